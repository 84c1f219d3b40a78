"""What a verdict hangs on beside its call: the driver's version, and a hash of the package's own files."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit4dit.ops import sources, tiles


@pytest.mark.parametrize("text", ["580.82.07", "580.95.05"])
def test_the_drivers_version_is_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    kind = "Open Kernel Module for x86_64" if text.endswith("05") else "x86_64 Kernel Module"
    (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX {kind}  {text}  Release\nGCC version: gcc 13.3.0\n")
    monkeypatch.setattr(sources, "DRIVER", tmp_path / "version")
    assert sources.driver.__wrapped__() == text


HASHES = """
import json, os, sys
from pathlib import Path
import dit4dit
from dit4dit.ops import sources

inside = Path(dit4dit.__file__).parent
assert inside.is_relative_to(Path.cwd())
compiled = next(inside.glob("_C*.so"))

def now():
    sources._package.cache_clear()
    return sources.kernels_hash()

found = {"as it is": now()}
files = ("kernels/adaln.py", "ops/adaln.py", "ops/aot/loader.py", "ops/tiles.json", compiled.name)
files += ("engine/action_ode/plan.py", "model/vae.py")
for file in files if len(sys.argv) > 1 else ():
    content = (inside / file).read_bytes()
    (inside / file).write_bytes(content + b" ")
    found[file] = now()
    (inside / file).write_bytes(content)
if found.keys() - {"as it is"}:
    compiled.rename(compiled.with_suffix(".old"))
    found["no module"] = now()
    compiled.with_suffix(".old").rename(compiled)
    (inside / "ops" / "adaln.py").rename(inside / "ops" / "adaln2.py")
    found["another name"] = now()
    (inside / "ops" / "adaln2.py").rename(inside / "ops" / "adaln.py")
    found["once more"] = now()
print(json.dumps(found))
"""


def hashes(package: Path, *args: str, **environment: str) -> dict[str, str]:
    """In a process of its own whose dit4dit is in this folder."""
    env = {**os.environ, "PYTHONPATH": str(package), **environment}
    command = [sys.executable, "-c", HASHES, *args]
    done = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """copy(name): the installed package again, in a folder of this name."""

    def make(name: str) -> Path:
        target = tmp_path / name / "dit4dit"
        package, kernels = (importlib.util.find_spec(name) for name in ("dit4dit", "dit4dit.kernels"))
        for folder in package.submodule_search_locations:
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "cubins"), dirs_exist_ok=True)
        for folder in kernels.submodule_search_locations:
            shutil.copytree(
                folder, target / "kernels", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        compiled = Path(importlib.util.find_spec("dit4dit._C").origin)
        shutil.copy(compiled, target / compiled.name)
        return target.parent

    return make


def test_the_hash_is_of_the_files_and_not_of_where_they_are(copy: Callable[[str], Path]) -> None:
    one, two = copy("one"), copy("two")
    for file in two.rglob("*.py"):
        os.utime(file, (1, 1))
    (two / "dit4dit" / "ops" / "__pycache__").mkdir(exist_ok=True)
    (two / "dit4dit" / "ops" / "__pycache__" / "adaln.cpython-311.pyc").write_bytes(b"x")
    found = hashes(two, "and changed", HOME="/elsewhere", PYTHONHASHSEED="7")
    before = found.pop("as it is")
    assert {"as it is": before} == hashes(one)
    assert found.pop("once more") == before
    assert len({before, *found.values()}) == 1 + len(found) == 10, found


def test_the_hash_is_of_every_file_of_the_package_that_an_op_takes_something_from() -> None:
    known = {name for name, _ in sources._files()}
    root = Path(sources.__file__).parents[1]
    found = set()
    for path in (root / "ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("dit4dit.model", "dit4dit.engine")):
                modules = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                files = [f"{module.removeprefix('dit4dit.').replace('.', '/')}.py" for module in modules]
                found |= {file for file in files if (root / file).is_file()}
    assert found, "some references are the model's"
    assert found <= known


def test_the_hash_sees_what_is_in_a_table_of_tiles_and_not_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_own(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / name))
        return sources.kernels_hash()

    before = sources.kernels_hash()
    one, other, again = with_own("own.json", "{}"), with_own("own.json", "{} "), with_own("another.json", "{}")
    assert len({before, one, other}) == 3
    assert one == again
