"""Real-time chunking: the next chunk is made to go on from what the robot is still carrying out of the chunk before.

The method is arXiv 2506.07339, in the guided form without a gradient that LeRobot has; its formulas are those of
`ops.euler_step` and `ops.prefix_weights`. NumPy only; tensors are made where a policy runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError, did_you_mean

Schedule = Literal["linear", "exp", "ones", "zeros"]
MAX_GUIDANCE = 10.0
"""Bound of the guidance's strength where none is given, LeRobot's."""


def check_strength(where: str, schedule: str, max_guidance: float) -> None:
    """InputError unless it is a schedule and a finite bound above 0."""
    if schedule not in get_args(Schedule):
        near = did_you_mean(schedule, get_args(Schedule))
        raise InputError(f"{where}: schedule: expected one of {', '.join(get_args(Schedule))}, got {schedule!r}{near}")
    if not 0.0 < max_guidance < math.inf:
        raise InputError(f"{where}: max_guidance: expected a finite number above 0, got {max_guidance!r}")


@dataclass(frozen=True, eq=False)
class Guidance:
    """What one request is to keep to.

    Attributes:
        previous: left-over of the chunk before, NORMALISED as the model writes it: `chunk.normalized[executed:]`, [n, A_model],
            1 <= n <= K. Its row i is meant for the same control step as row i of the new chunk. Actions in robot units have
            another width or range, and only the width can be told. A left-over shorter than a chunk guides its own rows and no
            others.
        delay: rows of it that will have been executed when the new chunk is there, 0 to n: they have the full weight.
        horizon: rows from here on are free; the weight falls from the delay to here. n where None, and at most n; at least
            the delay.
        schedule: how it falls: "linear", "exp", "ones" (not at all) or "zeros" (at once).
        max_guidance: bound of the strength, above 0.
    """

    previous: NDArray[np.float32]
    delay: int = 0
    horizon: int | None = None
    schedule: Schedule = "linear"
    max_guidance: float = MAX_GUIDANCE

    def __post_init__(self) -> None:
        previous = np.asarray(self.previous)
        if previous.ndim != 2 or 0 in previous.shape or not np.issubdtype(previous.dtype, np.floating):
            raise InputError(
                "guidance: previous: expected chunk.normalized[executed:], floats [n, A] with n >= 1, got "
                f"{previous.dtype} {list(previous.shape)}; give guidance=None where nothing is left"
            )
        if not np.isfinite(previous).all():
            raise InputError("guidance: previous: expected finite numbers, got NaN or infinite ones")
        check_strength("guidance", self.schedule, self.max_guidance)
        self._check_whole("delay", self.delay, 0, len(previous), "the rows of previous")
        if self.horizon is not None:
            self._check_whole("horizon", self.horizon, self.delay, None, "at least the delay")
        kept = np.array(previous, np.float32)  # a copy: the caller's buffer may change
        kept.flags.writeable = False
        object.__setattr__(self, "previous", kept)

    @staticmethod
    def _check_whole(name: str, value: object, low: int, high: int | None, what: str) -> None:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
            wanted = f">= {low}" if high is None else f"{low} to {high}"
            raise InputError(f"guidance: {name}: expected a whole number {wanted} ({what}), got {value!r}")

    def check(self, length: int, width: int) -> None:
        """InputError unless it fits chunks of `length` rows and `width` model dimensions."""
        rows, found = self.previous.shape
        if rows > length or found != width:
            raise InputError(
                f"guidance: previous: expected [n, A] = [1 to {length}, {width}], as ActionChunk.normalized[executed:] is, got "
                f"{[rows, found]}"
            )
        if self.horizon is not None and self.horizon > length:
            raise InputError(f"guidance: horizon: expected at most {length}, the rows of a chunk, got {self.horizon}")

    def arrays(self, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """previous [K, A] and its weights [K] for chunks of `length` rows K; rows that are not there have weight 0."""
        from dit4dit.ops.euler_step import prefix_weights

        rows, width = self.previous.shape
        previous = np.zeros((length, width), np.float32)
        previous[:rows] = self.previous
        horizon = rows if self.horizon is None else min(self.horizon, rows)
        return previous, prefix_weights(self.schedule, self.delay, horizon, length).numpy()
