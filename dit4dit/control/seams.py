"""Seams: how one chunk follows another. Each is a fact about a stream; `csrc/include/dit4dit/seams.h` carries it out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dit4dit.errors import ConfigError, shown


@dataclass(frozen=True)
class Switch:
    """The newest chunk, at once."""


@dataclass(frozen=True)
class Ensemble:
    """The mean of what the last chunks say for a moment, weighted by exp(alpha * cosine of each and the newest).

    Attributes:
        alpha: weight of agreement with the newest chunk; finite.
        history: chunks that are averaged at most, 1 or more; an action stream holds 8.
    """

    alpha: float = 0.1
    history: int = 3

    def __post_init__(self) -> None:
        if not _number(self.alpha) or not math.isfinite(self.alpha):
            raise ConfigError(f"ensemble: expected a finite alpha, got {shown(self.alpha)}")
        if not _number(self.history) or not isinstance(self.history, int) or self.history < 1:
            raise ConfigError(
                f"ensemble: history: expected a whole number of chunks, 1 or more, got {shown(self.history)}"
            )


@dataclass(frozen=True)
class Blend:
    """A smooth ramp (3 s^2 - 2 s^3) over the first rows of the new chunk, from what would have been sent without it.

    Attributes:
        rows: length of the ramp, in rows of the new chunk; above 0, at most 64. Need not be whole.
    """

    rows: float = 3.0

    def __post_init__(self) -> None:
        if not _number(self.rows) or not 0 < self.rows <= 64:
            raise ConfigError(
                f"blend: rows: expected a number above 0, 64 at most, got {shown(self.rows)}; Switch() has none"
            )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


Seam = Switch | Ensemble | Blend
