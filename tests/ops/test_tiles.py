"""The table of tiles: every op and every size finds a row on every architecture; and what the door to Triton refuses."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit4dit import ops
from dit4dit.errors import ConfigError
from dit4dit.ops import dispatch, launch, stand_in, tiles

OPS = [op for op in ops.names() if "triton" in ops.implementations(op)]


def test_the_table_has_the_ops_that_have_triton_kernels():
    wide = {"wide_attention"}  # of an implementation of self_attention that is not called triton
    assert set(tiles.table()) == set(OPS) | wide


@pytest.mark.parametrize("op", OPS)
def test_rows_are_complete(op):
    assert tiles.table()[op]
    for architecture, rows in tiles.table()[op].items():
        names = set(rows[0]["tile"])
        assert {"num_warps", "num_stages"} <= names
        for row in rows:
            assert set(row["tile"]) == names, (op, architecture)
            for name, value in row["tile"].items():
                assert name in ("SPAN", "num_stages") or value & (value - 1) == 0, (op, architecture, row)
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
    assert tiles.lookup("linear_gelu", "90", rows=588, columns=64, inner=64)["ROWS"] == 64


@pytest.mark.parametrize("op", OPS)
def test_explain_says_why_not_on_a_cpu(op):
    (found,) = ops.explain(op)
    one = dispatch.find(op)
    assert one.example is not None
    assert found.chosen in ("onednn", "parts", "torch")
    # an op that is made of others asks them before its kernel
    why = found.refused or {"triton": one.implementations["triton"].refuse(*one.example(torch.device("cpu")))}
    assert "TRITON_INTERPRET=1" in str(why["triton"])


@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_the_step_down_is_no_warning(op, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())  # whatever other tests made it say
    module = importlib.import_module(f"dit4dit.ops.{op}")
    module._op(*module._op.example(torch.device("cpu")))
    assert not [record for record in caplog.records if "'triton' refused" in record.getMessage()]


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


def test_a_part_of_a_large_buffer_is_within_reach_of_offsets():
    """Few elements far apart: a kernel's offsets have 31 bits."""
    with stand_in.without_data():
        for stride, fits in ((2**31 - 4, True), (2**31 - 3, False), (2**30 + 2, True)):
            x = torch.empty_strided((2, 4), (stride, 1), device="meta")
            reason = launch.refuse(strided=("x",), x=x)
            assert (reason is None) == fits, reason
        three = torch.empty_strided((3, 4), (2**30 + 2, 1), device="meta")
        assert "more elements than offsets of 31 bits reach" in str(launch.refuse(strided=("x",), x=three))
        one = torch.empty_strided((1, 4), (2**40, 1), device="meta")
        assert launch.refuse(strided=("x",), x=one) is None


EULER = {"upto": {}, "tile": {"BLOCK": 64, "num_warps": 2, "num_stages": 1}}


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    """use(data): DIT4DIT_TILES names a file with `data` (text as it is)."""

    def name(data: Any) -> Path:
        path = tmp_path / "own.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        monkeypatch.setenv(tiles.VARIABLE, str(path))
        tiles.forget()
        return path

    yield name
    monkeypatch.undo()
    tiles.forget()


def test_own_columns_replace_committed_ones_and_nothing_else(use) -> None:
    path = use({"note": "", "tiles": {"euler_step": {"90": [EULER]}}})
    assert tiles.lookup("euler_step", "90") == EULER["tile"]
    assert tiles.lookup("euler_step", "100") == EULER["tile"]  # the latest before it
    assert tiles.lookup("euler_step", "80") == tiles.committed()["euler_step"]["80"][0]["tile"]
    assert tiles.table()["linear_gelu"] == tiles.committed()["linear_gelu"]
    assert tiles.source("euler_step", "90") == f"{path} (DIT4DIT_TILES), column 90"
    assert tiles.source("euler_step", "86") == "tiles.json of dit4dit, column 80"
    assert "90" not in tiles.committed()["euler_step"]
    use({"tiles": {"euler_step": {"80": [EULER]}}})
    assert tiles.lookup("euler_step", "80") == EULER["tile"] != tiles.committed()["euler_step"]["80"][0]["tile"]


def test_explain_and_doctor_say_which_table(use, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit4dit import doctor

    assert ops.explain("euler_step")[0].tiles is None  # no Triton kernel would run
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.explain("euler_step")[0].tiles == "tiles.json of dit4dit, column 80"
    path = use({"tiles": {"euler_step": {"interpreter": [EULER]}}})
    assert ops.explain("euler_step")[0].tiles == f"{path} (DIT4DIT_TILES), column interpreter"
    assert f"{path} (DIT4DIT_TILES) for euler_step interpreter" in doctor._tiles().detail
    path = use("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ops.explain("euler_step")
    assert doctor._tiles().level == "problem"
    assert doctor._ops() == []


def row(**changes: Any) -> dict[str, Any]:
    return {"tiles": {"euler_step": {"90": [{**EULER, **changes}]}}}


MISTAKES = {
    "not JSON": ("{", "not valid JSON"),
    "no tiles": ({"note": ""}, "expected an object with 'tiles'"),
    "no such op": ({"tiles": {"linear_gelo": {}}}, "did you mean 'linear_gelu'"),
    "no columns": ({"tiles": {"adaln": []}}, "expected an object, architecture -> rows"),
    "architecture": ({"tiles": {"adaln": {"sm_90": []}}}, "compute capability without its dot"),
    "no rows": ({"tiles": {"adaln": {"90": []}}}, "expected a list of rows"),
    "row": ({"tiles": {"adaln": {"90": [{"tile": {}}]}}}, "adaln 90 row 1: expected 'upto' and 'tile'"),
    "limit": (row(upto={"rows": 3}), r"whole numbers by the names \(none\)"),
    "no last row": (
        {"tiles": {"adaln": {"90": [{"upto": {"width": 256}, "tile": {}}]}}},
        "limits in every row but the last",
    ),
    "two last rows": ({"tiles": {"euler_step": {"90": [EULER, EULER]}}}, "row 1: expected limits"),
    "entry": (row(tile={"BLOK": 64, "num_warps": 2, "num_stages": 1}), "tile: expected BLOCK, num_stages, num_warps"),
    "size": (row(tile={**EULER["tile"], "BLOCK": 48}), "BLOCK: expected a power of two, got 48"),
    "words": (row(tile={**EULER["tile"], "num_stages": "2"}), "num_stages: expected 1 or more, got '2'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_broken_table_is_a_clear_error(use, name: str) -> None:
    data, message = MISTAKES[name]
    path = use(data)
    with pytest.raises(ConfigError, match=message) as error:
        tiles.lookup("euler_step", "90")
    assert str(error.value).startswith(str(path))


def test_a_table_that_is_not_there(use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use("{}")
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "gone.json"))
    with pytest.raises(ConfigError, match="unset DIT4DIT_TILES"):
        tiles.table()
