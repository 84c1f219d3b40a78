"""A reader of an action stream: each kind of channel at any rate, and how one chunk follows another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stream_cases import START, Case, names, one
from stream_reference import Interpolation, Kind, Seam, wrap

Array = NDArray[Any]
Build = Callable[..., Path]
WAYS = list(Interpolation)


@pytest.fixture(scope="module")
def reader(cpp: Build) -> Path:
    return cpp("reader_streams")


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
        assert set(known) == {0.0, 1.0}
        assert len(known) > 800


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
    assert (values >= -np.pi).all()
    assert (values < np.pi).all()
    wanted = 3.0 + 4 * (ticks - 1000) / 1e3
    late = 0.3 if bounds else 1e-6
    assert np.abs(wrap(values - wanted)).max() < late
    assert np.abs(wrap(np.diff(values))).max() < 4 * 2e-3 * (2 if bounds else 1 + 1e-4)


@pytest.mark.parametrize("kind", [Kind.POSITION, Kind.VELOCITY, Kind.ANGLE, Kind.RELATIVE])
@pytest.mark.parametrize("interpolation", WAYS[1:])
def test_rows_are_found_by_time(kind: Kind, interpolation: Interpolation, reader: Path) -> None:
    """A policy that runs at about 20 Hz writes chunks at 30 Hz, each late by its own time, for a robot that is read at 500 Hz
    with jitter: a line in time stays that line."""
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
    assert np.abs(np.diff(rate)).max() < 0.02
    assert np.ptp(rate) > 0.3


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
    assert set(commands.values[:, 0]) == {1.0, 3.0}
    assert set(commands.chunk) == {1, 3}
