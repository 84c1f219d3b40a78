"""RoboCasa-GR1: a Fourier GR1 humanoid's arms, hands and waist, absolute joint positions at 20 Hz, one head camera."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.embodiments.embodiment import Array, Embodiment, Key, field_of
from dit4dit.types import Observation

PARTS = (("left_arm", 7), ("right_arm", 7), ("left_hand", 6), ("right_hand", 6), ("waist", 3))
ENV_VIEW = "video.ego_view_bg_crop_pad_res256_freq20"


def observe(raw: Mapping[str, Any]) -> Observation:
    """The environment's dictionary (one environment, one time step) -> named data.

    The picture may come under the environment's own name or as the policy wrapper's `video.ego_view`.
    """
    picture = np.asarray(raw["video.ego_view"] if "video.ego_view" in raw else field_of(raw, ENV_VIEW, "GR1"))
    state = {name: np.asarray(field_of(raw, f"state.{name}", "GR1"), dtype=np.float32) for name, _ in PARTS}
    return Observation(images={"ego_view": picture}, state=state)


def command(action: Array) -> dict[str, Array]:
    """[29] -> {"action.left_arm": [7], ...}, absolute joint targets in radians."""
    cuts = np.cumsum([dim for _, dim in PARTS])[:-1]
    parts = np.split(np.asarray(action, dtype=np.float32), cuts)
    return {f"action.{name}": part for (name, _), part in zip(PARTS, parts, strict=True)}


def record(sent: Mapping[str, Any]) -> Array:
    """The inverse of `command`."""
    return np.concatenate([np.asarray(sent[f"action.{name}"], dtype=np.float32) for name, _ in PARTS])


GR1 = Embodiment(
    name="gr1",
    tag="gr1",
    views=("ego_view",),
    state=tuple(Key(name, dim) for name, dim in PARTS),
    action=tuple(Key(name, dim) for name, dim in PARTS),
    state_encoding="sin_cos",
    rate_hz=20.0,
    observe=observe,
    command=command,
    record=record,
)
