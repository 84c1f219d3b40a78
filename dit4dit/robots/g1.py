"""Unitree G1, whole body: arms, three-finger hands, torso and a walking command, one head camera, 30 Hz.

The published whole-body stack fixes the sizes (36 actions; a raw state that is q01/q99-normalised and padded to 64) but
publishes no list of keys; this is the usual layout of that width. A robot laid out otherwise is another `Embodiment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.robots.channels import UNLIMITED, Bounds, ChannelGroup
from dit4dit.robots.embodiment import Array, Embodiment, Key, field_of, join_action, split_action, state_of
from dit4dit.types import Observation

BODY = (("left_arm", 7), ("right_arm", 7), ("left_hand", 7), ("right_hand", 7), ("torso_rpy", 3), ("base_height", 1))
WALK = (("base_velocity", 3), ("target_yaw", 1))
ACTION = BODY + WALK

# rad, in the order of an arm's motors (shoulder pitch, roll, yaw, elbow, wrist roll, pitch, yaw), as in Unitree's own description
# of the robot (unitree_ros, robots/g1_description/g1_29dof_rev_1_0.urdf)
SHOULDER_PITCH, LEFT_SHOULDER_ROLL, RIGHT_SHOULDER_ROLL = (-3.0892, 2.6704), (-1.5882, 2.2515), (-2.2515, 1.5882)
SHOULDER_YAW, ELBOW = (-2.618, 2.618), (-1.0472, 2.0944)
WRIST = ((-1.972222054, 1.972222054), (-1.614429558, 1.614429558), (-1.614429558, 1.614429558))
ARM_SPEED = (
    3.0  # rad/s, far below the 37 and 22 of that description: the published control loop ends above a measured 14
)
# what the published client clips to: m/s, m/s, rad/s; m; rad. Its controller is stricter still (vx and vy within 0.1, vyaw 0.5)
VELOCITY = ((-0.1, 0.3), (-0.1, 0.1), (-0.8, 0.8))
HEIGHT = (0.2, 0.74)
TILT = 0.52


def _arm(shoulder_roll: tuple[float, float]) -> tuple[Bounds, ...]:
    ranges = (SHOULDER_PITCH, shoulder_roll, SHOULDER_YAW, ELBOW, *WRIST)
    return tuple(Bounds(low, high, velocity=ARM_SPEED) for low, high in ranges)


LIMITS: dict[str, Bounds | tuple[Bounds, ...]] = {
    "left_arm": _arm(LEFT_SHOULDER_ROLL),
    "right_arm": _arm(RIGHT_SHOULDER_ROLL),
    # a yaw of the torso is not bounded by what was published, which sends 0
    "torso_rpy": (Bounds(-TILT, TILT), Bounds(-TILT, TILT), UNLIMITED),
    "base_height": Bounds(*HEIGHT),
}


def observe(raw: Mapping[str, Any]) -> Observation:
    """{"ego_view": uint8 [H, W, 3], "state.<key>": [d], ...} -> named data; joints in radians, height in metres."""
    return Observation(
        images={"ego_view": np.asarray(field_of(raw, "ego_view", "G1"))}, state=state_of(raw, BODY, "G1")
    )


def command(action: Array) -> dict[str, Array]:
    """[36] -> {"action.left_arm": [7], ...}: absolute joint targets, torso angles, height, velocities (m/s, rad/s)."""
    return split_action(action, ACTION)


def record(sent: Mapping[str, Any]) -> Array:
    """The inverse of `command`."""
    return join_action(sent, ACTION)


G1 = Embodiment(
    name="g1",
    tag="new_embodiment",
    views=("ego_view",),
    state=tuple(Key(name, dim, "q99", unit="m" if name == "base_height" else "rad") for name, dim in BODY),
    action=(
        *(Key(name, dim, kind="position", moves=name, limits=LIMITS.get(name, UNLIMITED)) for name, dim in BODY),
        # without a chunk the robot stops walking; the heading stays the one that it was told last: 0 is a place on the compass
        # too, and would turn it there
        Key("base_velocity", 3, kind="velocity", limits=tuple(Bounds(low, high) for low, high in VELOCITY)),
        Key("target_yaw", 1, kind="angle"),
    ),
    state_encoding="normalized",
    control_hz=30.0,
    observe=observe,
    command=command,
    record=record,
    groups=(
        ChannelGroup("arms", ("left_arm", "right_arm")),
        ChannelGroup("hands", ("left_hand", "right_hand")),
        ChannelGroup("torso", ("torso_rpy", "base_height")),
        # what nobody looks after any more stops walking, and not from one tick to the next
        ChannelGroup("base", ("base_velocity", "target_yaw"), on_dry="decay", on_stale="decay", on_dead="decay"),
    ),
    notes=("the state is normalised with q01 and q99, clipped to [-1, 1], and padded",),
)
