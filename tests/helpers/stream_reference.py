"""The definition of a reader of an action stream: csrc/include/dit4dit/{chain,seams,reader}.h do this, bit for bit.

Vectorized over lanes: each is a robot with its own layout, chunks and ticks. L lanes, C channels, N chunks, K rows. All chunks
that will ever be published are given at once; a lane knows those that have begun, and the newest of them governs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from limiter_reference import LimiterReference
from stream_rows import (
    NEVER,
    Array,
    Chunks,
    Commands,
    Interpolation,
    Kind,
    Mode,
    Robots,
    Rule,
    Seam,
    Status,
    difference,
    limits_of,
    path_at,
    row_of,
    rows_since,
    values_at,
    wrap,
)

__all__ = [
    "NEVER",
    "Chunks",
    "Commands",
    "Interpolation",
    "Kind",
    "Reader",
    "Robots",
    "Rule",
    "Seam",
    "Status",
    "limits_of",
    "wrap",
]

MOST_HISTORY = 8
SHORTEST_TICK, LONGEST_TICK, AT_REST = 50_000, 20_000_000, 250_000_000
MADE_UP_FOR = 0.5  # seconds at the velocity limit, of displacements that limits hold back


# -- seams -------------------------------------------------------------------------------------------------------------------


def exponential(x: Array) -> Array:
    y = np.clip(x, -100, 100) / 256
    total = np.ones_like(y)
    for k in range(8, 0, -1):
        total = 1 + y / k * total
    for _ in range(8):
        total = total * total
    return total


def ramp(now: Array, begins: Array, length: Array) -> Array:
    s = (now - begins).astype(np.float64) / length
    return np.where(s >= 1, 1.0, np.where(s > 0, s * s * (3 - 2 * s), 0.0))


def mix(kind: Array, newer: Array, older: Array, weight: Array) -> Array:
    return np.where(kind == Kind.BINARY, newer, newer + (1 - weight) * difference(kind, older, newer))


@dataclass
class Chain:
    """Of one moment: usable [L, N]: has begun, no newer one had begun before, not from before an e-stop. place [L, N]: how many
    usable ones are newer. newest [L]: index; -1: none."""

    usable: Array
    place: Array
    newest: Array

    @classmethod
    def of(cls, chunks: Chunks, now: Array, released: Array) -> Chain:
        begins = chunks.begins
        later = np.minimum.accumulate(begins[:, ::-1], axis=1)[:, ::-1]
        overtaken = np.zeros(begins.shape, bool)
        overtaken[:, :-1] = later[:, 1:] <= begins[:, :-1]
        usable = (begins <= now[:, None]) & ~overtaken & (chunks.observed >= released[:, None])
        newer = np.cumsum(usable[:, ::-1], axis=1)[:, ::-1] - usable
        newest = np.where(usable.any(1), usable.shape[1] - 1 - usable[:, ::-1].argmax(1), -1)
        return cls(usable, newer, newest)

    def pick(self, per_chunk: Array) -> Array:
        """The newest's of [L, N, ...]; where there is none, the first's."""
        return per_chunk[np.arange(len(self.newest)), np.maximum(self.newest, 0)]


class Reader:
    """One reader per lane."""

    def __init__(self, robots: Robots, chunks: Chunks) -> None:
        lanes = len(robots.kind)
        self.robots, self.chunks = robots, chunks
        kind = robots.kind
        self.relative, self.binary = kind == Kind.RELATIVE, kind == Kind.BINARY
        self.moves = self.relative | (kind == Kind.VELOCITY)
        sums = np.cumsum(chunks.values.astype(np.float64), axis=2)
        self.sums = np.concatenate([np.zeros_like(sums[:, :, :1]), sums], axis=2)
        bounds = limits_of(robots)
        self.limited = np.isfinite(bounds).any(-1)
        self.limiter = LimiterReference(bounds.reshape(-1, 5))
        self.limiter.reset(np.zeros(kind.size), self.moves.ravel())
        nothing = np.where(self.moves, 0.0, np.nan)
        self.asked, self.sent = nothing.copy(), nothing.copy()
        self.base, self.fades_from, self.path = np.zeros_like(nothing), np.zeros_like(nothing), np.zeros_like(nothing)
        self.started = self.moves.copy()
        self.mode = np.full(kind.shape, Mode.NONE)
        self.base_at, self.since = np.zeros(kind.shape, np.int64), np.zeros(kind.shape, np.int64)
        self.ticked, self.stopped = np.zeros(lanes, bool), np.zeros(lanes, bool)
        self.last, self.until, self.released = (np.zeros(lanes, np.int64) for _ in range(3))
        self.newest_id, self.newest_observed = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.chunk, self.observed = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.row = np.full(lanes, -1)

    def start_at(self, pose: Array, lanes: Array) -> None:
        """At rest in pose [L, C], NaN: not known; for some lanes [L]."""
        given = lanes[:, None] & np.isfinite(pose) & ~self.relative
        zero = lanes[:, None] & self.relative
        self.limiter.reset(np.where(self.relative, 0.0, pose).ravel(), (given | zero).ravel())
        pose = np.where(self.binary, (pose > 0.5) * 1.0, pose)
        for name in ("asked", "sent"):
            setattr(self, name, np.where(given, pose, np.where(zero, 0.0, getattr(self, name))))
        self.path = np.where(zero, 0.0, self.path)
        self.started |= given
        self.mode = np.where(lanes[:, None], Mode.NONE, self.mode)
        self.ticked &= ~lanes
        self.last = np.where(lanes, 0, self.last)
        self.stopped &= ~lanes

    def stop(self, lanes: Array) -> None:
        self.stopped |= lanes

    def read(self, now: Array, estop: Array, sign_of_life: Array) -> Commands:
        """For now, estop (is it latched?), sign_of_life (the producer's loop, ns), all [L]."""
        robots, chunks = self.robots, self.chunks
        again = self.ticked & (now == self.last)
        now = np.maximum(now, self.last)
        estop = estop | self.stopped
        self.released = np.where(estop, now, self.released)  # the robot stops elsewhere than these chunks planned
        chain = Chain.of(chunks, now, self.released)
        some = chain.newest >= 0
        u = chain.pick(rows_since(chunks, now))
        rows = chain.pick(chunks.rows)
        dry = ~some | (row_of(chunks, u) >= rows)
        self.newest_id = np.where(some, chain.newest + 1, self.newest_id)
        self.newest_observed = np.where(some, chain.pick(chunks.observed), self.newest_observed)
        old = (now - self.newest_observed)[:, None]
        stale = (self.newest_id > 0)[:, None] & (robots.max_age_ns > 0) & (old > robots.max_age_ns) & robots.mine
        after = robots.loop_dead_after_ns
        dead = (after > 0) & (now - sign_of_life >= after)

        ticks = ~self.ticked | (now - self.last >= SHORTEST_TICK)
        followed = self.mode == Mode.FOLLOW
        brakes = self._enter(now, ticks, estop, dead, stale, dry)
        follows = (self.mode == Mode.FOLLOW) & robots.mine
        any_follows = follows.any(1)
        end = now + robots.command_period_ns
        start = np.where(self.ticked, self.until, now)
        to = np.where(some, np.minimum(end, np.maximum(chain.pick(chunks.ends), start)), end)
        span = Span(start, to, chain.pick(chunks.begins))
        wanted, seconds = self._follow(chain, now, span, ticks[:, None] & follows, followed)
        ends = self.relative & followed & (self.mode != Mode.FOLLOW) & ~brakes & some[:, None]
        self._move(now, ticks, np.where(follows | ends, wanted, 0.0), seconds, brakes)

        row = np.minimum(row_of(chunks, u), rows - 1).astype(np.int64)
        self.row = np.where(ticks, np.where(any_follows, row, -1), self.row)
        self.chunk = np.where(ticks, self.newest_id, self.chunk)
        self.observed = np.where(ticks, self.newest_observed, self.observed)
        self.until = np.where(ticks, np.where(any_follows, to, end), self.until)
        self.last = np.where(ticks, now, self.last)
        self.ticked |= ticks
        status = np.select(
            [estop, dead, stale.any(1), dry], [Status.ESTOP, Status.DEAD, Status.STALE, Status.DRY], Status.OK
        )
        values = np.where(self.relative & ~(ticks | again)[:, None], 0.0, self.sent)
        values = np.where(robots.kind == Kind.ANGLE, wrap(values), values)
        age = np.where(self.chunk > 0, now - self.observed, -1)
        return Commands(np.where(robots.mine, values, np.nan), self.chunk, self.row, status, age)

    def _enter(self, now: Array, ticks: Array, estop: Array, dead: Array, stale: Array, dry: Array) -> Array:
        """What each channel does; returns which ones brake."""
        robots, rules = self.robots, lambda rule: np.where(rule == Rule.DECAY, Mode.DECAY, Mode.HOLD)
        cases = [
            np.broadcast_to(estop[:, None], stale.shape),
            dead[:, None] & (robots.on_dead != Rule.FINISH),
            stale & (robots.on_stale != Rule.FINISH),
            np.broadcast_to(dry[:, None], stale.shape),
        ]
        modes = [np.full(stale.shape, Mode.HOLD), *(rules(r) for r in (robots.on_dead, robots.on_stale, robots.on_dry))]
        mode = np.where(ticks[:, None], np.select(cases, modes, Mode.FOLLOW), self.mode)
        begins, fades = ((mode == m) & (self.mode != m) for m in (Mode.FOLLOW, Mode.DECAY))
        self.base_at = np.where(begins, now[:, None], self.base_at)
        self.base = np.where(
            begins, np.where(self.relative, np.nan, self.asked), self.base
        )  # first displacements are whole
        self.since = np.where(fades, now[:, None], self.since)
        self.fades_from = np.where(fades, self.asked, self.fades_from)
        self.mode = mode
        return cases[0] | cases[1] | cases[2]

    def _follow(self, chain: Chain, now: Array, span: Span, follows: Array, followed: Array) -> tuple[Array, Array]:
        """What the chunks ask for [L, C], and the seconds that displacements are for. Relative channels that followed at the tick
        before also owe what older chunks say for their part of the span; where the chunk has ended, what is left of it."""
        own = self._displacements(chain, np.maximum(span.own, 0)[:, None], span.to[:, None], chain.place > 0)
        says = np.where(self.relative[:, None], own, values_at(self.robots, self.chunks, now))
        own_seconds = ((span.to - span.own).astype(np.float64) * 1e-9)[:, None]
        seam = self.robots.seam[:, None]
        wanted = chain.pick(says)
        wanted = np.where(follows & (seam == Seam.ENSEMBLE), self._average(chain, now, span, says), wanted)
        wanted = np.where(follows & (seam == Seam.BLEND), self._blend(chain, now, own_seconds, says, follows), wanted)
        owes = self.relative & followed & (span.own != span.start)[:, None]
        if owes.any():
            wanted = np.where(owes, wanted + self._earlier(chain, span), wanted)
        return wanted, np.where(followed, ((span.to - span.start).astype(np.float64) * 1e-9)[:, None], own_seconds)

    def _displacements(self, chain: Chain, start: Array, to: Array, goes_on: Array) -> Array:
        ends = (np.broadcast_to(t, goes_on.shape) for t in (to, start))
        end, begin = (path_at(self.robots, self.chunks, self.sums, t, goes_on) for t in ends)
        return end - begin

    def _earlier(self, chain: Chain, span: Span) -> Array:
        """Each moment from before the newest chunk began belongs to the chunk that was the newest then."""
        begins, number = self.chunks.begins, self.chunks.begins.shape[1]
        to, left = np.zeros_like(begins), span.own
        for n in reversed(range(number)):
            to[:, n] = np.maximum(left, span.start)
            left = np.where(chain.usable[:, n], np.minimum(begins[:, n], left), left)
        start = np.minimum(np.maximum(begins, span.start[:, None]), to)
        parts = self._displacements(chain, start, to, np.zeros(begins.shape, bool))
        total = np.zeros_like(self.asked)
        for n in reversed(range(number)):
            older = chain.usable[:, n] & (chain.place[:, n] > 0)
            total = np.where(older[:, None], total + parts[:, n], total)
        return total

    def _average(self, chain: Chain, now: Array, span: Span, says: Array) -> Array:
        robots, chunks, kind = self.robots, self.chunks, self.robots.kind
        over = row_of(chunks, rows_since(chunks, now)) >= chunks.rows
        member = chain.usable & (chain.place < robots.history[:, None]) & ((chain.place == 0) | ~over)
        length = (span.to - span.own).astype(np.float64)
        per_row = np.where(length > 0, chain.pick(chunks.period_ns) / np.where(length > 0, length, 1), 0.0)
        scale = np.where(self.relative, per_row[:, None], 1.0)
        newest = chain.pick(says)
        lanes, number = member.shape
        x = scale * newest
        y = x[:, None] + scale[:, None] * difference(kind[:, None], says, newest[:, None])
        dot, square = np.zeros((lanes, number)), np.zeros((lanes, number))
        for c in range(kind.shape[1]):
            mine = robots.mine[:, c, None]
            dot = np.where(mine, dot + x[:, c, None] * y[:, :, c], dot)
            square = np.where(mine, square + y[:, :, c] * y[:, :, c], square)
        cosine = dot / (np.sqrt(square) * np.sqrt(chain.pick(square))[:, None] + 1e-7)
        weights = exponential(robots.alpha[:, None] * cosine)
        total = np.zeros(lanes)
        for n in reversed(range(number)):
            total = np.where(member[:, n], total + weights[:, n], total)
        away = np.zeros(kind.shape)
        for n in reversed(range(number)):
            weight = (weights[:, n] / np.where(total > 0, total, 1))[:, None]
            apart = difference(kind, says[:, n], newest)
            apart = np.where(self.binary, apart * apart, apart)
            away = np.where((member[:, n] & (chain.place[:, n] > 0))[:, None], away + weight * apart, away)
        voted = np.where(away > 0.5, 1 - newest, newest)
        return np.where(self.binary, voted, newest + away)

    def _blend(self, chain: Chain, now: Array, seconds: Array, says: Array, follows: Array) -> Array:
        """Each chunk ramps up over what would have been sent without it, from the last one that nothing older shows through. But
        displacements of a chunk that comes when the one before has ended are sent as they are."""
        chunks, kind = self.chunks, self.robots.kind
        begins, number = chunks.begins, chunks.begins.shape[1]
        length = self.robots.blend_rows[:, None] * chunks.period_ns
        base_at, base = self.base_at, np.where(self.relative, self.base * seconds, self.base)
        oldest = chain.usable.cumsum(1) == 1
        shows, bottom, weight = ([np.zeros(0)] * number for _ in range(3))
        on_base = [begins[:, n, None] <= base_at for n in range(number)]
        open_ = np.ones(kind.shape, bool)
        for n in reversed(range(number)):
            start = np.where(on_base[n], base_at, begins[:, n, None])
            weight[n] = ramp(now[:, None], start, length[:, n, None])
            shows[n] = open_ & chain.usable[:, n, None]
            bottom[n] = shows[n] & (on_base[n] | (weight[n] == 1) | oldest[:, n, None])
            open_ = open_ & ~bottom[n]
        y, ended = np.zeros(kind.shape), np.zeros(len(now), np.int64)
        for n in range(number):
            alone = self.relative & (ended <= begins[:, n])[:, None]
            ended = np.where(chain.usable[:, n], chunks.ends[:, n], ended)
            from_base = bottom[n] & on_base[n] & ~np.isnan(base)
            renews = shows[n] & ~bottom[n] & (chain.place[:, n, None] == MOST_HISTORY - 1) & follows
            renews &= (self.robots.seam == Seam.BLEND)[:, None]
            per_second = np.where(seconds > 0, y / np.where(seconds > 0, seconds, 1), 0.0)
            self.base = np.where(renews, np.where(self.relative, per_second, y), self.base)
            self.base_at = np.where(renews, begins[:, n, None], self.base_at)
            mixed = np.where(alone, says[:, n], mix(kind, says[:, n], y, weight[n]))
            y = np.where(bottom[n], says[:, n], np.where(shows[n], mixed, y))
            y = np.where(from_base, mix(kind, says[:, n], base, weight[n]), y)
        return y

    def _move(self, now: Array, ticks: Array, wanted: Array, seconds: Array, brakes: Array) -> None:
        robots, relative, moves = self.robots, self.relative, self.moves
        follows, fades = self.mode == Mode.FOLLOW, moves & (self.mode == Mode.DECAY)
        tick_seconds = (robots.command_period_ns.astype(np.float64) * 1e-9)[:, None]
        passed = (now[:, None] - self.since).astype(np.float64)
        length = robots.decay_ns.astype(np.float64)
        left = np.where(length > passed, 1 - passed / np.where(length > 0, length, 1), 0.0)
        rate = np.where(seconds > 0, wanted / np.where(seconds > 0, seconds, 1), self.asked)
        asked = np.where(follows, np.where(relative, rate, wanted), self.asked)
        asked = np.where(moves & ~follows, np.where(fades, self.fades_from * left, 0.0), asked)
        displaced = np.where(follows, wanted, wanted + asked * tick_seconds)
        brakes = brakes & ~fades & (robots.kind != Kind.VELOCITY)

        period = robots.command_period_ns
        since = np.where(self.ticked, now - self.last, period)
        rested = ticks & (since > np.maximum(AT_REST, 4 * period))  # it stands where it was sent
        self.limiter.reset(self.limiter.now.x, (rested[:, None] & self.started).ravel())
        before = self.limiter.now.x.reshape(asked.shape)
        path, farthest = self.path + displaced, limits_of(robots)[..., 2] * MADE_UP_FOR
        path = np.where(path - before > farthest, before + farthest, path)
        path = np.where(path - before < -farthest, before - farthest, path)
        turned = np.where(self.started & (robots.kind == Kind.ANGLE), before + wrap(asked - before), asked)
        target = np.where(relative, path, turned)
        known = self.started | ~np.isnan(asked)
        acts = ticks[:, None] & self.limited & robots.mine & known & ~self.binary
        dt = np.minimum(since, np.maximum(LONGEST_TICK, 2 * period)).astype(np.float64) * 1e-9
        after = self.limiter.tick(
            np.where(brakes, np.nan, target).ravel(), np.where(acts, dt[:, None], 0.0).ravel()
        ).reshape(asked.shape)
        rests = acts & brakes
        new = ticks[:, None] & robots.mine
        self.asked = np.where(new, np.where(rests & ~relative, after, asked), self.asked)
        self.path = np.where(acts & relative, np.where(rests, after, path), self.path)
        self.started |= acts
        free = np.where(relative, displaced, asked)
        self.sent = np.where(new, np.where(acts, np.where(relative, after - before, after), free), self.sent)


@dataclass(frozen=True)
class Span:
    """The time that relative channels' displacements are for [L]: the newest chunk's own part of it begins when it does."""

    start: Array
    to: Array
    begins: Array

    @property
    def own(self) -> Array:
        return np.where(self.start < self.begins, np.minimum(self.begins, self.to), self.start)
