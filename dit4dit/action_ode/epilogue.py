"""What may follow the velocity: guidance towards the chunk that is being carried out, and the way back to robot units.

Both are reached through `ops.action_ode`. The engine's plan leaves the units to `ops.unnormalize`, one small kernel behind this
one in the same graph: a chunk has its normalised actions beside those in robot units (the next chunk's guidance wants them), and
the kernel writes one of the two; and there they are made in float64, as `Chain.inverse` does on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit4dit.transforms import Chain, inverse_table


@dataclass(frozen=True)
class Guidance:
    """Real-time chunking, as `ops.euler_step` has it: previous float32 [B, K, A], weights float32 [K], bound of the strength.

    The loops of engine and plain model take weights [B, K], too; this is the device's side of `dit4dit.guidance.Guidance`.
    """

    previous: Tensor
    weights: Tensor
    max_guidance: float


@dataclass(frozen=True)
class Units:
    """Normalised actions -> robot units, for each of the model's A dimensions; all float32 [A].

    y is clipped to low..high; where `threshold` is no NaN it becomes 1 from there on and 0 below; then y * scale + offset,
    and `offset` alone where scale is 0.
    """

    low: Tensor
    high: Tensor
    threshold: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, chain: Chain, width: int, device: torch.device | str = "cpu") -> Units:
        """The inverse of an embodiment's action chain for a model `width` wide; padded dimensions stay as they are.

        ConfigError: a chain with another step than Normalize, Threshold and Pad.
        """
        at, low, high, scale, offset = torch.from_numpy(inverse_table(chain)).float()

        def padded(row: Tensor, value: float) -> Tensor:
            return torch.cat([row, torch.full((width - len(row),), value)]).to(device)

        bounds = padded(low, -math.inf), padded(high, math.inf), padded(at, math.nan)
        return cls(*bounds, padded(scale, 1.0), padded(offset, 0.0))

    def table(self) -> Tensor:
        """float32 [5, A], as the kernel takes it."""
        return torch.stack([self.low, self.high, self.threshold, self.scale, self.offset])

    def __call__(self, y: Tensor) -> Tensor:
        """float32 [..., A] -> [..., A]."""
        y = torch.where(y < self.low, self.low, torch.where(y > self.high, self.high, y))
        y = torch.where(self.threshold.isnan(), y, (y >= self.threshold).float())
        return torch.where(self.scale == 0, self.offset, y * self.scale + self.offset)
