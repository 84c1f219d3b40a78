"""One step of the sampler, with the guidance of real-time chunking: keep to what the robot is already carrying out.

Real-time chunking: arXiv 2506.07339; the guided form without a gradient, as LeRobot has it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError, did_you_mean
from dit4dit.ops import launch, tiles
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op
from dit4dit.ops.launch import Launch

_Args = tuple[Tensor, Tensor, float, float | None, Tensor | None, Tensor | None, float | None]

SCHEDULES = ("linear", "exp", "ones", "zeros")


def reference(
    x: Tensor,
    velocity: Tensor,
    dt: float,
    t: float | None,
    previous: Tensor | None,
    weights: Tensor | None,
    max_guidance: float | None,
) -> Tensor:
    """The definition: see `euler_step` for the arguments and the result."""
    if previous is not None and weights is not None and t is not None and max_guidance is not None:
        velocity = guided(x, velocity, t, previous, weights, max_guidance)
    return x - dt * velocity


def guided(x: Tensor, velocity: Tensor, t: float, previous: Tensor, weights: Tensor, max_guidance: float) -> Tensor:
    """The velocity that keeps to `previous`: arguments as `euler_step` has them."""
    data = x - t * velocity  # where the velocity points
    return velocity - guidance(t, max_guidance) * weights[..., None] * (previous - data)


def guidance(t: float, max_guidance: float) -> float:
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
    if schedule not in SCHEDULES:
        near = did_you_mean(schedule, SCHEDULES)
        raise InputError(f"prefix_weights: schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{near}")
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


def euler_step(
    x: Tensor,
    velocity: Tensor,
    dt: float,
    *,
    t: float | None = None,
    previous: Tensor | None = None,
    weights: Tensor | None = None,
    max_guidance: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """x - dt * v, with v = velocity, or guided: velocity - g * weights * (previous - (x - t * velocity)).

    x, velocity: float32 [B, K, A]; dt: length of the step, above 0 (velocity = noise - data, t falls from 1 to 0).
    previous: what is left of the chunk before, normalised as x is, shifted so that its first step is x's, [B, K, A].
    weights: float32 [K] from `prefix_weights`, or [B, K], a row for each sample. t: time before the step.
    max_guidance: bound of g. All four or none.
    backend: "triton" or "torch"; None chooses.

    Returns [B, K, A], a new tensor.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    Shapes("euler_step").of("x", x, "B K A").of("velocity", velocity, "B K A").of("previous", previous, "B K A").of(
        "weights", weights, "B K" if weights is not None and weights.dim() == 2 else "K"
    )
    floating("euler_step", x=x, velocity=velocity, previous=previous, weights=weights)
    given = [value is not None for value in (t, previous, weights, max_guidance)]
    if any(given) and not all(given):
        raise InputError("euler_step: guidance: expected all of t, previous, weights and max_guidance, or none of them")
    result: Tensor = _op(x, velocity, dt, t, previous, weights, max_guidance, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    x, velocity, dt, t, previous, weights, max_guidance = args
    tile = tiles.lookup("euler_step", architecture)
    out = torch.empty_like(x)
    strength = 0.0 if t is None or max_guidance is None else guidance(t, max_guidance)
    rows = x.shape[1] if weights is None else weights.numel()  # a sample's, or the whole batch's
    arguments: dict[str, Any] = dict(
        x=x, velocity=velocity, previous=previous, weights=weights, out=out, count=x.numel()
    )
    arguments |= dict(rows=rows, actions=x.shape[2], dt=float(dt), t=float(t or 0.0), strength=float(strength))
    return [Launch("euler_step", (launch.blocks(x.numel(), tile["BLOCK"]),), arguments, {}, tile)], out


def _refuse(
    x: Tensor, velocity: Tensor, dt: float, t: float | None, previous: Tensor | None, weights: Tensor | None, _: object
) -> str | None:
    for name, tensor in (("x", x), ("velocity", velocity), ("previous", previous), ("weights", weights)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    return launch.refuse(x=x, velocity=velocity, previous=previous, weights=weights)


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 8, 7, device=device)
    return x, x, 0.25, 1.0, x, torch.ones(8, device=device), 5.0


_op = Op(
    "euler_step",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
