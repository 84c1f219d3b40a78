"""The process that tunes: children that are made up, its journal, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from dit4dit.benchmarks import tuning, tuning_process
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning import Limits, Todo, tune
from dit4dit.benchmarks.tuning_journal import JOURNAL, LOCK, Journal, locked
from dit4dit.benchmarks.tuning_process import Died
from tuning_calls import CPU, QUICK, STEP, clean, meta, product, tuned

from dit4dit.errors import BackendError, InputError
from dit4dit.ops import verdicts


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from clean(tmp_path, monkeypatch)


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


def test_a_child_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_process, "SCRIPT", "raise SystemExit('no such library')")
    with pytest.raises(BackendError, match=r"does not start: ended its process with exit code 1\nno such library"):
        tuned([product(48)], plugins=[])
    monkeypatch.setattr(tuning_process, "SCRIPT", "import threading; threading.Event().wait()")
    with pytest.raises(BackendError, match=r"does not start: hung: it was not done after 0.2 s"):
        tuned([product(48)], plugins=[], limits=Limits(start=0.2))


RAW = """
import json, os, sys
def say(message):
    os.write({pipe}, json.dumps(message).encode() + b"\\n")
say(dict(ready=PLACE))
task = json.loads(sys.stdin.readline())
name, token = task["name"], task["token"]
say(dict(at=name, step="trial", token=token))
sys.stdin.readline()
"""
ENDS = {
    "illegal address; then the GPU was lost: gone": (
        'say(dict(lost="illegal address; then the GPU was lost: gone")); os._exit(3)'
    ),
    "ended its process with exit code 3": "os._exit(3)",
    "crashed: its process was ended by SIGABRT": "os.abort()",
}


NOT_ITS_OWN = "wrote to its process's pipe, which is not its own"
STRAYS = {
    "garbage": "os.write({pipe}, b'garbage\\n')",
    "without an end": "while True: os.write({pipe}, b'a' * 65536)",
    "number": "say(5)",
    "no step": "say(dict(at=name, token=token))",
    "another name": "say(dict(at='x', step='trial', token=token))",
    "half an answer": "say(dict(answer=dict(reason=None), token=token))",
    "an answer to something else": "say(dict(answer=dict(reason=None, refused=False, unsound=False), token='x'))",
    "a start": "say(dict(ready=dict(), token=token))",
    "a loss, again and again": "while True: say(dict(lost='x'))",
}
CASES = list(ENDS.items())
CASES += [(NOT_ITS_OWN, f"{script}\nsys.stdin.readline()") for script in STRAYS.values()]


@pytest.mark.parametrize(("reason", "script"), CASES, ids=[*ENDS, *STRAYS])
def test_however_a_child_ends_it_is_charged(reason: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = repr(verdicts.place(CPU)).replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(tuning_process, "SCRIPT", RAW.replace("PLACE", place) + script)
    result = tuned([product(8), STEP], plugins=[])
    assert result["calls"][0]["refused"] == dict.fromkeys(("triton", "onednn", "torch"), reason)
    assert [row["chosen"] for row in result["calls"]] == [None, None]
    assert result["children"] == 5


UNSUPPORTED = {"triton": "x is on cpu"}
"""Of the op of `product`, in any child."""


class Scripted:
    """A child that is made up: what it answers to a trial by its implementation and to a timing, or how it dies."""

    trials: ClassVar[dict[str, Any]] = {}
    timing: ClassVar[list[Any]] = []
    making: ClassVar[list[Any]] = []  # how a call's arguments fail, task by task; None: they do not
    started: ClassVar[list[Scripted]] = []

    def __init__(self, *_: object) -> None:
        self.place, self.ended = verdicts.place(CPU), False
        self.started.append(self)

    def ask(self, task: dict[str, Any], at: Callable[[str, str], float], first: float) -> dict[str, Any]:
        assert not self.ended
        trouble = self.making.pop(0) if self.making else None
        if isinstance(trouble, Died):
            at("", "arguments")
            raise trouble
        if trouble is not None:
            return {"impossible": trouble}
        if task["do"] == "trial":
            at(task["name"], "trial")
            if task["name"] == "triton":
                return {"reason": UNSUPPORTED["triton"], "refused": True, "unsound": False}
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
    assert (row["default"], row["chosen"], row["refused"]) == ("torch", "torch", {**UNSUPPORTED, "onednn": "hung"})
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
    assert (row["chosen"], row["refused"]) == (None, {**UNSUPPORTED, **both})
    assert not list(verdicts.known(CPU)), "nor the verdict that there was"


@pytest.mark.parametrize("trouble", [Died("crashed"), "ValueError: no op is left"], ids=["died", "raised"])
def test_a_call_that_cannot_be_made_is_tried_in_a_process_of_its_own(
    trouble: Any, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was run before in the old one may be at fault; in a new one it is the call itself."""
    monkeypatch.setattr(scripted, "timing", [{"rounds": ROUNDS}])
    monkeypatch.setattr(scripted, "making", [None, trouble])
    result = tuned([product(8)], plugins=[])
    assert (result["calls"][0]["chosen"], result["children"]) == ("torch", 2)
    monkeypatch.setattr(scripted, "making", [trouble])
    result = tuned([product(8)], plugins=[])
    assert result["calls"][0]["why"].startswith("not tuned: its arguments or its reference cannot be made here")
    assert (result["calls"][0]["chosen"], result["children"]) == (None, 1)


def test_a_child_at_another_place(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.verdicts, "difference", lambda found, here: "made with torch 1, this is 2")
    with pytest.raises(BackendError, match="not at the same place as this one: made with torch 1"):
        tuned([product(8)], plugins=[])
    assert scripted.started[0].ended


def test_a_lock_with_something_else_in_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\xff" * 1000)
        with pytest.raises(BackendError) as error, locked(tmp_path):
            pass
    assert len(str(error.value)) < 200
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


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
    full = rf"{JOURNAL}: cannot be written \(No space left on device\); set DIT4DIT_CACHE"
    with Path("/dev/full").open("a") as last._file, pytest.raises(InputError, match=full):
        last.begin("linear", "b", "one", durable=True)
    last.close()
    last = Journal(tmp_path)
    last.done("linear", "a")
    last.close()
    assert not Journal(tmp_path).unfinished
