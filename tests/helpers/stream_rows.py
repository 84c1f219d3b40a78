"""What chunks say between their rows, for tests/helpers/stream_reference.py: csrc/include/dit4dit/interpolation.h.

Row i of a chunk is meant for starts + i * period; u = (now - starts) / period. A chunk begins when it is published and its first
row's time has come, and ends when floor(u + 1e-6) reaches its rows (ticks are whole ns).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TURN = 2 * np.pi
ROW_TOLERANCE = 1e-6
NEVER = np.iinfo(np.int64).max // 4


class Kind(IntEnum):
    POSITION, ANGLE, VELOCITY, RELATIVE, BINARY = range(5)


class Interpolation(IntEnum):
    HOLD, LINEAR, CUBIC = range(3)


class Seam(IntEnum):
    NEWEST, ENSEMBLE, BLEND = range(3)


class Rule(IntEnum):
    HOLD, DECAY, FINISH = range(3)


class Status(IntEnum):
    OK, CONTENDED, DRY, STALE, DEAD, ESTOP = range(6)


class Mode(IntEnum):
    NONE, FOLLOW, HOLD, DECAY = range(4)


@dataclass(frozen=True)
class Robots:
    """kind .. decay_ns [L, C]: rules are those of the channel's group. bounds [L, C, 5]: low, high, velocity, acceleration, jerk.
    mine [L, C]: the reader's channels. The rest [L]."""

    kind: Array
    mine: Array
    bounds: Array
    on_dry: Array
    on_stale: Array
    on_dead: Array
    max_age_ns: Array
    decay_ns: Array
    command_period_ns: Array
    interpolation: Array
    seam: Array
    history: Array
    alpha: Array
    blend_rows: Array
    loop_dead_after_ns: Array


@dataclass(frozen=True)
class Chunks:
    """observed, starts, published (int64 ns; NEVER: there is none), period_ns (float64), rows [L, N]; values float32
    [L, N, K, C]."""

    observed: Array
    starts: Array
    published: Array
    period_ns: Array
    rows: Array
    values: Array

    @property
    def begins(self) -> Array:
        return np.maximum(self.published, self.starts)

    @property
    def ends(self) -> Array:
        return np.maximum(self.starts + np.ceil(self.rows * self.period_ns).astype(np.int64), self.begins)


@dataclass
class Commands:
    """values float64 [L, C], NaN for channels of others; chunk (from 1; 0: none), row, status, age_ns int64 [L]."""

    values: Array
    chunk: Array
    row: Array
    status: Array
    age_ns: Array


# -- between rows ------------------------------------------------------------------------------------------------------------


def wrap(angle: Array) -> Array:
    """The same angle in [-pi, pi)."""
    turned = angle - TURN * np.floor(angle / TURN + 0.5)
    turned = np.where(turned >= np.pi, turned - TURN, turned)
    return np.where(turned < -np.pi, turned + TURN, turned)


def difference(kind: Array, to: Array, start: Array) -> Array:
    return np.where(kind == Kind.ANGLE, wrap(to - start), to - start)


def catmull_rom(before: Array, here: Array, after: Array, t: Array) -> Array:
    """From one knot (t = 0) toward the next, relative to the first, by the differences of four knots."""
    begin, end = 0.5 * (before + here), 0.5 * (here + after)
    return t * (begin + t * (3 * here - 2 * begin - end + t * (begin + end - 2 * here)))


def rows_since(chunks: Chunks, now: Array) -> Array:
    """u [L, N] of now [L] or [L, N]."""
    now = now if now.ndim == 2 else now[:, None]
    return np.maximum((now - chunks.starts).astype(np.float64) / chunks.period_ns, 0.0)


def row_of(chunks: Chunks, u: Array, later: float = 0.0) -> Array:
    return np.floor(u + later + ROW_TOLERANCE)


def at(knots: Array, index: Array) -> Array:
    """Of [L, N, K, C] those with index [L, N] -> [L, N, C]."""
    lanes, chunks = np.indices(index.shape, sparse=True)
    return knots[lanes, chunks, index.astype(np.int64)]


def rows_at(chunks: Chunks, index: Array) -> Array:
    """Rows [L, N, C] of index [L, N], cut to those that there are."""
    return at(chunks.values, np.clip(index, 0, chunks.rows - 1)).astype(np.float64)


def values_at(robots: Robots, chunks: Chunks, now: Array) -> Array:
    """What each chunk says for now [L] -> [L, N, C]; of relative channels nothing that means anything."""
    kind, way = robots.kind[:, None, :], robots.interpolation[:, None, None]
    u, last = rows_since(chunks, now), chunks.rows - 1
    knot = np.floor(u)
    part, inside = (u - knot)[:, :, None], (knot < last)[:, :, None]
    previous, left, right, following = (rows_at(chunks, knot + i) for i in (-1, 0, 1, 2))
    here = difference(kind, right, left)
    before = np.where((knot > 0)[:, :, None], difference(kind, left, previous), here)
    after = np.where((knot + 1 < last)[:, :, None], difference(kind, following, right), here)
    curved = left + np.where(way == Interpolation.CUBIC, catmull_rom(before, here, after, part), part * here)
    held = rows_at(chunks, row_of(chunks, u))
    nearest = np.where(way == Interpolation.HOLD, held, rows_at(chunks, row_of(chunks, u, 0.5)))
    smooth = np.where(way == Interpolation.HOLD, held, np.where(inside, curved, rows_at(chunks, last)))
    return np.where(kind == Kind.BINARY, nearest, smooth)


def path_at(robots: Robots, chunks: Chunks, sums: Array, now: Array, goes_on: Array) -> Array:
    """The path of the summed rows [L, N, C]; behind the last row it stands still, or `goes_on` [L, N] with the last row's
    slope."""
    u, cubic = rows_since(chunks, now), (robots.interpolation == Interpolation.CUBIC)[:, None, None]
    rest = (u - chunks.rows)[:, :, None]
    knot = np.minimum(np.floor(u), chunks.rows - 1)
    t = (u - knot)[:, :, None]
    here, before, after = (rows_at(chunks, knot + i) for i in (0, -1, 1))  # at the ends: the row itself
    inside = at(sums, knot) + np.where(cubic, catmull_rom(before, here, after, t), t * here)
    whole = at(sums, chunks.rows)
    behind = np.where(goes_on[:, :, None], whole + rest * rows_at(chunks, chunks.rows - 1), whole)
    return np.where(rest >= 0, behind, inside)


def limits_of(robots: Robots) -> Array:
    """Bounds for the limiter [L, C, 5]: of a velocity channel the velocity takes the position's place; binary ones have none."""
    low, high, velocity, acceleration, jerk = (robots.bounds[..., i] for i in range(5))
    never = np.full_like(low, np.inf)
    as_velocity = [np.maximum(low, -velocity), np.minimum(high, velocity), acceleration, jerk, never]
    out = np.where((robots.kind == Kind.VELOCITY)[..., None], np.stack(as_velocity, -1), robots.bounds)
    return np.where((robots.kind == Kind.BINARY)[..., None], [-np.inf, np.inf, np.inf, np.inf, np.inf], out)
