"""What csrc/include/dit4dit/limiter.h promises, held against what it sends.

Lanes are channels of their own: [ticks, lanes]. `differences` are those of what was sent, from rest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from limiter_program import EXACT, HEADERS, INFINITY, Program, differences, ticks

FREE = (-INFINITY, INFINITY)
ARM = (3.0, 20.0, 200.0)
"""rad/s, rad/s^2, rad/s^3."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("exact"))


def bounds(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """Velocity, acceleration and jerk [lanes, 3], over decades."""
    velocity = 10 ** rng.uniform(-1, 1.5, lanes)
    acceleration = velocity * 10 ** rng.uniform(-0.5, 2.5, lanes)
    return np.stack([velocity, acceleration, acceleration * 10 ** rng.uniform(-0.5, 3, lanes)], 1)


def with_limits(
    dynamic: np.ndarray, low: np.ndarray | float = -INFINITY, high: np.ndarray | float = INFINITY
) -> np.ndarray:
    lanes = len(dynamic)
    return np.concatenate([np.broadcast_to(low, lanes)[:, None], np.broadcast_to(high, lanes)[:, None], dynamic], 1)


def largest(sent: np.ndarray, dts: np.ndarray, pose: np.ndarray | float = 0.0) -> np.ndarray:
    """[lanes, 3]: the largest differences of what is sent from rest at `pose`."""
    begun = np.concatenate([np.broadcast_to(pose, sent[:1].shape), sent])
    return np.stack([np.abs(d).max(0) for d in differences(begun, np.concatenate([dts[:1], dts]))], 1)


def test_bounds_hold_for_any_targets_at_any_ticks(program: Program) -> None:
    found = program.stress(5_000_000)
    assert found["violations"] == 0
    assert found["farther_out"] == 0
    worst = [found[name] for name in ("velocity", "acceleration", "jerk")]
    assert all(0.998 < share < 1 for share in worst), worst  # they are made use of
    assert found["exact"] > 0.05


@pytest.mark.long
def test_bounds_hold_for_much_longer(program: Program) -> None:
    assert all(program.stress(50_000_000, 1 + seed)["violations"] == 0 for seed in range(10))


def test_backward_differences_at_uniform_ticks(program: Program) -> None:
    rng = np.random.default_rng(0)
    dts = np.broadcast_to(10 ** rng.uniform(-3.5, -1.8, 500), (600, 500))
    dynamic = bounds(rng, 500)
    sent = program(with_limits(dynamic), 0, np.cumsum(rng.uniform(-1, 1, (600, 500)), 0), dts)
    x = np.concatenate([np.zeros((3, 500)), sent])
    for order, bound in enumerate(dynamic.T, 1):
        x = np.diff(x, axis=0) / dts[0]
        assert (np.abs(x) <= bound * (1 + 1e-9)).all(), f"derivative {order}"
        assert (np.abs(x).max(0) > 0.9 * bound).mean() > 0.2


# --- a target that may be followed


def smooth(rng: np.random.Generator, dts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets [ticks, lanes] that begin at rest at 0, how far their curves go [2, lanes] and the largest
    differences [lanes, 3]: a cosine, a sum of cosines, a path with jerks that are switched, a ramp that begins with a corner."""
    lanes = dts.shape[1]
    t = np.cumsum(dts, 0)
    kind, pace = rng.integers(0, 4, lanes), 6.3 * 10 ** rng.uniform(-0.3, 0.5, lanes)

    def cosines(t: np.ndarray) -> np.ndarray:
        return sum(share * (1 - np.cos(k * pace * t)) for k, share in enumerate((1.0, 0.3, 0.1), 1))

    def switched(t: np.ndarray) -> np.ndarray:
        """Jerk +, -, -, + by quarters of a period, which brings it to rest elsewhere; then back."""
        phase = 4 - np.abs(pace * t / 12.6 % 1 * 2 - 1) * 4
        x = np.zeros_like(phase)
        for begin, jerk in ((0, 1.0), (1, -2.0), (3, 2.0)):
            x = x + jerk * np.maximum(phase - begin, 0) ** 3 / 6
        return x

    curves = [lambda t: 1 - np.cos(pace * t), cosines, switched, lambda t: t * np.ones(lanes)]
    size = 10 ** rng.uniform(-2, 1, lanes) * rng.choice([-1, 1], lanes)
    dense = np.linspace(0, 1, 4000)[:, None] * 13 / pace
    chosen = [size * np.select([kind == k for k in range(4)], [curve(when) for curve in curves]) for when in (t, dense)]
    ranges = np.stack([chosen[1].min(0), chosen[1].max(0)]) + 1e-5 * np.abs(size) * [
        [-1],
        [1],
    ]  # it is not dense enough for less
    ranges[:, kind == 3] = [[-INFINITY], [INFINITY]]
    # of the whole curve too: at short ticks the targets are not all of it
    reached = np.maximum(largest(chosen[0], dts), largest(chosen[1][1:], np.diff(dense, axis=0)) * (kind != 3)[:, None])
    return chosen[0], ranges, reached


def test_a_target_inside_the_bounds_is_sent_as_it_is(program: Program) -> None:
    """0.8 of the bounds, at ticks of all kinds; position limits at the ends of the target's curve."""
    rng = np.random.default_rng(0)
    dts = ticks(rng, 400, 2000)
    targets, ranges, reached = smooth(rng, dts)
    dynamic = reached / 0.799 * np.where(rng.random((2000, 3)) < 0.5, 1, rng.uniform(1, 5, (2000, 3)))
    room = np.where(rng.random(2000) < 0.5, 0, rng.uniform(0, 1, 2000))
    sent = program(with_limits(dynamic, ranges[0] - room, ranges[1] + room), 0, targets, dts)
    off = np.abs(sent - targets).max(0)
    assert off.max() < 1e-9, f"{(off >= 1e-9).sum()} lanes, {off.max()}"
    assert np.isfinite(ranges).all(0).sum() > 1000


@pytest.mark.parametrize("kind", ["noise", "alternating"])
def test_a_target_that_changes_with_every_tick_is_sent_as_it_is(program: Program, kind: str) -> None:
    """At 0.8 of the bounds, uniform ticks."""
    rng = np.random.default_rng(1)
    dts = np.broadcast_to(10 ** rng.uniform(-3.7, -1.7, 500), (300, 500))
    targets = (
        rng.uniform(-1, 1, (300, 500))
        if kind == "noise"
        else np.where(np.arange(300)[:, None] % 2, 1.0, -1.0) * np.ones(500)
    )
    dynamic = largest(targets, dts) / 0.799
    assert np.array_equal(program(with_limits(dynamic), 0, targets, dts), targets)


@pytest.mark.parametrize("relation", [1e2, 1e5, INFINITY])
def test_with_a_velocity_bound_alone_any_steps_within_it_are_sent(program: Program, relation: float) -> None:
    """Or with an acceleration that is far beyond what ticks show."""
    rng = np.random.default_rng(2)
    dts = np.broadcast_to(10 ** rng.uniform(-3, -1.3, 500), (400, 500))
    velocity = 10 ** rng.uniform(-1, 2, 500)
    dynamic = np.stack([velocity, velocity / dts[0] * relation, np.full(500, INFINITY)], 1)
    targets = np.cumsum(rng.uniform(-0.79, 0.79, (400, 500)) * velocity * dts, 0)
    assert np.array_equal(program(with_limits(dynamic), 0, targets, dts), targets)


# --- a target that stays


def optimum(distance: float, velocity: float, acceleration: float, jerk: float) -> float:
    ruckig = pytest.importorskip("ruckig")
    asked = ruckig.InputParameter(1)
    asked.current_position, asked.target_position = [0.0], [distance]
    asked.max_velocity, asked.max_acceleration, asked.max_jerk = [velocity], [acceleration], [jerk]
    found = ruckig.Trajectory(1)
    assert ruckig.Ruckig(1).calculate(asked, found) in (ruckig.Result.Working, ruckig.Result.Finished)
    return found.duration


def test_from_rest_to_rest_hardly_takes_longer_than_the_optimum(program: Program) -> None:
    rng = np.random.default_rng(0)
    lanes, number = 3000, 600
    dts, dynamic = ticks(rng, number, lanes), bounds(rng, lanes)
    distance = 10 ** rng.uniform(-3, 1, lanes) * rng.choice([-1, 1], lanes)
    limits = with_limits(dynamic, np.minimum(0, distance), np.maximum(0, distance))
    limits[rng.random(lanes) < 0.5, :2] = FREE
    best, time = np.array([optimum(d, *b) for d, b in zip(distance, dynamic, strict=True)]), np.cumsum(dts, 0)
    sent = program(limits, 0, np.broadcast_to(distance, (number, lanes)), dts)

    # a step that is a permitted ramp as far as its first tick goes is sent; see limiter.h
    first = largest(distance[None], dts[:1])
    small = (first < 0.8001 * dynamic).all(1)
    judged = ~small & (time[-10] > 1.05 * best)
    assert judged.sum() > 1000
    away = np.abs(sent - distance) > 1e-9
    arrival = number - np.argmax(away[::-1], 0)
    allowed = np.argmax(time >= 1.05 * best, 0) + 2
    late = (arrival - allowed)[judged]
    assert late.max() <= 0, f"{(late > 0).sum()} lanes, up to {late.max()} ticks"
    over = (np.sign(distance) * (sent - distance)).max(0)
    assert over[judged].max() < 1e-6
    print(f"overshoot {over[judged].max():.2g}, {judged.sum()} lanes")  # noqa: T201
    assert small.sum() > 100
    assert (over < np.abs(distance))[small].all()
    assert (over[small] > 1e-6).any()  # as limiter.h says


def test_it_settles_on_a_target_that_stays_or_moves_steadily(program: Program) -> None:
    """After noise: no limit cycle around a constant target or a ramp, which is sent as it is from some moment on."""
    rng = np.random.default_rng(0)
    lanes, number = 1000, 1500
    dts, dynamic = ticks(rng, number, lanes), bounds(rng, lanes)
    pace = np.where(np.arange(lanes) % 2, 0, rng.uniform(-0.7, 0.7, lanes)) * dynamic[:, 0]
    time = np.cumsum(dts, 0)
    stretch = dynamic[:, 0] ** 2 / dynamic[:, 1] + dynamic[:, 0] * dynamic[:, 1] / dynamic[:, 2]
    targets = pace * time + np.where(np.arange(number)[:, None] < 100, stretch * rng.uniform(-1, 1, (number, lanes)), 0)
    sent = program(with_limits(dynamic), 0, targets, dts)
    met = np.where((sent != targets).any(0), number - np.argmax((sent != targets)[::-1], 0), 0)
    # the widest ways: to turn around, to come back
    enough = time[-1] - time[100] > 20 * (dynamic[:, 0] / dynamic[:, 1] + dynamic[:, 1] / dynamic[:, 2])
    assert enough.sum() > 300
    assert (met[enough] < number).all(), f"{(met[enough] == number).sum()} of {enough.sum()} lanes never settle"


def test_a_moving_target_is_caught(program: Program) -> None:
    """Sines that are within 0.1 to 0.79 of the bounds and begin elsewhere, with a jump in the middle."""
    rng = np.random.default_rng(0)
    lanes, number = 600, 2000
    dts = np.broadcast_to(10 ** rng.uniform(-3, -2, lanes), (number, lanes)) * rng.uniform(0.5, 1.5, (number, lanes))
    time = np.cumsum(dts, 0)
    pace, size, share = (
        20 / time[-1] * rng.uniform(1, 3, lanes),
        10 ** rng.uniform(-1, 1, lanes),
        rng.uniform(0.1, 0.79, lanes),
    )
    dynamic = np.stack([size * pace**order / share for order in (1, 2, 3)], 1)
    targets = size * (
        np.sin(pace * time + rng.uniform(0, 6, lanes)) + np.where(time > time[-1] / 2, rng.uniform(-1, 1, lanes), 0)
    )
    sent = program(with_limits(dynamic), 0, targets, dts)
    same = np.abs(sent - targets) < 1e-9
    assert same[number // 2 - 200 : number // 2 - 100].all(0).mean() > 0.99
    assert same[-100:].all(0).mean() > 0.99
    assert not same[:20].all(0).any()


# --- everything else


def test_nan_brings_it_to_rest_as_fast_as_the_bounds_allow(program: Program) -> None:
    dts = np.full(2000, 1e-3)
    targets = np.minimum(3 * np.cumsum(dts), 2.4)  # at full speed for a while
    for begin in (150, 200, 600):
        braked = np.where(np.arange(2000) < begin, targets, np.nan)
        sent = program((*FREE, *ARM), 0, braked, dts)
        assert (largest(sent[:, None], dts[:, None]) <= ARM).all()
        rest = int(np.argmax(np.abs(sent - sent[-1]) < 1e-12))
        assert (sent[rest:] == sent[-1]).all()
        speed = (sent[begin - 1] - sent[begin - 2]) / 1e-3
        assert begin < rest <= begin + 1000 * (speed / ARM[1] + 2 * ARM[1] / ARM[2]) + 2
    again = np.where(np.arange(2000) < 600, np.where(np.arange(2000) < 200, targets, np.nan), 1.0)
    assert program((*FREE, *ARM), 0, again, dts)[-1] == 1.0


def test_brakes_within_the_limits_even_at_the_last_moment(program: Program) -> None:
    """At full speed toward a limit, then no target: it stops before."""
    dts = np.full(1500, 2e-3)
    for begin in range(100, 500, 10):
        targets = np.where(np.arange(1500) < begin, 1.0, np.nan)
        sent = program((-0.1, 1.0, *ARM), 0, targets, dts)
        assert sent.max() <= 1.0
        assert (largest(sent[:, None], dts[:, None]) <= ARM).all()
        assert sent[-1] == sent[-200] > 0


@pytest.mark.parametrize("start", [-3.0, 2.5])
def test_a_start_outside_the_limits_comes_in(program: Program, start: float) -> None:
    rng = np.random.default_rng(0)
    dts = rng.uniform(1e-3, 4e-3, 3000)
    for target in (rng.uniform(-2, 2, 3000), np.full(3000, 5.0), np.full(3000, np.nan), np.full(3000, 0.5)):
        sent = program((-1.0, 1.0, *ARM), start, target, dts)
        outside = np.maximum(np.maximum(-1 - sent, sent - 1), 0)
        assert (np.diff(outside, prepend=outside[0]) <= 0).all()
        assert (largest(sent[:, None], dts[:, None], start) <= ARM).all()
        assert sent[-1] == start if np.isnan(target[0]) else outside[-1] == 0


def test_what_is_ignored_or_unlimited(program: Program) -> None:
    nan, targets, dts = np.nan, np.array([1.0, 2.0, 3.0, -9.0]), np.full(4, 1e-2)
    assert program((*FREE, INFINITY, INFINITY, INFINITY), 0, targets, dts).tolist() == [1, 2, 3, -9]
    assert program((-1, 2.5, INFINITY, INFINITY, INFINITY), 0, targets, dts).tolist() == [1, 2, 2.5, -1]
    assert program((*FREE, *ARM), nan, targets[:1], dts[:1]).tolist() == [
        1
    ]  # not placed before: at rest at the first target
    assert program((-1, 0.5, *ARM), nan, targets[:1], dts[:1]).tolist() == [0.5]
    assert program((*FREE, 1, 1, 0), 0.3, targets, dts).tolist() == [0.3] * 4
    assert program((2, 1, *ARM), 0.3, targets, dts).tolist() == [0.3] * 4
    assert program((*FREE, *ARM), nan, np.array([nan, INFINITY, 7]), dts[:3]).tolist() == [0, 0, 7]
    plain = program((*FREE, *ARM), 0, np.full(20, 1.0), np.full(20, 1e-2))
    for odd in (0, -1, 49e-6, nan, INFINITY):
        mixed = program((*FREE, *ARM), 0, np.full(40, 1.0), np.tile([1e-2, odd], 20))
        assert np.array_equal(mixed[::2], plain)
        assert np.array_equal(mixed[1::2], plain)
    assert 0 < plain[1] < plain[-1] < 1


def test_one_bound_alone(program: Program) -> None:
    dts, targets = np.full(2000, 1e-3), np.full(2000, 1.0)
    for place, bound in enumerate((2.0, 10.0, 100.0)):
        dynamic = np.full(3, INFINITY)
        dynamic[place] = bound
        sent = program((*FREE, *dynamic), 0, targets, dts)
        found = largest(sent[:, None], dts[:, None])[0, place]
        assert 0.99 * bound < found <= bound
        assert sent[-1] == 1.0
        best = (1 / 2.0, 2 * (1 / 10.0) ** 0.5, 4 * (1 / 200.0) ** (1 / 3))[place]
        assert np.argmax(sent == 1.0) * 1e-3 < 1.01 * best + 2e-3


# --- would the tests see it? Faults, each one a line of the header, and the test that fails


def hostile(program: Program) -> None:
    assert program.stress(1_000_000)["violations"] == 0


def velocity_alone(program: Program) -> None:
    test_with_a_velocity_bound_alone_any_steps_within_it_are_sent(program, INFINITY)


def from_outside(program: Program) -> None:
    test_a_start_outside_the_limits_comes_in(program, 2.5)


FAULTS = {
    "bounds that are not kept inside": (hostile, "kInside = 0.999", "kInside = 1.001"),
    "the last ticks are taken for uniform ones": (hostile, "d2_ = d1_, d1_ = dt;", "d2_ = dt, d1_ = dt;"),
    "the difference of another window": (
        hostile,
        "* 3 / (dt + d1_ + d2_);\n        const double part",
        "* 3 / (3 * dt);\n        const double part",
    ),
    "sent without a way to rest": (
        hostile,
        "const int side = leaves(m, goal);",
        "const int side = leaves(m, goal) * 0;",
    ),
    "the past's acceleration is wrong": (hostile, "by_a((2 * dt + before)", "by_a((dt + 2 * before)"),
    "the past's jerk is not bounded": (
        hostile,
        "low = low < -jerk ? -jerk : low, high = high > jerk ? jerk : high;",
        "",
    ),
    "no look at where the way to rest leads": (hostile, "if (!bounded_) return 0;", "return 0;"),
    "a turn on the way is not seen": (
        hostile,
        "const bool turning = m.v * r.j1 > 0 && square > 0;",
        "const bool turning = false;",
    ),
    "the nearest motion is the one that is not admissible": (hostile, "m = nearest(m, dt, goal);", "goal = 0;"),
    "the way to rest is let go of": (hostile, "goal = left < 0 ? goal_ : 0;", "goal = 0;"),
    "drives too long": (
        test_from_rest_to_rest_hardly_takes_longer_than_the_optimum,
        "if (!(at_b * full > 0)) return dt;",
        "return dt;",
    ),
    "the past that was possible is not chosen from": (
        test_from_rest_to_rest_hardly_takes_longer_than_the_optimum,
        "if (open_) choose_past(from, left);",
        "",
    ),
    "brakes with half of the acceleration": (
        test_nan_brings_it_to_rest_as_fast_as_the_bounds_allow,
        "own_ = {a_, a_, j_, j_};",
        "own_ = {a_ / 2, a_ / 2, j_, j_};",
    ),
    "a quick turn has no past": (velocity_alone, "if (i == 0 && level > low && level < high) {", "if (false) {"),
    "one past only": (
        test_a_target_inside_the_bounds_is_sent_as_it_is,
        "for (int i = 0; i < 8; ++i)",
        "for (int i = 0; i < 1; ++i)",
    ),
    "a target's acceleration is not looked at": (
        test_a_moving_target_is_caught,
        "dt * (dt + d1_) * (1.0 / 6)), end}, jerk}",
        "0), 0}, 0}",
    ),
    "a start outside is a fault": (from_outside, "&& (up > x || way.turn < x)) return 1;", ") return 1;"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str, tmp_path: Path) -> None:
    test, right, wrong = FAULTS[name]
    shutil.copytree(HEADERS, tmp_path / "include")
    header = tmp_path / "include/dit4dit/limiter.h"
    text = header.read_text()
    assert text.count(right) == 1, f"{name}: the line has changed: {right}"
    header.write_text(text.replace(right, wrong))
    program = Program(tmp_path, *EXACT, "-Wno-error", headers=tmp_path / "include")
    with pytest.raises(AssertionError):
        test(program)
