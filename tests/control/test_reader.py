"""The C++ reader of an action stream against its reference, and what both promise a robot."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stream_cases import CLEAR, LATCH, MS, START, STOP, Case, Streams, random_streams
from stream_reference import Commands, Interpolation, Kind, Rule, Seam, Status, limits_of, wrap

Array = NDArray[Any]
Build = Callable[..., Path]
WAYS = list(Interpolation)


@pytest.fixture(scope="module")
def reader(cpp: Build) -> Path:
    return cpp("reader_streams")


@pytest.fixture(scope="module")
def hostile() -> tuple[Streams, Commands]:
    """200 lanes at random, and what the reference commands."""
    streams = random_streams(1, lanes=200)
    return streams, streams.reference()


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


# -- the reference is the definition -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reader_is_its_reference_bit_for_bit(reader: Path) -> None:
    streams = random_streams(0, lanes=1000)
    commands = streams.run(reader)
    for status in set(Status) - {Status.CONTENDED}:  # or the streams are no test
        assert (commands.status == status).mean() > 0.01
    assert (commands.row >= 0).mean() > 0.2
    assert same_bits(commands, streams.reference())


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_reader_is_its_reference_bit_for_bit_over_100000_streams(reader: Path) -> None:
    for seed in range(50):
        streams = random_streams(100 + seed, lanes=2000)
        assert same_bits(streams.run(reader), streams.reference()), f"seed {100 + seed}"


FAULTS = {
    "row that has begun": ("interpolation.h", "std::floor(at.u + kRowTolerance)", "std::floor(at.u)"),
    "nearest row": ("interpolation.h", "std::floor(at.u + 0.5 + kRowTolerance)", "std::floor(at.u + kRowTolerance)"),
    "short way": ("interpolation.h", "kind == Kind::angle ? wrap(to - from)", "kind == Kind::angle ? (to - from)"),
    "knot before": ("interpolation.h", "k > 0 ? difference(kind, row(k), row(k - 1)) : here", "here"),
    "path's knots": ("interpolation.h", "k > 0 ? row(k - 1) : here", "here"),
    "late chunk": (
        "chain.h",
        "chunk.published_at > chunk.starts_at ? chunk.published_at : chunk.starts_at",
        "chunk.starts_at",
    ),
    "overtaken": ("chain.h", "if (order_[i]->begins_at >= order_[i + 1]->begins_at) drop(i);", ";"),
    "depth": ("chain.h", "++deep >= depth_", "++deep"),
    "before the e-stop": ("chain.h", "chunk.observed_at < forgotten_ || ", ""),
    "history": ("seams.h", "n < seam_.history", "n < seam_.history + 1"),
    "ended member": ("seams.h", "if (n > 0 && moment((*chain_)[n].chunk, now_).over) continue;", ""),
    "vote": ("seams.h", "away > 0.5", "away > 0.4"),
    "per row": ("seams.h", "columns_[i].path < 0 ? 1 : per_row", "1"),
    "level ramp": ("seams.h", "s * s * (3 - 2 * s)", "s"),
    "frozen base": (
        "seams.h",
        "if (n == kMostHistory - 1) freeze(group, base, (*chain_)[n].begins_at, out, seconds);",
        "",
    ),
    "made up": (
        "seams.h",
        "const bool alone = (*chain_)[n + 1].ends_at <= (*chain_)[n].begins_at;",
        "const bool alone = false;",
    ),
    "ended chunk goes on": ("seams.h", "displacement(link, c, own_, known_ > 0)", "displacement(link, c, own_, false)"),
    "pruned too early": ("seams.h", "== 1) kept = n + 1", "> 0.9) kept = n + 1"),
    "part of older chunks": ("seams.h", "if (!on || own_.from == whole_.from) return own_;", "return own_;"),
    "rest of a chunk": ("reader_inl.h", "if (ends) seams_.finish(group, follows_.data());", ""),
    "age": ("reader_inl.h", "now - newest_observed_at_ > most", "now - newest_observed_at_ >= most + 1000000"),
    "finish": ("reader_inl.h", "seen.dead && rules.on_dead != Rule::finish", "seen.dead"),
    "decay": ("reader_inl.h", "fades ? state.fades_from * left : 0", "fades ? state.fades_from : 0"),
    "brake": (
        "reader_inl.h",
        "if (!brakes) return state.limiter.tick(target, dt);",
        "return state.limiter.tick(target, dt);",
    ),
    "path forgets": ("reader_inl.h", "state.path = state.limiter.brake(dt);", "state.limiter.brake(dt); return 0;"),
    "unwrapped": ("reader_inl.h", "target = sent + wrap(target - sent);", ""),
    "too soon": ("reader_inl.h", "now - last_ >= kShortestTick", "now > last_"),
    "time": ("reader_inl.h", "ticked_ ? now - last_ : period", "period"),
    "late tick": ("reader_inl.h", "passed < longest ? passed : longest", "passed"),
    "left alone": ("reader_inl.h", "passed > kAtRest &&", "false &&"),
    "velocity's limits": ("reader_inl.h", "limits.velocity = given.acceleration;", "limits.velocity = given.velocity;"),
    "pose": ("reader_inl.h", "state.limiter.reset(values[i]);", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_differs_from_the_reference(
    fault: str, cpp: Build, faulty_include: Callable[[str, str, str], Path], hostile: tuple[Streams, Commands]
) -> None:
    program = cpp("reader_streams", "-O0", "-Wno-error", include=faulty_include(*FAULTS[fault]))
    streams, wanted = hostile
    assert not same_bits(streams.run(program), wanted)


def test_other_compiler_flags_change_rounding_only(cpp: Build, reader: Path) -> None:
    native = cpp("reader_streams", "-O3", "-march=native", "-ffp-contract=fast")
    streams = random_streams(2, lanes=1000)
    ours, theirs = streams.run(reader), streams.run(native)
    for name in ("chunk", "row", "status", "age_ns"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    apart = np.nan_to_num(np.abs(ours.values - theirs.values))
    angle = (streams.robots.kind == Kind.ANGLE)[:, None]
    worst = np.where(angle, np.abs(wrap(apart)), apart).max(1)  # ranges are about 1
    limited = np.isfinite(limits_of(streams.robots)).any(-1)
    assert worst[~limited].max() < 1e-9
    # a limiter in a corner may take another branch by the last bit; it is inside the bounds on either
    assert (worst[limited] < 1e-9).mean() > 0.995


def test_other_compiler_flags_follow_a_smooth_policy_to_1e_9(cpp: Build, reader: Path) -> None:
    native = cpp("reader_streams", "-O3", "-march=native", "-ffp-contract=fast")
    case = Case(
        kinds=[Kind.POSITION, Kind.ANGLE, Kind.VELOCITY, Kind.RELATIVE],
        chunks=[smooth_chunk(t, 4) for t in range(100, 2000, 150)],
        ticks_ms=np.arange(130, 2200, 2),
        pose=[*np.sin([0.6, 1.6]), 0, 0],
        interpolation=Interpolation.CUBIC,
        seam=Seam.BLEND,
        bounds=[[-np.inf, np.inf, 20, 200, 20000]] * 4,
    )
    ours, theirs = case.streams().run(reader), case.streams().run(native)
    assert np.abs(ours.values - theirs.values).max() < 1e-9


def smooth_chunk(
    observed_ms: float, channels: int, hz: float = 30, rows: int = 16, late_ms: float = 20
) -> tuple[Any, ...]:
    """Of sines of the time that each row is meant for."""
    t = observed_ms / 1e3 + np.arange(rows) / hz
    return observed_ms, observed_ms, observed_ms + late_ms, hz, np.sin(5 * t[:, None] + np.arange(channels))


# -- kinds -------------------------------------------------------------------------------------------------------------------

LIBERO = [Kind.RELATIVE] * 6 + [Kind.BINARY]


def libero_rows(rng: np.random.Generator, rows: int) -> Array:
    return np.concatenate([rng.normal(0, 0.02, (rows, 6)), rng.integers(0, 2, (rows, 1))], 1).astype(np.float32)


def libero_chunks(hz: float = 20, rows: int = 8, number: int = 4) -> list[tuple[Any, ...]]:
    """One after the other, each there when the one before ends."""
    rng, length = np.random.default_rng(0), rows / hz * 1e3
    return [(at, at, at, hz, libero_rows(rng, rows)) for at in 1000 + length * np.arange(number)]


@pytest.mark.parametrize("seam", list(Seam))
@pytest.mark.parametrize("interpolation", WAYS)
@pytest.mark.parametrize("hz, jitter", [(20, 0.0), (500, 0.0), (500, 0.9), (37, 0.0), (37, 0.9), (7, 0.5), (1.3, 0.0)])
def test_relative_keeps_its_sum(
    seam: Seam, interpolation: Interpolation, hz: float, jitter: float, reader: Path
) -> None:
    """Of chunks that follow one another, also under Blend, which is the default."""
    rng = np.random.default_rng(1)
    steps = 1e3 / hz * (1 + jitter * rng.uniform(-1, 1, 2000))
    ticks = 1000 + np.concatenate([[0], np.cumsum(steps)])
    ticks = ticks[: np.searchsorted(ticks, 2600) + 3]
    for command_ms in (2.0, 1e3 / hz):
        case = Case(LIBERO, libero_chunks(), ticks, interpolation=interpolation, command_ms=command_ms, seam=seam)
        commands = one(case, reader)
        rows = np.concatenate([chunk[4] for chunk in case.chunks]).astype(np.float64)
        np.testing.assert_allclose(commands.values[:, :6].sum(0), rows[:, :6].sum(0), rtol=0, atol=1e-12)


def test_relative_sum_is_of_the_time_that_each_chunk_governs(reader: Path) -> None:
    ones = np.ones((20, 1))
    chunks = [(1000, 1000, 1000, 20, ones), (1100, 1100, 1310, 20, 3 * ones)]  # overlap; the second one is late
    early = 0.5 * (3 - 1) / 50  # the read at 1308.5 is for the 2 ms from then
    for ticks, less in (
        (np.arange(1000, 2200, 2), 0),
        (np.arange(1000, 2200, 61.7), early),
        (np.array([1000, 1900, 2200]), 0),
    ):
        got = one(Case([Kind.RELATIVE], chunks, ticks), reader)
        assert got.values.sum() == pytest.approx(310 / 50 + 3 * (2100 - 1310) / 50 - less, abs=1e-9)


@pytest.mark.parametrize("hz", [20, 30, 50, 7])
@pytest.mark.parametrize("interpolation", WAYS)
def test_at_the_policys_own_rate_the_rows_come_out(hz: float, interpolation: Interpolation, reader: Path) -> None:
    rng = np.random.default_rng(2)
    kinds = [*LIBERO, Kind.POSITION, Kind.ANGLE, Kind.VELOCITY]
    rows = np.concatenate([libero_rows(rng, 16), rng.uniform(-3, 3, (16, 3))], 1).astype(np.float32)
    ticks = 1000 + np.arange(17) * 1e3 / hz  # whole ns: 33333333, 66666667, ...
    case = Case(kinds, [(1000, 1000, 1000, hz, rows)], ticks, interpolation=interpolation, command_ms=1e3 / hz)
    commands = one(case, reader)
    assert names(commands.status) == ["OK"] * 16 + ["DRY"]
    assert commands.row.tolist() == [*range(16), -1]
    np.testing.assert_allclose(commands.values[:16], rows, rtol=0, atol=1e-12 if hz in (20, 50) else 1e-6)
    exact = [
        kind is Kind.BINARY or (interpolation == Interpolation.HOLD and kind is not Kind.RELATIVE) for kind in kinds
    ]
    assert np.array_equal(commands.values[:16, exact], rows[:, exact])


@pytest.mark.parametrize("seam", list(Seam))
def test_binary_is_never_between(seam: Seam, reader: Path) -> None:
    rng = np.random.default_rng(3)
    chunks = [(t, t, t + 40, 20, rng.integers(0, 2, (10, 1))) for t in range(1000, 3000, 130)]
    for interpolation in WAYS:
        commands = one(
            Case([Kind.BINARY], chunks, np.arange(990, 3700, 3.1), interpolation=interpolation, seam=seam), reader
        )
        known = commands.values[~np.isnan(commands.values)]
        assert set(known) == {0.0, 1.0} and len(known) > 800


def test_binary_votes(reader: Path) -> None:
    """The newest decides unless the others outweigh it."""
    grip = [0.0, 0.0, 1.0]
    chunks = [(1000 + i, 1000 + i, 1000 + i, 20, np.full((10, 1), g)) for i, g in enumerate(grip)]
    for number, wanted in ((2, 1.0), (3, 0.0)):
        case = Case([Kind.BINARY], chunks[3 - number :], [1100], seam=Seam.ENSEMBLE, alpha=0.0)
        assert one(case, reader).values == wanted


@pytest.mark.parametrize("interpolation", WAYS[1:])
@pytest.mark.parametrize("bounds", [None, [[-np.inf, np.inf, 10, 100, 5000]]])
def test_angle_goes_the_short_way(interpolation: Interpolation, bounds: Any, reader: Path) -> None:
    """A wheel that turns at 4 rad/s through pi again and again, in chunks that wrap."""
    t = np.arange(40) / 20
    rows = wrap(3.0 + 4 * t)[:, None]
    ticks = np.arange(1000, 2950, 2)
    case = Case(
        [Kind.ANGLE], [(1000, 1000, 1000, 20, rows)], ticks, interpolation=interpolation, pose=[3.0], bounds=bounds
    )
    values = one(case, reader).values[:, 0]
    assert (values >= -np.pi).all() and (values < np.pi).all()
    wanted = 3.0 + 4 * (ticks - 1000) / 1e3
    late = 0.3 if bounds else 1e-6
    assert np.abs(wrap(values - wanted)).max() < late
    assert np.abs(wrap(np.diff(values))).max() < 4 * 2e-3 * (2 if bounds else 1 + 1e-4)


@pytest.mark.parametrize("kind", [Kind.POSITION, Kind.VELOCITY, Kind.ANGLE, Kind.RELATIVE])
@pytest.mark.parametrize("interpolation", WAYS[1:])
def test_rows_are_found_by_time(kind: Kind, interpolation: Interpolation, reader: Path) -> None:
    """A policy that runs at about 20 Hz writes chunks at 30 Hz, each late by its own time, for a robot that is read at 500 Hz with
    jitter: a line in time stays that line."""
    rng = np.random.default_rng(4)
    chunks, observed, published = [], 1000.0, 0.0
    while observed < 3000:
        published = max(published, observed + rng.uniform(30, 120))
        t = observed / 1e3 + np.arange(12) / 30
        rows = np.full((12, 1), 0.4 / 30) if kind is Kind.RELATIVE else (0.4 * t)[:, None]
        chunks.append((observed, observed, published, 30, rows))
        observed += rng.uniform(40, 60)
    ticks = np.cumsum(2 + rng.uniform(-1.5, 1.5, 1000)) + 1150
    for seam in Seam:
        commands = one(Case([kind], chunks, ticks, interpolation=interpolation, seam=seam), reader)
        assert set(names(commands.status)) == {"OK"}
        values = commands.values[:, 0]
        if kind is Kind.RELATIVE:
            wanted = 0.4 * np.diff(ticks) / 1e3  # each is for the time until the next tick is due, 2 ms later
            np.testing.assert_allclose(values[1:], wanted, rtol=0, atol=1e-7)
        else:
            begun = np.searchsorted(ticks, ticks[0] + 100)  # blend: a ramp over 3 rows, from no velocity
            np.testing.assert_allclose(values[begun:], 0.4 * ticks[begun:] / 1e3, rtol=0, atol=1e-6)


# -- seams -------------------------------------------------------------------------------------------------------------------


def disagreeing(number: int, every_ms: float, rows: int = 20) -> list[tuple[Any, ...]]:
    """Smooth chunks that contradict each other by up to 0.6."""
    rng = np.random.default_rng(5)
    chunks = []
    for at in 1000 + every_ms * np.arange(number):
        t = at / 1e3 + np.arange(rows) / 20
        chunks.append((at, at, at + 20, 20, (0.3 * np.sin(2 * t) + rng.uniform(-0.3, 0.3))[:, None]))
    return chunks


@pytest.mark.parametrize("kind", [Kind.POSITION, Kind.ANGLE, Kind.VELOCITY])
@pytest.mark.parametrize("every_ms", [400, 90])
def test_blend_is_smooth_where_the_chunks_are(kind: Kind, every_ms: float, reader: Path) -> None:
    """Neither the value nor its slope jumps, also where a ramp begins before the one before is over."""
    ticks = np.arange(1030, 1900, 0.5)
    slopes = {}
    for seam in (Seam.BLEND, Seam.NEWEST):
        case = Case([kind], disagreeing(10, every_ms), ticks, seam=seam, interpolation=Interpolation.CUBIC)
        slopes[seam] = np.diff(one(case, reader).values[:, 0]) / 0.5e-3
    assert np.abs(slopes[Seam.NEWEST]).max() > 100
    assert np.abs(slopes[Seam.BLEND]).max() < 12
    # the ramp's own bend: 6 * 0.6 / (150 ms)^2 = 160 a second, of two ramps at once; a ramp with a corner has 4 at once
    assert np.abs(np.diff(slopes[Seam.BLEND])).max() < 0.3


def test_blend_of_relative_is_smooth(reader: Path) -> None:
    chunks = [(o, s, p, hz, 0.1 * rows) for o, s, p, hz, rows in disagreeing(10, 90)]
    case = Case([Kind.RELATIVE], chunks, np.arange(1030, 1900, 0.5), seam=Seam.BLEND, command_ms=0.5)
    case.interpolation = Interpolation.CUBIC
    rate = one(case, reader).values[:, 0] / 0.5e-3
    assert np.abs(np.diff(rate)).max() < 0.02 and np.ptp(rate) > 0.3


def test_blend_with_more_ramps_than_it_remembers_does_not_jump(reader: Path) -> None:
    """A policy at 100 Hz, ramps of 250 ms: 25 at once."""
    case = Case([Kind.POSITION], disagreeing(100, 10), np.arange(1030, 1900, 0.5), seam=Seam.BLEND, blend_rows=5)
    values = one(case, reader).values[:, 0]
    assert np.abs(np.diff(values)).max() < 0.005  # the 25 ramps' own slopes are below 6 a second; a jump is 0.05


def test_blend_goes_on_from_an_older_chunk_that_has_ended(reader: Path) -> None:
    """A chunk that comes just as the one before ends makes no dent in a constant velocity."""
    chunks = [(1000, 1000, 1000, 20, np.ones((4, 2))), (1150, 1150, 1201, 20, np.ones((10, 2)))]
    case = Case([Kind.VELOCITY, Kind.RELATIVE], chunks, np.arange(1000, 1500, 2), seam=Seam.BLEND)
    case.ticks_ms = case.ticks_ms[case.ticks_ms != 1200]  # no read finds it ended
    values = one(case, reader).values
    np.testing.assert_allclose(values[75:, 0], 1, atol=1e-12)  # after the ramp from standing
    np.testing.assert_allclose(values.sum(0)[1], (500 - 1) / 50, atol=1e-9)


def test_blend_begins_from_the_pose_and_from_what_was_held(reader: Path) -> None:
    rows = np.ones((4, 1))
    chunks = [(1000, 1000, 1000, 20, rows), (1400, 1400, 1400, 20, 3 * rows)]
    ticks = np.arange(990, 1700, 1)
    case = Case([Kind.POSITION], chunks, ticks, events={0: START}, pose=[-1.0], seam=Seam.BLEND)
    commands = one(case, reader)
    values, step = commands.values[:, 0], np.abs(np.diff(commands.values[:, 0]))
    assert step.max() < 2 * 1.5 / 150 * 1.01  # of a ramp from one to the other in 150 ms
    for at, wanted in (
        (995, -1),
        (1000, -1),
        (1075, 0),
        (1150, 1),
        (1390, 1),
        (1400, 1),
        (1475, 2),
        (1550, 3),
        (1690, 3),
    ):
        assert values[at - 990] == pytest.approx(wanted, abs=1e-12)


def test_ensemble_is_the_published_mean(reader: Path) -> None:
    rng = np.random.default_rng(6)
    said = rng.normal(0, 1, (4, 3))
    chunks = [(1000 + i, 1000 + i, 1000 + i, 20, np.tile(said[i], (10 - 9 * (i == 0), 1))) for i in range(4)]
    for history, alpha in ((3, 0.1), (2, 2.0), (8, -1.5)):
        case = Case([Kind.POSITION] * 3, chunks, [1100], seam=Seam.ENSEMBLE, history=history, alpha=alpha)
        heard = said[1:][-history:]  # the first chunk has ended
        newest = heard[-1]
        cosine = heard @ newest / (np.linalg.norm(heard, axis=1) * np.linalg.norm(newest) + 1e-7)
        weights = np.exp(alpha * cosine)
        np.testing.assert_allclose(one(case, reader).values[0], weights @ heard / weights.sum(), rtol=0, atol=1e-6)


def test_a_chunk_that_a_newer_one_overtakes_is_never_used(reader: Path) -> None:
    rows = np.ones((10, 1))
    chunks = [(1000, 1000, 1000, 20, rows), (1010, 1200, 1010, 20, 2 * rows), (1020, 1100, 1020, 20, 3 * rows)]
    commands = one(Case([Kind.POSITION], chunks, np.arange(1000, 1500, 2)), reader)
    assert set(commands.values[:, 0]) == {1.0, 3.0} and set(commands.chunk) == {1, 3}


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
    assert (path >= low).all() and (path <= high).all()
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
    assert set(names(commands.status[:300])) == {"OK"} and set(names(commands.status[300:])) == {"ESTOP"}
    assert assert_bounds_hold(streams, streams.run(reader)) > 0
    rests = commands.values[300 + 250 :]  # 8 / 60 s, and the jerk
    assert np.ptp(rests[:, :2], axis=0).max() < 1e-9 and np.abs(rests[:, 2:]).max() < 1e-9
    assert np.abs(commands.values[300] - commands.values[299]).max() > 1e-4  # it was moving


def test_after_an_estop_only_new_observations_are_followed(reader: Path) -> None:
    rows = np.linspace(0, 1, 50)[:, None]
    chunks = [(1000, 1000, 1000, 20, rows), (1190, 1190, 1230, 20, rows), (1220, 1220, 1300, 20, rows)]
    ticks = np.arange(1000, 1400, 10)
    case = Case([Kind.POSITION], chunks, ticks, {10: LATCH, 21: CLEAR}, pose=[0.0])
    commands = one(case, reader)
    assert names(commands.status) == ["OK"] * 10 + ["ESTOP"] * 11 + ["DRY"] * 9 + ["OK"] * 10
    assert set(commands.chunk[30:]) == {3} and np.ptp(commands.values[10:30]) == 0


# -- rules -------------------------------------------------------------------------------------------------------------------

ALL = [Kind.POSITION, Kind.ANGLE, Kind.VELOCITY, Kind.RELATIVE, Kind.BINARY]


def two_seconds(value: float = 1.0, hz: float = 20) -> list[tuple[Any, ...]]:
    return [(1000, 1000, 1000, hz, np.full((40, 5), value))]


def test_before_the_first_chunk_nothing_is_known(reader: Path) -> None:
    ticks = np.arange(900, 1100, 10)
    commands = one(Case(ALL, two_seconds(), ticks), reader)
    assert np.isnan(commands.values[:10, [0, 1, 4]]).all() and (commands.values[:10, [2, 3]] == 0).all()
    assert set(names(commands.status[:10])) == {"DRY"} and not commands.chunk[:10].any()
    assert (commands.age_ns[:10] == -1).all() and (commands.row[:10] == -1).all()
    assert (commands.values[10:, [0, 1, 2, 4]] == 1).all()
    commands = one(Case(ALL, two_seconds(), ticks, {0: START}, [0.5, 0.25, 0, 0, 1]), reader)
    assert (commands.values[:10] == [0.5, 0.25, 0, 0, 1]).all()


def test_a_pose_may_be_known_in_part(reader: Path) -> None:
    commands = one(Case(ALL, two_seconds(), [900, 910], {0: START}, [np.nan, 0.25, 0, 0, np.nan]), reader)
    assert np.array_equal(np.isnan(commands.values), [[True, False, False, False, True]] * 2)


@pytest.mark.parametrize("why", ["DRY", "STALE", "DEAD"])
@pytest.mark.parametrize("rule", list(Rule))
def test_rules(why: str, rule: Rule, reader: Path) -> None:
    """Of a chunk that lasts until 3000; it is stale at 2000, or its producer dead then."""
    if why == "DRY" and rule is Rule.FINISH:
        pytest.skip("dry has nothing to finish")
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
    assert set(names(commands.status[:said])) == {"OK"} and set(names(commands.status[said:])) == {why}
    assert (commands.row[begins:] == -1).all() and (commands.row[:begins] >= 0).all()
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
    rows = np.tile(np.arange(40.0)[:, None], (1, 2))
    bounds = [[-np.inf, np.inf, 100, 1e4, 1e6]] * 2
    commands = one(Case([Kind.POSITION, Kind.RELATIVE], [(1000, 1000, 1000, 20, rows)], ticks, bounds=bounds), reader)
    position, relative = commands.values.T
    assert set(position[1:6]) == {position[1]} and set(position[6:9]) == {position[6]}
    assert set(relative[1:5]) == {relative[1]} and relative[5] == 0 and set(relative[6:9]) == {relative[6]}
    assert position[9] > position[6] > position[1] and set(names(commands.status)) == {"OK"}
    steady = one(
        Case([Kind.POSITION], [(1000, 1000, 1000, 20, rows[:, :1])], [1000, 1010, 1020, 1030], bounds=bounds[:1]),
        reader,
    )
    assert np.array_equal(position[[0, 1, 6, 9]], steady.values[:, 0])


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
    assert len(set(values)) > 900 and values[-1] == pytest.approx(1.0, abs=0.02)


# -- what is not seen from outside -------------------------------------------------------------------------------------------

CHECKS = ["no_allocation", "no_system_call", "dead", "estop", "contended", "feedback", "ahead", "opening"]


@pytest.mark.parametrize("check", CHECKS)
def test_reader_checks(check: str, cpp: Build, segment_name: str) -> None:
    done = subprocess.run([cpp("reader_checks"), check, segment_name], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no seccomp here")
    assert done.returncode == 0, f"{check}: {done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-fsanitize=thread", "-fsanitize=address,undefined"])
def test_reader_beside_a_producer_under_a_sanitizer(flag: str, cpp: Build, segment_name: str) -> None:
    done = subprocess.run([cpp("reader_live", flag, "-g"), segment_name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_hostile_streams_under_a_sanitizer(cpp: Build, hostile: tuple[Streams, Commands]) -> None:
    program = cpp("reader_streams", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    streams, wanted = hostile
    assert same_bits(streams.run(program), wanted)


CHECKED_FAULTS = {
    "no_allocation": (
        "chain.h",
        "Link& link = *order_[kMostHeld];",
        "std::vector<int> spare(9); Link& link = *order_[kMostHeld];",
    ),
    "no_system_call": ("reader_inl.h", "const std::int64_t now = now_ns", "getppid(); const std::int64_t now = now_ns"),
    "dead": ("ring.h", ">= after;", "> after;"),
    "estop": ("reader_inl.h", "if (seen.estop) chain_.forget_before(now);", ""),
    "contended": (
        "chain.h",
        "if (!take_down_from(segment, newest, covered)) continue;",
        "take_down_from(segment, newest, covered);",
    ),
    "feedback": ("reader_inl.h", "feedback_.values[columns_[i].column] = out[i]", "feedback_.values[i] = out[i]"),
    "ahead": ("chain.h", "order_[1]->begins_at <= order_[kMostHeld]->chunk.published_at ? 0 : 1", "0"),
    "opening": ("reader_inl.h", "if (options.driver && !memory->lock(Role::driver))", "if (false)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_reader_checks_notice(
    check: str, cpp: Build, faulty_include: Callable[[str, str, str], Path], segment_name: str
) -> None:
    program = cpp("reader_checks", "-O0", "-Wno-error", include=faulty_include(*CHECKED_FAULTS[check]))
    done = subprocess.run([program, check, segment_name], capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 2), done.stdout
