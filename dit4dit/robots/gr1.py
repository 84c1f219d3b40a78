"""RoboCasa-GR1: a Fourier GR1 humanoid's arms, hands and waist, absolute joint positions at 20 Hz, one head camera."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.robots.channels import ChannelGroup
from dit4dit.robots.embodiment import Array, Embodiment, Key, field_of, join_action, split_action, state_of
from dit4dit.types import Observation

PARTS = (("left_arm", 7), ("right_arm", 7), ("left_hand", 6), ("right_hand", 6), ("waist", 3))
ENV_VIEW = "video.ego_view_bg_crop_pad_res256_freq20"


def observe(raw: Mapping[str, Any]) -> Observation:
    """The environment's dictionary (one environment, one time step) -> named data.

    The picture may come under the environment's own name or as the policy wrapper's `video.ego_view`.
    """
    picture = np.asarray(raw["video.ego_view"] if "video.ego_view" in raw else field_of(raw, ENV_VIEW, "GR1"))
    return Observation(images={"ego_view": picture}, state=state_of(raw, PARTS, "GR1"))


def command(action: Array) -> dict[str, Array]:
    """[29] -> {"action.left_arm": [7], ...}, absolute joint targets in radians."""
    return split_action(action, PARTS)


def record(sent: Mapping[str, Any]) -> Array:
    """The inverse of `command`."""
    return join_action(sent, PARTS)


GR1 = Embodiment(
    name="gr1",
    tag="gr1",
    views=("ego_view",),
    state=tuple(Key(name, dim, unit="rad") for name, dim in PARTS),
    # a hand's state lists its joints in another order than its action, so no value of one is the target of the other's
    action=tuple(Key(name, dim, kind="position", moves=None if name.endswith("hand") else name) for name, dim in PARTS),
    state_encoding="sin_cos",
    control_hz=20.0,
    observe=observe,
    command=command,
    record=record,
    groups=(
        ChannelGroup("arms", ("left_arm", "right_arm")),
        ChannelGroup("hands", ("left_hand", "right_hand")),
        ChannelGroup("waist", ("waist",)),
    ),
)
