"""A reader of an action stream: limits, e-stop, what is done without a chunk, and odd ticks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stream_cases import CLEAR, LATCH, MS, START, STOP, Case, Streams, names, one, random_streams, smooth_chunk
from stream_reference import Commands, Kind, Rule, Seam, limits_of, wrap

Array = NDArray[Any]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def reader(cpp: Build) -> Path:
    return cpp("reader_streams")


# -- limits ------------------------------------------------------------------------------------------------------------------


def sent_paths(streams: Streams, commands: Commands) -> tuple[Array, Array]:
    """The values that limits bound [L, T, C]: angles unwrapped, displacements summed. With seconds [L, T]."""
    kind, values = streams.robots.kind[:, None], commands.values
    turned = np.concatenate([values[:, :1], values[:, :1] + np.cumsum(wrap(np.diff(values, axis=1)), axis=1)], axis=1)
    path = np.where(kind == Kind.RELATIVE, np.cumsum(values, axis=1), np.where(kind == Kind.ANGLE, turned, values))
    return path, (streams.now - streams.now[:, :1]) * 1e-9


def assert_bounds_hold(streams: Streams, commands: Commands) -> int:
    """Divided differences of what was sent, from rest in the pose, one command period before the first tick; returns how often
    a bound was all but reached."""
    path, seconds = sent_paths(streams, commands)
    first = streams.robots.command_period_ns[:, None] * 1e-9
    dt = np.concatenate([np.repeat(first, 3, 1), np.diff(seconds, axis=1)], axis=1)[..., None]
    before = np.where(streams.robots.kind == Kind.RELATIVE, 0, streams.pose)
    before = path[:, 0] + np.where(streams.robots.kind == Kind.ANGLE, wrap(before - path[:, 0]), before - path[:, 0])
    x = np.concatenate([np.repeat(before[:, None], 3, 1), path], axis=1)
    low, high, *rates = np.moveaxis(limits_of(streams.robots)[:, None], -1, 0)
    assert (path >= low).all()
    assert (path <= high).all()
    noise, reached, span = 4e-16 * np.maximum(1, np.abs(path).max()), 0, dt
    for order, bound in enumerate(rates, start=1):
        x = np.diff(x, axis=1) / (span / order)
        slack = noise * 2**order / dt.min() ** order
        most = np.abs(x)
        assert (most <= bound * (1 + 1e-9) + slack).all(), f"derivative {order}: {(most / bound).max()}"
        reached += int((most > 0.9 * bound).sum())
        span = span[:, 1:] + dt[:, :-order]
    return reached


@pytest.mark.parametrize("seed", [0, 1])
def test_limits_hold_through_seams_stops_and_resumptions(seed: int, reader: Path) -> None:
    streams = random_streams(10 + seed, lanes=300)
    rng = np.random.default_rng(seed)
    steps = rng.uniform(1 * MS, 20 * MS, streams.now.shape).astype(np.int64)
    now = streams.chunks.published.min(1)[:, None] + np.cumsum(steps, axis=1)
    events = streams.events & ~START & ~STOP
    events[:, 0] = START
    low, high = np.maximum(streams.robots.bounds[..., 0], -1), np.minimum(streams.robots.bounds[..., 1], 1)
    pose = rng.uniform(low, high)
    pose[streams.robots.kind == Kind.VELOCITY] = 0
    robots = replace(streams.robots, mine=np.ones_like(streams.robots.mine))
    streams = replace(streams, now=now, events=events, pose=pose, robots=robots, only=np.full_like(streams.only, -1))
    commands = streams.run(reader)
    assert {*names(np.unique(commands.status))} == {"OK", "DRY", "STALE", "DEAD", "ESTOP"}
    assert assert_bounds_hold(streams, commands) > 1000  # or nothing tried them


@pytest.mark.parametrize("event", [LATCH, STOP])
def test_estop_brakes_within_the_limits_and_stays(event: int, reader: Path) -> None:
    kinds = [Kind.POSITION, Kind.ANGLE, Kind.VELOCITY, Kind.RELATIVE]
    chunks = [smooth_chunk(t, 4, rows=50) for t in range(1000, 3000, 200)]
    bounds = [[-np.inf, np.inf, 8, 60, 2000]] * 4
    ticks = np.arange(1020, 3000, 2)
    case = Case(kinds, chunks, ticks, {0: START, 300: event}, [*np.sin([5, 6]), 0, 0], bounds=bounds, seam=Seam.BLEND)
    streams = case.streams()
    commands = one(case, reader)
    assert set(names(commands.status[:300])) == {"OK"}
    assert set(names(commands.status[300:])) == {"ESTOP"}
    assert assert_bounds_hold(streams, streams.run(reader)) > 0
    rests = commands.values[300 + 250 :]  # 8 / 60 s, and the jerk
    assert np.ptp(rests[:, :2], axis=0).max() < 1e-9
    assert np.abs(rests[:, 2:]).max() < 1e-9
    assert np.abs(commands.values[300] - commands.values[299]).max() > 1e-4  # it was moving


def test_after_an_estop_only_new_observations_are_followed(reader: Path) -> None:
    rows = np.linspace(0, 1, 50)[:, None]
    chunks = [(1000, 1000, 1000, 20, rows), (1190, 1190, 1230, 20, rows), (1220, 1220, 1300, 20, rows)]
    ticks = np.arange(1000, 1400, 10)
    case = Case([Kind.POSITION], chunks, ticks, {10: LATCH, 21: CLEAR}, pose=[0.0])
    commands = one(case, reader)
    assert names(commands.status) == ["OK"] * 10 + ["ESTOP"] * 11 + ["DRY"] * 9 + ["OK"] * 10
    assert set(commands.chunk[30:]) == {3}
    assert np.ptp(commands.values[10:30]) == 0


# -- rules -------------------------------------------------------------------------------------------------------------------

ALL = [Kind.POSITION, Kind.ANGLE, Kind.VELOCITY, Kind.RELATIVE, Kind.BINARY]


def two_seconds(value: float = 1.0, hz: float = 20) -> list[tuple[Any, ...]]:
    return [(1000, 1000, 1000, hz, np.full((40, 5), value))]


def test_before_the_first_chunk_nothing_is_known(reader: Path) -> None:
    ticks = np.arange(900, 1100, 10)
    commands = one(Case(ALL, two_seconds(), ticks), reader)
    assert np.isnan(commands.values[:10, [0, 1, 4]]).all()
    assert (commands.values[:10, [2, 3]] == 0).all()
    assert set(names(commands.status[:10])) == {"DRY"}
    assert not commands.chunk[:10].any()
    assert (commands.age_ns[:10] == -1).all()
    assert (commands.row[:10] == -1).all()
    assert (commands.values[10:, [0, 1, 2, 4]] == 1).all()
    commands = one(Case(ALL, two_seconds(), ticks, {0: START}, [0.5, 0.25, 0, 0, 1]), reader)
    assert (commands.values[:10] == [0.5, 0.25, 0, 0, 1]).all()


def test_a_pose_may_be_known_in_part(reader: Path) -> None:
    commands = one(Case(ALL, two_seconds(), [900, 910], {0: START}, [np.nan, 0.25, 0, 0, np.nan]), reader)
    assert np.array_equal(np.isnan(commands.values), [[True, False, False, False, True]] * 2)


@pytest.mark.parametrize(
    ("why", "rule"),
    [(why, rule) for why in ("DRY", "STALE", "DEAD") for rule in Rule if (why, rule) != ("DRY", Rule.FINISH)],
)
def test_rules(why: str, rule: Rule, reader: Path) -> None:
    """Of a chunk that lasts until 3000; it is stale at 2000, or its producer dead then."""
    ticks = np.arange(1000, 3200, 2)
    case = Case(ALL, two_seconds(), ticks, decay_ms=100, pose=[1, 1, 0, 0, 1])
    if why == "DRY":
        case.on_dry = rule
    else:
        case = replace(case, on_stale=rule, on_dead=rule)
        case.max_age_ms, case.loop_dead_after_ms = (1000 - 1e-6, 0) if why == "STALE" else (0, 1000)
    commands = one(case, reader)
    begins = 1000 if why == "DRY" or rule is Rule.FINISH else 500
    said = 500 if why != "DRY" else 1000
    assert set(names(commands.status[:said])) == {"OK"}
    assert set(names(commands.status[said:])) == {why}
    assert (commands.row[begins:] == -1).all()
    assert (commands.row[:begins] >= 0).all()
    after = commands.values[begins:]
    assert (after[:, [0, 1, 4]] == 1).all()
    left = np.clip(1 - np.arange(len(after)) * 2 / 100, 0, None) if rule is Rule.DECAY else np.zeros(len(after))
    np.testing.assert_allclose(after[:, 2], left, atol=1e-12)
    np.testing.assert_allclose(after[:, 3], left * 2 / 50, atol=1e-9)


@pytest.mark.parametrize("after_ms", [50, 123])
def test_the_first_read_at_stamp_plus_dead_after_says_dead(after_ms: float, reader: Path) -> None:
    at = 1000 + after_ms
    ticks = [1000, at - 1e-6, at, at + 1, at + 2]
    case = Case([Kind.POSITION], two_seconds()[:0], ticks, loop_dead_after_ms=after_ms, created_ms=1000)
    assert names(one(case, reader).status) == ["DRY", "DRY", "DEAD", "DEAD", "DEAD"]


def test_each_group_has_its_rules(reader: Path) -> None:
    """A reader of one group sees what the reader of all sees of it, but for the status."""
    streams = random_streams(20, lanes=200)
    robots = streams.robots
    robots = replace(robots, seam=np.where(robots.seam == Seam.ENSEMBLE, Seam.BLEND, robots.seam))

    def run(only: Array, mine: Array) -> Commands:
        return replace(streams, robots=replace(robots, mine=mine), only=only).run(reader)

    everything = run(np.full(200, -1), np.ones_like(robots.mine))
    part = np.zeros(200, np.int64)
    mine = streams.group == 0
    one_group = run(part, mine)
    wanted = np.where(mine[:, None], everything.values, np.nan)
    relative = (robots.kind == Kind.RELATIVE)[
        :, None
    ]  # where the other groups still follow, their tick ends with the chunk
    wanted, got = (np.where(relative, 0, v) for v in (wanted, one_group.values))
    assert np.array_equal(wanted, got, equal_nan=True)
    assert (one_group.status != everything.status).any()


# -- ticks -------------------------------------------------------------------------------------------------------------------


def test_time_that_runs_backwards_stands_still(reader: Path) -> None:
    ticks = np.array([1000, 1010, 1009, 1010, 1002, 1010.02, 1020, 5, 1020, 1030])
    rows = np.tile(np.arange(1, 41.0)[:, None], (1, 2))
    bounds = [[-np.inf, np.inf, 100, 1e4, 1e6]] * 2
    commands = one(Case([Kind.POSITION, Kind.RELATIVE], [(1000, 1000, 1000, 20, rows)], ticks, bounds=bounds), reader)
    position, relative = commands.values.T
    assert set(position[1:6]) == {position[1]}
    assert set(position[6:9]) == {position[6]}
    assert relative[[3, 8]].tolist() == relative[[1, 6]].tolist()  # the very same time
    assert (relative[[1, 6]] > 0).all()
    assert not relative[[2, 4, 5, 7]].any()  # a robot must not run away while a clock is wrong
    assert position[9] > position[6] > position[1]
    assert set(names(commands.status)) == {"OK"}
    steady = one(
        Case([Kind.POSITION], [(1000, 1000, 1000, 20, rows[:, :1])], [1000, 1010, 1020, 1030], bounds=bounds[:1]),
        reader,
    )
    assert np.array_equal(position[[0, 1, 6, 9]], steady.values[:, 0])


def test_displacements_that_limits_hold_back_are_made_up_for_within_bounds(reader: Path) -> None:
    """The policy asks for twice the velocity limit for 6 s: the robot must not travel on for another 6."""
    ticks, chunks = np.arange(1000, 9000, 2), [(1000, 1000, 1000, 10, np.full((60, 1), 0.02))]
    bounds = [[-np.inf, np.inf, 0.1, 1.0, np.inf]]
    commands = one(Case([Kind.RELATIVE], chunks, ticks, {0: START}, [0.0], bounds=bounds), reader)
    sent, dry = np.cumsum(commands.values[:, 0]), ticks >= 7000
    assert set(names(commands.status[dry])) == {"DRY"}
    assert sent[~dry][-1] > 0.59  # as fast as the limit allows
    assert sent[-1] - sent[~dry][-1] == pytest.approx(0.05, abs=1e-3)  # half a second's way
    assert not commands.values[-500:].any()


@pytest.mark.parametrize("stall_ms", [100, 1000])
def test_a_robot_that_was_left_alone_gets_no_step(stall_ms: float, reader: Path) -> None:
    """The row that is due has gone far away meanwhile."""
    ticks = np.concatenate([np.arange(1000, 1500, 2), np.arange(1500 + stall_ms, 4600, 2)])
    rows = np.linspace(0, 6, 60)[:, None]  # 2 a second
    bounds = [[-np.inf, np.inf, 4, 40, 2000]]
    values = one(
        Case([Kind.POSITION], [(1000, 1000, 1000, 20, rows)], ticks, {0: START}, [0.0], bounds=bounds), reader
    ).values[:, 0]
    step = values[250] - values[249]
    assert 0 < step < (4 * 20e-3 if stall_ms == 100 else 40 * 20e-3**2)
    assert values[-1] == pytest.approx(6, abs=1e-9)


def test_a_reader_slower_than_it_said_follows(reader: Path) -> None:
    """At 20 Hz, where the layout says 500."""
    ticks = np.arange(1000, 4000, 50)
    bounds = [[-np.inf, np.inf, 4, 40, 2000]]
    rows = np.sin(np.arange(60) / 20)[:, None]
    commands = one(
        Case([Kind.POSITION], [(1000, 1000, 1000, 20, rows)], ticks, {0: START}, [0.0], bounds=bounds), reader
    )
    np.testing.assert_allclose(commands.values[20:], rows[20:], rtol=0, atol=1e-6)


def test_a_reader_that_polls_moves_on(reader: Path) -> None:
    """Every 10 us: it moves every 50."""
    ticks = 1000 + np.arange(5000) / 100
    rows = np.arange(40.0)[:, None]
    case = Case(
        [Kind.POSITION], [(1000, 1000, 1000, 20, rows)], ticks, bounds=[[-np.inf, np.inf, 100, 1e4, 1e6]], pose=[0.0]
    )
    values = one(case, reader).values[:, 0]
    assert len(set(values)) > 900
    assert values[-1] == pytest.approx(1.0, abs=0.02)
