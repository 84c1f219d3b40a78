"""How chunks are timed: nothing is written while one is, and what follows a writing is not timed."""

from __future__ import annotations

import io
import itertools
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import sampling
from dit4dit.benchmarks.recording import Recording


class Stand:
    """A sampler over chunks that take a millisecond, on a terminal; what happens, in order, and while what was timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> None:
        self.events: list[tuple[str, Any]] = []
        stand = self

        class Stream(io.StringIO):
            def isatty(self) -> bool:
                return terminal

            def write(self, text: str) -> int:
                stand.note("write")
                return super().write(text)

        self.stream = Stream()
        monkeypatch.setattr(sys, "stderr", self.stream)
        monkeypatch.setattr(sampling, "BLOCK", 0.02)
        monkeypatch.setattr(sampling, "clocks", lambda work: None)
        fast = SimpleNamespace(chunk=self.chunk, stages=self.stages, inputs=SimpleNamespace(frame=torch.zeros(1)))
        self.record = Recording(None)
        self.sampler = sampling.Sampler(fast, 0, self.record, lambda: None)  # type: ignore[arg-type]

    def note(self, what: str) -> None:
        self.events.append((what, self.sampler.samples.collections.sample))

    def chunk(self, noise: object) -> None:
        self.note("chunk")
        time.sleep(0.001)

    def stages(self, clock: Any) -> None:
        for name in ("vae", "backbone"):
            with clock.stage(name):
                self.note(name)

    def play(self, part: str, count: int, end: float | None = None) -> None:
        if part == "alone":
            self.sampler.alone(count, end)
        elif part == "spaced":
            self.sampler.spaced(200.0, count, end)
        else:
            self.sampler.pairs(None, count, end)


@pytest.mark.parametrize("part", ["alone", "spaced", "pairs"])
def test_nothing_is_written_while_a_chunk_is_timed(part, monkeypatch) -> None:
    stand, threads = Stand(monkeypatch), threading.active_count()
    stand.play(part, 60)
    assert threading.active_count() <= threads
    timed = [what for what, sample in stand.events if sample is not None]
    assert timed.count("chunk") == 60
    assert timed.count("write") == 0
    assert sum(what == "write" for what, _ in stand.events) > 4, "the bar has moved"
    assert "60/60" in stand.stream.getvalue()


def test_the_chunk_after_a_writing_is_not_timed(monkeypatch) -> None:
    stand = Stand(monkeypatch)
    stand.play("alone", 60)
    first = next(i for i, (_, sample) in enumerate(stand.events) if sample is not None)
    later = stand.events[first:]
    after = [b[1] for a, b in itertools.pairwise(later) if (a[0], b[0]) == ("write", "chunk")]
    assert after
    assert set(after) == {None}


def test_a_robots_schedule_begins_after_the_bar_is_drawn(monkeypatch) -> None:
    stand = Stand(monkeypatch)
    make = sampling.progress.bar

    def slow(*words: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return make(*words, **options)

    monkeypatch.setattr(sampling.progress, "bar", slow)
    stand.play("spaced", 1)
    assert stand.sampler.samples.spaced is not None
    assert stand.sampler.samples.spaced.late[0] < 0.3


def test_time_that_ends_a_part_is_kept_and_shown(monkeypatch) -> None:
    stand = Stand(monkeypatch)
    stand.play("alone", 10**6, time.monotonic() + 0.1)
    count = len(stand.sampler.samples.alone)
    assert 0 < count < 10**6
    assert "s more" in stand.stream.getvalue()
    assert f"{count}/1000000" in stand.stream.getvalue()
    with stand.record:
        pass
    assert stand.record.result["cut"]["left"] == [f"engine alone: {10**6 - count} of {10**6}"]


def test_without_a_terminal_a_short_part_writes_its_end_alone(monkeypatch) -> None:
    stand = Stand(monkeypatch, terminal=False)
    stand.play("alone", 30)
    assert stand.stream.getvalue() == "engine alone: 30 of 30, 00:00 left\n"
    assert [sample for what, sample in stand.events if what == "write"] == [None]
