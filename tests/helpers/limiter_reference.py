"""csrc/include/dit4dit/limiter.h in NumPy, for many channels at once: the same operations in the same order, so the same bits.

Every branch is computed for all lanes and `np.where` chooses; what the header says of its steps is not repeated here.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np

LEAST_TICK = 50e-6
INSIDE, REACHED = 0.999, 1 + 1e-9
FROM_REST = 0.8 / INSIDE


class Motion(NamedTuple):
    x: np.ndarray
    v: np.ndarray
    a: np.ndarray


class Reach(NamedTuple):
    down: np.ndarray
    up: np.ndarray
    jerk_down: np.ndarray
    jerk_up: np.ndarray


class Ramp(NamedTuple):
    j1: np.ndarray
    j3: np.ndarray
    t1: np.ndarray
    t2: np.ndarray
    t3: np.ndarray

    @property
    def duration(self) -> np.ndarray:
        return self.t1 + self.t2 + self.t3


class Aim(NamedTuple):
    at: Motion
    jerk: np.ndarray

    def after(self, t):
        return Aim(advanced(self.at, self.jerk, t), self.jerk)


def pick(mask, yes, no):
    """np.where for tuples of arrays."""
    return type(yes)(*(np.where(mask, y, n) for y, n in zip(yes, no, strict=True)))


def taken(value: Any, lanes: np.ndarray) -> Any:
    """Some lanes of an array, or of all arrays of a tuple or a limiter."""
    if isinstance(value, tuple):
        parts = [taken(x, lanes) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, LimiterReference):
        part = copy.copy(value)
        vars(part).update({name: taken(x, lanes) for name, x in vars(value).items()})
        return part
    return value[lanes]


def put(value: Any, lanes: np.ndarray, part: Any) -> Any:
    """`value` with some of its lanes replaced."""
    if isinstance(value, tuple):
        return type(value)(*(put(x, lanes, y) for x, y in zip(value, part, strict=True)))
    value = np.array(value)
    value[lanes] = part
    return value


def minus(m, n):
    return Motion(m.x - n.x, m.v - n.v, m.a - n.a)


def advanced(m, jerk, t):
    return Motion(
        m.x + t * (m.v + t * (m.a * 0.5 + t * (jerk * (1.0 / 6)))), m.v + t * (m.a + t * (jerk * 0.5)), m.a + t * jerk
    )


def clipped(x, low, high):
    return np.where(x < low, low, np.where(x > high, high, x))


def root(square):
    return np.where(square > 0, np.sqrt(np.where(square > 0, square, 0.0)), 0.0)


def ramp_to(goal, v, a, reach):
    level = v + a * np.abs(a) * 0.5 / np.where(a > 0, reach.jerk_down, reach.jerk_up)
    rises = level < goal
    s = np.where(rises, 1.0, -1.0)
    most = np.where(rises, reach.up, reach.down)
    on = np.where(rises, reach.jerk_up, reach.jerk_down)
    off = np.where(rises, reach.jerk_down, reach.jerk_up)
    begin, gap = s * a, s * (goal - v)
    t2 = (gap - begin * begin * 0.5 / off) / most
    back = Ramp(-s * off, -s * off, (begin - most) / off, np.where(t2 > 0, t2, 0.0), most / off)
    missing = gap + begin * begin * 0.5 / on
    peak = root(missing * (2 * on * off / (on + off)))
    full = peak > most
    peak = np.where(full, most, peak)
    t2 = np.where(full, missing / peak - peak * (0.5 / on + 0.5 / off), 0.0)
    t1 = (peak - begin) / on
    there = Ramp(s * on, -s * off, np.where(t1 > 0, t1, 0.0), np.where(t2 > 0, t2, 0.0), peak / off)
    return pick(begin > most, back, there)


def along(m, r, between, t):
    first = advanced(m, r.j1, t)
    m1, u = advanced(m, r.j1, r.t1), t - r.t1
    second = advanced(m1, between, u)
    m2, w = advanced(m1, between, r.t2), u - r.t2
    third = advanced(m2, r.j3, w)
    behind = advanced(advanced(m2, r.j3, r.t3), between, w - r.t3)
    return pick(t <= r.t1, first, pick(u <= r.t2, second, pick(w <= r.t3, third, behind)))


def end_of(m, r):
    return advanced(advanced(advanced(m, r.j1, r.t1), 0.0, r.t2), r.j3, r.t3).x


def settled(m, r, goal, t):
    over = t - r.duration
    goal = np.broadcast_to(goal, over.shape)
    return pick(over < 0, along(m, r, 0.0, t), Motion(end_of(m, r) + over * goal, goal, np.zeros_like(over)))


def miss(m, aim, reach):
    r = minus(m, aim.at)
    return end_of(r, ramp_to(0.0, r.v, r.a, reach))


def switching(now, drive, full, since, reach, error, dt, tolerance):
    a, at_a, b, t = np.zeros_like(dt), error, dt, dt.copy()
    at_b = miss(settled(now, drive, full, dt), since.after(dt), reach)
    left = np.flatnonzero(at_b * full > 0)
    state = taken((now, drive, full, since, reach, tolerance, a, at_a, b, at_b, np.zeros(len(dt), int)), left)
    for i in range(72):
        now, drive, full, since, reach, tolerance, a, at_a, b, at_b, side = state
        t[left] = new = (a * at_b - b * at_a) / (at_b - at_a) if i < 20 else 0.5 * (a + b)
        f = miss(settled(now, drive, full, new), since.after(new), reach)
        beyond = f * full > 0
        at_a, at_b = (
            np.where(beyond, np.where(side > 0, at_a * 0.5, at_a), f),
            np.where(beyond, f, np.where(side < 0, at_b * 0.5, at_b)),
        )
        a, b, side = np.where(beyond, a, new), np.where(beyond, new, b), np.where(beyond, 1, -1)
        go_on = np.flatnonzero(~(np.abs(f) <= tolerance))
        if not len(go_on):
            return t
        left = left[go_on]
        state = taken((now, drive, full, since, reach, tolerance, a, at_a, b, at_b, side), go_on)
    t[left] = state[6]  # a
    return t


class LimiterReference:
    """Channels [N] with limits [N, 5]: low, high, velocity, acceleration, jerk."""

    def __init__(self, limits: np.ndarray) -> None:
        low, high, v, a, j = np.ascontiguousarray(np.asarray(limits, np.float64).T)
        inf = np.inf
        self.low, self.high = low, high
        self.still = ~((v > 0) & (a > 0) & (j > 0) & (low <= high))
        self.dynamic = (v < inf) | (a < inf) | (j < inf)
        self.bounded = (low > -inf) | (high < inf)
        a = np.where(a < inf, a, np.where(v < inf, v * 1e6, np.where(j < inf, j * 1e6, 1.0)))
        j = np.where(j < inf, j, a * 1e6)
        v = np.where(v < inf, v, a * 1e6)
        self.v, self.a, self.j = v * INSIDE, a * INSIDE, j * INSIDE
        self.own = Reach(self.a, self.a, self.j, self.j)
        with np.errstate(divide="ignore"):
            self.half = 0.5 / self.j
        zero, no = np.zeros_like(v), np.zeros(v.shape, bool)
        self.started, self.first, self.exact, self.aimless = no, ~no, ~no, ~no
        self.now = Motion(zero, zero, zero)
        self.goal = self.v1 = self.a1 = self.d1 = self.d2 = zero
        self.targets, self.met, self.open = (zero, zero, zero), np.zeros(v.shape, int), no

    def reset(self, position: np.ndarray, lanes: np.ndarray | bool = True) -> None:
        """position [N]; `lanes` [N]: which."""
        lanes = lanes & (position - position == 0)
        zero = np.zeros_like(position)
        self.started, self.first = self.started | lanes, self.first | lanes
        self.exact, self.aimless = self.exact | lanes, self.aimless | lanes
        self.met, self.open = np.where(lanes, 0, self.met), self.open & ~lanes
        self.now = pick(lanes, Motion(position, zero, zero), self.now)
        self.goal, self.v1, self.a1 = (np.where(lanes, 0.0, x) for x in (self.goal, self.v1, self.a1))

    def tick(self, target: np.ndarray, dt: np.ndarray) -> np.ndarray:
        """target, dt [N] -> sent [N]; a lane brakes where its target is NaN or infinite."""
        with np.errstate(all="ignore"):
            usable = (dt >= LEAST_TICK) & (dt - dt == 0)
            aims = usable & (target - target == 0)
            target = clipped(target, self.low, self.high)
            self.reset(target, aims & ~self.started)
            aims = aims & ~self.still
            clamped = aims & ~self.dynamic
            self.now = self.now._replace(x=np.where(clamped, target, self.now.x))
            moves = self.dynamic & ~self.still & self.started & usable
            aims = aims & moves
            self._move(target, dt, aims, moves & ~aims)
        return self.now.x

    def _move(self, target, dt, aims, brakes):
        moves = aims | brakes
        begins = moves & self.first
        self.d1, self.d2 = np.where(begins, dt, self.d1), np.where(begins, dt, self.d2)
        self.first = self.first & ~moves
        self.targets = tuple(np.where(aims & self.aimless, target, t) for t in self.targets)
        self.aimless = (self.aimless & ~aims) | brakes
        self.exact = self.exact & ~brakes

        some = np.flatnonzero(aims & self.exact & (self.met > 0))
        part = taken(self, some)
        fits, on, on_goal = part._along(target[some], dt[some])
        self.met = put(self.met, some, part.met)
        kept = put(np.zeros(dt.shape, bool), some, fits)
        sent, m, goal = self._exactly(target, dt, aims & self.exact & ~kept)
        open_now = (self.open & ~(aims | brakes)) | sent
        m, goal, sent = put(m, some[fits], taken(on, fits)), put(goal, some[fits], on_goal[fits]), sent | kept
        rest = np.flatnonzero(aims & ~sent)
        approached, way, met, hit = taken(self, rest)._approach(target[rest], dt[rest])
        m, goal, self.exact = put(m, rest, approached), put(goal, rest, way), put(self.exact, rest, met)
        self.met = put(self.met, rest, np.where(hit, 3, 0))
        self.open = open_now
        braked, end = self._backup(dt)
        m, goal = pick(brakes, braked, m), np.where(brakes, end, goal)
        floor = np.where(self.now.x < self.low, self.now.x, self.low)
        ceiling = np.where(self.now.x > self.high, self.now.x, self.high)
        m = m._replace(x=np.where(sent, m.x, clipped(m.x, floor, ceiling)))
        v = (m.x - self.now.x) / dt
        a = (v - self.v1) * 2 / (dt + self.d1)
        self.now, self.goal = pick(moves, m, self.now), np.where(moves, goal, self.goal)
        self.v1, self.a1 = np.where(moves, v, self.v1), np.where(moves, a, self.a1)
        self.d2, self.d1 = np.where(moves, self.d1, self.d2), np.where(moves, dt, self.d1)
        t1, t2, _ = self.targets
        self.targets = tuple(np.where(aims, n, t) for n, t in zip((target, t1, t2), self.targets, strict=True))

    def _beyond(self, m, goal, rounding):
        r = ramp_to(goal, m.v, m.a, self.own)
        end, zero = end_of(m, r), np.zeros_like(m.x)
        far = end_of(Motion(end, goal, zero), ramp_to(0.0, goal, zero, self.own))
        back = advanced(advanced(m, r.j1, r.t1), 0.0, r.t2).x
        square = m.a * m.a - 2 * r.j1 * m.v
        turn = advanced(m, r.j1, (np.abs(m.a) - root(square)) / self.j).x
        turn = np.where(goal != 0, back, np.where((m.v * r.j1 > 0) & (square > 0), turn, m.x))
        end = np.where(goal != 0, far, end)
        slack = rounding * (np.abs(turn) + np.abs(end)) + 1e-17 * self.j
        up, down = np.where(turn > m.x, turn, end), np.where(turn < m.x, turn, end)
        above = (up > self.high + slack) & ((up > m.x) | (turn < m.x))
        below = (down < self.low - slack) & ((down < m.x) | (turn > m.x))
        return np.where(above, 1, np.where(below, -1, 0))

    def _leaves(self, m, rounding=4e-16):
        level, v, a = m.v + m.a * np.abs(m.a) * self.half, self.v * REACHED, self.a * REACHED
        up = (level > v) | (m.v > v) | (m.a > a)
        down = (level < -v) | (m.v < -v) | (m.a < -a)
        slack = rounding * np.abs(m.x) + 1e-17 * self.j
        far_up, far_down = (m.x > self.high + slack) & (m.x > self.now.x), (m.x < self.low - slack) & (m.x < self.now.x)
        up, down = up | (~down & self.bounded & far_up), down | (~up & self.bounded & ~far_up & far_down)
        side = np.where(up, 1, np.where(down, -1, 0))
        way = self._beyond(m, np.zeros_like(v), rounding)
        ends = (side != 0) | ~self.bounded | (way == 0)
        full = self.a * self.a * self.half
        back = m.a * m.a * self.half + way * m.v
        back = np.where(back > full, full, back)
        turns = (way * m.v > 0) & (back > 0) & (back <= v)
        goal = np.where(ends | ~turns, 0.0, -way * back)
        return np.where(ends, side, np.where(turns, self._beyond(m, -way * back, rounding), way)), goal

    def _backup(self, dt):
        r = ramp_to(self.goal, self.now.v, self.now.a, self.own)
        left = dt - r.duration
        m = settled(self.now, r, self.goal, np.where(left < 0, dt, r.duration))
        rest = settled(m, ramp_to(0.0, m.v, m.a, self.own), 0.0, left)
        return pick((left < 0) | (self.goal == 0), m, rest), np.where(left < 0, self.goal, 0.0)

    def _exactly(self, target, dt, lanes):
        v = (target - self.now.x) / dt
        a = (v - self.v1) * 2 / (dt + self.d1)
        j = (a - self.a1) * 3 / (dt + self.d1 + self.d2)
        part = np.where((self.v1 == 0) & (self.a1 == 0), FROM_REST, 1.0)
        left = lanes & (np.abs(v) <= part * self.v) & (np.abs(a) <= part * self.a) & (np.abs(j) <= part * self.j)
        past, low, high = self._cubics(target, v, a, dt, self.d1)
        q, level = clipped(j, low, high), -(a * dt * 0.5) / (dt * (dt + self.d1) * (1.0 / 6))
        tried = np.zeros(v.shape, bool)
        sent, best, way = np.zeros(v.shape, bool), self.now, self.goal
        for attempt in range(8):
            some = np.flatnonzero(left)
            m = past(q)
            side, goal = taken(self, some)._leaves(taken(m, some))
            side, goal = put(np.zeros(v.shape, int), some, side), put(way, some, goal)
            found = left & (side == 0)
            sent, best, way = sent | found, pick(found, m, best), np.where(found, goal, way)
            left = left & ~found & (q != np.where(side > 0, low, high))
            if not left.any():
                break
            low, high = np.where(side > 0, low, q), np.where(side > 0, q, high)
            first = (level > low) & (level < high) if attempt == 0 else np.zeros_like(tried)
            q = np.where(first, level, np.where(tried, 0.5 * (low + high), np.where(side > 0, low, high)))
            tried = tried | ~first
        return sent, best, way

    def _cubics(self, x, v, a, dt, before):
        v0, by_v, by_a = v + a * dt * 0.5, dt * (dt + before) * (1.0 / 6), (2 * dt + before) * (1.0 / 3)
        low, high = (-self.a - a) / by_a, (self.a - a) / by_a
        low, high = np.where(low < -self.j, -self.j, low), np.where(high > self.j, self.j, high)
        return lambda q: Motion(x, v0 + q * by_v, a + q * by_a), low, high

    def _choose_past(self, since, reach):
        past, low, high = self._cubics(self.now.x, self.v1, self.a1, self.d1, self.d2)
        for _ in range(12):
            q = 0.5 * (low + high)
            above = miss(past(q), since, reach) > 0
            low, high = np.where(above, low, q), np.where(above, q, high)
        m = past(0.5 * (low + high))
        side, goal = self._leaves(m)
        return pick(side == 0, m, self.now), np.where(side == 0, goal, self.goal)

    def _along(self, target, dt):
        v = (target - self.now.x) / dt
        jerk = (target - self.now.x - dt * (self.now.v + dt * (self.now.a * 0.5))) * 6 / (dt * dt * dt)
        m = Motion(target, self.now.v + dt * (self.now.a + dt * (jerk * 0.5)), self.now.a + dt * jerk)
        side, goal = self._leaves(m)
        fits = (np.abs(jerk) <= self.j) & (np.abs(v) <= self.v * REACHED) & (side == 0)
        stays = (jerk == 0) & (self.now.v == 0) & (self.now.a == 0)
        self.met = np.where(fits & ~stays, self.met - 1, self.met)
        return fits, m, goal

    def _aimed(self, target, dt):
        t1, t2, t3 = self.targets
        v, v1, v2 = (target - t1) / dt, (t1 - t2) / self.d1, (t2 - t3) / self.d2
        a, a1 = (v - v1) * 2 / (dt + self.d1), (v1 - v2) * 2 / (self.d1 + self.d2)
        j = (a - a1) * 3 / (dt + self.d1 + self.d2)
        jumps, bends = ~((np.abs(v) <= self.v) & (np.abs(a) <= self.a)), ~(np.abs(j) <= self.j)
        most, most_jerk = 0.9 * self.a, 0.9 * self.j
        end = clipped(a + j * ((2 * dt + self.d1) * (1.0 / 3)), -most, most)
        begin = clipped(end - j * dt, -most, most)
        jerk = clipped((end - begin) / dt, -most_jerk, most_jerk)
        speed = v + a * dt * 0.5 + j * (dt * (dt + self.d1) * (1.0 / 6))
        plain = jumps | bends
        at = Motion(target, np.where(jumps, 0.0, np.where(bends, v, speed)), np.where(plain, 0.0, end))
        return Aim(at, np.where(plain, 0.0, jerk))

    def _approach(self, target, dt):
        to = self._aimed(target, dt)
        since = to.after(-dt)
        low = np.where(since.at.a < to.at.a, since.at.a, to.at.a)
        high = np.where(since.at.a < to.at.a, to.at.a, since.at.a)
        reach = Reach(self.a + low, self.a - high, self.j + since.jerk, self.j - since.jerk)
        some = np.flatnonzero(self.open)
        now, goal = taken(self, some)._choose_past(*taken((since, reach), some))
        self.now, self.goal = put(self.now, some, now), put(self.goal, some, goal)
        tolerance = 4e-16 * (np.abs(self.now.x) + np.abs(target)) + 1e-12 * self.j * (dt * dt * dt)
        error = miss(self.now, since, reach)
        full = np.where(error < 0, self.v, -self.v)
        drive = ramp_to(full, self.now.v, self.now.a, self.own)
        t = np.zeros_like(dt)
        far = np.flatnonzero(np.abs(error) > tolerance)
        parts = taken((self.now, drive, full, since, reach, error, dt, tolerance), far)
        t[far] = switching(*parts)
        m = settled(self.now, drive, full, t)
        r = minus(m, since.after(t).at)
        stop = ramp_to(0.0, r.v, r.a, reach)
        off = np.where(dt - t >= stop.duration, np.abs(end_of(r, stop)), 1 / tolerance)
        stop = stop._replace(j1=stop.j1 + since.jerk, j3=stop.j3 + since.jerk)
        m, met = along(m, stop, since.jerk, dt - t), off <= 100 * tolerance
        m = pick(met, to.at._replace(x=np.where(off <= tolerance, target, m.x)), m)
        admissible, goal = self._admissible(m, dt, 1e-13)
        rest = np.flatnonzero(~admissible)
        near, way = taken(self, rest)._nearest(taken(m, rest), dt[rest])
        return put(m, rest, near), put(goal, rest, way), met & admissible, met

    def _admissible(self, m, dt, rounding=4e-16):
        side, goal = self._leaves(m, rounding)
        return (np.abs(m.x - self.now.x) <= self.v * REACHED * dt) & (side == 0), goal

    def _nearest(self, m, dt):
        rest, goal = self._backup(dt)
        d, best, part, step = minus(m, rest), rest, np.zeros_like(dt), 0.5
        while step > 1e-4:
            f = part + step
            mixed = Motion(rest.x + f * d.x, rest.v + f * d.v, rest.a + f * d.a)
            admissible, way = self._admissible(mixed, dt)
            part, best, goal = (
                np.where(admissible, f, part),
                pick(admissible, mixed, best),
                np.where(admissible, way, goal),
            )
            step *= 0.5
        return best, goal


def limited(limits: np.ndarray, pose: np.ndarray, targets: np.ndarray, dts: np.ndarray) -> np.ndarray:
    """limits [N, 5], pose [N] (NaN: no reset), targets and dts [ticks, N] -> sent [ticks, N]."""
    limiter = LimiterReference(limits)
    limiter.reset(np.asarray(pose, np.float64))
    return np.stack([limiter.tick(target, dt) for target, dt in zip(targets, dts, strict=True)])
