"""Unitree G1, whole body: arms, three-finger hands, torso and a walking command, one head camera, 30 Hz.

The published whole-body stack fixes the sizes (36 actions; a raw state that is q01/q99-normalised and padded to 64) but
publishes no list of keys; this is the usual layout of that width. A robot laid out otherwise is another `Embodiment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.robots.embodiment import Array, Embodiment, Key, field_of, join_action, split_action, state_of
from dit4dit.types import Observation

BODY = (("left_arm", 7), ("right_arm", 7), ("left_hand", 7), ("right_hand", 7), ("torso_rpy", 3), ("base_height", 1))
WALK = (("base_velocity", 3), ("target_yaw", 1))
ACTION = BODY + WALK


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
        *(Key(name, dim, kind="position", moves=name) for name, dim in BODY),
        # without a chunk the robot stops walking; the heading stays the one that it was told last: 0 is a place on the compass
        # too, and would turn it there
        Key("base_velocity", 3, kind="velocity"),
        Key("target_yaw", 1, kind="angle"),
    ),
    state_encoding="normalized",
    control_hz=30.0,
    observe=observe,
    command=command,
    record=record,
    notes=("the state is normalised with q01 and q99, clipped to [-1, 1], and padded",),
)
