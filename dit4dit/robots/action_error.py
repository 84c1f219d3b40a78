"""How far predicted actions are from recorded ones, per dimension: sums that add up over chunks, episodes and processes.

Training's held-out error and `dit4dit eval openloop` are both made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.robots.embodiment import Array, Embodiment
from dit4dit.robots.transforms import Chain


@dataclass(frozen=True)
class ActionUnits:
    """One robot's way from the model's actions back to its own units.

    Attributes:
        embodiment: whose `action_names` are the dimensions. chain: robot actions [..., d] <-> model actions [..., A_model].
    """

    embodiment: Embodiment
    chain: Chain

    @property
    def names(self) -> tuple[str, ...]:
        return self.embodiment.action_names

    def robot(self, normalized: Array) -> Array:
        """[..., A_model] -> robot units [..., d]."""
        return self.chain.inverse(normalized)


class ActionError:
    """Squared and absolute errors of d dimensions and how many values they are of, as float64 sums [3, d]."""

    def __init__(self, size: int) -> None:
        self.sums: NDArray[np.float64] = np.zeros((3, size))

    def add(self, predicted: Array, recorded: Array, mask: NDArray[np.bool_] | None = None) -> None:
        """predicted, recorded [..., d]; mask [..., d], True where a value counts (None: everywhere)."""
        error = np.asarray(predicted, dtype=np.float64) - recorded
        counted = np.ones(error.shape, dtype=bool) if mask is None else mask
        error = np.where(counted, error, 0.0).reshape(-1, error.shape[-1])
        counts = counted.reshape(error.shape).sum(axis=0)
        self.sums += np.stack([(error**2).sum(axis=0), np.abs(error).sum(axis=0), counts])

    def __iadd__(self, other: ActionError) -> ActionError:
        self.sums += other.sums
        return self

    @property
    def mse(self) -> NDArray[np.float64]:
        """Mean squared error [d]; NaN where nothing was counted."""
        return self._mean(self.sums[0], self.sums[2])

    @property
    def mae(self) -> NDArray[np.float64]:
        """Mean absolute error [d]; NaN where nothing was counted."""
        return self._mean(self.sums[1], self.sums[2])

    @property
    def total(self) -> dict[str, float]:
        """{"mse", "mae"} over all dimensions together; means something where they are normalised."""
        squared, absolute, count = self.sums.sum(axis=1)
        return {name: float(self._mean(value, count)) for name, value in (("mse", squared), ("mae", absolute))}

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """{"mse": {name: value}, "mae": {name: value}}, None where nothing was counted."""
        each = (("mse", self.mse), ("mae", self.mae))
        return {
            kind: {name: None if np.isnan(v) else float(v) for name, v in zip(names, values, strict=True)}
            for kind, values in each
        }

    @staticmethod
    def _mean(sums: Any, counts: Any) -> Any:
        return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)
