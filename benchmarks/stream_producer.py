"""The producer of `dit4dit bench stream`: slow waves for a robot of 23 joints, until its input ends."""

from __future__ import annotations

import select
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.control import ActionStream, Blend
from dit4dit.robots.channels import Bounds
from dit4dit.robots.embodiment import Embodiment, Key

ROWS, CONTROL_HZ, COMMAND_HZ = 16, 30.0, 1000.0


def _none(given: Any) -> Any:
    raise NotImplementedError("the robot of a benchmark")


ROBOT = Embodiment(
    name="bench",
    tag="bench",
    views=("view",),
    state=(),
    action=(Key("joints", 23, kind="position", limits=Bounds(-3.0, 3.0, velocity=2.0, acceleration=10.0, jerk=100.0)),),
    state_encoding="normalized",
    control_hz=CONTROL_HZ,
    observe=_none,
    command=_none,
    record=_none,
)
"""The same channels and limits as those of csrc/stream_bench.cpp, whose single reads are timed."""


@dataclass(frozen=True)
class Chunk:
    """What `ActionStream.publish` looks at."""

    actions: NDArray[np.float32]
    observed_at_ns: int
    computed_at_ns: int
    names: tuple[str, ...] = ROBOT.action_names
    control_hz: float = CONTROL_HZ


def chunk(now_ns: int) -> Chunk:
    """Waves that depend on the time alone, so that each chunk goes on where the one before is."""
    seconds = now_ns / 1e9 + np.arange(ROWS)[:, None] / CONTROL_HZ
    actions = 0.3 * np.sin(2 * np.pi * (0.25 * seconds + 0.1 * np.arange(ROBOT.action_dim)))
    return Chunk(actions.astype(np.float32), now_ns, now_ns)


def produce(name: str, period_ns: int) -> None:
    """Publish a chunk each period, observed at that moment. Writes "ready" when the first is there."""
    with ActionStream(ROBOT, command_hz=COMMAND_HZ, seam=Blend(rows=3), shared=name) as stream:
        due = time.monotonic_ns()
        stream.publish(chunk(due))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            due += period_ns
            if select.select([sys.stdin], [], [], max(due - time.monotonic_ns(), 0) / 1e9)[0]:
                return
            stream.publish(chunk(time.monotonic_ns()))
