"""Chunks for action streams at times of one's choosing, and a producer that is a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit import ActionChunk, Noise
from dit4dit.control import ActionStream, Command
from dit4dit.robots import Embodiment

T0 = 10**12
"""ns at which tests that give their own times begin."""
MS = 10**6
S = 10**9


def chunk(robot: Embodiment, rows: Any, observed_at_ns: int | None = T0, **changes: Any) -> ActionChunk:
    """rows [K, A] (or [A], repeated 8 times), computed when they were observed."""
    actions = np.asarray(rows, np.float32)
    actions = np.tile(actions, (8, 1)) if actions.ndim == 1 else actions
    stamps = {"observed_at_ns": observed_at_ns, "computed_at_ns": observed_at_ns}
    given = {"control_hz": robot.control_hz, "noise": Noise.from_seed(0), **stamps, **changes}
    return ActionChunk(actions=actions, names=robot.action_names, normalized=actions, **given)


def commands(stream: ActionStream, times: Any) -> list[Command]:
    """One per time, ns."""
    return [stream.at(int(now)) for now in times]


def values(stream: ActionStream, times: Any) -> np.ndarray:
    """[len(times), A], float64."""
    return np.stack([command.values for command in commands(stream, times)])


@contextmanager
def unused_segment() -> Iterator[str]:
    """The name of a segment that is not there, and is not there afterwards."""
    name = f"/dit4dit.test.{os.getpid()}.{next(_COUNT)}"
    try:
        yield name
    finally:
        Path("/dev/shm", name[1:]).unlink(missing_ok=True)


_COUNT = itertools.count()
PRODUCER = """
import sys, time
from stream_chunks import chunk
from dit4dit.control import ActionStream
from dit4dit.robots import EMBODIMENTS
robot, name, value = EMBODIMENTS[sys.argv[1]], sys.argv[2], float(sys.argv[3])
stream = ActionStream(robot, shared=name, interpolation="hold", dead_after_ms=50)
stream.publish(chunk(robot, [value] * robot.action_dim, time.monotonic_ns()))
print("published", flush=True)
{then}
"""


@contextmanager
def producer(robot: Embodiment, name: str, value: float, then: str = "sys.stdin.read()") -> Iterator[subprocess.Popen]:
    """A process that has published one chunk of `value` and then does `then`: it waits for the end of its input."""
    command = [sys.executable, "-c", PRODUCER.format(then=then), robot.name, name, str(value)]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # from a folder without a dit4dit in it, which Python would take first
    folder, environment = Path(__file__).parent, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, cwd=folder, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "published\n"
            yield process
        finally:
            process.kill()
