"""Steps between robot units and model values, each with its inverse; training and serving use the same objects.

All act on the last axis of float32 arrays. `forward` goes from the robot to the model, `inverse` back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError
from dit4dit.robots.statistics import VectorStats

Array = NDArray[np.float32]
Mode = Literal["min_max", "q99", "mean_std", "binary", "none"]


class Transform(Protocol):
    def forward(self, x: Array) -> Array: ...
    def inverse(self, y: Array) -> Array: ...


@dataclass(frozen=True)
class Chain:
    """Transforms in forward order; the inverse runs them backwards."""

    steps: tuple[Transform, ...]

    def forward(self, x: Array) -> Array:
        for step in self.steps:
            x = step.forward(x)
        return x

    def inverse(self, y: Array) -> Array:
        for step in reversed(self.steps):
            y = step.inverse(y)
        return y


@dataclass(frozen=True)
class SinCos:
    """[sin(v), cos(v)] of each key's vector, keys concatenated: one-dimensional keys interleave, longer ones do not.

    The inverse is the angle in (-pi, pi]; values outside come back wrapped.
    """

    dims: tuple[int, ...]

    def forward(self, x: Array) -> Array:
        """[..., sum(dims)] -> [..., 2 * sum(dims)]."""
        keys = np.split(x, np.cumsum(self.dims)[:-1], axis=-1)
        return np.concatenate([f(key) for key in keys for f in (np.sin, np.cos)], axis=-1)

    def inverse(self, y: Array) -> Array:
        keys = np.split(y, np.cumsum([d for dim in self.dims for d in (dim, dim)])[:-1], axis=-1)
        return np.concatenate([np.arctan2(s, c) for s, c in zip(keys[0::2], keys[1::2], strict=True)], axis=-1)


@dataclass(frozen=True)
class Pad:
    """Zeros up to the model's width; the inverse cuts them off."""

    size: int
    width: int

    def forward(self, x: Array) -> Array:
        """[..., size] -> [..., width]."""
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.width - self.size)])

    def inverse(self, y: Array) -> Array:
        return y[..., : self.size]


@dataclass(frozen=True)
class Normalize:
    """(x - offset) / scale per dimension, clipped to [-1, 1] where `clip`; the inverse bounds by `low` and `high`, then scales.

    The training mode of a key decides what happens to its values in both directions. The statistics' `mask` (False: the
    published inference passes the value through) was written from key names, so for a gripper that training did normalise it
    is wrong; it counts where the mode leaves the inverse open, for `binary` and `none`, and in the inverse alone:

    | mode     | forward                              | inverse                        | inverse where mask is False       |
    | -------- | ------------------------------------ | ------------------------------ | --------------------------------- |
    | min_max  | min..max to [-1, 1]                  | clip to [-1, 1], to min..max   | the same                          |
    | q99      | q01..q99 to [-1, 1], clipped         | clip to [-1, 1], to q01..q99   | the same                          |
    | mean_std | (x - mean) / std                     | y * std + mean                 | the same                          |
    | binary   | x > 0.5                              | y > 0.5                        | y itself, clip to [-1, 1]         |
    | none     | x                                    | y                              | y, clip to [-1, 1] and min..max   |

    The last clip is the published one to [-1, 1], widened to the range of the data: a robot without normalisation may have
    values of any size.

    Dimensions whose range is empty map to 0 (min_max) or pass through (q99, mean_std), as in the published loader; back
    they come as the one value that the data had (q99: nearly always).
    """

    offset: NDArray[np.float64]
    scale: NDArray[np.float64]
    clip: NDArray[np.bool_]
    """Dimensions that the forward step clips to [-1, 1]."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """Bounds of the model's values in the inverse; infinite where there are none."""
    flat: NDArray[np.bool_]
    """Dimensions of empty range that the forward step maps to 0."""
    constant: NDArray[np.float64]
    """The value of dimensions of empty range, which the inverse gives whatever the model wrote; NaN elsewhere."""
    binary: NDArray[np.bool_]
    """Dimensions that the forward step makes 0 or 1."""
    decided: NDArray[np.bool_]
    """Those of them that the inverse makes 0 or 1 as well."""

    @classmethod
    def from_stats(cls, stats: VectorStats, modes: Sequence[Mode]) -> Normalize:
        """One mode per dimension; what the mask of `stats` means for each is in the class's table."""
        mode = np.asarray(modes)
        offset, scale = np.zeros(stats.size), np.ones(stats.size)
        for name, low, high in (("min_max", stats.min, stats.max), ("q99", stats.q01, stats.q99)):
            chosen = mode == name
            offset[chosen], scale[chosen] = ((low + high) / 2)[chosen], ((high - low) / 2)[chosen]
        chosen = mode == "mean_std"
        offset[chosen], scale[chosen] = stats.mean[chosen], stats.std[chosen]
        # a standard deviation of equal values may come out of its rounding as a little more than 0
        empty = (scale == 0) | ((mode == "mean_std") & (stats.min == stats.max))
        flat = empty & (mode == "min_max")
        constant = np.where(empty, np.where(stats.min == stats.max, stats.min, offset), np.nan)
        passed = empty & (mode != "min_max")
        offset[passed], scale[passed] = 0.0, 1.0
        scale[flat] = 1.0
        low, high = np.full(stats.size, -np.inf), np.full(stats.size, np.inf)
        bounded = np.isin(mode, ("min_max", "q99", "binary"))
        low[bounded], high[bounded] = -1.0, 1.0
        raw = (mode == "none") & ~stats.mask
        low[raw], high[raw] = np.minimum(-1.0, stats.min)[raw], np.maximum(1.0, stats.max)[raw]
        binary = mode == "binary"
        return cls(offset, scale, mode == "q99", low, high, flat, constant, binary, binary & stats.mask)

    def forward(self, x: Array) -> Array:
        """Robot units [..., d] -> model values [..., d]."""
        y = (x - self.offset) / self.scale
        y = np.where(self.clip, np.clip(y, -1, 1), y)
        y = np.where(self.flat, 0.0, y)
        return np.where(self.binary, x > 0.5, y).astype(np.float32)

    def inverse(self, y: Array) -> Array:
        """Model values [..., d] -> robot units [..., d]; what float32 cannot hold becomes infinite (`Codec` refuses it)."""
        y = np.clip(y.astype(np.float64), self.low, self.high)
        x = np.where(np.isnan(self.constant), y * self.scale + self.offset, self.constant)
        with np.errstate(over="ignore"):
            return np.where(self.decided, y > 0.5, x).astype(np.float32)


@dataclass(frozen=True)
class Threshold:
    """One dimension decided by the model to be 0 or 1: below `at` is 0. Robot data hold 0 or 1 already."""

    index: int
    at: float = 0.5

    def forward(self, x: Array) -> Array:
        return x

    def inverse(self, y: Array) -> Array:
        out = y.copy()
        out[..., self.index] = y[..., self.index] >= self.at
        return out


def inverse_table(chain: Chain) -> NDArray[np.float64]:
    """The inverse of an action chain as one row per fact and one column per robot dimension, for `ops.unnormalize`.

    Rows: threshold (NaN: none), low, high, scale, offset; the result of both is the same to the bit.

    Raises:
        ConfigError: the chain has another step than Normalize, Threshold and Pad.
    """
    for step in chain.steps:
        if not isinstance(step, (Normalize, Threshold, Pad)):
            raise ConfigError(f"action chain: expected Normalize, Threshold and Pad alone, got {type(step).__name__}")
    normalize = next((step for step in chain.steps if isinstance(step, Normalize)), None)
    if normalize is None:
        size = next(step.size for step in chain.steps if isinstance(step, Pad))
        none, open_end = np.zeros(size, dtype=bool), np.full(size, np.inf)
        blank = np.full(size, np.nan)
        normalize = Normalize(np.zeros(size), np.ones(size), none, -open_end, open_end, none, blank, none, none)
    size = normalize.scale.shape[0]
    at = np.full(size, np.nan)
    # strictly above 0.5 in float32 is at least the next number
    at[normalize.decided] = np.nextafter(np.float32(0.5), np.float32(1))
    for step in chain.steps:
        if isinstance(step, Threshold):
            at[step.index] = step.at
    fixed = ~np.isnan(normalize.constant)
    scale = np.where(fixed, 0.0, normalize.scale)
    offset = np.where(fixed, normalize.constant, normalize.offset)
    return np.stack([at, normalize.low, normalize.high, scale, offset])
