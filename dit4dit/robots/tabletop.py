"""The built-in tabletop world: one camera from above, end-effector positions and a gripper command, 10 Hz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.robots.embodiment import Array, Embodiment, Gripper, Key, field_of
from dit4dit.types import Observation

STATE = ("x", "y", "grip")
ACTION = ("x", "y", "grip")
REACH = 0.21  # m from the middle, which the world's gripper does not leave


def observe(raw: Mapping[str, Any]) -> Observation:
    """{"image": uint8 [H, W, 3], "state": [3]} -> named data; metres, gripper opening in 0..1."""
    vector = np.asarray(field_of(raw, "state", "tabletop"), dtype=np.float32)
    state = {name: vector[i : i + 1] for i, name in enumerate(STATE)}
    return Observation(images={"top": np.asarray(field_of(raw, "image", "tabletop"))}, state=state)


def command(action: Array) -> Array:
    """[3] -> [3]: the world takes (x, y) in metres and a grip command, 1 = close, as they are."""
    return np.asarray(action, dtype=np.float32)


TABLETOP = Embodiment(
    name="tabletop",
    tag="tabletop",
    views=("top",),
    state=(Key("x", unit="m"), Key("y", unit="m"), Key("grip")),
    action=(
        *(Key(name, normalization="mean_std", kind="position", moves=name, clip=REACH) for name in ACTION[:2]),
        Key("grip", normalization="none", kind="binary"),
    ),
    state_encoding="normalized",
    control_hz=10.0,
    observe=observe,
    command=command,
    record=command,
    resize="bilinear",
    gripper=Gripper(index=2, threshold=0.5, open=0, fingers=(("grip", 1.0),)),
)
