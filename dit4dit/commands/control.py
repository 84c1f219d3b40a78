"""The commands around a running robot, `dit4dit control ...`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from dit4dit.commands.shell import at_least, check_outputs, finish, say
from dit4dit.errors import InputError, StreamError


def watch(
    name: tyro.conf.Positional[str | None] = None,
    once: bool = False,
    every_ms: int = 500,
    chunks: int = 4,
    dead_after_ms: float = 50.0,
    json: Path | None = None,
) -> int:
    """What is in an action stream's shared memory, live: producer, chunks, driver, e-stop, status. It never writes to it.

    Without a name: the segments that are there. Ctrl-C ends it; on a terminal it is drawn in place.

    Args:
        name: of the segment, as given to ActionStream(shared=...): /dit4dit.g1; the slash may be left out.
        once: show it once.
        every_ms: milliseconds between two looks.
        chunks: of the newest, how many are shown; 16 are kept.
        dead_after_ms: after how long without a stamp the producer counts as dead, as in the robot's controller.
        json: also write what was found to this file, at each look anew.
    """
    at_least(10, every_ms=every_ms)
    at_least(1, chunks=chunks)
    if not 0 < dead_after_ms < float("inf"):
        raise InputError(f"--dead-after-ms: expected milliseconds above 0, got {dead_after_ms}")
    check_outputs(json=json)
    if name is None:
        return _list(dead_after_ms, json)
    from dit4dit.control.watch import Watch
    from dit4dit.control.watch_text import show
    from dit4dit.files.json_files import strict

    watched = Watch(name, dead_after_ms)
    found = watched.look_twice()
    if once:
        finish(show(found, chunks), strict(found), json)
    else:
        _live(watched, found, every_ms / 1000, chunks, json)
    return 0


def _live(watched: Any, found: dict[str, Any], every_s: float, chunks: int, json: Path | None) -> None:
    """Look and show until Ctrl-C. A segment that is removed meanwhile may come back: that it is gone is shown."""
    from dit4dit.control.watch_text import Screen, show
    from dit4dit.files.json_files import strict, write_json

    screen = Screen(sys.stdout)
    try:
        while True:
            if "error" in found:
                screen.draw(found["error"])
            else:
                screen.draw(show(found, chunks))
            if json is not None:
                write_json(json, strict(found))
            time.sleep(every_s)
            try:
                found = watched.look()
            except StreamError as error:
                found = {"name": watched.name, "error": str(error)}
    except KeyboardInterrupt:
        return


def _list(dead_after_ms: float, json: Path | None) -> int:
    from dit4dit.control import watch as module
    from dit4dit.control.watch_text import show_list
    from dit4dit.files.json_files import strict

    found = list[tuple[str, Any]]()
    for name in module.names():
        try:
            found.append((name, module.Watch(name, dead_after_ms).look()))
        except StreamError as error:
            found.append((name, str(error)))
    data = [one if isinstance(one, dict) else {"name": name, "error": one} for name, one in found]
    finish(show_list(found), strict(data), json)
    return 0


def bench_stream(
    samples: int = 10_000,
    reads: int = 200_000,
    seconds: float | None = None,
    json: Path | None = None,
    report: Path | None = None,
) -> int:
    """What an action stream costs here: reads, and the age and jitter of a 1 kHz reader in C++ and in Python.

    Each loop with and without load (as many busy processes as cores), and under SCHED_FIFO where this user may. It takes about
    1.5 minutes, in which nothing else should run.

    Args:
        samples: ticks of each loop, a millisecond each.
        reads: timed reads of each kind.
        seconds: end after about this long; loops that were not reached are named in the result.
        json: also write every number to this file, as they come.
        report: write an HTML page and its images into this folder, or as one page to this file if it ends in .html.
    """
    from dit4dit.benchmarks import stream as module
    from dit4dit.benchmarks import stream_report
    from dit4dit.benchmarks.recording import Recording, left_out
    from dit4dit.progress import bar

    at_least(2, samples=samples)
    at_least(1, reads=reads)
    if report is not None:
        stream_report.check(report)
    with bar("stream") as shown, Recording(json, seconds) as record:
        module.measure(samples, reads, record=record, shown=shown)
    say(module.show(record.result) + left_out(record.result))
    if report is not None:
        say(f"wrote {stream_report.write(report, record.result)}")
    return 0


CONTROL: dict[str, Callable[..., int]] = {"watch": watch}
