"""The whole ODE of the action head, noise to actions: every block of every Euler step in one launch.

The CUDA kernel (kernels/action_ode.cu) runs a schedule of `dit4dit.action_ode`; on a CPU it runs by emulation
(tests/cuda_emulation). It is chosen by itself only where measured.py names it, which is nowhere yet: on an H200 it is right, and
takes 4.5 ms where a graph of this file's reference takes 3.6, and the engine's loop of library and Triton kernels 2.4
(benchmarks/results/nvidia-h200.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op
from dit4dit.ops.euler_step import reference as euler_step

if TYPE_CHECKING:
    from dit4dit.action_ode.epilogue import Guidance, Units
    from dit4dit.action_ode.program import OneLaunchHead
    from dit4dit.engine.fold import HeadBlock, Modulation

_Args = tuple["OneLaunchHead", Tensor, Tensor, "Tensor | None", "Guidance | None", "Units | None"]


def reference(
    head: OneLaunchHead,
    noise: Tensor,
    context: Tensor,
    prefix: Tensor | None,
    guidance: Guidance | None,
    units: Units | None,
) -> Tensor:
    """The definition: see `action_ode` for the arguments and the result."""
    x = noise.float()
    for step in range(head.steps):
        velocity = _velocity(head, x.to(context.dtype), step, context, prefix).float()
        if guidance is None:
            x = euler_step(x, velocity, 1 / head.steps, None, None, None, None)
        else:
            t, given = 1 - step / head.steps, guidance
            x = euler_step(x, velocity, 1 / head.steps, t, given.previous, given.weights, given.max_guidance)
    return x if units is None else units(x)


def _velocity(head: OneLaunchHead, actions: Tensor, step: int, context: Tensor, prefix: Tensor | None) -> Tensor:
    folded, dtype = head.folded, context.dtype
    tokens = folded.encode_out(F.silu(folded.encode(actions) + folded.time_bias[step]))
    if folded.position is not None:
        tokens = tokens + folded.position
    x = (tokens if prefix is None else torch.cat([prefix[:, None].to(dtype), tokens], dim=1)).float()
    contexts = iter(context.chunk(sum(block.cross for block in folded.blocks), dim=-1))
    for block in folded.blocks:
        h = _norm(x, block.norms[step], 1e-5).to(dtype)
        x = x + _attend(block, h, next(contexts) if block.cross else None, head.heads).float()
        h = F.layer_norm(x, x.shape[-1:], eps=1e-5).to(dtype)
        x = x + block.mlp_out(F.gelu(block.mlp_in(h), approximate="tanh")).float()
    h = _norm(x, folded.out_norms[step], 1e-6).to(dtype)[:, -actions.shape[1] :]
    return folded.decode_out(torch.relu(folded.decode_in(h)))


def _norm(x: Tensor, table: Modulation, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + table.scale) + table.shift


def _attend(block: HeadBlock, h: Tensor, context: Tensor | None, heads: int) -> Tensor:
    projected = block.project(h)
    q, k, v = projected.chunk(3, dim=-1) if context is None else (projected, *context.chunk(2, dim=-1))
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def action_ode(
    head: OneLaunchHead,
    noise: Tensor,
    context: Tensor,
    prefix: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    units: Units | None = None,
    backend: str | None = None,
) -> Tensor:
    """Noise -> actions, float32 [B, K, A], a new tensor.

    Args:
        head: the folded head with its steps; it owns the schedules, the packed weights and the workspaces.
        noise: standard normal, float32 [B, K, A].
        context: the features' k | v of every block that attends to them, one product: [B, S, 2 * blocks * W].
        prefix: the state token [B, W], or None for a request without state.
        guidance: keep to a chunk that is being carried out. units: back to robot units at the end.
        backend: "torch", or "cuda" (bfloat16 on a GPU; read `head.check()` with the actions); None chooses.

    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    shapes = Shapes("action_ode", K=head.config.action_horizon, A=head.config.action_dim, W=head.config.width)
    shapes.of("noise", noise, "B K A").of("context", context, "B S C").of("prefix", prefix, "B W")
    contexts = sum(block.cross for block in head.folded.blocks)
    if shapes["C"] != 2 * contexts * head.config.width:
        wanted = 2 * contexts * head.config.width
        raise InputError(f"action_ode: context: expected [B, S, {wanted}], got {list(context.shape)}")
    given: dict[str, Tensor | None] = {"noise": noise, "context": context, "prefix": prefix}
    if guidance is not None:
        shapes.of("guidance.previous", guidance.previous, "B K A").of("guidance.weights", guidance.weights, "K")
        given |= {"guidance.previous": guidance.previous, "guidance.weights": guidance.weights}
    if units is not None:
        shapes.of("units", units.scale, "A")
        given["units"] = units.scale
    floating("action_ode", **given)
    result: Tensor = _op(head, noise, context, prefix, guidance, units, backend=backend)
    return result


def _refuse(head: OneLaunchHead, noise: Tensor, context: Tensor, prefix: Tensor | None, *_: object) -> str | None:
    return head.refuse(noise, context, prefix)


def _run(head: OneLaunchHead, *args: object) -> Tensor:
    return head.launch(*args)  # type: ignore[arg-type]


def _example(device: torch.device) -> _Args:
    from dit4dit.action_ode.program import example

    return example(device)


_op = Op(
    "action_ode",
    [
        Implementation("cuda", _refuse, _run, device="cuda", measured_only=True),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
