"""Which robot a checkpoint is for, with which statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dit4dit.checkpoints.checkpoint import Checkpoint
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import naming
from dit4dit.robots import EMBODIMENTS, embodiment
from dit4dit.robots import statistics as stats
from dit4dit.robots.descriptions import restored
from dit4dit.robots.embodiment import Embodiment
from dit4dit.robots.processor import Codec
from dit4dit.robots.state_range import StateRange

log = logging.getLogger("dit4dit.checkpoints")


def for_checkpoint(checkpoint: Checkpoint, wanted: str | Embodiment | None) -> Codec:
    """Embodiment, statistics tag, and the chains between robot units and model values.

    Args:
        wanted: an embodiment, its name, or a statistics tag; None takes what the checkpoint implies.

    Raises:
        ConfigError: nothing implies an embodiment, several tags and none chosen, or sizes that do not fit.
    """
    where = f"statistics of {checkpoint.path}"
    robot, label = choose_embodiment(checkpoint, wanted)
    tag = stats.choose_tag(checkpoint.statistics, label, where)
    statistics = stats.parse(checkpoint.statistics, tag, where)
    with naming(str(checkpoint.path)):  # views that side by side are wider than the backbone takes
        checkpoint.model.tokens(len(robot.views))
    head = checkpoint.model.head
    state = None if head.state_dim is None else robot.state_chain(statistics, head.state_dim)
    action = robot.action_chain(statistics, head.action_dim)
    codec = Codec(robot, tag, state, action, StateRange.of(robot, statistics, state))
    if never_moved := robot.never_moved(statistics):
        log.warning("%s: %s", where, never_moved)
    return codec


def choose_embodiment(checkpoint: Checkpoint, wanted: str | Embodiment | None) -> tuple[Embodiment, str | None]:
    """The embodiment, and the label of its statistics (None: whichever is the only one)."""
    if isinstance(wanted, Embodiment):
        return wanted, wanted.tag
    if wanted in EMBODIMENTS:
        robot = EMBODIMENTS[str(wanted)]
        return robot, robot.tag if robot.tag in checkpoint.statistics or len(checkpoint.statistics) > 1 else None
    implied = robot_of(checkpoint)
    own = implied is not None and implied.name not in EMBODIMENTS
    if implied is not None and own and wanted in (None, implied.name):
        return implied, implied.tag if implied.tag in checkpoint.statistics else None
    known = [*EMBODIMENTS, *([implied.name] if implied is not None and own else []), *checkpoint.statistics]
    if wanted is not None and wanted not in checkpoint.statistics:
        raise ConfigError(
            f"embodiment {shown(wanted)}: unknown{did_you_mean(wanted, known)}; known: {', '.join(known)}"
        )
    if implied is None:
        raise ConfigError(
            f"{checkpoint.path}: does not say which robot it is for; choose one with --embodiment: "
            f"{', '.join(EMBODIMENTS)}; for a robot of your own `dit4dit eval openloop` takes --robots FILE "
            "--robot NAME"
        )
    return implied, wanted


def robot_of(checkpoint: Checkpoint) -> Embodiment | None:
    """The robot that the checkpoint says or implies it is for: one of the package's, or one that it describes."""
    if isinstance(checkpoint.embodiment, Mapping):
        return restored(checkpoint.embodiment, f"{checkpoint.path}: embodiment")
    return None if checkpoint.embodiment is None else embodiment(checkpoint.embodiment)
