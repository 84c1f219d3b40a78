"""One op, one word, five places: the source tree has every file of every op, and no file of an op that is none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dit4dit import ops

ROOT = Path(__file__).parents[2]
NOT_OPS = {
    "__init__",
    "arguments",
    "attention_libraries",
    "device_tables",
    "dispatch",
    "explanation",
    "launch",
    "native",
    "onednn",
    "programmatic",
    "sources",
    "stages",
    "stand_in",
    "tiles",
    "verdicts",
    "wide_attention",
}


@pytest.mark.parametrize("op", ops.names())
def test_five_places(op):
    assert (ROOT / "dit4dit" / "ops" / f"{op}.py").exists()
    # the fourth only where an implementation is a kernel of ours
    declared = {"triton": ".py", "cuda": ".cu"}
    for name, suffix in declared.items():
        assert (ROOT / "kernels" / f"{op}{suffix}").exists() == (name in ops.implementations(op)), (op, name)
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    assert (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").exists()


def test_no_op_is_left_out():
    files = {path.stem for path in (ROOT / "dit4dit" / "ops").glob("*.py")} - NOT_OPS
    assert files == set(ops.names())


def test_the_reference_comes_first():
    for op in ops.names():
        source = (ROOT / "dit4dit" / "ops" / f"{op}.py").read_text()
        first = next(line for line in source.splitlines() if line.startswith("def "))
        assert first.startswith("def reference("), op


def imported_ops(path: Path) -> set[str]:
    """Names below dit4dit.ops that a file imports or reads from it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dit4dit.ops":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dit4dit.ops."):
            found.add(node.module.split(".")[2])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
            found.add(node.attr)
    return found


def test_every_op_is_called_by_the_engine_or_the_model():
    """By one of their files, or by an op that is, as self_attention begins with qk_norm_rope."""
    files = [path for room in ("engine", "model") for path in (ROOT / "dit4dit" / room).rglob("*.py")]
    called: set[str] = set()
    while files:
        new = imported_ops(files.pop()) & set(ops.names()) - called
        called |= new
        files += [ROOT / "dit4dit" / "ops" / f"{op}.py" for op in new]
    assert called == set(ops.names())
