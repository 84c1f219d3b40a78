"""Which sample comes next: a function of the seed and of how many came before, alone.

Sample number n of epoch e is drawn with the counter-based generator that the policy's noise uses (key = seed, counter = (n, e)):
first the data set by weight, then a frame uniformly within it. So neither the number of workers nor what was computed before
matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError, shown
from dit4dit.noise import philox

WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Draw:
    """A frame of an episode of a data set, by position."""

    dataset: int
    episode: int
    frame: int


class Draws:
    """Sample number -> frame, for one split.

    Args:
        episodes: for each data set, positions of its episodes of this split.
        lengths: for each data set, frames of each of those episodes.
        weights: of the data sets; those without episodes in this split are never drawn.
        seed: 0 .. 2^64 - 1.
    """

    def __init__(
        self,
        episodes: Sequence[Sequence[int]],
        lengths: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed: expected an integer in 0..2^64-1, got {shown(seed)}")
        self.episodes = [np.asarray(each, dtype=np.int64) for each in episodes]
        self.ends = [np.cumsum(np.asarray(each, dtype=np.int64)) for each in lengths]
        frames = [int(end[-1]) if len(end) else 0 for end in self.ends]
        usable = np.array([w if count else 0.0 for w, count in zip(weights, frames, strict=True)])
        if not usable.sum() > 0:
            raise ConfigError("sampler: no frames to draw from; the data sets of this split are empty")
        self.edges = np.cumsum(usable / usable.sum())
        self.edges[int(np.flatnonzero(usable)[-1]) :] = 1.0
        self.seed = seed
        self.epoch_size = sum(frames)

    def draw(self, number: int, attempt: int = 0) -> Draw:
        """Sample `number` of the whole run; `attempt` counts the replacements of one that could not be read."""
        epoch, within = divmod(number, self.epoch_size)
        counter = np.array([[within & WORD, within >> 32, epoch & WORD, attempt]], dtype=np.uint64)
        words = philox(counter, (self.seed & WORD, self.seed >> 32))[0]
        dataset = int(np.searchsorted(self.edges, _unit(words[0:2]), side="right"))
        ends = self.ends[dataset]
        row = int(_unit(words[2:4]) * int(ends[-1]))
        at = int(np.searchsorted(ends, row, side="right"))
        start = int(ends[at - 1]) if at else 0
        return Draw(dataset, int(self.episodes[dataset][at]), row - start)

    @property
    def fingerprint(self) -> str:
        """What must be the same for a saved position to mean the same samples."""
        digest = hashlib.blake2b(f"{self.seed} {self.epoch_size}".encode(), digest_size=16)
        for array in (self.edges, *self.episodes, *self.ends):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _unit(words: NDArray[np.uint64]) -> float:
    """Two 32-bit words -> a number in [0, 1) of 53 random bits."""
    high, low = int(words[0]) >> 5, int(words[1]) >> 6
    return float((high << 26) + low) * 2.0**-53
