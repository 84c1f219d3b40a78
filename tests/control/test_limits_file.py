"""Limits: a robot's own, and what a file or a mapping puts in their place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dit4dit.control import Limits
from dit4dit.errors import ConfigError
from dit4dit.robots import G1, GR1, LIBERO, TABLETOP, Bounds

FILE = """
limits:
  left_arm.3: {low: -1.0, high: 2.0}            # one joint: its own entry counts, wherever it stands
  left_arm: {velocity: 2.0, acceleration: 8.0, jerk: 80.0, low: null}
  base_velocity: {high: [0.05, 0.05, 0.5]}
  base_height: {velocity: 0.1}
"""


def test_of_a_robot() -> None:
    limits = Limits.of(G1)
    assert limits.bounds == G1.bounds
    assert limits["base_height"] == Bounds(0.2, 0.74)
    assert limits.limited
    assert not Limits.of(GR1).limited
    with pytest.raises(KeyError, match="channel 'base_heigth': unknown; did you mean 'base_height'"):
        limits["base_heigth"]


def test_a_file_overrides_them(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(FILE)
    own = Limits.of(G1)
    for source in (path, str(path)):
        limits = own.override(source)
        assert limits["left_arm.0"] == Bounds(None, own["left_arm.0"].high, 2.0, 8.0, 80.0)
        assert limits["left_arm.3"] == Bounds(-1.0, 2.0, 2.0, 8.0, 80.0)
        assert limits["right_arm.0"] == own["right_arm.0"]
        assert [limits[f"base_velocity.{i}"].high for i in range(3)] == [0.05, 0.05, 0.5]
        assert [limits[f"base_velocity.{i}"].low for i in range(3)] == [-0.1, -0.1, -0.8]
        assert limits["base_height"] == Bounds(0.2, 0.74, 0.1)
    assert own.bounds == G1.bounds
    again = limits.override({"left_arm": {"velocity": None}})
    assert again["left_arm.3"] == Bounds(-1.0, 2.0, None, 8.0, 80.0)


def test_a_mapping_may_widen_what_the_robot_says() -> None:
    assert Limits.of(TABLETOP).override({"x": {"low": None, "high": 5}})["x"] == Bounds(high=5.0)
    assert Limits.of(LIBERO).override({"yaw": {"velocity": 99.0}})["yaw"] == Bounds(velocity=99.0)
    assert Limits.of(TABLETOP).override({"x": {"velocity": np.float32(0.5)}})["x"].velocity == 0.5


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("limits:", "limit:", "unknown key 'limit'; did you mean 'limits'?; expected limits"),
        (FILE, "limits: 3", "expected limits: {KEY or CHANNEL: {velocity: ..., ...}, ...}"),
        (FILE, "- 3", "expected a mapping, got list"),
        ("left_arm.3", "left_arm.7", "limits: unknown key 'left_arm.7'; did you mean 'left_arm"),
        ("base_height", "base_heigth", "limits: unknown key 'base_heigth'; did you mean 'base_height'"),
        ("jerk", "jrek", "limits: left_arm: unknown key 'jrek'; did you mean 'jerk'?; known: low, high, velocity, acc"),
        ("80.0", "-80.0", "limits: left_arm: jerk: expected a number above 0, got -80.0"),
        ("80.0", "80 rad/s3", "limits: left_arm: jerk: expected a number above 0, got '80 rad/s3'"),
        ("velocity: 2.0", "velocity: .inf", "limits: left_arm: velocity: expected a number above 0, got inf; leave it out"),
        ("high: 2.0", "high: -2.0", "limits: left_arm.3: low, high: expected low < high, got -1 and -2"),
        ("[0.05, 0.05, 0.5]", "[0.05, 0.05]", "limits: base_velocity: high: expected a number or 3 of them, got 2"),
        ("[0.05, 0.05, 0.5]", "-0.05", "robot 'g1': limits of 'base_velocity': low and high of a velocity must include 0"),
        ("base_height", "left_arm: {jerk: 9.0}\n  base_height", "not readable YAML (key 'left_arm' is there twice"),
        ("base_height: {velocity: 0.1}", "base_height: 0.1", "limits: base_height: expected a mapping of low, high, vel"),
        ("base_height: {velocity", "target_yaw: {low", "robot 'g1': limits of 'target_yaw': an angle wraps: leave low"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "limits.yaml"
    assert old in FILE
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {re.escape(message)}") as caught:
        Limits.of(G1).override(path)
    assert "\n" not in str(caught.value)


def test_kinds_that_have_none() -> None:
    with pytest.raises(ConfigError, match="limits of 'gripper': it is 0 or 1; leave them out"):
        Limits.of(LIBERO).override({"gripper": {"velocity": 1.0}})
    with pytest.raises(ConfigError, match="limits of 'x': a displacement has no place: leave low and high out"):
        Limits.of(LIBERO).override({"x": {"low": -1.0}})
    with pytest.raises(ConfigError, match="no such file"):
        Limits.of(LIBERO).override("nowhere.yaml")
