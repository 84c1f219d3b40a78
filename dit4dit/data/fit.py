"""Whether a model can take what a robot's data hold: sizes alone, before anything is read or loaded."""

from __future__ import annotations

from dit4dit.config import ModelConfig
from dit4dit.errors import ConfigError
from dit4dit.robots.embodiment import Embodiment


def check_fit(robot: Embodiment, model: ModelConfig) -> None:
    """ConfigError, with the option to set, where the robot's actions, state or joined images are too large for the model."""
    robot.check_action_width(model.head.action_dim)
    if model.head.state_dim is not None:
        robot.check_state_width(model.head.state_dim)
    height, width = model.image_size
    most = tuple(model.vae.spatial_factor * side for side in model.dit.max_size[1:])
    joined = width * len(robot.views)
    if height > most[0] or joined > most[1]:
        raise ConfigError(
            f"model.image_size: {len(robot.views)} views of robot {robot.name!r} at {height} x {width} pixels join to {height} x "
            f"{joined}, the model takes at most {most[0]} x {most[1]} (dit.max_size); lower --model.image_size "
            "(from a checkpoint with --weights.fresh_head true)"
        )


def check_views(views: dict[str, int]) -> str | None:
    """What keeps robots, each with its number of views, out of one batch; None where nothing does."""
    if len(set(views.values())) < 2:
        return None
    listed = ", ".join(f"{name} {count}" for name, count in sorted(views.items()))
    return f"its robots have different numbers of views ({listed}), so that their images do not go into one batch"
