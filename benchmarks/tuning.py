"""`dit4dit tune`: which implementation of each op call is right here, and the fastest.

The implementations run in a child process (`tuning_child`), one after the other. Before one starts, its name is in a journal; if
the child then crashes or hangs, that implementation is charged with it, and what is left is done in a new child. What is right is
timed in turns, and the winner becomes the call's verdict (`dit4dit.ops.verdicts`). This process runs none of them.
"""

from __future__ import annotations

import importlib
import pickle
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning_child import Tasks
from dit4dit.benchmarks.tuning_journal import Journal, locked
from dit4dit.benchmarks.tuning_process import Died, Process, last_lines
from dit4dit.benchmarks.tuning_rounds import Decision, Round, decide
from dit4dit.benchmarks.tuning_trial import NESTING, tensors

import dit4dit.engine  # noqa: F401  the ops of a plan, all of them
from dit4dit import progress
from dit4dit.errors import BackendError, Dit4DitError, InputError, said, shown
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import Implementation, find, foreign
from dit4dit.ops.verdicts import Verdict, call_text

STRIKES = 3
"""An implementation that has crashed or hung on so many calls is tried on no more."""
STARTS = 2  # children in a row that do not become ready


@dataclass(frozen=True)
class Todo:
    """One distinct call of a plan: arguments on the meta device, `count` times in a step."""

    op: str
    args: tuple[Any, ...]
    count: int = 1

    @property
    def key(self) -> tuple[str, str]:
        """As verdicts have it."""
        return self.op, call_text(self.args)


@dataclass(frozen=True)
class Limits:
    """Seconds, and how much is measured.

    Attributes:
        trial: of one implementation on one call, to be found right.
        timing: of all implementations of one call, to be timed.
        start: of a child to become ready; of a call's arguments and of its reference too.
        seconds: how long the timing of one call should take; None: 0.5 on a GPU, 2 on a CPU.
        rounds, samples: blocks of each implementation, and calls of a block at most.
    """

    trial: float = 10.0
    timing: float = 60.0
    start: float = 120.0
    seconds: float | None = None
    rounds: int = 9
    samples: int = 100


def tune(
    todo: Sequence[Todo],
    device: torch.device,
    *,
    record: Recording,
    plugins: Sequence[str] = (),
    seed: int = 0,
    write: bool = True,
    limits: Limits = Limits(),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Try and time every implementation of these calls on a device, into `record` and, call by call, into verdicts.

    Args:
        plugins: modules that register implementations (`dit4dit.ops.register`); imported here and in the child.
        seed: of the arguments' values.
        write: false leaves verdicts as they are, and needs no folder for them.
        environment: variables of the child, beside this process's.

    Returns record.result:
        machine, device, place (`verdicts.place`), folder (None without `write`), children (processes that were started),
        seconds, and calls, one entry for each: op, call, count, default, chosen, runner_up, ms, ratio (default's ms over the
        chosen one's), refused (name -> reason), failed (those of them that do not refuse by themselves), why, verdict (name of
        its file). chosen is None where nothing is right.

    Raises:
        InputError: nothing to do, arguments with data, a plugin that cannot be imported, a folder that cannot be written.
        BackendError: no such op or device, another process that is tuning the device, a child that does not start.
    """
    device = _check(todo, device, plugins)
    begin, folder = time.monotonic(), verdicts.folder(device) if write else None
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(locked(folder))
        result = record.result
        result |= {"machine": machine(), "device": str(device), "place": verdicts.place(device)}
        result |= {"folder": None if folder is None else str(folder), "children": 0, "seconds": 0.0, "calls": []}
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit4dit-tune-")))
        seconds = limits.seconds or (0.5 if device.type == "cuda" else 2.0)
        calls = [(each.op, each.args) for each in todo]
        threads = torch.get_num_threads()
        tasks = Tasks(calls, device, seed, plugins, threads, seconds, limits.rounds, limits.samples)
        (private / "tasks").write_bytes(pickle.dumps(tasks))
        journal = Journal(folder)
        stack.callback(journal.close)
        bar = stack.enter_context(progress.bar("tune", len(todo), unit="call"))
        tuner = _Tuner(device, private, folder, limits, environment or {}, journal, bar)
        stack.callback(tuner.end)
        numbered = sorted(enumerate(todo), key=lambda entry: entry[1].op in NESTING)  # after the ops that they call
        for number, each in record.each(numbered, "calls", name=lambda entry: ": ".join(entry[1].key)):
            result["calls"].append(tuner.call(number, each))
            result |= {"children": tuner.children, "seconds": round(time.monotonic() - begin, 3)}
            bar.update()
    return result


def _check(todo: Sequence[Todo], device: torch.device, plugins: Sequence[str]) -> torch.device:
    """The device with its number."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"tune: device: expected cpu or cuda, got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f"tune: PyTorch {torch.__version__} sees no GPU; run it where there is one, or on cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise BackendError(f"tune: PyTorch sees {torch.cuda.device_count()} CUDA devices, so not {device}")
    if not todo:
        raise InputError("tune: expected at least one op call, got none")
    for each in todo:
        find(each.op)
        if any(not tensor.is_meta for tensor in tensors(each.args)):
            raise InputError(f"tune: {each.op}: expected arguments on the meta device, got some with data")
    for module in plugins:
        try:
            importlib.import_module(module)
        except Dit4DitError:
            raise
        except Exception as error:
            raise InputError(
                f"tune: plugin {shown(module)} cannot be imported ({said(error)}); is it installed?"
            ) from error
    return device


class _Impossible(Exception):
    """No implementation of a call can be judged."""


@dataclass
class _Found:
    """What is known of the implementations of one call."""

    names: list[str]
    right: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    cannot: set[str] = field(default_factory=set)
    """Those of `refused` that say so themselves: they would not run without a verdict either."""

    def strike(self, name: str, reason: str) -> None:
        self.refused[name] = reason
        if name in self.right:
            self.right.remove(name)


class _Tuner:
    """The queue's state: the child, and what implementations have done to earlier ones."""

    def __init__(
        self,
        device: torch.device,
        private: Path,
        folder: Path | None,
        limits: Limits,
        environment: Mapping[str, str],
        journal: Journal,
        bar: progress.Bar,
    ) -> None:
        self._device, self._private, self._folder, self._limits = device, private, folder, limits
        self._environment, self._journal, self._bar = environment, journal, bar
        self.children = 0
        self._process: Process | None = None
        self._strikes: dict[tuple[str, str], int] = {}  # (op, implementation) -> calls on which a child was lost
        self._charged: dict[tuple[str, str], dict[str, str]] = {}  # (op, call) -> implementation -> how it was lost

    def end(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def call(self, number: int, todo: Todo) -> dict[str, Any]:
        """The row of one call; its verdict is written, or removed where nothing is right."""
        op, call = todo.key
        found = _Found(list(find(op).implementations))
        row: dict[str, Any] = {"op": op, "call": call, "count": todo.count, "default": None, "chosen": None}
        row |= {"runner_up": None, "ms": {}, "ratio": None, "refused": found.refused, "failed": []}
        row |= {"why": "", "verdict": None}
        try:
            self._trials(number, todo.key, found)
            default, note = self._default(op, found)
            rounds = self._timing(number, todo.key, found) if found.right else []
        except _Impossible as error:
            row["why"] = f"not tuned: its arguments or its reference cannot be made here: {error}"
            return row
        row |= {"default": default, "failed": [name for name in found.refused if name not in found.cannot]}
        if not found.right:
            row["why"] = "nothing is right here, so there is no verdict, and the default stays"
            if self._folder is not None:
                (self._folder / verdicts.file_name(op, call)).unlink(missing_ok=True)
        else:
            default, note = self._default(op, found)  # it may have been found out while it was timed
            decision = decide(rounds, default if default in found.right else None)
            self._conclude(row, todo.key, default, note, decision)
        self._journal.done(op, call)
        return row

    def _default(self, op: str, found: _Found) -> tuple[str | None, str]:
        """What runs without a verdict (`Op.choose`), or where that is not right, the next that is; and a note of that."""
        known = find(op).implementations
        usual = next((n for n in found.names if n not in found.cannot and not self._waits(known[n])), None)
        if usual is None or usual in found.right or not found.right:
            return usual, ""
        note = f"{usual!r}, which runs without a verdict, is not right here: {found.refused[usual]}; "
        other = next((name for name in found.right if not self._waits(known[name])), None)
        return other, note + (f"{other!r} takes its place as default; " if other else "nothing else runs without one; ")

    def _waits(self, implementation: Implementation) -> bool:
        return implementation.measured_only and implementation.device in (None, self._device.type)

    def _conclude(
        self, row: dict[str, Any], key: tuple[str, str], default: str | None, note: str, decision: Decision
    ) -> None:
        op, call = key
        author = foreign(find(op).implementations[decision.chosen])
        verdict = Verdict(
            op=op,
            call=call,
            place=verdicts.place(self._device),
            default=default or decision.chosen,
            chosen=decision.chosen,
            ms=decision.ms,
            refused=row["refused"],
            foreign=None if author is None else verdicts.file_hash(author),
            made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        chosen = decision.chosen
        row |= {"default": verdict.default, "chosen": chosen, "runner_up": verdict.runner_up, "ms": decision.ms}
        row["ratio"] = decision.ms[verdict.default] / decision.ms[chosen]
        row["why"] = f"{note}{chosen!r}: {decision.why}"
        if self._folder is not None:
            row["verdict"] = verdicts.write(verdict, self._folder).name

    def _trials(self, number: int, key: tuple[str, str], found: _Found) -> None:
        op = key[0]
        for name in found.names:
            if name in self._journal.unfinished.get(key, ()):
                found.refused[name] = "an earlier run was killed while it was at this; not tried in this run"
            elif name in self._charged.get(key, {}):
                found.refused[name] = self._charged[key][name]
            elif self._strikes.get((op, name), 0) >= STRIKES:
                found.refused[name] = f"left out: it crashed or hung on {STRIKES} calls of this run"
            else:
                self._trial(number, key, name, found)

    def _trial(self, number: int, key: tuple[str, str], name: str, found: _Found) -> None:
        try:
            answer = self._ask({"do": "trial", "call": number, "name": name}, key)
        except Died:
            found.refused[name] = self._charged[key][name]
            return
        if answer["reason"] is None:
            found.right.append(name)
            return
        found.refused[name] = answer["reason"]
        if answer["refused"]:
            found.cannot.add(name)
        if answer["unsound"]:  # who knows what else it has written
            self.end()

    def _timing(self, number: int, key: tuple[str, str], found: _Found) -> list[Round]:
        """Times of those that are right; what is found out meanwhile is so no more."""
        while found.right:
            try:
                answer = self._ask({"do": "time", "call": number, "names": found.right}, key)
            except Died:
                for name, reason in self._charged[key].items():
                    found.strike(name, reason)
                continue
            for name, reason in answer["out"].items():
                found.strike(name, reason)
            if answer["unsound"]:
                self.end()
                continue
            return [{name: block[name] for name in block if name in found.right} for block in answer["rounds"]]
        return []

    def _ask(self, task: dict[str, Any], key: tuple[str, str]) -> dict[str, Any]:
        """The answer. Died: the child was lost, and the implementation that it was at is charged. _Impossible: it was at none."""
        used, process = self._process is not None, self._child()
        at, timing = "", 0.0

        def announced(name: str, step: str) -> float:
            nonlocal at, timing
            at, now = name, time.monotonic()
            if not name:
                return now + self._limits.start
            self._bar.say(f"{key[0]} {name}")
            self._journal.begin(*key, name, durable=step == "trial")
            if step == "trial":
                return now + self._limits.trial
            timing = timing or now + self._limits.timing
            return timing

        try:
            answer = process.ask(task, announced, self._limits.start)
        except Died as error:
            self._process = None
            self._journal.end()
            if not at and used:  # by what an earlier implementation has left there, maybe
                return self._ask(task, key)
            if not at:
                raise _Impossible(str(error)) from None
            self._charged.setdefault(key, {})[at] = str(error)
            self._strikes[key[0], at] = self._strikes.get((key[0], at), 0) + 1
            raise
        self._journal.end()
        if "impossible" in answer and used:
            self.end()
            return self._ask(task, key)
        if "impossible" in answer:
            raise _Impossible(answer["impossible"])
        return answer

    def _child(self) -> Process:
        """The child; a new one where there is none. BackendError: it does not start."""
        if self._process is not None:
            return self._process
        log = self._private / "log"
        for attempt in range(STARTS):
            self.children += 1
            try:
                process = Process(self._private / "tasks", log, self._limits.start, self._environment)
            except Died as error:
                if attempt + 1 == STARTS:
                    raise BackendError(f"tune: a child process does not start: {error}\n{last_lines(log)}") from None
            else:
                break
        elsewhere = verdicts.difference(process.place, verdicts.place(self._device))
        if elsewhere is not None:
            process.end()
            raise BackendError(f"tune: the child process is not at the same place as this one: {elsewhere}")
        self._process = process
        return process
