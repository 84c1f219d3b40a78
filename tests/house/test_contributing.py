"""CONTRIBUTING.md: its table of rooms is the order that is tested, and its worked examples work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rooms import ORDER, ROOT

import dit4dit
from dit4dit import ops
from dit4dit.commands.tune import load_plugin
from dit4dit.ops import dispatch

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(heading: str) -> dict[str, str]:
    """The code of one chapter, by the path that its first line names."""
    chapter = re.split(r"^## ", TEXT.split(f"## {heading}\n")[1], flags=re.M)[0]
    return dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", chapter, flags=re.M | re.S))


def copy_of_the_package(folder: Path, code: dict[str, str]) -> None:
    """The installed package with these files added, and their tests beside it."""
    here = folder / "dit4dit"
    shutil.copytree(Path(dit4dit.__file__).parent, here, ignore=shutil.ignore_patterns("__pycache__", "tabletop_*"))
    for name, text in code.items():
        inside = name.startswith(("kernels/", "benchmarks/"))
        path = here / name if inside else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_table_of_rooms_is_the_order_that_is_tested() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", TEXT.split("## The house\n")[1], flags=re.M)
    assert [tuple(re.findall(r"\w+", row)) for row in rows] == [*ORDER]


@pytest.mark.parametrize("heading", ["Add a robot", "Add an op", "An implementation of your own", "Add a benchmark"])
def test_every_example_passes_lint(heading: str) -> None:
    """But for the order of imports, which depends on the files being there."""
    for name, text in blocks(heading).items():
        for words in (("check", "-q", "--ignore", "I001"), ("format", "-q", "--check")):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *words, "--stdin-filename", name, "-"],
                input=text, cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, (name, done.stdout, done.stderr)


def test_the_robot(tmp_path: Path) -> None:
    code = blocks("Add a robot")
    assert len(code) == 2
    copy_of_the_package(tmp_path, code)
    tests = next(name for name in code if name.startswith("tests/"))
    assert run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests).strip().startswith("..")


@pytest.mark.kernels
@pytest.mark.usefixtures("interprets")
def test_the_op(tmp_path: Path) -> None:
    code = blocks("Add an op")
    assert len(code) == 4
    copy_of_the_package(tmp_path, code)
    (op,) = (Path(name).stem for name in code if name.startswith("dit4dit/"))
    table = tmp_path / "dit4dit" / "ops" / "tiles.json"
    (row,) = re.findall(r"^```json\n(.*?)^```", TEXT, flags=re.M | re.S)
    tiles = json.loads(table.read_text())
    tiles["tiles"] |= json.loads("{" + row + "}")
    table.write_text(json.dumps(tiles))
    with (tmp_path / "dit4dit" / "ops" / "__init__.py").open("a") as file:
        file.write(f"from dit4dit.ops.{op} import {op}\n")
    for name in ("pyproject.toml", "tests/ops/conftest.py", "tests/ops/interpreter.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tests" / "helpers", tmp_path / "tests" / "helpers")
    said = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", f"tests/ops/test_{op}.py")
    assert "4 passed" in said
    assert "usage:" in run(tmp_path, "-m", f"dit4dit.benchmarks.ops.bench_{op}", "--help")


def test_the_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, text),) = blocks("An implementation of your own").items()
    (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    linear = dispatch.find("linear")
    monkeypatch.setattr(linear, "implementations", dict(linear.implementations))
    load_plugin("my_products")
    monkeypatch.delitem(sys.modules, "my_products")
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
    for given in (None, bias):
        ours = ops.linear(x, weight, given, backend="mine")
        assert torch.allclose(ours, ops.linear(x, weight, given, backend="torch"), atol=1e-5)
    assert "mine" in ops.implementations("linear")
    assert ops.explain("linear")[0].chosen != "mine", "only where a verdict names it"


def test_the_benchmark(tmp_path: Path) -> None:
    code = blocks("Add a benchmark")
    copy_of_the_package(tmp_path, code)
    (name,) = code
    run(tmp_path, "-m", "dit4dit." + name.removesuffix(".py").replace("/", "."), str(tmp_path / "out.json"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["complete"]
    assert [row["size"] for row in result["rows"]] == [64, 1024]
    assert result["machine"]["cpu"]
