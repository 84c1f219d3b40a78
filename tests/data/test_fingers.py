"""Whether fingers run against the command: by how far they move, and by how they correlate."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from grippers import fingers, pick_and_place

from dit4dit.data import gripper


@functools.cache
def commands_and_fingers(kind: str, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Episodes as they come: late fingers, objects of any width, few or short ones, commands that chatter, sensors that hiss."""
    rng = np.random.default_rng(seed)
    many = [pick_and_place(rng) for _ in range(8)]
    if kind == "late":
        return many, [fingers(c, lag=14, held=0.03) for c in many]
    if kind == "no lag":
        return many, [fingers(c, lag=0, travel=2) for c in many]
    if kind == "at once":
        return many, [0.08 * c for c in many]
    if kind == "held wide":
        return many, [fingers(c, held=rng.uniform(0.045, 0.055)) for c in many]
    if kind == "starts half open":
        return many, [fingers(c, held=0.04, start=0.0417) for c in many]
    if kind == "one episode":
        return many[:1], [fingers(many[0], held=0.03)]
    if kind == "one grasp, no release":
        command = np.ones(60)
        command[25:] = 0
        return [command], [fingers(command, held=0.03)]
    if kind == "short":
        command = np.r_[np.ones(6), np.zeros(6)]
        return [command], [fingers(command, lag=1, travel=4)]
    if kind == "chatters":
        flipped = [np.where(rng.random(len(c)) < 0.05, 1 - c, c) for c in many]
        return flipped, [fingers(c, lag=4, held=0.03) for c in flipped]
    if kind == "taps":  # runs as short as the lag
        taps = [np.resize(np.repeat([1.0, 0.0], 12), 120) for _ in range(4)]
        return taps, [fingers(c, lag=10, travel=6) for c in taps]
    assert kind == "hisses"
    return many, [fingers(c, held=0.03) + rng.normal(0, 0.004, len(c)) for c in many]


KINDS = ("late", "no lag", "at once", "held wide", "starts half open", "one episode", "one grasp, no release", "short")
KINDS = (*KINDS, "chatters", "hisses")


@pytest.mark.parametrize("fps", [10.0, 20.0])
@pytest.mark.parametrize("kind", [*KINDS, "taps"])
def test_fingers_that_follow_are_never_an_error(kind: str, fps: float) -> None:
    for seed in range(10):
        commands, openings = commands_and_fingers(kind, seed)
        assert gripper.runs_against([c > 0.5 for c in commands], openings, fps) is None


@pytest.mark.parametrize("fps", [10.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fingers_that_run_against_the_command_are(kind: str, fps: float) -> None:
    for seed in range(10):
        commands, openings = commands_and_fingers(kind, seed)
        found = gripper.runs_against([c <= 0.5 for c in commands], openings, fps)
        assert found is not None
        assert found[0] > 0.9
        assert found[2] < -0.5


def test_a_correlation_alone_is_no_error() -> None:
    """A gripper that was blocked in one episode, and holds something wide in another; where it moves, it follows."""
    command = [np.ones(100, bool), np.zeros(100, bool), np.arange(20) < 10]
    opening = [np.zeros(100), np.full(100, 0.08), np.where(np.arange(20) < 12, 0.08, 0.0)]
    assert gripper.strongest_correlation(command, opening, 20.0) < -0.8
    assert gripper.travel(command, opening) == (0.0, 1)
    assert gripper.runs_against(command, opening, 20.0) is None


def test_fingers_that_tell_nothing_are_no_error() -> None:
    rng = np.random.default_rng(0)
    commands = [pick_and_place(rng) <= 0.5 for _ in range(8)]
    assert gripper.runs_against(commands, [np.full(120, 0.04) for _ in commands], 20.0) is None, "they do not move"
    still = 0
    for _ in range(200):  # what a broken sensor hisses, in sets of one short episode and of eight
        openings = [rng.normal(0.04, 0.01, 120) for _ in commands]
        assert gripper.runs_against(commands, openings, 20.0) is None
        still += gripper.runs_against(commands[:1], openings[:1], 20.0) is None
    assert still == 200


def test_travel_and_correlation_by_hand() -> None:
    # opens 0 -> 4 while commanded open, then closes by 1 and by 1 more while open is commanded again
    command = [np.array([True, True, True, False, False, True, True])]
    opening = [np.array([0.0, 2.0, 4.0, 4.0, 3.0, 3.0, 0.0])]
    share, movements = gripper.travel(command, opening)
    # 0..4 agrees (4); 4..3 agrees (1, below 30 % of the range: not counted); 3..0 is against (3)
    assert movements == 2
    assert share == pytest.approx(3 / 7)
    late = [np.r_[np.zeros(5, bool), np.ones(5, bool)]]
    assert gripper.strongest_correlation(late, [np.r_[np.zeros(7), np.ones(3)]], 4.0) == pytest.approx(1.0), (
        "two frames later"
    )
    assert gripper.strongest_correlation(late, [np.ones(10)], 4.0) == 0.0
    assert gripper.strongest_correlation([np.ones(0, bool)], [np.ones(0)], 4.0) == 0.0
