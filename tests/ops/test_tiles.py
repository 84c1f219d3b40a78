"""The table of tiles: every op and every size finds a row on every architecture; and what the door to Triton refuses."""

from __future__ import annotations

import importlib

import pytest
import torch

from dit4dit import ops
from dit4dit.ops import launch, tiles

OPS = [op for op in ops.names() if "triton" in ops.implementations(op)]


def test_the_table_has_the_ops_that_have_triton_kernels():
    assert set(tiles.table()) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_rows_are_complete(op):
    for architecture, rows in tiles.table()[op].items():
        names = set(rows[0]["tile"])
        assert {"num_warps", "num_stages"} <= names
        for row in rows:
            assert set(row["tile"]) == names, (op, architecture)
            for name, value in row["tile"].items():
                assert name in ("SPLIT", "SPAN", "num_stages") or value & (value - 1) == 0, (op, architecture, row)
        assert rows[-1]["upto"] == {}
        assert all(row["upto"] for row in rows[:-1]), f"{op} {architecture}: rows after the one without limits"


@pytest.mark.parametrize(
    ("architecture", "column"),
    [("90", "90"), ("86", "80"), ("75", "80"), ("103", "100"), ("121", "120"), ("interpreter", "interpreter")],
)
def test_the_nearest_architecture_serves(architecture, column):
    assert tiles.nearest("linear_gelu", architecture) == column


def test_where_the_interpreter_has_no_column_it_takes_that_of_hopper():
    assert tiles.nearest("euler_step", "interpreter") == "80"  # one column for all


def test_the_first_row_that_fits_is_taken_and_a_copy_is_given():
    few = tiles.lookup("linear_gelu", "90", rows=9, columns=64, inner=64)
    assert few["ROWS"] == 16
    few.clear()
    assert tiles.lookup("linear_gelu", "90", rows=9, columns=64, inner=64)["ROWS"] == 16
    assert tiles.lookup("linear_gelu", "90", rows=588, columns=64, inner=64)["ROWS"] == 128


@pytest.mark.parametrize("op", OPS)
def test_explain_says_why_not_on_a_cpu(op):
    (found,) = ops.explain(op)
    assert found.chosen == "torch"
    assert "TRITON_INTERPRET=1" in found.refused["triton"]


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_the_step_down_is_no_warning(op, caplog):
    module = importlib.import_module(f"dit4dit.ops.{op}")
    module._op(*module._op.example(torch.device("cpu")))
    assert not [record for record in caplog.records if "triton" in record.getMessage()]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 3).T, "x is not contiguous"),
        (torch.zeros(2, dtype=torch.float64), "x is torch.float64"),
        (torch.zeros(2, requires_grad=True), "x needs a gradient"),
        (torch.zeros(2, device="meta"), "x is on meta"),
        (torch.zeros(1).expand(2**31), "x is not contiguous"),
    ],
)
def test_what_triton_refuses(monkeypatch, tensor, reason):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.refuse(x=torch.zeros(2)) is None
    assert launch.refuse(x=tensor) == reason
    reason = launch.refuse(strided=("x",), x=torch.zeros(2, 3).T)
    assert reason == "x: its last dimension has stride 3, not 1"
