"""Bounds and groups of a robot's action channels: the known robots', a user's in a file, and through a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dit4dit.data.catalogue import catalogue
from dit4dit.envs import tabletop
from dit4dit.errors import ConfigError
from dit4dit.robots import EMBODIMENTS, G1, GR1, LIBERO, TABLETOP, Bounds, ChannelGroup, Key
from dit4dit.robots.descriptions import described, restored

OWN = """
robots:
  my_arm:
    video: [front]
    state: [joints]
    action: [joints, turn, walk, gripper]
    language: annotation.human.action.task_description
    action_steps: 12
    normalization: {action.gripper: binary}
    kinds: {action.joints: position, action.walk: velocity, action.turn: position}
    limits:
      action.joints: {low: -1, high: [1, 2, null], velocity: 3}
      action.walk: {high: 0.3, acceleration: 2.0, jerk: 20.0}
    groups:
      arm: {keys: [action.joints, action.turn, action.gripper]}
      base: {keys: [action.walk], on_dry: decay, on_stale: finish, on_dead: decay}
"""
SIZES = {"state.joints": 3, "action.joints": 3, "action.turn": 4, "action.walk": 1, "action.gripper": 1}


def embodiment_of(folder: Path, text: str = OWN, rotations: dict | None = None):
    (folder / "robots.yaml").write_text(text)
    robot = catalogue(folder / "robots.yaml").robot("my_arm")
    return robot.to_embodiment(SIZES, 30.0, "data", rotations=rotations)


@pytest.mark.parametrize("robot", EMBODIMENTS.values(), ids=lambda robot: robot.name)
def test_every_channel_of_a_known_robot_has_bounds_and_one_group(robot) -> None:
    assert len(robot.bounds) == robot.action_dim
    assert sorted(key for group in robot.channel_groups for key in group.keys) == sorted(
        key.name for key in robot.action
    )


def test_what_is_known_of_the_known_robots() -> None:
    bounds = {robot.name: dict(zip(robot.action_names, robot.bounds, strict=True)) for robot in EMBODIMENTS.values()}
    walk = [(bounds["g1"][f"base_velocity.{i}"].low, bounds["g1"][f"base_velocity.{i}"].high) for i in range(3)]
    assert walk == [(-0.1, 0.3), (-0.1, 0.1), (-0.8, 0.8)]
    assert bounds["g1"]["base_height"] == Bounds(0.2, 0.74)
    assert [bounds["g1"][f"torso_rpy.{i}"].high for i in range(3)] == [0.52, 0.52, None]
    assert {bounds["g1"][f"{side}_arm.{i}"].velocity for side in ("left", "right") for i in range(7)} == {3.0}
    left, right = (bounds["g1"][f"{side}_arm.1"] for side in ("left", "right"))
    assert (left.low, left.high) == (-right.high, -right.low)  # the shoulders' roll is mirrored
    assert LIBERO.channel_groups == (ChannelGroup("all", tuple(key.name for key in LIBERO.action)),)
    rules = {group.name: (group.on_dry, group.on_stale, group.on_dead) for group in G1.groups}
    assert list(rules) == ["arms", "hands", "torso", "base"]
    assert rules["base"] == ("decay", "decay", "decay")
    assert rules["arms"] == ("hold", "hold", "finish")
    # what the simulators clip a row to, in the stream's units: LIBERO takes 1.0 of displacement 20 times a second
    assert bounds["libero"]["yaw"] == Bounds(velocity=20.0)
    assert bounds["tabletop"]["x"] == Bounds(-tabletop.REACH, tabletop.REACH)
    assert not any(one.limited for one in (*GR1.bounds, LIBERO.bounds[6], TABLETOP.bounds[2]))
    assert TABLETOP.channel_groups == (ChannelGroup("all", ("x", "y", "grip")),)


def test_a_file_gives_limits_and_groups_and_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    robot = embodiment_of(tmp_path, rotations={"turn": "quaternion"})
    joints = [Bounds(-1.0, 1.0, 3.0), Bounds(-1.0, 2.0, 3.0), Bounds(-1.0, None, 3.0)]
    walk = Bounds(high=0.3, acceleration=2.0, jerk=20.0)
    assert list(robot.bounds) == [*joints, *[Bounds()] * 4, walk, Bounds()]
    assert robot.groups == (
        ChannelGroup("arm", ("joints", "turn", "gripper")),
        ChannelGroup("base", ("walk",), "decay", "finish", "decay"),
    )
    assert [key.rotation for key in robot.action] == [None, "quaternion", None, None]
    stored = json.loads(json.dumps(described(robot)))
    again = restored(stored, "here")
    assert (again.action, again.groups, again.bounds) == (robot.action, robot.groups, robot.bounds)
    for key in ("limits", "groups"):  # a description of before
        del stored["robot"][key]
    del stored["rotations"]
    before = restored(stored, "here")
    assert [group.name for group in before.channel_groups] == ["all"]
    assert not any(bounds.limited for bounds in before.bounds)


def test_the_files_rotation_goes_before_the_datas(tmp_path: Path) -> None:
    text = OWN.replace("    limits:", "    target_rotations: {action.turn: matrix}\n    limits:")
    assert embodiment_of(tmp_path, text, {"turn": "quaternion"}).action[1].rotation == "matrix"
    # roll, pitch and yaw are numbers each, to a stream too
    assert embodiment_of(tmp_path, OWN, {"turn": "euler_angles_rpy"}).action[1].rotation is None


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("action.walk: {high", "action.wlak: {high", r"limits: unknown key 'action.wlak'; did you mean 'action.walk'"),
        ("jerk: 20", "jrek: 20", "limits of action.walk: unknown key 'jrek'; did you mean 'jerk'"),
        ("jerk: 20.0", "jerk: 0", "limits of action.walk: jerk: expected a number above 0, got 0"),
        ("jerk: 20.0", "jerk: fast", "limits of action.walk: jerk: expected a number above 0, got 'fast'"),
        ("jerk: 20.0", "jerk: true", "limits of action.walk: jerk: expected a number above 0, got True"),
        ("high: 0.3", "high: .nan", "limits of action.walk: high: expected a number, got nan"),
        ("low: -1,", "low: 5,", "limits of action.joints: low, high: expected low < high, got 5 and 1"),
        ("[1, 2, null]", "[1, 2]", "limits of action.joints: high: expected a number or 3 of them, got 2"),
        ("{low: -1, high: [1, 2, null], velocity: 3}", "3", "limits of action.joints: expected a mapping of low, high,"),
        ("action.joints: position", "action.joints: angle", "limits of 'joints': an angle wraps: leave low and high out"),
        ("action.joints: position", "action.joints: relative", "limits of 'joints': a displacement has no place"),
        ("action.walk: {high", "action.gripper: {high", "limits of 'gripper': it is 0 or 1; leave them out"),
        ("[action.walk],", "[action.wlak],", "group 'base': unknown action key 'wlak'; did you mean 'walk'"),
        ("[action.walk],", "[walk],", "group 'base': keys: expected action.KEY, got 'walk'"),
        ("[action.walk],", "[action.walk, action.turn],", "action 'turn' is in groups 'arm' and 'base'; choose one"),
        ("action.turn, action.gripper]", "action.turn]", "groups: action 'gripper' is in none; every action key is"),
        ("on_dry: decay", "on_dyr: decay", "group 'base': unknown key 'on_dyr'; did you mean 'on_dry'"),
        ("on_dry: decay", "on_dry: dceay", "group 'base': on_dry: expected one of hold, decay, got 'dceay'; did you mean"),
        ("on_dry: decay", "on_dry: finish", "group 'base': on_dry: expected one of hold, decay, got 'finish'"),
        ("arm: {keys", "arm: {keis", r"group 'arm': expected a mapping with keys: \[action.KEY, ...\]"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert OWN.count(old) == 1
    with pytest.raises(ConfigError, match=message) as caught:
        embodiment_of(tmp_path, OWN.replace(old, new))
    assert "my_arm" in str(caught.value)


def test_a_rotation_has_no_limits_of_its_numbers(tmp_path: Path) -> None:
    text = OWN.replace("action.walk: {high", "action.turn: {velocity: 1.0}\n      action.walk: {high")
    with pytest.raises(ConfigError, match=r"limits of 'turn': it is a rotation \(quaternion\), not 4 numbers"):
        embodiment_of(tmp_path, text, {"turn": "quaternion"})


def test_an_entry_with_an_embodiment_has_neither(tmp_path: Path) -> None:
    for key in ("limits", "groups"):
        text = f"robots:\n  mine: {{embodiment: libero, language: annotation.a, action_steps: 8, {key}: {{}}}}\n"
        (tmp_path / "robots.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"robots.mine.{key}: embodiment 'libero' decides it; leave it out"):
            catalogue(tmp_path / "robots.yaml")


def test_a_clip_narrows_the_limits() -> None:
    keys = (
        Key("near", kind="position", clip=0.5, limits=Bounds(-1.0, 0.2, 4.0)),
        Key("walk", kind="velocity", clip=0.5),
        Key("step", 2, kind="relative", clip=0.1, limits=(Bounds(velocity=0.5), Bounds(velocity=9.0, jerk=3.0))),
    )
    robot = replace(TABLETOP, action=keys, gripper=None)
    assert robot.bounds == (
        Bounds(-0.5, 0.2, 4.0),
        Bounds(-0.5, 0.5),
        Bounds(velocity=0.5),
        Bounds(velocity=0.1 * TABLETOP.control_hz, jerk=3.0),
    )
    with pytest.raises(ConfigError, match="limits of 'step': expected 2, one per value, got 1"):
        replace(robot, action=(Key("step", 2, limits=(Bounds(),)),))
    with pytest.raises(ConfigError, match="action 'turn': expected no clip of a key of kind angle"):
        replace(robot, action=(Key("turn", kind="angle", clip=1.0),))
