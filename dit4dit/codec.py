"""Which robot a checkpoint is for, with which statistics: the chains between robot units and model values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dit4dit import embodiments, stats
from dit4dit.embodiments.embodiment import Array, Embodiment
from dit4dit.embodiments.state_range import StateRange
from dit4dit.errors import ConfigError, OutputError, did_you_mean
from dit4dit.model.checkpoint import Checkpoint
from dit4dit.model.keys import naming
from dit4dit.transforms import Chain

log = logging.getLogger("dit4dit.codec")


@dataclass(frozen=True)
class Codec:
    """How one embodiment's named data become model values and back, for one checkpoint's statistics.

    Attributes:
        state: None for a model without a state token.
        state_range: tells of states that are far from the training data's; None where it has nothing to compare them with.
    """

    embodiment: Embodiment
    tag: str
    state: Chain | None
    action: Chain
    state_range: StateRange | None = None

    @classmethod
    def for_checkpoint(cls, checkpoint: Checkpoint, wanted: str | Embodiment | None) -> Codec:
        """Choose embodiment and statistics tag.

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
        codec = cls(robot, tag, state, action, StateRange.of(robot, statistics, state))
        if never_moved := robot.never_moved(statistics):
            log.warning("%s: %s", where, never_moved)
        return codec

    def robot_units(self, normalized: Array) -> Array:
        """The model's actions [..., K, A_model] -> robot units [..., K, A]; OutputError as `check`."""
        actions = self.action.inverse(normalized)
        self.check(actions)
        return actions

    def check(self, actions: Array) -> None:
        """Refuse actions in robot units [..., A] that no robot can carry out; all that `robot_units` or the engine writes is
        looked at before it leaves the policy.

        Raises:
            OutputError: a value is NaN or infinite; it names the dimensions.
        """
        bad = ~np.isfinite(actions).reshape(-1, actions.shape[-1]).all(axis=0)
        if bad.any():
            names = ", ".join(np.asarray(self.embodiment.action_names)[bad])
            raise OutputError(
                f"actions: NaN or infinite values in robot units ({names}) with the statistics {self.tag!r}; nothing was "
                "returned. Check the checkpoint's weights and statistics (`dit4dit inspect`)"
            )


def choose_embodiment(checkpoint: Checkpoint, wanted: str | Embodiment | None) -> tuple[Embodiment, str | None]:
    """The embodiment, and the statistics label that the choice stands for (None: whichever is the only one)."""
    if isinstance(wanted, Embodiment):
        return wanted, wanted.tag
    if wanted in embodiments.EMBODIMENTS:
        robot = embodiments.EMBODIMENTS[str(wanted)]
        return robot, robot.tag if robot.tag in checkpoint.statistics or len(checkpoint.statistics) > 1 else None
    implied = robot_of(checkpoint)
    own = implied is not None and implied.name not in embodiments.EMBODIMENTS
    if implied is not None and own and wanted in (None, implied.name):
        return implied, implied.tag if implied.tag in checkpoint.statistics else None
    known = [*embodiments.EMBODIMENTS, *([implied.name] if implied is not None and own else []), *checkpoint.statistics]
    if wanted is not None and wanted not in checkpoint.statistics:
        raise ConfigError(f"embodiment {wanted!r}: unknown{did_you_mean(wanted, known)}; known: {', '.join(known)}")
    if implied is None:
        raise ConfigError(
            f"{checkpoint.path}: does not say which robot it is for; choose one with --embodiment: "
            f"{', '.join(embodiments.EMBODIMENTS)}; for a robot of your own `dit4dit eval openloop` takes --robots FILE "
            "--robot NAME"
        )
    return implied, wanted


def robot_of(checkpoint: Checkpoint) -> Embodiment | None:
    """The robot that the checkpoint says or implies it is for: one of the package's, or one that it describes."""
    if isinstance(checkpoint.embodiment, Mapping):
        from dit4dit.data.robots import restored

        return restored(checkpoint.embodiment, f"{checkpoint.path}: embodiment")
    return None if checkpoint.embodiment is None else embodiments.embodiment(checkpoint.embodiment)
