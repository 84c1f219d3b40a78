"""LIBERO: a Franka arm with two cameras, controlled by end-effector deltas (robosuite's OSC_POSE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.robots.embodiment import Array, Embodiment, Gripper, Key, field_of
from dit4dit.types import Observation

STATE = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")
ACTION = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def axis_angle(quaternion: NDArray[Any]) -> NDArray[np.float64]:
    """Unit quaternion (x, y, z, w), w clipped to [-1, 1] -> axis times angle [3], radians."""
    x, y, z, w = np.asarray(quaternion, dtype=np.float64)
    w = float(np.clip(w, -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * np.arccos(w) / sine)


def observe(raw: Mapping[str, Any]) -> Observation:
    """The simulator's dictionary -> named data: pictures turned by 180 degrees, orientation as axis-angle."""
    get = lambda key: np.asarray(field_of(raw, key, "LIBERO"))  # noqa: E731
    views = {"primary_image": get("agentview_image"), "wrist_image": get("robot0_eye_in_hand_image")}
    vector = np.concatenate([get("robot0_eef_pos"), axis_angle(get("robot0_eef_quat")), get("robot0_gripper_qpos")])
    return Observation(
        images={name: np.ascontiguousarray(picture[::-1, ::-1]) for name, picture in views.items()},
        state={name: vector[i : i + 1].astype(np.float32) for i, name in enumerate(STATE)},
    )


def command(action: Array) -> Array:
    """Six deltas unchanged; gripper 1 = open, 0 = close -> the simulator's -1 = open, +1 = close. [7] -> [7]"""
    out = np.array(action, dtype=np.float32)
    out[6] = 1.0 - 2.0 * (out[6] > 0.5)
    return out


def record(sent: Any) -> Array:
    """The inverse of `command`."""
    out = np.array(sent, dtype=np.float32)
    out[6] = out[6] < 0
    return out


LIBERO = Embodiment(
    name="libero",
    tag="franka",
    views=("primary_image", "wrist_image"),
    state=tuple(Key(name, unit="rad" if name in ("roll", "pitch", "yaw") else "m") for name in STATE),
    action=(
        *(Key(name, kind="relative", moves=name, clip=1.0) for name in ACTION[:6]),
        Key("gripper", normalization="none", kind="binary"),
    ),
    state_encoding="sin_cos",
    control_hz=20.0,
    observe=observe,
    command=command,
    record=record,
    gripper=Gripper(index=6, threshold=0.5, open=1, fingers=(("pad", 1.0), ("gripper", -1.0))),
    notes=(
        "pad and gripper are the two finger joints; roll, pitch, yaw are the axis-angle vector",
        "control_hz is the simulator's control rate; a data set's own rate is in its meta/info.json",
        "held in its fastest turn it comes to rest after 1.5 s: a turn of 0 leaves the goal of the turn before, 0.5 rad ahead",
    ),
)
