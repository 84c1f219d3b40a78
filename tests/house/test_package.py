"""The package as installed: what importing it costs, what it says about itself, what is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, files, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dit4dit
from dit4dit import _C

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "transformers", "diffusers", "triton", "matplotlib", "importlib.metadata")


def run(script: str, tmp_path: Path) -> str:
    """In a process of its own, away from the source tree."""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_brings_nothing_heavy(tmp_path):
    """Quick is counted, in modules and in calls of Python functions: seconds depend on what else the machine does."""
    script = """
import sys
before, calls = set(sys.modules), 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
import dit4dit
sys.setprofile(None)
print(calls)
print(*sorted(set(sys.modules) - before))
"""
    calls, names = run(script, tmp_path).splitlines()
    loaded = set(names.split())
    assert "dit4dit" in loaded
    assert not loaded & set(HEAVY)
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"dit4dit"}
    assert len(loaded) <= 60, "30 on Python 3.11"
    assert int(calls) <= 20_000, "4663 on Python 3.11, most of them in the standard library's own modules"


def test_the_compiled_module_needs_no_torch(tmp_path):
    loaded = run("import sys; from dit4dit import _C; print(*sys.modules)", tmp_path).split()
    assert "dit4dit._C" in loaded
    assert not set(loaded) & {"torch", "numpy"}


def test_importing_the_data_package_brings_nothing_heavy(tmp_path):
    loaded = run("import sys, dit4dit.data; print(*sys.modules)", tmp_path).split()
    assert not set(loaded) & {*HEAVY, "pyarrow", "av"}


def test_the_data_packages_names():
    from dit4dit import data

    for name in data.__all__:
        assert getattr(data, name).__name__ == name
        assert getattr(data, name).__module__.startswith("dit4dit.data.")
        assert name in dir(data)
    with pytest.raises(AttributeError, match="no attribute 'Wrtier'"):
        data.Wrtier  # noqa: B018


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the source tree")
def test_what_the_readme_imports_is_there():
    """Every import of its Python blocks, and the names that it says `dit4dit.data` has."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"(from|import) ", line)]
    assert len(lines) >= 3
    for line in lines:
        # the one file that a robot's computer gets, on its own
        exec(line.replace("from client import", "from dit4dit.serving.client import"), {})
    (listed,) = re.findall(r"((?:`\w+`(?:, | and )?)+) \(`dit4dit\.data`\)", readme)
    from dit4dit import data

    names = re.findall(r"`(\w+)`", listed)
    assert names == ["Mixture", "Window"]
    assert set(names) <= set(data.__all__)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Polizy'"):
        dit4dit.Polizy  # noqa: B018
    assert {"Policy", "Observation", "ActionChunk", "Noise"} <= set(dir(dit4dit))


@pytest.mark.parametrize("name", ["Policy", "Observation", "ActionChunk", "Noise"])
def test_public_names_load(name):
    assert getattr(dit4dit, name).__name__ == name


def test_one_version():
    assert dit4dit.__version__ == version("dit4dit")


def test_what_the_build_says_about_itself():
    info = _C.build_info()
    assert set(info) == {"compiler", "cuda", "architectures"}
    assert info["compiler"]
    assert info["architectures"] == _C.cuda_architectures
    assert isinstance(_C.cuda_architectures, tuple)
    assert bool(info["cuda"]) == bool(_C.cuda_architectures)
    assert hasattr(_C, "preprocess_cuda") == bool(_C.cuda_architectures)


def test_no_extra_brings_the_package_by_name():
    """As dit4dit-cu12 it has another name (release.yml), and two of the same package would overwrite each other."""
    wanted = {}
    for requirement in map(Requirement, requires("dit4dit") or []):
        assert not requirement.name.startswith("dit4dit")
        for extra in ("test", "train", "dev"):
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                wanted.setdefault(extra, set()).add(f"{requirement.name}{requirement.specifier}")
    assert wanted["test"] | wanted["train"] < wanted["dev"]


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="dit4dit")
    assert command.value == "dit4dit.cli:main"


def installed() -> set[str]:
    found = files("dit4dit")
    assert found is not None
    return {str(path) for path in found}


@pytest.mark.skipif(
    Path(dit4dit.__file__).is_relative_to(ROOT) and not Path(dit4dit.__file__).is_relative_to(ROOT / ".venv"),
    reason="an editable install holds links, not files",
)
def test_what_is_installed():
    names = installed()
    written = [file for file in (ROOT / "dit4dit").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert not [name for name in (str(file.relative_to(ROOT)) for file in written) if name not in names]
    assert {"dit4dit/robots/robots.yaml", "dit4dit/data/mixtures.yaml"} <= names
    assert "dit4dit/benchmarks/harness.py" in names
    assert "dit4dit/benchmarks/ops/bench_preprocess.py" in names
    # these would shadow the Hugging Face package `kernels` where the source tree is on the path
    assert not {"dit4dit/kernels/__init__.py", "dit4dit/benchmarks/__init__.py"} & names
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp"))]
    # for C++ users, and no other header
    headers = {f"dit4dit/include/dit4dit/{file.name}" for file in (ROOT / "csrc" / "include" / "dit4dit").iterdir()}
    assert "dit4dit/include/dit4dit/action_stream.h" in headers
    assert {name for name in names if name.endswith(".h")} == headers
    assert {name for name in names if name.endswith(".cmake")} == {
        "dit4dit/cmake/dit4ditConfig.cmake",
        "dit4dit/cmake/dit4ditConfigVersion.cmake",
    }
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "benchmarks/", "csrc/"))]


def test_no_package_at_the_root_of_the_source_shadows_another():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "benchmarks" / "__init__.py").exists()


def test_a_copy_without_the_compiled_module_says_what_to_do(tmp_path):
    source = Path(dit4dit.__file__).parent
    copy = tmp_path / "dit4dit"
    copy.mkdir()
    for file in source.glob("*.py"):
        (copy / file.name).write_bytes(file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-S", "-c", "from dit4dit import _C"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "start elsewhere, or pip install -e ." in done.stderr.splitlines()[-1]
