"""Where the C++ side of the action stream is installed.

python -m dit4dit.control --cmake-dir       cmake -S . -B build -Ddit4dit_DIR="$(python -m dit4dit.control --cmake-dir)"
python -m dit4dit.control --include-dir     g++ -std=c++17 -I"$(python -m dit4dit.control --include-dir)" controller.cpp -pthread
"""

from __future__ import annotations

import argparse
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

FILES = {"cmake_dir": ("cmake", "dit4ditConfig.cmake"), "include_dir": ("include", "dit4dit/action_stream.h")}
"""Option -> folder beside the compiled module, and the file that it must have."""


def place(option: str) -> Path:
    """The installed folder that the option asks for.

    Raises:
        FileNotFoundError: it is not there; the message says what to do.
    """
    folder, wanted = FILES[option]
    # beside the compiled module: of an editable install the Python files lie elsewhere
    module = find_spec("dit4dit._C") or _installed()
    if module is None or module.origin is None:
        raise FileNotFoundError(
            f"{Path(__file__).parents[1]}: no C++ headers here: this looks like the source tree, which Python takes before the "
            "installed package when it starts there; start elsewhere, or pip install -e ."
        )
    found = Path(module.origin).resolve().parent / folder
    if not (found / wanted).is_file():
        raise FileNotFoundError(
            f"{found}: no {wanted}; the installation is incomplete: pip install --force-reinstall dit4dit"
        )
    return found


def _installed() -> ModuleSpec | None:
    """The compiled module of the package that comes later in Python's path than the source tree, in which Python was started."""
    for folder in sys.path:
        package = PathFinder.find_spec("dit4dit", [folder])
        module = package and PathFinder.find_spec("dit4dit._C", package.submodule_search_locations)
        if module:
            return module
    return None


def main() -> int:
    """Print one path and nothing else; exit code 1 where there is none."""
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m dit4dit.control", description=__doc__, formatter_class=lines)
    asked = parser.add_mutually_exclusive_group(required=True)
    for option, what in (("cmake_dir", "find_package(dit4dit): its dit4dit_DIR"), ("include_dir", "-I of a compiler")):
        asked.add_argument(
            f"--{option.replace('_', '-')}", dest="option", action="store_const", const=option, help=what
        )
    option = parser.parse_args().option
    try:
        print(place(option))
    except FileNotFoundError as error:
        sys.stderr.write(f"python -m dit4dit.control: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
