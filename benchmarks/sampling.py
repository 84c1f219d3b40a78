"""How chunks are timed: back to back, at a robot's rate, and in turns with the published schedule.

A block is about half a second of samples. Between two blocks the numbers so far are written and the progress bar is moved, never
within one, and the first chunk after a writing is not timed where chunks are short.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dit4dit.benchmarks.contenders import Clock, Planned, Published
from dit4dit.benchmarks.harness import clocks
from dit4dit.benchmarks.recording import Recording

from dit4dit import progress
from dit4dit.noise import Noise
from dit4dit.tables import quantiles_ms

BLOCK = 0.5
"""Seconds of samples between two writings."""
SHORT = 0.1
"""A chunk of fewer seconds feels that something else has just run."""
SLOWEST = 20


@dataclass
class Collections:
    """Garbage collections while something is timed: how many of each generation, and each of the oldest one."""

    counts: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    full: list[dict[str, Any]] = field(default_factory=list)
    sample: tuple[str, int] | None = None
    """What is being timed; what is collected between samples is not counted."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        gc.callbacks.append(self._seen)
        try:
            yield
        finally:
            gc.callbacks.remove(self._seen)

    def _seen(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._start = time.perf_counter()
        elif self.sample is not None:
            taken, generation = time.perf_counter() - self._start, info["generation"]
            self.counts[generation] = self.counts.get(generation, 0) + 1
            self.seconds[generation] = self.seconds.get(generation, 0.0) + taken
            if generation == 2:
                part, i = self.sample
                self.full.append({"part": part, "sample": i, "ms": round(taken * 1e3, 4)})

    def result(self) -> dict[str, Any]:
        """Ready for JSON; `gc.get_count()` and the objects that are frozen are those of now."""
        generations = {
            str(g): {"count": self.counts[g], "ms": round(self.seconds[g] * 1e3, 4)} for g in sorted(self.counts)
        }
        return {
            "by_generation": generations,
            "full": self.full,
            "count": gc.get_count(),
            "frozen": gc.get_freeze_count(),
        }


@dataclass
class Spaced:
    """Samples of a loop that begins a chunk at fixed times, seconds since the first of them."""

    hz: float
    starts: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    missed: int = 0
    clocks: dict[str, Any] = field(default_factory=lambda: {"before": None, "after": None})

    def result(self) -> dict[str, Any]:
        """Ready for JSON. "starts_s" are since the first slot, "late_ms" is how much later than its slot a chunk began."""
        count = min(map(len, (self.starts, self.late, self.seconds)))
        late = quantiles_ms(self.late[:count])
        return {
            "hz": self.hz,
            "wait": "sleep",
            **quantiles_ms(self.seconds[:count]),
            "late_ms": {name: late[name] for name in ("p50", "p99", "max")},
            "missed_slots": self.missed,
            "clocks": self.clocks,
            "samples_ms": rounded(self.seconds[:count]),
            "starts_s": [round(t, 5) for t in self.starts[:count]],
        }


@dataclass
class Samples:
    """All that has been timed so far."""

    alone: list[float] = field(default_factory=list)
    spaced: Spaced | None = None
    totals: dict[str, list[float]] = field(default_factory=dict)
    """Contender -> seconds per chunk, in turns."""
    stages: dict[str, Clock] = field(default_factory=dict)
    collections: Collections = field(default_factory=Collections)

    @property
    def pairs(self) -> int:
        """Turns that are whole: where a process is told to stop, one contender can be a chunk ahead."""
        stages = [len(s) for clock in self.stages.values() for s in clock.seconds.values()]
        return min([*map(len, self.totals.values()), *stages], default=0)


def rounded(seconds: list[float]) -> list[float]:
    return [round(t * 1e3, 4) for t in seconds]


def slowest(seconds: list[float]) -> list[dict[str, float]]:
    """The slowest samples and where they are in the order of time: clustered, at the beginning, or anywhere."""
    order = sorted(range(len(seconds)), key=seconds.__getitem__, reverse=True)
    return [{"sample": i, "ms": round(seconds[i] * 1e3, 4)} for i in order[:SLOWEST]]


class Sampler:
    """Times one engine; `keep` is called between blocks and writes what there is."""

    def __init__(self, fast: Planned, seed: int, record: Recording, keep: Callable[[], None]) -> None:
        self.fast, self.seed, self.record, self.samples = fast, seed, record, Samples()
        self._keep, self._block, self._moved = keep, time.perf_counter(), lambda: None

    def chunk(self, i: int = 0) -> None:
        self.fast.chunk(Noise.from_seed(self.seed, i))

    def warm_up(self, seconds: float, least: int = 1) -> int:
        """Chunks that are not timed, so that clocks and caches are as in a loop; how many."""
        end, count = time.perf_counter() + seconds, 0
        while count < least or time.perf_counter() < end:
            self.chunk(count)
            count += 1
        return count

    def alone(self, count: int, end: float | None) -> None:
        """The engine by itself, one chunk after the other."""
        times = self.samples.alone
        self._begin()
        for i in self._until(count, end, "engine alone", lambda: len(times)):
            self.samples.collections.sample = ("engine_alone", i)
            start = time.perf_counter()
            self.chunk(i)
            times.append(time.perf_counter() - start)
            self.samples.collections.sample = None
            if self._block_over() and times[-1] < SHORT:
                self.chunk()

    def spaced(self, hz: float, count: int, end: float | None) -> None:
        """A chunk at each of a robot's control steps: the schedule is absolute, and the loop sleeps until the next step.

        It does not spin: a core that has slept and a GPU that has been idle are what a control loop finds. A step that comes
        while a chunk still runs is missed; the chunks after it are at their own times and not in a burst.
        """
        spaced = self.samples.spaced = Spaced(hz)
        spaced.clocks["before"] = clocks(lambda: self._one_step(hz))
        self._begin()
        first, slot = 0.0, 0
        for i in self._until(count, end, f"at {hz:g} Hz", lambda: len(spaced.seconds)):
            first = first if i else time.perf_counter()
            due = first + slot / hz
            time.sleep(max(due - time.perf_counter(), 0.0))
            self.samples.collections.sample = ("spaced", i)
            start = time.perf_counter()
            self.chunk(i)
            stop = time.perf_counter()
            self.samples.collections.sample = None
            spaced.starts.append(start - first)
            spaced.late.append(start - due)
            spaced.seconds.append(stop - start)
            after = next_slot(slot, stop - first, hz)
            spaced.missed += after - slot - 1
            slot = after
            if self._block_over():  # one step is left out, so that the next chunk begins as all others do
                slot = next_slot(slot, time.perf_counter() - first, hz)
        spaced.clocks["after"] = clocks(lambda: self._one_step(hz))

    def pairs(self, published: Published | None, count: int, end: float | None) -> None:
        """Engine and published schedule in turns, and the engine's stages."""
        device = self.fast.inputs.frame.device
        names = ("engine",) if published is None else ("engine", "baseline")
        wholes = {who: Clock(device, {"total": []}) for who in names}
        self.samples.totals = {who: whole.seconds["total"] for who, whole in wholes.items()}
        self.samples.stages = stages = {who: Clock(device) for who in names}
        self._begin()
        for i in self._until(count, end, "chunks", lambda: self.samples.pairs):
            self.samples.collections.sample = ("pairs", i)
            with wholes["engine"].stage("total"):
                self.chunk(i)
            self.fast.stages(stages["engine"])
            if published is not None:
                with wholes["baseline"].stage("total"):
                    published.sample(self.fast.inputs, stages["baseline"])
            self.samples.collections.sample = None
            self._block_over()

    def _one_step(self, hz: float) -> None:
        time.sleep(1 / hz)
        self.chunk()

    def _begin(self) -> None:
        self._block = time.perf_counter()

    def _until(self, count: int, end: float | None, what: str, done: Callable[[], int]) -> Iterator[int]:
        """0, 1, ... while there is time, at least once; what the time leaves out is noted, and what another end does."""

        def missing() -> list[str]:
            return [f"{what}: {count - done()} of {count}"] if done() < count else []

        def moved() -> None:
            shown.reach(done())
            if end is not None:
                shown.say(f"at most {max(end - time.monotonic(), 0):.0f} s more")

        self.record.undone(missing)
        with progress.bar(what, count, unit="chunk", mininterval=0) as shown:
            self._moved = moved
            for i in range(count):
                if i and end is not None and time.monotonic() >= end:
                    self.record.undone(list)
                    self.record.short(missing())
                    break
                yield i
            moved()

    def _block_over(self) -> bool:
        """Whether a block has ended, which is then written and shown."""
        if time.perf_counter() - self._block < BLOCK:
            return False
        self._keep()
        self._moved()
        self._begin()
        return True


def next_slot(slot: int, now: float, hz: float) -> int:
    """The first slot after `slot` that is not yet past, `now` seconds after slot 0."""
    return max(slot + 1, math.ceil(now * hz))
