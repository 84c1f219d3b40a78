"""What an action stream costs: single reads, and how a driver at 1 kHz fares in C++ and in Python, with and without load.

Reads are timed one by one in C++, so that the clock's own cost is in each: its row says how much.

The loops drive a segment in shared memory that another process publishes to: 23 channels with limits, cubic, a chunk of 16 rows
at 30 Hz every 47.3 ms, observed at the moment at which it is published. So an age is what comes on top of a policy's own delay,
and grows to about 47 ms until the next chunk; the age of the first command of each chunk is how long a chunk takes to reach the
motors. Lateness is that of the wake-up. Both readers are the same C++ code; Python has its binding on top.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from numpy.typing import NDArray

from dit4dit.control.watch import FOLDER
from dit4dit.errors import BackendError, said
from dit4dit.progress import Bar
from dit4dit.tables import number, quantiles, table

TICK_NS = 1_000_000
"""Of the loops: 1 kHz."""
CHUNK_NS = 47_300_000
"""Between two chunks of the loops' producer: no multiple of a tick, so that chunks come at any moment between two."""
BLOCK = 1000
"""Ticks at a time: between blocks the bar is drawn and the file written."""
READS_AT_A_TIME = 20_000
PRIORITY = 50
"""Of SCHED_FIFO, in 1..99; kernel threads for interrupts have 50 too."""
STATUSES = ("ok", "contended", "dry", "stale", "dead", "estop")
SHOWN = ("p50", "p90", "p99", "p999", "max")
START_S = 60.0
"""For the producer to be there, on a busy machine too."""


def _native() -> Any:
    from dit4dit import _C

    return _C


READS = {
    "clock": lambda count: (_native().stream_bench_clock(count), 0),
    "ring": lambda count: _native().stream_bench_ring(count),
    "reader": lambda count: (_native().stream_bench_reader(count, False), 0),
    "reader at its limits": lambda count: (_native().stream_bench_reader(count, True), 0),
}
SAYS = {
    "clock": "nothing, twice the clock",
    "ring": "2 rows x 23 of the newest chunk",
    "reader": "a command: 23 channels, cubic, blend, limits",
    "reader at its limits": "the same, chunks of steps that the limits hold back",
}


class Case(NamedTuple):
    """One loop. reader: C++ or Python. load: beside as many busy processes as cores. fifo: under SCHED_FIFO."""

    reader: str
    load: bool
    fifo: bool

    def __str__(self) -> str:
        scheduler = "SCHED_FIFO" if self.fifo else "normal priority"
        return f"{self.reader}, {'loaded' if self.load else 'idle'}, {scheduler}"


CASES = [Case(reader, load, fifo) for load, reader, fifo in product((False, True), ("C++", "Python"), (False, True))]


@dataclass
class Times:
    """Of a loop's ticks, in ns, int64 [ticks]: of the wake-up after its deadline, of the command after its observation (-1: it
    answers none), of the read; and the chunk of each command."""

    late: NDArray[np.int64]
    age: NDArray[np.int64]
    took: NDArray[np.int64]
    chunk: NDArray[np.int64]
    missed: int
    status: dict[str, int]


def measure(samples: int, reads: int, *, record: Recording, shown: Bar) -> None:
    """All reads and loops, with the machine they belong to, into `record`. samples: ticks of each loop. reads: of each kind."""
    result = record.result
    allowed, why = fifo_allowed()
    result |= {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "tick_ms": TICK_NS / 1e6,
        "chunk_every_ms": CHUNK_NS / 1e6,
        "busy": cores(),
        "fifo": {"allowed": allowed, "why": why, "priority": PRIORITY},
        "reads": [],
        "loops": [],
    }
    todo = [case for case in CASES if allowed or not case.fifo]
    shown.of(len(READS) + len(todo) * blocks(samples))
    with producer() as name:
        for what in record.each(READS, "reads"):
            shown.say(what)
            result["reads"].append(_reads(what, reads))
            shown.update()
        for case in record.each(todo, "loops"):
            shown.say(str(case))
            with busy(cores()) if case.load else contextlib.nullcontext():
                times = _loop(case, name, samples, record, shown)
            if times:
                result["loops"].append(_summary(case, times))


def blocks(samples: int) -> int:
    return -(-samples // BLOCK)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _reads(what: str, count: int) -> dict[str, Any]:
    took, contended = list[NDArray[np.int64]](), 0
    for begin in range(0, count, READS_AT_A_TIME):
        times, more = READS[what](min(READS_AT_A_TIME, count - begin))
        took.append(np.frombuffer(times, np.int64))
        contended += more
    return {"what": what, "says": SAYS[what], "ns": _quantiles(np.concatenate(took)), "contended": contended}


def _loop(case: Case, name: str, samples: int, record: Recording, shown: Bar) -> list[Times]:
    """Its ticks, in blocks, as far as there is time."""
    run = {"C++": cpp_loop, "Python": python_loop}[case.reader]
    found = list[Times]()
    for begin in range(0, samples, BLOCK):
        found.append(run(name, min(BLOCK, samples - begin), PRIORITY if case.fifo else 0))
        shown.update()
        if begin + BLOCK < samples and record.over([f"{case}, ticks from {begin + BLOCK} on"]):
            break
    return found


def _summary(case: Case, times: Sequence[Times]) -> dict[str, Any]:
    late, age, took, chunk = (
        np.concatenate([getattr(t, key) for t in times]) for key in ("late", "age", "took", "chunk")
    )
    # of each block the first chunk was there before
    first = np.concatenate([np.diff(t.chunk, prepend=t.chunk[:1]) > 0 for t in times])
    answers = age >= 0
    return {
        **case._asdict(),
        "ticks": len(late),
        "missed": sum(t.missed for t in times),
        "statuses": {status: count for status in STATUSES if (count := sum(t.status[status] for t in times))},
        "chunks": len(np.unique(chunk[answers])),
        "late_us": _quantiles(late / 1e3),
        "age_ms": _quantiles(age[answers] / 1e6),
        "handover_ms": _quantiles(age[first & answers] / 1e6),
        "read_us": _quantiles(took / 1e3),
        "late_us_beyond": _beyond(late / 1e3),
        "handover_ms_beyond": _beyond(age[first & answers] / 1e6),
    }


def _quantiles(values: NDArray[Any]) -> dict[str, Any] | None:
    """p50, p90, p99, p999, max and how many there are; None without any."""
    if not len(values):
        return None
    found = quantiles(values.tolist(), SHOWN[:-1])
    return {**{name: found[name] for name in SHOWN}, "samples": len(values)}


def _beyond(values: NDArray[Any], points: int = 60) -> list[list[float]]:
    """For the drawing: [value, share of the values that are larger], from all of them down to one."""
    ordered = np.sort(values)
    if not len(ordered):
        return []
    larger = np.unique(np.geomspace(1, len(ordered), points).astype(int)) - 1
    return [[float(ordered[-1 - n]), (n + 1) / len(ordered)] for n in larger[::-1].tolist()]


# -- loops -----------------------------------------------------------------------------------------


def cpp_loop(name: str, ticks: int, priority: int) -> Times:
    """The driver of this segment in C++, in a thread of its own without Python's lock. priority: of SCHED_FIFO; 0: normal."""
    found = _native().stream_bench_loop(name, TICK_NS, ticks, priority)
    if found["refused"]:
        raise BackendError(f"SCHED_FIFO: {found['refused']}; run without it")
    arrays = {key: np.frombuffer(found[key], np.int64) for key in ("late", "age", "took", "chunk")}
    return Times(**arrays, missed=found["missed"], status=dict(zip(STATUSES, found["status"], strict=True)))


def python_loop(name: str, ticks: int, priority: int) -> Times:
    """The same in Python, in this thread."""
    from dit4dit.control import ActionStream

    late, age, took, chunk = (np.zeros(ticks, np.int64) for _ in range(4))
    missed, status = 0, dict.fromkeys(STATUSES, 0)
    with ActionStream.attach(name, driver=True) as stream, fifo(priority):
        deadline = time.monotonic_ns() + TICK_NS
        for i in range(ticks):
            while (left := deadline - time.monotonic_ns()) > 0:
                time.sleep(left / 1e9)
            woke = time.monotonic_ns()
            command = stream.at(woke)
            taken = time.monotonic_ns() - woke
            late[i], took[i], chunk[i] = woke - deadline, taken, command.chunk
            age[i] = command.age_ns + taken if command.chunk else -1
            status[command.status.name.lower()] += 1
            over = (woke + taken - deadline) // TICK_NS
            missed += over
            deadline += (over + 1) * TICK_NS
    return Times(late, age, took, chunk, missed, status)


# -- beside them -----------------------------------------------------------------------------------

_PRODUCE = "import sys; sys.path[:] = {path}; from dit4dit.benchmarks.stream_producer import produce; produce({name!r}, {period})"
_CHILD: Any = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
"""Ctrl-C is the parent's, who ends them."""
_BUSY = "import os\nparent = os.getppid()\nprint(flush=True)\nwhile os.getppid() == parent: sum(range(100_000))"


@contextlib.contextmanager
def producer() -> Iterator[str]:
    """A process that publishes to a segment; gives its name."""
    name = f"/dit4dit.bench.{os.getpid()}"
    script = _PRODUCE.format(path=sys.path, name=name, period=CHUNK_NS)
    with subprocess.Popen(
        [sys.executable, "-c", script], **_CHILD, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                _, errors = process.communicate(timeout=START_S)
                raise BackendError(f"the benchmark's producer failed: {said(errors.strip().rpartition(chr(10))[2])}")
            yield name
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=START_S)  # it ends with its input
            process.kill()
            (FOLDER / name[1:]).unlink(missing_ok=True)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time; they end with this one too."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-Sc", _BUSY], **_CHILD))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield


def fifo_allowed() -> tuple[bool, str | None]:
    """Whether a thread of this process gets SCHED_FIFO, and why not."""
    try:
        with fifo(PRIORITY):
            return True, None
    except OSError as error:
        return False, (
            f"SCHED_FIFO is not allowed here ({error.strerror}); give this user rtprio in /etc/security/limits.conf, "
            "or CAP_SYS_NICE"
        )


@contextlib.contextmanager
def fifo(priority: int) -> Iterator[None]:
    """This thread under SCHED_FIFO; 0 leaves it as it is. OSError: it is not allowed."""
    if priority == 0:
        yield
        return
    # a process that is started meanwhile is not to have it: two that compute all the time would stop the machine. Taking the mark
    # away again is not for every user
    before = os.sched_getscheduler(0) | os.SCHED_RESET_ON_FORK, os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


# -- as text ---------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> str:
    """Tables of the reads and the loops, and what was left out."""
    parts = [
        table(
            ["read, ns", *HEADS, "reads"],
            [_row(one["says"], one["ns"], ".0f") for one in result["reads"]],
            right=range(1, 7),
        )
    ]
    for key, title, of, form in (
        ("late_us", "wakes up late, us", "ticks", ".0f"),
        ("age_ms", "age of a command, ms", "ticks", ".2f"),
        ("handover_ms", "age of a chunk's first command, ms", "chunks", ".2f"),
        ("read_us", "read, us", "ticks", ".1f"),
    ):
        rows = [_row(name_of(loop), loop[key], form) for loop in result["loops"]]
        if rows:
            parts.append(table([title, *HEADS, of], rows, right=range(1, 7)))
    return "\n\n".join(parts) + "".join(f"\n{note}" for note in notes(result))


HEADS = ("p50", "p90", "p99", "p99.9", "max")


def name_of(loop: Mapping[str, Any]) -> str:
    """Which loop of a result it is: "Python, loaded, SCHED_FIFO"."""
    return str(Case(loop["reader"], loop["load"], loop["fifo"]))


def _row(name: str, found: dict[str, Any] | None, form: str) -> list[Any]:
    if found is None:
        return [name, *("-" for _ in HEADS), 0]
    return [name, *(number(found[key], form) for key in SHOWN), found["samples"]]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    told = [
        f"{name_of(loop)}: {loop['missed']} ticks left out because one before ended too late"
        for loop in result["loops"]
        if loop["missed"]
    ]
    for loop in result["loops"]:
        other = {status: count for status, count in loop["statuses"].items() if status != "ok"}
        if other:
            told.append(
                f"{name_of(loop)}: "
                + ", ".join(f"{count} commands {status.upper()}" for status, count in other.items())
            )
    if result["fifo"]["why"]:
        told.append(result["fifo"]["why"])
    if result["load_before"] > 0.5:
        told.append(f"load before the first number: {result['load_before']:.1f}; the machine was not idle")
    return told
