"""One step of the sampler, with the guidance of real-time chunking (`model.flow`): keep to what the robot is carrying out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.model.flow import guidance_strength, guided
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, float, float | None, Tensor | None, Tensor | None, float | None]


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
    weights: float32 [K] from `flow.prefix_weights`, or [B, K], a row for each sample. t: time before the step.
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
    strength = 0.0 if t is None or max_guidance is None else guidance_strength(t, max_guidance)
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
