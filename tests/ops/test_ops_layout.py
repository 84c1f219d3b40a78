"""One op, one word, five places: the source tree has every file of every op, and no file of an op that is none."""

from __future__ import annotations

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
    "launch",
    "measured",
    "native",
    "onednn",
    "tiles",
}


@pytest.mark.parametrize("op", ops.names())
def test_five_places(op):
    assert (ROOT / "dit4dit" / "ops" / f"{op}.py").exists()
    assert any((ROOT / "kernels" / f"{op}{suffix}").exists() for suffix in (".py", ".cu"))
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
