"""Streams (robots, chunks, ticks) for the C++ reader and its reference: made at random or by hand, run by either."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stream_reference import NEVER, Chunks, Commands, Interpolation, Kind, Reader, Robots, Rule, Seam, Status

Array = NDArray[Any]
MS = 1_000_000
LATCH, CLEAR, START, STOP, HEARTBEAT = 1, 2, 4, 8, 16
"""Events before a read: e-stop, its end, start_at(pose), stop(), the producer's heartbeat."""

CHANNEL = np.dtype([("name", "S47"), ("kind", "u1"), ("group", "u8"), ("bounds", "f8", 5)])
GROUP = np.dtype(
    [
        ("name", "S32"),
        ("max_age", "i8"),
        ("decay", "i8"),
        ("on_dry", "u1"),
        ("on_stale", "u1"),
        ("on_dead", "u1"),
        ("-", "u1", 5),
    ]
)
SEAM = np.dtype([("kind", "u1"), ("-", "u1", 3), ("history", "i4"), ("alpha", "f8"), ("rows", "f8")])
LAYOUT = np.dtype(
    [
        *(
            ("robot", "S56"),
            ("channels", "u4"),
            ("groups", "u4"),
            ("period", "i8"),
            ("seam", SEAM),
            ("interpolation", "u1"),
        ),
        *(("-", "u1", 7), ("channel", CHANNEL, 64), ("group", GROUP, 8)),
    ]
)
STREAM = np.dtype(
    [("layout", LAYOUT), ("created", "i8"), ("loop_dead_after", "i8"), ("only", "i8"), ("pose", "f8", 64)]
)
SENT = np.dtype(
    [("observed", "i8"), ("computed", "i8"), ("starts", "i8"), ("published", "i8"), ("hz", "f8"), ("rows", "i8")]
)
TICK = np.dtype([("now", "i8"), ("events", "i8")])


@dataclass(frozen=True)
class Streams:
    """control_hz [L, N]; group [L, C]; only [L]: the reader's group, -1: all; now, events int64 [L, T]; pose [L, C];
    created [L]."""

    robots: Robots
    chunks: Chunks
    control_hz: Array
    group: Array
    only: Array
    now: Array
    events: Array
    pose: Array
    created: Array

    def run(self, program: Path) -> Commands:
        """What the C++ reader commands: as Commands, with ticks as the second axis."""
        done = subprocess.run([program], input=self.stored(), capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program.name}: {done.returncode}: {done.stderr.decode()}")
        lanes, ticks = self.now.shape
        mine = self.robots.mine
        values = np.full((lanes, ticks, mine.shape[1]), np.nan)
        facts = np.zeros((lanes, ticks, 4), np.int64)
        at = 0
        for lane in range(lanes):
            width = 4 + mine[lane].sum()
            block = np.frombuffer(done.stdout, np.int64, ticks * width, at).reshape(ticks, width)
            facts[lane] = block[:, :4]
            values[lane][:, mine[lane]] = block[:, 4:].copy().view(np.float64)
            at += 8 * ticks * width
        if at != len(done.stdout):
            raise RuntimeError(f"{program.name}: wrote {len(done.stdout)} bytes, expected {at}")
        return Commands(values, *np.moveaxis(facts, -1, 0))

    def reference(self) -> Commands:
        """What the reference commands."""
        reader = Reader(self.robots, self.chunks)
        latched, sign, published = np.zeros(len(self.only), bool), self.created, self.chunks.published
        seen = np.full(len(sign), -1)
        commands = []
        for now, events in zip(self.now.T, self.events.T, strict=True):
            fresh = (published <= now[:, None]) & (published > seen[:, None])
            sign = np.where(fresh.any(1), np.where(fresh, published, 0).max(1), sign)
            seen = np.maximum(seen, np.where(fresh, published, -1).max(1))
            sign = np.where(events & HEARTBEAT, now, sign)
            latched = (latched | (events & LATCH > 0)) & (events & CLEAR == 0)
            if (starts := events & START > 0).any():
                reader.start_at(self.pose, starts)
            reader.stop(events & STOP > 0)
            commands.append(reader.read(now, latched, sign))
        return Commands(*(np.stack([getattr(c, name) for c in commands], 1) for name in Commands.__dataclass_fields__))

    def stored(self) -> bytes:
        """What cpp/reader_streams.cpp reads."""
        robots, chunks = self.robots, self.chunks
        lanes, number, rows, channels = chunks.values.shape
        stream = np.zeros(lanes, STREAM)
        layout, channel = stream["layout"], stream["layout"]["channel"]
        layout["robot"], layout["channels"], layout["groups"] = b"robot", channels, self.group.max(1) + 1
        layout["period"], layout["interpolation"] = robots.command_period_ns, robots.interpolation
        seam = layout["seam"]
        seam["kind"], seam["history"], seam["alpha"], seam["rows"] = (
            robots.seam,
            robots.history,
            robots.alpha,
            robots.blend_rows,
        )
        for c in range(channels):
            channel["name"][:, c] = f"channel{c}".encode()
            channel["kind"][:, c], channel["group"][:, c] = robots.kind[:, c], self.group[:, c]
            channel["bounds"][:, c] = robots.bounds[:, c]
            where = np.arange(lanes), self.group[:, c]
            group = layout["group"]
            for name, value in (("on_dry", robots.on_dry), ("on_stale", robots.on_stale), ("on_dead", robots.on_dead)):
                group[name][where] = value[:, c]
            group["max_age"][where], group["decay"][where] = robots.max_age_ns[:, c], robots.decay_ns[:, c]
            group["name"][where] = [f"group{g}".encode() for g in self.group[:, c]]
        stream["created"], stream["loop_dead_after"], stream["only"] = (
            self.created,
            robots.loop_dead_after_ns,
            self.only,
        )
        stream["pose"][:, :channels] = self.pose
        sent = np.zeros((lanes, number), SENT)
        sent["observed"], sent["computed"], sent["starts"] = chunks.observed, chunks.observed, chunks.starts
        sent["published"], sent["hz"], sent["rows"] = chunks.published, self.control_hz, chunks.rows
        tick = np.zeros(self.now.shape, TICK)
        tick["now"], tick["events"] = self.now, self.events
        parts = [np.array([lanes, number, rows, self.now.shape[1]], np.int64).tobytes()]
        for lane in range(lanes):
            parts += [part[lane].tobytes() for part in (stream, sent, chunks.values, tick)]
        return b"".join(parts)


# -- by hand -----------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One stream by hand. A chunk is (observed, starts, published ms; control_hz; rows [K, C])."""

    kinds: list[Kind]
    chunks: list[tuple[float, float, float, float, Any]] = field(default_factory=list)
    ticks_ms: Any = ()
    events: dict[int, int] = field(default_factory=dict)
    pose: Any = None
    interpolation: Interpolation = Interpolation.LINEAR
    seam: Seam = Seam.NEWEST
    history: int = 3
    alpha: float = 0.1
    blend_rows: float = 3.0
    command_ms: float = 2.0
    bounds: Any = None
    on_dry: Rule = Rule.HOLD
    on_stale: Rule = Rule.HOLD
    on_dead: Rule = Rule.HOLD
    max_age_ms: float = 0
    decay_ms: float = 100
    loop_dead_after_ms: float = 0
    group: Any = None
    only: int = -1
    created_ms: float = 1

    def streams(self) -> Streams:
        channels, number = len(self.kinds), max(1, len(self.chunks))
        longest = max([len(c[4]) for c in self.chunks], default=1)
        values = np.zeros((1, number, longest, channels), np.float32)
        stamps, rows, hz = np.full((3, 1, number), NEVER), np.ones((1, number), np.int64), np.ones((1, number))
        for n, (observed, starts, published, rate, given) in enumerate(self.chunks):
            stamps[:, 0, n] = [round(t * MS) for t in (observed, starts, published)]
            rows[0, n], hz[0, n] = len(given), rate
            values[0, n, : len(given)] = np.asarray(given).reshape(len(given), channels)
        group = np.zeros((1, channels), np.int64) if self.group is None else np.asarray(self.group)[None]
        mine = np.ones((1, channels), bool) if self.only < 0 else group == self.only
        bounds = np.tile([-np.inf, np.inf, np.inf, np.inf, np.inf], (1, channels, 1))
        if self.bounds is not None:
            bounds[0] = self.bounds
        lane = {"interpolation": self.interpolation, "seam": self.seam, "history": self.history, "alpha": self.alpha}
        lane |= {"blend_rows": self.blend_rows, "command_period_ns": round(self.command_ms * MS)}
        lane |= {"loop_dead_after_ns": round(self.loop_dead_after_ms * MS)}
        each = {"on_dry": self.on_dry, "on_stale": self.on_stale, "on_dead": self.on_dead}
        each |= {"max_age_ns": round(self.max_age_ms * MS), "decay_ns": round(self.decay_ms * MS)}
        robots = Robots(
            kind=np.array([self.kinds]),
            mine=mine,
            bounds=bounds,
            **{name: np.full((1, channels), value) for name, value in each.items()},
            **{name: np.array([value]) for name, value in lane.items()},
        )
        now = np.round(np.asarray(self.ticks_ms, np.float64) * MS).astype(np.int64)[None]
        events = np.zeros_like(now)
        for tick, event in self.events.items():
            events[0, tick] = event
        pose = np.full((1, channels), np.nan) if self.pose is None else np.asarray(self.pose, np.float64)[None]
        chunks = Chunks(*stamps, 1e9 / hz, rows, values)
        created = np.array([round(self.created_ms * MS)])
        return Streams(robots, chunks, hz, group, np.array([self.only]), now, events, pose, created)


def same_bits(got: Commands, wanted: Commands) -> bool:
    """-0.0 counts as 0.0, and one NaN as another."""
    return all(
        np.array_equal(getattr(got, name), getattr(wanted, name), equal_nan=name == "values")
        for name in Commands.__dataclass_fields__
    )


def one(case: Case, reader: Path) -> Commands:
    """What the reader commands for one stream: values [T, C], the rest [T]."""
    commands = case.streams().run(reader)
    return Commands(*(getattr(commands, name)[0] for name in Commands.__dataclass_fields__))


def names(statuses: Array) -> list[str]:
    return [Status(s).name for s in statuses]


def smooth_chunk(
    observed_ms: float, channels: int, hz: float = 30, rows: int = 16, late_ms: float = 20
) -> tuple[Any, ...]:
    """Of sines of the time that each row is meant for."""
    t = observed_ms / 1e3 + np.arange(rows) / hz
    return observed_ms, observed_ms, observed_ms + late_ms, hz, np.sin(5 * t[:, None] + np.arange(channels))


# -- at random ---------------------------------------------------------------------------------------------------------------


def random_robots(rng: np.random.Generator, lanes: int, channels: int) -> tuple[Robots, Array, Array]:
    """Robots, the channels' groups [L, C] and the reader's group [L]."""
    kind = rng.integers(0, 5, (lanes, channels))
    groups = rng.integers(1, 4, lanes)
    group = rng.integers(0, groups[:, None], (lanes, channels))
    for g in range(3):  # each has a channel
        group[:, g] = np.where(groups > g, g, group[:, g])
    only = np.where(rng.random(lanes) < 0.2, rng.integers(0, groups), -1)

    def ruled(draw: Array) -> Array:
        return np.take_along_axis(draw, group, axis=1)

    velocity = 10 ** rng.uniform(-0.5, 1.5, kind.shape)
    acceleration = velocity * 10 ** rng.uniform(0, 1.5, kind.shape)
    bounds = np.stack(
        [-rng.uniform(0.2, 3, kind.shape), rng.uniform(0.2, 3, kind.shape), velocity, acceleration, acceleration * 10],
        -1,
    )
    unlimited = rng.random(bounds.shape) < 0.25
    unlimited |= (rng.random(kind.shape) < 0.25)[..., None] | (kind == Kind.BINARY)[..., None]
    unlimited[..., :2] |= ((kind == Kind.ANGLE) | (kind == Kind.RELATIVE))[..., None]
    bounds = np.where(unlimited, [-np.inf, np.inf, np.inf, np.inf, np.inf], bounds)
    robots = Robots(
        kind=kind,
        mine=(only[:, None] < 0) | (group == only[:, None]),
        bounds=bounds,
        on_dry=ruled(rng.integers(0, 2, (lanes, 3))),
        on_stale=ruled(rng.integers(0, 3, (lanes, 3))),
        on_dead=ruled(rng.integers(0, 3, (lanes, 3))),
        max_age_ns=ruled(rng.choice([0, 0, 300 * MS, 1000 * MS], (lanes, 3))),
        decay_ns=ruled(rng.choice([0, 30 * MS, 200 * MS], (lanes, 3))),
        command_period_ns=rng.choice([1, 2, 5, 10, 20, 50], lanes) * MS,
        interpolation=rng.integers(0, 3, lanes),
        seam=rng.integers(0, 3, lanes),
        history=rng.integers(1, 9, lanes),
        alpha=rng.choice([-3.0, 0.0, 0.1, 2.0], lanes),
        blend_rows=rng.choice([0.3, 1.0, 3.0, 6.5], lanes),
        loop_dead_after_ns=rng.choice([0, 0, 100 * MS, 600 * MS], lanes),
    )
    return robots, group, only


def random_chunks(
    rng: np.random.Generator, robots: Robots, start: Array, length: Array, number: int
) -> tuple[Chunks, Array]:
    """Chunks and control_hz over about `length` ns from `start` [L]: late ones, early ones, overlapping or with gaps; some come
    in bursts."""
    lanes, channels = robots.kind.shape
    most = 10
    rows = rng.integers(1, most + 1, (lanes, number))
    factor = rng.choice([0.7, 1.5, 1.5, 3.0], (lanes, number))
    factor = np.where(rng.random(lanes)[:, None] < 0.5, factor[:, :1], factor)
    round_hz = np.array([2, 5, 10, 20, 30, 50, 100, 250])
    hz = np.clip(5.5e9 / (length[:, None] / number * factor), 0.5, 500)  # most chunks last until about the next
    near = round_hz[np.abs(np.log(hz[..., None] / round_hz)).argmin(-1)]
    hz = np.where(rng.random(lanes)[:, None] < 0.5, near, hz)
    gap = rng.exponential(1.0, (lanes, number)) * (length / number)[:, None]
    gap = np.where(rng.random((lanes, number)) < 0.15, 0, gap)
    gap = np.where(rng.random(lanes)[:, None] < 0.2, np.minimum(gap, 4 * MS), gap)  # many ramps at once
    observed = start[:, None] + np.cumsum(gap, axis=1).astype(np.int64)
    late = rng.exponential(0.3, (lanes, number)) * (length / number)[:, None]
    late = np.where(rng.random((lanes, number)) < 0.2, 0, late)
    published = np.maximum.accumulate(observed + late.astype(np.int64), axis=1)
    way = rng.random((lanes, number))
    ahead = (rng.random((lanes, number)) * (length / number)[:, None]).astype(np.int64)
    starts = np.where(
        way < 0.6, observed, np.where(way < 0.8, published, np.where(way < 0.9, observed + ahead, observed - ahead))
    )
    steps = rng.normal(0, 0.2, (lanes, number, most, channels))
    values = rng.normal(0, 0.5, (lanes, number, 1, channels)) + np.cumsum(steps, axis=2)
    kind = robots.kind[:, None, None]
    values = np.where(kind == Kind.BINARY, values > 0, values)
    values = np.where(kind == Kind.ANGLE, values * 3, values)
    values = np.where(kind == Kind.RELATIVE, values * 0.05, values).astype(np.float32)
    return Chunks(observed, starts, published, 1e9 / hz, rows, values), hz


def random_ticks(rng: np.random.Generator, robots: Robots, start: Array, ticks: int) -> Array:
    """now [L, T]: with jitter, with stalls, at another rate than said, and sometimes twice, too soon or backwards."""
    lanes = len(start)
    period = robots.command_period_ns.astype(np.float64) * np.where(rng.random(lanes) < 0.2, 7.3, 1)
    step = np.tile(period[:, None], (1, ticks))
    jitter = rng.choice([0.0, 0.1, 0.9], lanes)[:, None]
    step *= 1 + jitter * rng.uniform(-1, 1, step.shape)
    step += np.where(rng.random(step.shape) < 0.02, rng.exponential(100 * MS, step.shape), 0)
    odd = rng.random(step.shape)
    step = np.where(odd < 0.01, 0, np.where(odd < 0.02, 20_000, np.where(odd < 0.03, -step, step)))
    return start[:, None] + np.cumsum(step, axis=1).astype(np.int64)


def random_streams(seed: int, lanes: int, ticks: int = 200, chunks: int = 12, channels: int = 6) -> Streams:
    """Lanes that differ in everything, about `chunks` chunks in their `ticks` ticks."""
    rng = np.random.default_rng(seed)
    robots, group, only = random_robots(rng, lanes, channels)
    start = rng.integers(1, 10**15, lanes)
    now = random_ticks(rng, robots, start, ticks)
    made, hz = random_chunks(rng, robots, start - 50 * MS, np.abs(now[:, -1] - start), chunks)
    own_rate = rng.random(lanes) < 0.15  # of the first chunk
    rows = np.arange(ticks) * made.period_ns[:, :1]
    now = np.where(own_rate[:, None], made.starts[:, :1] + np.rint(rows).astype(np.int64), now)
    odd = rng.random((6, lanes, ticks))
    often = rng.random(lanes)[:, None] < 0.3
    events = (odd[0] < 0.006 * often) * LATCH + (odd[1] < 0.2) * CLEAR + (odd[2] < 0.003) * START
    events += (odd[3] < 0.001 * often) * STOP + (odd[4] < 0.02) * HEARTBEAT
    events[:, 0] |= (rng.random(lanes) < 0.5) * START
    pose = rng.normal(0, 0.7, (lanes, channels))
    pose[rng.random(pose.shape) < 0.1] = np.nan
    return Streams(robots, made, hz, group, only, now, events, pose, start - 60 * MS)
