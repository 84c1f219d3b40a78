"""LIBERO's commands, and fingers that follow them."""

from __future__ import annotations

import numpy as np


def fingers(
    command: np.ndarray, *, lag: int = 10, travel: int = 10, held: float = 0.0, start: float = 0.08
) -> np.ndarray:
    """Opening in metres [n] of LIBERO's gripper under commands 1 = open: it starts `lag` frames late, takes `travel` frames from
    end to end, and stops at an object `held` wide.
    """
    opening, at, most = [], start, 0.08 / travel
    told = [bool(value) for value in command]
    for frame in range(len(told)):
        target = 0.08 if told[max(0, frame - lag)] else held
        at += max(-most, min(most, target - at))
        opening.append(at)
    return np.array(opening)


def pick_and_place(rng: np.random.Generator, frames: int = 120) -> np.ndarray:
    """LIBERO's commands: open, closed around an object, open again."""
    close, release = rng.integers(30, 50), rng.integers(75, 110)
    command = np.ones(frames)
    command[close:release] = 0
    return command
