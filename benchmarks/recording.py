"""A benchmark's result, whole in its file at any moment: after each block of samples, at its time's end, when asked to stop.

    with Recording(path, seconds) as record:
        record.result |= {"machine": machine(), "rows": []}
        for case in record.each(cases, "ops"):
            record.result["rows"].append(measure(case))

"complete" in the file says whether all was measured, and "cut" what stopped it: {"by", "during", "left"}, None where nothing did.
A process that is killed outright leaves the last block's file, whose "cut" says "killed". A number that is not finite is null
there: strict JSON has no other word for it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from dit4dit.errors import InputError
from dit4dit.files.atomic import check_file
from dit4dit.files.json_files import strict, write_json

T = TypeVar("T")
STOPPING = (signal.SIGTERM, signal.SIGHUP)
"""What asks a command to end; the second comes when its terminal or connection is closed, and not with nohup."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended, after it has written its file; other signals likewise."""


def left_out(result: dict[str, Any]) -> str:
    """For the end of what a command prints: a line of its own with what `--seconds` left out; empty where it left out nothing."""
    return f"\n--seconds left out: {', '.join(result['cut']['left'])}" if result["cut"] else ""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP; no `except Exception` of a single measurement keeps it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.signal = number


class Recording:
    """One result and its file. Only the main thread's is written on a signal (`STOPPING`).

    Attributes:
        result: ready for JSON at any time; "complete" and "cut" are this class's.
    """

    def __init__(self, path: Path | None, seconds: float | None = None) -> None:
        """path: None keeps no file. seconds: how long may be measured; None as long as it takes.

        Raises:
            InputError: `seconds` is not above 0, or not finite, or the file cannot be written.
        """
        if path is not None:
            check_file("--json", path)
        self.result: dict[str, Any] = {"complete": False}
        self._path = path
        self._end: float | None = None
        self.limit(seconds)
        self._during, self._left = "start", list[str]()
        self._undone: Callable[[], list[str]] = list
        self._over: dict[str, Any] | None = None
        self._writing = False
        self._stopped: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Recording:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._writing = True  # a signal that comes now waits until the file is there
        try:
            if error is not None:
                # what a signal interrupts may fail in its own way, as the capture of a CUDA graph does
                stopped = self._stopped
                if isinstance(error, Terminated):  # maybe by a recording within this one
                    stopped = error.signal
                self._over = self._ended(stopped.name if stopped else f"{type(error).__name__}: {error}")
            self.result |= {"complete": self._over is None, "cut": self._over}
            self._write()
        except Exception as failure:
            if error is None and not self._stopped:
                raise
            if str(failure) != str(error):  # where the path is wrong, it is what ended the measurement
                sys.stderr.write(f"not written: {failure}\n")
        finally:
            for number, before in self._before.items():
                signal.signal(number, before)
        if self._stopped and not isinstance(error, Terminated):
            raise Terminated(self._stopped) from error

    def limit(self, seconds: float | None) -> None:
        """The time begins now: what came before, as making a model, is not counted. None leaves it as it is."""
        if seconds is None:
            return
        if not 0 < seconds < float("inf"):
            raise InputError(f"--seconds: expected seconds above 0, got {seconds}")
        self._end = time.monotonic() + seconds

    def keep(self) -> None:
        """Write what there is: a block of samples has ended."""
        self.result |= {"complete": False, "cut": self._ended("killed")}
        self._write()

    def during(self, what: str, left: Iterable[str] = ()) -> None:
        """Name what is measured next, and what is left after it; keep what was measured before."""
        self._during, self._left, self._undone = what, list(left), list
        self.keep()

    def undone(self, of_it: Callable[[], list[str]]) -> None:
        """How to say, whenever it ends, what is missing of what is measured now; until `during` names something else."""
        self._undone = of_it

    def remaining(self) -> float | None:
        """Seconds that may still be measured; None without a limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def over(self, left: Iterable[str] = ()) -> bool:
        """Whether the time has been used up, which then stands in the result with what is left out."""
        if self.remaining() != 0.0:
            return False
        self.short(left)
        return True

    def short(self, left: Iterable[str]) -> None:
        """Note that the time, or the share of it that something had, left this out."""
        if self._over is None:
            self._over = {"by": "seconds", "during": self._during, "left": []}
        self._over["left"] += list(left)

    def each(self, things: Iterable[T], what: str, name: Any = str) -> Iterator[T]:
        """Each of `things` while there is time, with the file written after it; those not reached are named as left."""
        todo = list(things)
        self._during = what
        for i, thing in enumerate(todo):
            self._left = [name(other) for other in todo[i:]]
            if self.over(self._left):
                break
            yield thing
            self._left = self._left[1:]
            self.keep()
        self._left = []

    def _ended(self, by: str) -> dict[str, Any]:
        """What stands in the file if this is the end: what had no time before is left out too."""
        earlier = [] if self._over is None else self._over["left"]
        return {"by": by, "during": self._during, "left": [*earlier, *self._undone(), *self._left]}

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._stopped = signal.Signals(number)
        if not self._writing:  # a second one must not end the writing that the first one caused
            self._writing = True
            raise Terminated(self._stopped)

    def _write(self) -> None:
        if self._path is None:
            return
        before, self._writing = self._writing, True
        try:
            write_json(self._path, strict(self.result))
        finally:
            self._writing = before
        if self._stopped and not before:
            self._writing = True
            raise Terminated(self._stopped)
