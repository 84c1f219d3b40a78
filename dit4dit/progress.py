"""What a command shows of long work: a bar on a terminal, a line now and then where there is none; always on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

LINE_EVERY_S = 30.0
"""Where no bar can be drawn (a file, a batch system) a line says as often how far the work is."""
TICK_S = 1.0
"""How often the clock of work that cannot be counted is drawn."""


class Lines:
    """What stands for a bar where none can be drawn: a line on stderr every `LINE_EVERY_S`, and one at the end."""

    def __init__(self, name: str, first: int, total: int | None, unit: str = "") -> None:
        """total: None where it is not known, and no line comes at the end. unit: of large numbers, such as B for bytes."""
        self.name, self.first, self.done, self.total, self.text, self.unit = name, first, first, total, "", unit
        self._start = self._told = time.monotonic()
        self._over = False

    def show(self) -> None:
        """The line, if it is time for one. That nobody reads it any more is no reason to stop."""
        now, last = time.monotonic(), not self._over and self.first < self.done == self.total
        if now - self._told < LINE_EVERY_S and not last:
            return
        self._told, self._over = now, self._over or last
        words = filter(None, (f"{self.name}: {self._done()}", self.text, self._time(now - self._start)))
        with contextlib.suppress(OSError):
            sys.stderr.write(", ".join(words) + "\n")
            sys.stderr.flush()

    def _done(self) -> str:
        if self.total is not None:
            return f"{self.done} of {self.total}"
        if not self.done:
            return "at work"
        return f"{_tqdm().format_sizeof(self.done)}{self.unit}" if self.unit else f"{self.done} done"

    def _time(self, taken: float) -> str:
        if self.total is None or self.done == self.first:
            return f"{_tqdm().format_interval(taken)} so far"
        return f"{_tqdm().format_interval(taken * (self.total - self.done) / (self.done - self.first))} left"


class Bar:
    """One piece of work; `bar` makes it. It writes in its methods, and at no other time: it has no thread."""

    def __init__(self, name: str, total: int | None, first: int, active: bool, options: dict[str, Any]) -> None:
        self._bar = _tqdm()(
            total=total, desc=name, initial=first, miniters=1, disable=None if active else True, **options
        )
        unit = options.get("unit", "") if options.get("unit_scale") else ""
        self._lines = Lines(name, first, total, unit) if active and self._bar.disable else None
        self.drawn = not self._bar.disable
        """Whether it is drawn on a terminal."""
        self.done = first

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._bar.update(count)
        if self._lines is not None:
            self._lines.done = self.done
            self._lines.show()

    def reach(self, done: int) -> None:
        """So much is done in all."""
        self.update(done - self.done)

    def say(self, text: str) -> None:
        """A few words at the bar's end: what is being done."""
        self._bar.set_postfix_str(text)
        if self._lines is not None:
            self._lines.text = text
            self._lines.show()

    def of(self, total: int) -> None:
        """How much there is to do has become known, for a part of it at least; the bar shows it."""
        self._bar.total = total

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Draw the clock each second, by a thread; not around what is timed."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(TICK_S):
                if self._lines is not None:
                    self._lines.show()
                self._bar.refresh()

        thread = threading.Thread(target=tick, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def bar(name: str, total: int | None = None, *, first: int = 0, active: bool = True, **options: Any) -> Iterator[Bar]:
    """A bar with count and time left.

    Args:
        total: None where it is not known, or not yet (`Bar.of`).
        first: what was done before.
        active: false shows nothing, as on all but one of several processes.
        options: of tqdm: unit, unit_scale, mininterval, leave.
    """
    shown = Bar(name, total, first, active, options)
    try:
        with log_lines_above() if shown.drawn else contextlib.nullcontext():
            yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def log_lines_above() -> Iterator[None]:
    """While bars are drawn: what is logged on standard error takes them off, and stands in lines of its own above them."""
    above, before, last = _Above(), list[tuple[logging.StreamHandler[Any], Any]](), logging.lastResort
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    for handler in (one for logger in loggers for one in getattr(logger, "handlers", ())):
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            before.append((handler, handler.stream))
            handler.setStream(above)
    if last is not None:  # the handler of who has set up none
        logging.lastResort = logging.StreamHandler(above)
        logging.lastResort.setLevel(last.level)
    try:
        yield
    finally:
        logging.lastResort = last
        for handler, stream in before:
            if handler.stream is above:
                handler.setStream(stream)


class _Above:
    """Standard error, with the bars off while a line is written."""

    def write(self, text: str) -> None:
        with _tqdm().external_write_mode(file=sys.stderr):
            sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def waiting(name: str) -> Iterator[Bar]:
    """For work that cannot be counted: its name, how long it has taken, and what `say` tells."""
    with bar(name, bar_format="{desc}: {elapsed}{postfix}", leave=False) as shown, shown.ticking():
        yield shown


@cache
def _tqdm() -> Any:
    """tqdm without its thread, which wakes every ten seconds and may draw at any moment, also while something is timed."""
    from tqdm import tqdm

    return type("Bar", (tqdm,), {"monitor_interval": 0})
