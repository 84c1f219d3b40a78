"""The chains between robot units and model values, for one robot and its statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit4dit.errors import OutputError
from dit4dit.robots.embodiment import Array, Embodiment
from dit4dit.robots.state_range import StateRange
from dit4dit.robots.transforms import Chain


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

    def check(self, actions: Array) -> None:
        """Refuse actions in robot units [..., A] that no robot can carry out; all of them are looked at before they leave the
        policy.

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
