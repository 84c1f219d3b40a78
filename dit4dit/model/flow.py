"""Rectified flow. The time convention, once: t = 0 is data, t = 1 is noise, x_t = (1 - t) x + t e, and v = e - x.

The sampler walks from noise to data, so it subtracts velocities (paper, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit4dit.config import FlowConfig
from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.types import Guidance, Schedule


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


# -- guidance: real-time chunking (arXiv 2506.07339) in the guided form without a gradient, as LeRobot has it ------------


@dataclass(frozen=True)
class GuidanceTensors:
    """The `Guidance` of one pass: previous float32 [B, K, A], weights float32 [K] or [B, K], bound of the strength."""

    previous: Tensor
    weights: Tensor
    max_guidance: float


def guided(x: Tensor, velocity: Tensor, t: float, previous: Tensor, weights: Tensor, max_guidance: float) -> Tensor:
    """The velocity that keeps to `previous`: arguments as `ops.euler_step` has them."""
    data = x - t * velocity  # where the velocity points
    return velocity - guidance_strength(t, max_guidance) * weights[..., None] * (previous - data)


def guidance_strength(t: float, max_guidance: float) -> float:
    """Strength of the guidance at time t (1: noise, 0: data): (t^2 + tau^2) / (t tau), tau = 1 - t, at most the maximum."""
    tau = 1 - t
    if t <= 0 or tau <= 0:
        return max_guidance
    return min((t * t + tau * tau) / (t * tau), max_guidance)


def prefix_weights(schedule: str, delay: int, horizon: int, length: int) -> Tensor:
    """How strongly each step of a chunk keeps to the left-over of the chunk before: float32 [length] in 0..1.

    1 for the first `delay` steps, which will have been carried out before the new chunk arrives; 0 from `horizon` on, where
    the left-over ends; between them "linear" or "exp" (linear w times (e^w - 1) / (e - 1)) falls, "ones" stays at 1 and
    "zeros" is 0. A delay beyond the horizon counts as the horizon.
    """
    if schedule not in get_args(Schedule):
        near = did_you_mean(schedule, get_args(Schedule))
        raise InputError(
            f"prefix_weights: schedule: expected one of {', '.join(get_args(Schedule))}, got {shown(schedule)}{near}"
        )
    if delay < 0 or horizon < 0 or length < 1:
        raise InputError(
            f"prefix_weights: expected delay and horizon >= 0 and length >= 1, got {delay}, {horizon}, {length}"
        )
    delay = min(delay, horizon)
    i = torch.arange(length, dtype=torch.float32)
    if schedule == "ones":
        w = torch.ones(length)
    elif schedule == "zeros":
        w = (i < delay).float()
    else:
        w = (1 - (i - delay + 1) / (horizon - delay + 1)).clamp(0, 1)
        if schedule == "exp":
            w = w * torch.expm1(w) / math.expm1(1)
    return torch.where(i < horizon, w, 0)


def guidance_arrays(guidance: Guidance, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """previous [K, A] and its weights [K] for chunks of `length` rows K; rows that are not there have weight 0."""
    rows, width = guidance.previous.shape
    previous = np.zeros((length, width), np.float32)
    previous[:rows] = guidance.previous
    horizon = rows if guidance.horizon is None else min(guidance.horizon, rows)
    return previous, prefix_weights(guidance.schedule, guidance.delay, horizon, length).numpy()
