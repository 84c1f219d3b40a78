"""`tune` among implementations with every kind of fault: each is found and charged, none is chosen, and the queue is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dit4dit.benchmarks import tuning, tuning_process
from dit4dit.benchmarks.recording import TERMINATED, Recording
from dit4dit.benchmarks.tuning import Limits, Todo, tune
from dit4dit.benchmarks.tuning_journal import JOURNAL, Journal, locked
from dit4dit.benchmarks.tuning_process import Died
from waiting import WAIT, eventually

from dit4dit.errors import BackendError, InputError
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import find, names
from dit4dit.ops.verdicts import Verdict

CPU = torch.device("cpu")
QUICK = Limits(trial=3, timing=20, seconds=0.05)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(rows: int) -> Todo:
    return Todo("linear", (meta(1, 5, 64), meta(rows, 64), meta(rows)))


def units(actions: int) -> Todo:
    return Todo("unnormalize", (meta(1, 16, actions), meta(5, actions, dtype=torch.float64)))


STEP = Todo("euler_step", (meta(1, 8, 8), meta(1, 8, 8), 0.25, None, None, None, None), 4)
GELU = Todo("linear_gelu", (meta(1, 2, 8, 64), meta(96, 64), None, "none"))
NORM = Todo("adaln", (meta(1, 2, 8, 64), None, None, None, None, 1e-6, torch.float32))
HUGE = Todo("linear", (meta(1, 1 << 24), meta(1 << 24, 1 << 24), None))


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verdicts in a folder of the test's own, and no stand-in after it."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    before = {op: dict(find(op).implementations) for op in names()}
    yield
    for op, implementations in before.items():
        find(op).implementations.clear()
        find(op).implementations.update(implementations)
    sys.modules.pop("standins", None)


def tuned(todo: list[Todo], path: Path | None = None, **options: Any) -> dict[str, Any]:
    options = {"limits": QUICK, "plugins": ["standins"], **options}
    with Recording(path) as record:
        return tune(todo, CPU, record=record, **options)


def folder() -> Path:
    return verdicts.folder(CPU)


REASONS = {
    "segfaults": "crashed: its process was ended by SIGSEGV",
    "hangs": "hung: it was not done after 3 s",
    "exits": "ended its process with exit code 0",
    "raises": "raised RuntimeError: no tile fits and a second line",
    "raises_exit": "raised SystemExit: 0",
    "is_wrong_on_the_third_call": "call 3 gave other bits than the first",
    "is_wrong": "disagrees with the reference: result 0: expected at most",
    "has_another_shape": "disagrees with the reference: result 0: expected [1, 5, 16]",
    "returns_no_tensor": "disagrees with the reference: expected tensors as result, got NoneType",
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
    assert time.monotonic() - begin < 90
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
    assert result["children"] == 1 + 3 + 2
    for row in result["calls"][:3]:
        assert row["default"] == "onednn"
        assert row["chosen"] in {"onednn", "torch", "prints"}
        assert {"onednn", "torch"} <= set(row["ms"]) <= {"onednn", "torch", "prints"}
        assert row["ratio"] == row["ms"]["onednn"] / row["ms"][row["chosen"]]
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
    assert "in two thirds" not in quick["why"]
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
    process.kill()
    process.wait()
    eventually(lambda: gone(child))
    assert [v.call for v in verdicts.known(CPU)] == [product(48).key[1]], "what was done is kept"
    other, row = tuned([product(48), product(32)])["calls"]
    assert other["refused"]["hangs"] == "not for this shape", "of another call it is tried"
    assert row["refused"]["hangs"] == "an earlier run was killed while it was at this; not tried in this run"
    assert row["chosen"] is not None
    assert not Journal(folder()).unfinished, "once"


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


def test_a_child_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_process, "SCRIPT", "raise SystemExit('no such library')")
    with pytest.raises(BackendError, match=r"does not start: ended its process with exit code 1\nno such library"):
        tuned([product(48)], plugins=[])
    monkeypatch.setattr(tuning_process, "SCRIPT", "import threading; threading.Event().wait()")
    with pytest.raises(BackendError, match=r"does not start: hung: it was not done after 0.2 s"):
        tuned([product(48)], plugins=[], limits=Limits(start=0.2))


class Scripted:
    """A child that is made up: what it answers to a trial by its implementation and to a timing, or how it dies."""

    trials: ClassVar[dict[str, Any]] = {}
    timing: ClassVar[list[Any]] = []
    started: ClassVar[list[Scripted]] = []

    def __init__(self, *_: object) -> None:
        self.place, self.ended = verdicts.place(CPU), False
        self.started.append(self)

    def ask(self, task: dict[str, Any], at: Callable[[str, str], float], first: float) -> dict[str, Any]:
        assert not self.ended
        if task["do"] == "trial":
            at(task["name"], "trial")
            reason = self.trials.get(task["name"])
            if isinstance(reason, Died):
                raise reason
            return {"reason": reason, "refused": False, "unsound": False}
        answer = self.timing.pop(0)
        if isinstance(answer, tuple):
            name, error = answer
            at(name, "timing")
            raise error
        return {"out": {}, "unsound": False, **answer}

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(Scripted, "started", [])
    monkeypatch.setattr(tuning, "Process", Scripted)
    return Scripted


ROUNDS: list[Any] = [{"onednn": 2.0, "torch": 1.0}] * 9


def test_after_three_crashes_it_is_left_out(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "trials", {"onednn": Died("crashed")})
    monkeypatch.setattr(scripted, "timing", [{"rounds": [{"torch": 1.0}]}] * 5)
    result = tuned([product(rows) for rows in (8, 16, 24, 40, 48)], plugins=[])
    reasons = [row["refused"]["onednn"] for row in result["calls"]]
    assert reasons == ["crashed"] * 3 + ["left out: it crashed or hung on 3 calls of this run"] * 2
    assert result["children"] == 1 + 3
    assert [row["chosen"] for row in result["calls"]] == ["torch"] * 5
    assert scripted.started[-1].ended


def test_one_that_hangs_while_it_is_timed(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "timing", [("onednn", Died("hung")), {"rounds": [{"torch": 1.0}] * 3}])
    (row,) = tuned([product(8)], plugins=[])["calls"]
    assert (row["default"], row["chosen"], row["refused"]) == ("torch", "torch", {"onednn": "hung"})
    assert row["why"] == (
        "'onednn', which runs without a verdict, is not right here: hung; 'torch' takes its place as default; "
        "'torch': the only one that is right"
    )


def test_one_that_is_found_out_while_it_is_timed(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "timing", [{"rounds": ROUNDS, "out": {"torch": "its result was another one"}}])
    (row,) = tuned([product(8)], plugins=[])["calls"]
    assert (row["chosen"], row["ms"]) == ("onednn", {"onednn": 2000})
    changed = {"rounds": [], "out": {"onednn": "changed argument 1"}, "unsound": True}
    monkeypatch.setattr(scripted, "timing", [changed, {"rounds": [{"torch": 1.0}]}])
    result = tuned([product(8)], plugins=[])
    assert (result["calls"][0]["chosen"], result["children"]) == ("torch", 2), "the rest in a process of its own"
    both = dict.fromkeys(("onednn", "torch"), "its result was another one")
    monkeypatch.setattr(scripted, "timing", [{"rounds": [{}], "out": both}])
    (row,) = tuned([product(8)], plugins=[])["calls"]
    assert (row["chosen"], row["refused"]) == (None, both)
    assert not list(verdicts.known(CPU)), "nor the verdict that there was"


def test_a_child_at_another_place(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.verdicts, "difference", lambda found, here: "made with torch 1, this is 2")
    with pytest.raises(BackendError, match="not at the same place as this one: made with torch 1"):
        tuned([product(8)], plugins=[])
    assert scripted.started[0].ended


def test_bad_arguments_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_process.subprocess, "Popen", pytest.fail)
    with pytest.raises(InputError, match="at least one op call"):
        tuned([])
    with pytest.raises(BackendError, match="no op is called 'linaer'; did you mean 'linear'"):
        tuned([Todo("linaer", ())])
    with pytest.raises(InputError, match="linear: expected arguments on the meta device"):
        tuned([Todo("linear", (torch.zeros(1, 4), meta(3, 4), None))])
    with pytest.raises(InputError, match=r"plugin 'no.such_module' cannot be imported \(No module named 'no'\)"):
        tuned([product(48)], plugins=["no.such_module"])
    with pytest.raises(InputError, match="expected cpu or cuda, got meta"), Recording(None) as record:
        tune([product(48)], torch.device("meta"), record=record)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="sees no GPU"), Recording(None) as record:
            tune([product(48)], torch.device("cuda"), record=record)


def test_a_time_that_is_over_names_what_it_left_out() -> None:
    with Recording(None, 1e-6) as record:
        tune([product(48), STEP], CPU, record=record, limits=QUICK)
    assert record.result["cut"]["left"] == [": ".join(each.key) for each in (product(48), STEP)]
    assert (record.result["calls"], record.result["children"]) == ([], 0)


# -- the journal --------------------------------------------------------------------------------------------------------


def test_a_journal_of_a_run_that_was_killed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("linear", "a", "one", durable=True)
    journal.begin("linear", "a", "two", durable=False)
    with (tmp_path / JOURNAL).open("a") as file:  # as a kill in the middle of a line leaves it
        file.write('garbage\n[1]\n{"what": "begin", "op": 3, "call": "a", "name": "b"}\n{"what": "begin", "op": "lin')
    killed = Journal(tmp_path)
    assert killed.unfinished == {("linear", "a"): {"two"}}
    killed.begin("linear", "b", "one", durable=True)
    killed.close()
    assert Journal(tmp_path).unfinished == {("linear", "a"): {"two"}}, "until its call is done"
    last = Journal(tmp_path)
    last.done("linear", "a")
    last.close()
    assert not Journal(tmp_path).unfinished
