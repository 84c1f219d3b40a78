"""The process of `dit4dit tune` in which implementations run: it may crash, hang or lose its GPU, and costs only itself.

It reads one JSON line a task, and writes one JSON line a message on a pipe of its own; libraries and implementations print where
they like. Before anything that can go wrong it says what comes next and waits for the parent's answer, which has it in its
journal by then:

    parent                                                   child
                                                             {"ready": place of its device}
    {"do": "trial", "call": 0, "name": "triton"}
                                                             {"at": "", "step": "arguments"}
    {"go": true}
                                                             {"at": "triton", "step": "trial"}
    {"go": true}
                                                             {"answer": {"reason": null, "refused": false, "unsound": false}}
    {"do": "time", "call": 0, "names": ["triton", "torch"]}  ...
                                                             {"answer": {"rounds": [...], "out": {name: reason}}}
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from dit4dit.benchmarks import failures, process_state
from dit4dit.benchmarks.ops.bench_action_ode import graph_of
from dit4dit.benchmarks.tuning_rounds import Round, timed
from dit4dit.benchmarks.tuning_trial import NESTING, Case, Outcome, bits_of, same

import dit4dit.engine  # noqa: F401  the ops of a plan, all of them
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import find

SCRIPT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent, however that ends
if os.getppid() != {parent}:
    os._exit(0)
sys.path[:] = {path!r}
from dit4dit.benchmarks import tuning_child
tuning_child.main({pipe}, {tasks!r})
"""


@dataclass(frozen=True)
class Tasks:
    """What a child needs from the start, in a file.

    Attributes:
        calls: (op, arguments on the meta device).
        plugins: modules that register implementations.
        threads: of torch on the CPU.
        seconds, rounds, samples: of the timing of one call (`tuning_rounds.timed`).
    """

    calls: Sequence[tuple[str, tuple[Any, ...]]]
    device: torch.device
    seed: int
    plugins: Sequence[str]
    threads: int
    seconds: float
    rounds: int
    samples: int


class Aborted(Exception):
    """What has happened to this process's memory makes its other results worth nothing."""


class Child:
    """The tasks, one after the other, and the one call whose arguments are there."""

    def __init__(self, given: Tasks, commands: TextIO, answers: TextIO) -> None:
        self._given, self._commands, self._answers = given, commands, answers
        self._process, self._token = os.getpid(), ""
        self._number = -1
        self._case: Case | None = None

    def serve(self) -> None:
        """Until the parent closes its end."""
        self.say({"ready": verdicts.place(self._given.device)})
        while (task := self._hear()) is not None:
            self._token = task["token"]
            self.say({"answer": self._do(task)})

    def say(self, message: dict[str, Any]) -> None:
        """With the task's token, so that what else is written to the pipe is not taken for it."""
        if os.getpid() != self._process:  # a copy that an implementation has made, and that runs
            os._exit(0)
        self._answers.write(json.dumps({"token": self._token, **message}) + "\n")
        self._answers.flush()

    def _hear(self) -> Any:
        line = self._commands.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _announce(self, name: str, step: str) -> None:
        """What comes next; returns when the parent has noted it."""
        self.say({"at": name, "step": step})
        if self._hear() is None:
            os._exit(0)

    def _do(self, task: dict[str, Any]) -> dict[str, Any]:
        try:
            case = self._at(task["call"])
        except Exception as error:
            reason = failures.reason_of(error.with_traceback(None))
            failures.check_gpu(reason)
            return {"impossible": reason}
        if task["do"] == "trial":
            return self._trial(case, task["name"]).data()
        out: dict[str, str] = {}
        try:
            return {"rounds": self._time(case, task["names"], out), "out": out, "unsound": False}
        except Aborted:
            return {"rounds": [], "out": out, "unsound": True}

    def _at(self, number: int) -> Case:
        if self._case is None or self._number != number:
            self._case = None  # its memory goes first
            self._announce("", "arguments")
            op, args = self._given.calls[number]
            case = Case(op, args, self._given.device, self._given.seed)
            self._announce("", "reference")
            case.measure()
            self._number, self._case = number, case
        return self._case

    def _trial(self, case: Case, name: str) -> Outcome:
        self._announce(name, "trial")
        return case.trial(name, find(case.op).implementations[name])

    def _time(self, case: Case, names: Sequence[str], out: dict[str, str]) -> list[Round]:
        # what a process that is gone has found right is tried again here: its first result is needed
        while again := [name for name in names if name not in case.first and name not in out]:
            outcome = self._trial(case, again[0])
            if outcome.reason is not None:
                out[again[0]] = outcome.reason
            if outcome.unsound:
                raise Aborted
        results: dict[str, Any] = {}
        given = self._given
        gpu = given.device.type == "cuda"
        calls = {name: _call(case, name, results, gpu) for name in names if name not in out}
        return timed(
            calls,
            gpu=gpu,
            seconds=given.seconds,
            rounds=given.rounds,
            samples=given.samples,
            before=partial(self._announce, step="timing"),
            after=partial(_sound, case, process_state.settings(), results, out),
        )


def _call(case: Case, name: str, results: dict[str, Any], gpu: bool) -> Callable[[], None]:
    """One call, its result in `results`. Many kernels in a row are a CUDA graph, as in a plan: launched one by one they would be
    as slow as Python.
    """
    once = partial(case.run, name, find(case.op).implementations[name])
    graph = gpu and case.op in NESTING
    if graph:
        once = graph_of(once)

    def run() -> None:
        nonlocal graph
        results[name] = once()
        if graph:  # libraries may choose otherwise in a graph: its first result is judged, and the later ones are its
            graph = False
            case.expect(name, results[name])

    return run


def _sound(
    case: Case,
    before: dict[str, Any],
    results: dict[str, Any],
    out: dict[str, str],
    name: str,
    error: Exception | None,
) -> bool:
    """Whether the last result of a block is still the first one; the reason in `out` where it is not. Aborted: see there.

    before: `process_state.settings`.
    """
    try:
        if error is not None:
            raise error
        case.checked()
        reason = None if same(bits_of(results.pop(name)), case.first[name]) else "its result was another one"
    except Exception as problem:
        reason = f"raised {failures.reason_of(problem)}"
        failures.check_gpu(reason)
    changed = case.changed() or process_state.changed(before)
    if changed is not None:
        reason = f"changed {changed}"
    if reason is not None:
        out[name] = f"{reason}, while it was timed"
    if changed is not None:
        raise Aborted
    return reason is None


def main(pipe: int, tasks: str) -> None:
    """The whole life of a child. pipe: where its messages go; tasks: a file with a pickled `Tasks`."""
    # what implementations and the programs that they start read and print has nothing to do with what is said here
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.set_inheritable(pipe, False)
    with contextlib.suppress(OSError):  # where memory runs out, the kernel ends this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(pipe, "w", encoding="utf-8")
    given: Tasks = pickle.loads(Path(tasks).read_bytes())
    for module in given.plugins:
        importlib.import_module(module)
    torch.set_num_threads(given.threads)
    if given.device.type == "cuda":
        torch.cuda.set_device(given.device)
        torch.cuda.set_stream(torch.cuda.Stream())  # as in a plan it is not the default one, which others wait for
        torch.zeros(1, device=given.device).item()  # CUDA starts now, in nobody's time
    child = Child(given, commands, answers)
    with open(os.devnull, "w") as nothing:  # what starts can be read in the log; what runs may print without an end
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        with torch.no_grad():
            child.serve()
    except failures.GpuLost as lost:
        child.say({"lost": str(lost.args[0])})
        failures.leave(failures.GPU_LOST)
    except BaseException:  # what implementations have left to be done at the end of a process is not waited for
        failures.leave(1)
    failures.leave(0)
