"""C++ programs that use the header of the action stream, and names for segments in shared memory."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "cpp"
INCLUDE = Path(__file__).parents[2] / "csrc" / "include"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
SHARED_MEMORY = Path("/dev/shm")

Build = Callable[..., Path]


def compile_program(name: str, program: Path, *flags: str, include: Path = INCLUDE) -> None:
    """tests/control/cpp/`name`.cpp, with the headers of `include` as a user would include them: <dit4dit/writer.h>."""
    command = ["g++", *FLAGS, *flags, "-I", include, PROGRAMS / f"{name}.cpp", "-o", program, "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """cpp(name, *flags, include=INCLUDE) -> the program of tests/control/cpp/name.cpp, built once for each set of flags.

    Skips where there is no g++, and where a program with the flags' -fsanitize does not run (no runtime library for it, or
    addresses that it cannot cope with).
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build C++ programs with")
    folder = tmp_path_factory.mktemp("cpp")
    built: dict[tuple[str, ...], Path] = {}

    def build(name: str, *flags: str, include: Path = INCLUDE) -> Path:
        key = (name, *flags, str(include))
        if key not in built:
            for flag in flags:
                if flag.startswith("-fsanitize="):
                    skip_without_sanitizer(flag, folder)
            program = folder / f"{name}-{len(built)}"
            compile_program(name, program, *flags, include=include)
            built[key] = program
        return built[key]

    return build


def skip_without_sanitizer(flag: str, folder: Path) -> None:
    source, program = folder / "sanitized.cpp", folder / "sanitized"
    source.write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    made = subprocess.run(["g++", flag, source, "-o", program, "-pthread"], capture_output=True, check=False)
    if made.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
        pytest.skip(f"g++ has no working {flag}")


@pytest.fixture
def faulty_include(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """faulty_include(header, right, wrong) -> a copy of the headers in which `right` is `wrong`."""

    def plant(header: str, right: str, wrong: str) -> Path:
        folder = Path(shutil.copytree(INCLUDE, tmp_path / "include", dirs_exist_ok=True))
        text = (INCLUDE / "dit4dit" / header).read_text()
        assert right in text, f"{header} has no {right!r}"
        (folder / "dit4dit" / header).write_text(text.replace(right, wrong))
        return folder

    return plant


_numbers = itertools.count()


@pytest.fixture
def segment_name() -> Generator[str, None, None]:
    """A name for a segment that nobody else has; what is there afterwards is removed."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        pytest.skip(f"no {SHARED_MEMORY}")
    name = f"/dit4dit.test.{os.getpid()}.{next(_numbers)}"
    yield name
    path = SHARED_MEMORY / name[1:]
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
