"""Rectified flow. The time convention, once: t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t e, and v = e - x.

The sampler walks from noise to data, so it subtracts velocities (paper, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit4dit.config import FlowConfig


def bridge(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point between data and noise at time t, and the velocity there.

    x, noise [B, ...], t [B] -> x_t [B, ...], v [B, ...].
    """
    t = t.reshape(-1, *(1,) * (x.dim() - 1))
    return (1 - t) * x + t * noise, noise - x


def bucket(t: float, buckets: int) -> int:
    """The integer timestep that the action head sees at time t."""
    return int(t * buckets)


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Euler steps of equal length from noise (t = 1) to data (t = 0).

    velocity(x, t) takes x shaped like `noise` and a time in (0, 1]; the result is shaped like `noise`.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    x = noise
    for i in range(steps):
        x = x - (1.0 / steps) * velocity(x, 1 - i / steps)
    return x


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the entries where `mask` is true; all three of one shape."""
    mask = mask.to(prediction.dtype)
    return (mask * (prediction - target) ** 2).sum() / mask.sum()


def action_times(count: int, config: FlowConfig, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Training times of the action loss, [count] in (0, 1/time_scale].

    Not clamped: released heads were trained with times up to 1.001, so clamping would shift their buckets.
    A Beta(a, b) draw is X / (X + Y) with X ~ Gamma(a), Y ~ Gamma(b), which a generator can drive.
    """
    concentration = torch.tensor([config.beta_alpha, config.beta_beta]).expand(count, 2).to(device)
    gamma = torch._standard_gamma(concentration, generator=generator)
    return gamma[:, 0] / gamma.sum(dim=1) / config.time_scale


def video_times(count: int, config: FlowConfig, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Training times of the video loss, [count] in [0, 1]: uniform or logit-normal, some moved to the noisy end."""
    if config.time_distribution == "uniform":
        t = torch.rand(count, generator=generator, device=device)
    else:
        t = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    if config.high_sigma_ratio is None or config.high_sigma_min is None:
        return t
    chosen = torch.rand(count, generator=generator, device=device) < config.high_sigma_ratio
    high = torch.rand(count, generator=generator, device=device)
    return torch.where(chosen, high_sigma(high, config.high_sigma_min), t)


def high_sigma(u: Tensor, lowest: float) -> Tensor:
    """Uniform draws in [0, 1) moved to [lowest, 1)."""
    return u * (1 - lowest) + lowest
