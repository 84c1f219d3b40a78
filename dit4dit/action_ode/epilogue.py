"""What may follow the velocity: guidance towards the chunk that is being carried out, and the way back to robot units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit4dit.errors import ConfigError
from dit4dit.transforms import Chain, Normalize, Pad, Threshold


@dataclass(frozen=True)
class Guidance:
    """Real-time chunking, as `ops.euler_step` has it: previous float32 [B, K, A], weights float32 [K], bound of the strength."""

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
        low, high = torch.full((width,), -math.inf), torch.full((width,), math.inf)
        threshold, scale, offset = torch.full((width,), math.nan), torch.ones(width), torch.zeros(width)
        for step in chain.steps:
            if isinstance(step, Normalize):
                d = len(step.scale)
                constant = torch.from_numpy(step.constant)
                fixed = ~constant.isnan()
                bounded, binary = torch.from_numpy(step.bounded), torch.from_numpy(step.binary)
                low[:d][bounded], high[:d][bounded] = -1.0, 1.0
                scale[:d] = torch.where(fixed | binary, (~fixed).double(), torch.from_numpy(step.scale)).float()
                base = torch.where(binary, 0.0, torch.from_numpy(step.offset))
                offset[:d] = torch.where(fixed, constant, base).float()
                # above one half, not from it on
                threshold[:d][binary] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
            elif isinstance(step, Threshold):
                threshold[step.index] = step.at
            elif not isinstance(step, Pad):
                raise ConfigError(f"action_ode: units: expected Normalize, Threshold or Pad, got {type(step).__name__}")
        return cls(*(t.to(device) for t in (low, high, threshold, scale, offset)))

    def table(self) -> Tensor:
        """float32 [5, A], as the kernel takes it."""
        return torch.stack([self.low, self.high, self.threshold, self.scale, self.offset])

    def __call__(self, y: Tensor) -> Tensor:
        """float32 [..., A] -> [..., A]."""
        y = torch.where(y < self.low, self.low, torch.where(y > self.high, self.high, y))
        y = torch.where(self.threshold.isnan(), y, (y >= self.threshold).float())
        return torch.where(self.scale == 0, self.offset, y * self.scale + self.offset)
