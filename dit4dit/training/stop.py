"""SIGTERM and Ctrl-C during a run."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from dit4dit.training.logs import log

PATIENCE_S = 5.0
"""A second Ctrl-C that comes later than this ends the process at once; torchrun hands the first one on, so it comes twice."""


class StopBeforeSteps(BaseException):
    """A signal came while there was nothing to save."""


class Stop:
    """Whether somebody asked this process to end.

    Attributes:
        stepping: whether steps are taken; before that a signal ends the run where it is, since caches go on by themselves.
    """

    requested = stepping = False
    _first = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
            if not self.stepping:
                raise StopBeforeSteps
        elif number == signal.SIGINT and now - self._first > PATIENCE_S:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C set a flag, or leave the block where no step has been taken, instead of ending the process."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    except StopBeforeSteps:
        log.warning("stopped by a signal before the first step; start again, caches go on where they are")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
