"""The search for tiles, with a made-up clock: no GPU is needed to see that it finds the best and writes it down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit4dit.benchmarks import recording, tiles_search
from dit4dit.benchmarks.op_bench import cases
from dit4dit.benchmarks.recording import Recording

from dit4dit.cli import main
from dit4dit.errors import BackendError, ConfigError, InputError
from dit4dit.ops import tiles


def wanted(tile: dict[str, int]) -> float:
    """Seconds, least at KEYS 32 and two warps."""
    return 1 + abs(tile["KEYS"] - 32) + abs(tile["num_warps"] - 2)


def test_finds_the_best_tile_of_every_row_that_is_called() -> None:
    found = cases(["cross_attention"])
    tried = []

    def measure(case):
        tried.append(dict(tiles._trials["cross_attention"].tile))
        return "too small" if tried[-1]["ROWS"] == 16 else wanted(tried[-1])

    before = tiles.table()["cross_attention"]["90"]
    search = tiles_search.search_tiles("90", found, measure, rounds=5, record=Recording(None))
    called = {tiles_search.row_of(call, "90") for call in found}
    assert len(called) == len(before) - 1  # no call of a single sample takes the row for larger batches
    for i, row in enumerate(search.columns["cross_attention"]):
        assert row["upto"] == before[i]["upto"]
        if i in called:
            assert (row["tile"]["KEYS"], row["tile"]["num_warps"]) == (32, 2)
            assert row["tile"]["ROWS"] != 16  # what cannot be measured is not chosen
        else:
            assert row == before[i]
    assert set(search.columns) == {"cross_attention"}
    assert "cross_attention" not in tiles._trials
    assert search.left == []
    refused = [entry for entry in search.timings if entry["tile"]["ROWS"] == 16]
    assert refused
    assert all(entry["refused"] == "too small" and entry["ms"] is None for entry in refused)
    for entry in search.timings:
        if entry not in refused:
            assert entry["ms"] == [1e3 * wanted(entry["tile"])] * len(entry["cases"])
    assert len(search.best) == len(called)
    shown = tiles_search.show(search)
    assert "KEYS=32" in shown
    assert "before did not work" in shown


def test_a_new_architecture_gets_a_column_of_its_own() -> None:
    search = tiles_search.search_tiles("103", cases(["euler_step"]), lambda case: 1.0, record=Recording(None))
    assert search.columns["euler_step"] == tiles.table()["euler_step"]["80"]
    assert "103" not in tiles.table()["euler_step"]


def test_ends_in_time_and_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in (tiles_search, recording):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(case) -> float:
        now[0] += 0.03
        return 1.0

    search = tiles_search.search_tiles("90", cases(["adaln", "self_attention"]), slow, record=Recording(None, 0.25))
    # a tile that has been begun in time is measured on every call of its row
    assert now[0] <= 0.25 + 0.03 * len(search.timings[-1]["cases"])
    rows = {(entry["op"], entry["row"]) for entry in search.timings}
    assert len(rows) == len(search.best)
    assert len(search.best) + len(search.left) == 6
    late = Recording(None, 0.25)
    now[0] += 0.25
    none = tiles_search.search_tiles("90", cases(["adaln"]), slow, record=late)
    assert none.left
    assert (none.columns, none.timings, none.best) == ({}, [], [])
    assert f"no time was left for: {', '.join(none.left)}" in tiles_search.show(none)


def test_what_is_found_is_kept_row_by_row_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiles_search.Files(tmp_path / "own.json", tmp_path / "timings.json")
    files.check()
    lengths = []

    def write(search: tiles_search.Search) -> None:
        files.write(search)
        lengths.append(len(json.loads(files.timings.read_text())["best"]))

    def measure(case) -> float:
        return wanted(tiles._trials[case[0]].tile)

    with Recording(files.timings) as record:
        tiles_search.search_tiles("90", cases(["cross_attention"]), measure, record=record, write=write)
    assert lengths == list(range(len(lengths))), "a row is in the file before the next one begins"
    assert len(lengths) > 1
    assert len(json.loads(files.timings.read_text())["best"]) == len(lengths)
    tiles_search.search_tiles("100", cases(["euler_step"]), lambda case: 1.0, record=Recording(None), write=files.write)
    assert set(tiles.read_own(files.out)) == {"cross_attention", "euler_step"}  # the first search's stay
    assert json.loads(files.timings.read_text())["machine"]["torch"] == torch.__version__
    monkeypatch.setenv(tiles.VARIABLE, str(files.out))
    tiles.forget()
    try:
        found = tiles.lookup("cross_attention", "90", length=588, dim=128, heads=16)
        assert (found["KEYS"], found["num_warps"]) == (32, 2)
    finally:
        monkeypatch.undo()
        tiles.forget()


def test_a_whole_table_can_replace_the_committed_one(tmp_path: Path) -> None:
    files = tiles_search.Files(tmp_path / "tiles.json", tmp_path / "timings.json", whole=True)
    tiles_search.search_tiles("103", cases(["euler_step"]), lambda case: 1.0, record=Recording(None), write=files.write)
    data = json.loads(files.out.read_text())
    assert data["tiles"]["euler_step"].pop("103")
    assert data["tiles"] == tiles.committed()
    assert "Column 103 measured on" in data["note"]


def test_every_tile_that_is_tried_can_be_read_back() -> None:
    """What a search on a GPU may find best is a table that the package takes."""
    for op, columns in tiles.committed().items():
        for architecture, rows in columns.items():
            for row in rows:
                for tile in tiles_search.candidates(op, row["tile"]):
                    tiles._check_column(op, op, architecture, [{"upto": {}, "tile": tile}])


def test_writes_the_committed_layout(tmp_path: Path) -> None:
    committed = json.loads(tiles.TABLE.read_text())
    tiles_search.write(committed["tiles"], committed["note"], tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles.TABLE.read_text()


def test_refuses_to_spoil_another_file(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="expected an object with 'tiles'"):
        tiles_search.Files(other, tmp_path / "t.json").check()
    with pytest.raises(InputError, match="in a folder that exists"):
        tiles_search.Files(tmp_path / "gone" / "x.json", tmp_path / "t.json").check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must be absent")
def test_needs_a_gpu(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tune", "--tiles", "1", "--out", str(tmp_path / "x.json")])
    assert end.value.code == 2
    assert "tiles are measured on the GPU that they are for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_are_checked() -> None:
    with pytest.raises(InputError, match="did you mean 'linear_gelu'"):
        tiles_search.check(["linear_gel"], torch.device("cpu"))
    with pytest.raises(InputError, match="no op with tiles"):
        tiles_search.check(["preprocess"], torch.device("cpu"))
    with pytest.raises(BackendError, match="run it on that machine"):
        tiles_search.check([], torch.device("cpu"))


SCRIPT = """
import torch
from dit4dit.benchmarks import op_bench, tiles_search
from dit4dit.ops import tiles
(case, *_) = op_bench.cases(["euler_step"])
case = (*case[:2], op_bench.fill(case[2], "cpu", torch.float32, torch.Generator()))
with torch.no_grad():
    for size in (64, 512):
        with tiles.trying("euler_step", {"BLOCK": size, "num_warps": 1, "num_stages": 1}):
            print(tiles_search.measured(case, samples=2) > 0)
    real = tiles_search.reference_of
    tiles_search.reference_of = lambda op: lambda *args: real(op)(*args) + 1
    print(tiles_search.measured(case, samples=2))
"""


@pytest.mark.kernels
@pytest.mark.usefixtures("interprets")
def test_a_tile_is_measured_through_its_kernel(tmp_path: Path) -> None:
    """Under the interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, wrong = done.stdout.splitlines()
    assert (first, second) == ("True", "True")
    assert wrong.startswith("disagrees with the reference: result 0: expected at most")


@pytest.mark.gpu
def test_searches_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    with pytest.raises(SystemExit) as end:
        main(
            [
                "tune",
                "--tiles",
                "20",
                "--ops",
                "euler_step",
                "adaln",
                "--batch",
                "1",
                "--samples",
                "5",
                "--out",
                str(out),
            ]
        )
    assert end.value.code == 0
    assert set(tiles.read_own(out)) == {"euler_step", "adaln"}
    timings = json.loads((tmp_path / "tiles.timings.json").read_text())["timings"]
    assert all(entry["ms"] for entry in timings if entry["refused"] is None)
