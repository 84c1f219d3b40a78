"""The search for tiles, with a made-up clock: no GPU is needed to see that it finds the best and writes it down."""

from __future__ import annotations

import json

import pytest
from dit4dit.benchmarks import tune
from dit4dit.benchmarks.kernels import calls

from dit4dit.ops import tiles


def wanted(tile: dict[str, int]) -> float:
    """Seconds, least at KEYS 32 and two warps."""
    return 1 + abs(tile["KEYS"] - 32) + abs(tile["num_warps"] - 2)


def test_finds_the_best_tile_of_every_row_that_is_called():
    found = [(op, args) for _, op, args in calls() if op == "cross_attention"]
    tried = []

    def measure(call):
        tried.append(dict(tiles._trials["cross_attention"].tile))
        return None if tried[-1]["ROWS"] == 16 else wanted(tried[-1])

    before = tiles.table()["cross_attention"]["90"]
    table = tune.tune("90", found, measure, rounds=5)
    called = {tune.row_of(call, "90") for call in found}
    assert len(called) == len(before) - 1  # no call of a single sample takes the row for larger batches
    for i, row in enumerate(table["cross_attention"]["90"]):
        assert row["upto"] == before[i]["upto"]
        if i in called:
            assert (row["tile"]["KEYS"], row["tile"]["num_warps"]) == (32, 2)
            assert row["tile"]["ROWS"] != 16  # what cannot be measured is not chosen
        else:
            assert row == before[i]
    assert table["linear_gelu"] == tiles.table()["linear_gelu"]
    assert "cross_attention" not in tiles._trials


def test_a_new_architecture_gets_a_column_of_its_own():
    found = [(op, args) for _, op, args in calls() if op == "euler_step"]
    table = tune.tune("103", found, lambda call: 1.0)
    assert table["euler_step"]["103"] == tiles.table()["euler_step"]["80"]
    assert "103" not in tiles.table()["euler_step"]


def test_writes_the_committed_layout(tmp_path):
    committed = json.loads(tiles.TABLE.read_text())
    tune.write(committed["tiles"], committed["note"], tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles.TABLE.read_text()


def test_needs_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["tune", "--out", str(tmp_path / "x.json")])
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main()
    assert "no GPU is visible" in capsys.readouterr().err
