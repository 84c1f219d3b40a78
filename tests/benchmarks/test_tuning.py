"""`tune` among implementations with every kind of fault: each is found and charged, none is chosen, and the queue is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks.recording import TERMINATED
from dit4dit.benchmarks.tuning_journal import JOURNAL, Journal, locked
from tuning_calls import CPU, GELU, HUGE, NORM, QUICK, STEP, clean, folder, product, tuned, units
from waiting import WAIT, eventually

from dit4dit.errors import BackendError, InputError
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import find
from dit4dit.ops.verdicts import Verdict


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from clean(tmp_path, monkeypatch)


REASONS = {
    "segfaults": "crashed: its process was ended by SIGSEGV",
    "hangs": "hung: it was not done after 3 s",
    "exits": "ended its process with exit code 0",
    "raises": "raised RuntimeError: no tile fits and a second line",
    "raises_exit": "raised SystemExit: 0",
    "is_wrong_on_the_third_call": "call 3 gave other bits than the first",
    "is_wrong": "disagrees with the reference: result 0: expected at most",
    "has_another_shape": "disagrees with the reference: result 0: expected [1, 5, 16]",
    "returns_no_tensor": "its result is a NoneType, the reference's a Tensor",
    "writes_behind": "call 1: 4 bytes behind a tensor (float32 [1, 5, 16]) were written",
    "writes_before": "call 1: 4 bytes before a tensor (float32 [1, 5, 16]) were written",
    "changes_input": "call 1 changed argument 0 (float32 [1, 5, 64])",
    "changes_weight": "call 1 changed argument 1 (float32 [16, 64])",
    "leaves_one_unwritten": "disagrees with the reference: result 0: infinite or NaN where the truth is not",
    "adds_to_what_is_there": "call 2 gave other bits than the first",
    "differs": "call 2 gave other bits than the first",
    "remembers": "disagrees with the reference: with other values in its first tensor",
}


@pytest.mark.slow
@pytest.mark.serial
def test_every_fault_is_charged_and_the_queue_is_finished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    todo = [product(8), product(16), product(24), units(8192), units(2048), HUGE]
    begin = time.monotonic()
    result = tuned(todo, tmp_path / "r.json")
    taken, most = time.monotonic() - begin, result["children"] * 20 + len(todo) * QUICK.timing
    assert taken < most, "bounded by its limits, whatever implementations do"
    assert json.loads((tmp_path / "r.json").read_text())["calls"] == result["calls"]
    assert "garbage" not in "".join(capfd.readouterr())
    rows = {row["call"].split(", ")[1]: row for row in result["calls"]}
    assert [(row["op"], row["call"]) for row in result["calls"]] == [each.key for each in todo]
    refused = rows["float32[8x64]"]["refused"] | {
        n: r for n, r in rows["float32[16x64]"]["refused"].items() if r != "not for this shape"
    }
    charged = {
        name: next((r for r in [refused.get(name, "")] if r.startswith(REASONS[name])), None) for name in REASONS
    }
    assert None not in charged.values(), refused
    # no more than it has to: one child for each crash and each write outside of memory that was asked for
    assert result["children"] == 1 + 3 + 2 + 1, "and one for what cannot be made: it may be because of those before"
    for row in result["calls"][:3]:
        assert row["default"] == "onednn"
        assert row["chosen"] in {"onednn", "torch", "prints"}
        assert {"onednn", "torch"} <= set(row["ms"]) <= {"onednn", "torch", "prints"}
        assert row["ratio"] == row["ms"]["onednn"] / row["ms"][row["chosen"]]
    assert rows["float32[8x64]"]["failed"] == ["segfaults", "hangs", "exits"]
    assert rows["float32[24x64]"]["failed"] == []
    assert "prints" in rows["float32[24x64]"]["ms"], "what it prints is no fault"
    check_the_right_ones(rows)
    assert rows["float32[16777216x16777216]"]["chosen"] is None
    assert "its arguments or its reference cannot be made here" in rows["float32[16777216x16777216]"]["why"]


def check_the_right_ones(rows: dict[str, dict[str, Any]]) -> None:
    """What is faster on one shape is chosen there, what is slower nowhere; and it is all in the verdicts."""
    quick, other = rows["float64[5x8192]"], rows["float64[5x2048]"]
    assert (quick["default"], quick["chosen"], other["chosen"]) == ("torch", "by_shape", "torch")
    assert quick["ratio"] > 1.02
    assert "'by_shape': " in quick["why"]
    assert "is asked for" not in quick["why"]
    assert set(other["ms"]) == {"torch", "by_shape", "row_by_row"}
    found = {(v.op, v.call): v for v in verdicts.known(CPU)}
    assert len(found) == 5
    for row in rows.values():
        if row["chosen"] is None:
            assert row["verdict"] is None
            continue
        verdict = found[row["op"], row["call"]]
        assert row["verdict"] == verdict.file
        for name in ("default", "chosen", "ms", "refused", "runner_up"):
            assert getattr(verdict, name) == row[name]
    author = str(sys.modules["standins"].__file__)
    assert found["unnormalize", quick["call"]].foreign == verdicts.file_hash(author)
    assert found["unnormalize", other["call"]].foreign is None


@pytest.mark.slow
def test_a_default_with_a_fault_gives_way(tmp_path: Path) -> None:
    """And where nothing is right there is no verdict, not even the one that there was."""
    old = Verdict(*STEP.key, verdicts.place(CPU), "torch", "torch", {"torch": 1.0})
    old_path = verdicts.write(old, folder())
    result = tuned([GELU, STEP, NORM], environment={"STANDINS_BREAK": "1"})
    gelu, step, norm = result["calls"]
    assert (gelu["default"], gelu["chosen"], set(gelu["ms"])) == ("torch", "torch", {"torch"})
    assert gelu["why"].startswith(
        "'onednn', which runs without a verdict, is not right here: disagrees with the reference"
    )
    assert "'torch' takes its place as default" in gelu["why"]
    assert (step["default"], step["chosen"], step["verdict"], step["count"]) == ("torch", None, None, 4)
    assert step["refused"]["torch"] == "call 2 gave other bits than the first"
    assert not old_path.exists()
    assert norm["why"] == (
        "not tuned: its arguments or its reference cannot be made here: crashed: its process was ended by SIGKILL"
    )
    assert [v.op for v in verdicts.known(CPU)] == ["linear_gelu"]


@pytest.mark.slow
def test_the_default_is_what_runs_without_a_verdict() -> None:
    todo = [product(48), GELU, STEP, NORM, units(64)]
    result = tuned(todo, plugins=[], write=False)
    with torch.no_grad():
        for each, row in zip(todo, result["calls"], strict=True):
            args = tuple(torch.zeros_like(a, device=CPU) if isinstance(a, torch.Tensor) else a for a in each.args)
            chosen, _ = find(each.op).choose(args, prepare=True)
            assert chosen is not None
            assert row["default"] == chosen.name
            assert row["verdict"] is None
    assert result["children"] == 1
    assert result["folder"] is None
    assert not (folder() / JOURNAL).exists(), "write=False leaves nothing behind"


SCRIPT = """
import sys
sys.path[:] = {search!r}
import torch
from pathlib import Path
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning import Limits, Todo, tune

def meta(*shape):
    return torch.empty(*shape, device="meta")

torch.set_num_threads({threads})
todo = [Todo("linear", (meta(1, 5, 64), meta(rows, 64), meta(rows))) for rows in (48, 32)]
with Recording(Path({path!r})) as record:
    tune(todo, torch.device("cpu"), record=record, plugins=["standins"], limits=Limits(trial=600, seconds=0.05))
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that tunes, and the child that hangs in it."""
    at = tmp_path / "at"
    script = SCRIPT.format(search=sys.path, path=str(tmp_path / "r.json"), threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "STANDINS_AT": str(at)})
    try:
        eventually(lambda: (at.exists() and at.read_text().endswith("\n")) or process.poll() is not None)
        yield process, int(at.read_text())
    finally:
        process.kill()
        process.wait()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_two_at_once_and_one_that_is_killed(hanging: tuple[subprocess.Popen[bytes], int]) -> None:
    process, child = hanging
    with pytest.raises(BackendError, match=f"process {process.pid} is tuning this device already"):
        tuned([product(48)], plugins=[])
    assert Path(f"/proc/{child}/oom_score_adj").read_text() == "1000\n", "the first to go where memory runs out"
    process.kill()
    process.wait()
    eventually(lambda: gone(child))
    assert [v.call for v in verdicts.known(CPU)] == [product(48).key[1]], "what was done is kept"
    other, row = tuned([product(48), product(32)])["calls"]
    assert other["refused"]["hangs"] == "not for this shape", "of another call it is tried"
    assert row["refused"]["hangs"] == "an earlier run was killed while it was at this; not tried in this run"
    assert row["chosen"] is not None
    assert not Journal(folder()).unfinished, "once"


LEFT_BEHIND = """
import atexit, os, pickle, sys
sys.path[:] = {search!r}
import torch
from dit4dit.benchmarks import tuning_child

def serve(child):
    atexit.register(os._exit, 7)
    sys.stdout.close()
    raise ValueError("no op is left")

tuning_child.Child.serve = serve
with open({tasks!r}, "wb") as file:
    pickle.dump(tuning_child.Tasks((), torch.device("cpu"), 0, (), 1, 1.0, 1, 1), file)
tuning_child.main(os.open(os.devnull, os.O_WRONLY), {tasks!r})
"""


def test_a_child_ends_at_once_whatever_was_left_to_be_done(tmp_path: Path) -> None:
    script = LEFT_BEHIND.format(search=sys.path, tasks=str(tmp_path / "tasks"))
    assert subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, timeout=WAIT).returncode == 1


@pytest.mark.slow
def test_sigterm_leaves_a_whole_file(hanging: tuple[subprocess.Popen[bytes], int], tmp_path: Path) -> None:
    process, child = hanging
    process.terminate()
    assert process.wait(WAIT) == TERMINATED
    assert gone(child)
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["cut"]["by"] == "SIGTERM"
    assert data["cut"]["left"] == [": ".join(product(32).key)]
    assert [row["chosen"] is not None for row in data["calls"]] == [True]
    assert not Journal(folder()).unfinished, "nobody is charged"
    with locked(folder()):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"verdicts cannot be written there \(Not a directory\); set DIT4DIT_CACHE"):
        tuned([product(48)])


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write anywhere: for the user that it is, the system's answer is made up."""

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match="cannot be written there"), locked(tmp_path):
        pass
