"""The whole ODE of the action head, noise to actions: op by op (`loop`), or every block of every Euler step in one launch.

`loop` is the head of an engine; by the ops' references it is this op's reference. The CUDA kernel (kernels/action_ode.cu) runs a
schedule of `dit4dit.engine.action_ode`; on a CPU it runs by emulation (tests/cuda_emulation). It is chosen by itself only where
a verdict names it, and has not been timed on a GPU yet.

The kernel's launch is cooperative: it begins when all SMs that it needs are free at once. A plan's stream has a high priority, so
that kernels of other streams that have not begun wait behind it, such as the text encoder's in `Policy.prepare`; call the op in
such a stream where other work shares the GPU (`torch.cuda.Stream(priority=-1)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.config import HeadConfig
from dit4dit.errors import InputError
from dit4dit.model.flow import GuidanceTensors
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.cross_attention import cross_attention
from dit4dit.ops.dispatch import Implementation, Op, use_backend
from dit4dit.ops.euler_step import euler_step
from dit4dit.ops.norm_linear import norm_linear
from dit4dit.ops.self_attention import self_attention


class Linear(Protocol):
    """A linear map: weight [N, K], bias [N] or None; x [..., K] -> [..., N]."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Modulation(Protocol):
    """shift and scale of a norm, float32 [1, W]."""

    @property
    def shift(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...


class Block(Protocol):
    """One block: `norms` has a `Modulation` for each Euler step, `project` is q where it is `cross`, else q | k | v."""

    @property
    def norms(self) -> Sequence[Modulation]: ...
    @property
    def cross(self) -> bool: ...
    @property
    def project(self) -> Linear: ...
    @property
    def out(self) -> Linear: ...
    @property
    def mlp_in(self) -> Linear: ...
    @property
    def mlp_out(self) -> Linear: ...


class FoldedHead(Protocol):
    """The action head folded for its Euler steps; `engine.fold.Head` is one, and says what each part is."""

    @property
    def heads(self) -> int: ...
    @property
    def encode(self) -> Linear: ...
    @property
    def time_bias(self) -> Tensor: ...
    @property
    def encode_out(self) -> Linear: ...
    @property
    def position(self) -> Tensor | None: ...
    @property
    def blocks(self) -> Sequence[Block]: ...
    @property
    def out_norms(self) -> Sequence[Modulation]: ...
    @property
    def decode_in(self) -> Linear: ...
    @property
    def decode_out(self) -> Linear: ...


class OneLaunch(Protocol):
    """A folded head with what one launch of it needs; `refuse` and `launch` are the op's "cuda"."""

    @property
    def folded(self) -> FoldedHead: ...
    @property
    def config(self) -> HeadConfig: ...
    def refuse(self, noise: Tensor, context: Tensor, prefix: Tensor | None) -> str | None: ...
    def launch(
        self, noise: Tensor, context: Tensor, prefix: Tensor | None, guidance: GuidanceTensors | None
    ) -> Tensor: ...


def reference(
    head: OneLaunch, noise: Tensor, context: Tensor, prefix: Tensor | None, guidance: GuidanceTensors | None
) -> Tensor:
    """The definition: see `action_ode` for the arguments and the result."""
    with use_backend("torch"):
        return loop(head.folded, noise, context, prefix, guidance)


def loop(
    head: FoldedHead, noise: Tensor, context: Tensor, prefix: Tensor | None, guidance: GuidanceTensors | None
) -> Tensor:
    """The same, each op by the implementation that is chosen for it: what runs in an engine without the kernel.

    Arguments as `action_ode` has them, but for the head; weights of the guidance [K] or [B, K].
    """
    x, dtype, steps = noise.float(), context.dtype, len(head.out_norms)
    crossing = sum(block.cross for block in head.blocks)
    prefix = None if prefix is None else prefix.to(dtype)
    context = context.unflatten(-1, (2 * crossing, head.heads, -1)).permute(2, 0, 3, 1, 4)
    for step in range(steps):
        v = velocity(head, x.to(dtype), step, context, prefix).float()
        if guidance is None:
            x = euler_step(x, v, 1.0 / steps)
        else:
            previous, weights, most = guidance.previous, guidance.weights, guidance.max_guidance
            t = 1 - step / steps
            x = euler_step(x, v, 1.0 / steps, t=t, previous=previous, weights=weights, max_guidance=most)
    return x


def velocity(head: FoldedHead, actions: Tensor, step: int, context: Tensor, prefix: Tensor | None) -> Tensor:
    """Noisy actions [B, K, A] at Euler step `step` -> velocity [B, K, A], all in the head's dtype.

    context: k and v of each cross-attending block [2 * blocks, B, heads, S, d]. prefix: state token [B, W] likewise, or None.
    """
    tokens = head.encode_out(F.silu(head.encode(actions) + head.time_bias[step]))
    if head.position is not None:
        tokens = tokens + head.position
    # the residual stream is float32 whatever the weights are
    x = (tokens if prefix is None else torch.cat([prefix[:, None], tokens], dim=1))[:, None].float()
    branch: Tensor | None = None
    cross = 0
    for block in head.blocks:
        norm = block.norms[step]
        x, h = norm_linear(x, branch, norm.shift, norm.scale, 1e-5, block.project.weight, block.project.bias, None)
        branch = _attend(block, h[:, 0], context[2 * cross : 2 * cross + 2], head.heads)[:, None]
        cross += block.cross
        x, h = norm_linear(x, branch, None, None, 1e-5, block.mlp_in.weight, block.mlp_in.bias, "gelu_tanh")
        branch = block.mlp_out(h)
    norm, last, length = head.out_norms[step], head.decode_in, actions.shape[1]
    # of one sample the last rows are dense as they are
    x = x[:, :, -length:].contiguous()
    branch = None if branch is None else branch[:, :, -length:].contiguous()
    _, h = norm_linear(x, branch, norm.shift, norm.scale, 1e-6, last.weight, last.bias, "relu")
    return head.decode_out(h[:, 0])


def _attend(block: Block, projected: Tensor, context: Tensor, heads: int) -> Tensor:
    if block.cross:
        return block.out(cross_attention(projected, context[0], context[1], None, heads, 1e-5))
    return block.out(self_attention(projected, None, None, None, heads, 1e-5))


def action_ode(
    head: OneLaunch,
    noise: Tensor,
    context: Tensor,
    prefix: Tensor | None = None,
    *,
    guidance: GuidanceTensors | None = None,
    backend: str | None = None,
) -> Tensor:
    """Noise -> actions, float32 [B, K, A], a new tensor.

    Args:
        head: the folded head with its steps; it owns the schedules, the packed weights and the workspaces.
        noise: standard normal, float32 [B, K, A].
        context: the features' k | v of every block that attends to them, one product: [B, S, 2 * blocks * W].
        prefix: the state token [B, W], or None for a request without state.
        guidance: keep to a chunk that is being carried out; weights [K].
        backend: "cuda" (bfloat16 on a GPU; read `head.check()` with the actions), "loop" or "torch"; None chooses.

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
    floating("action_ode", **given)
    result: Tensor = _op(head, noise, context, prefix, guidance, backend=backend)
    return result


_op = Op(
    "action_ode",
    [
        Implementation(
            "cuda",
            lambda head, *args: head.refuse(*args[:3]),
            lambda head, *args: head.launch(*args),
            device="cuda",
            measured_only=True,
        ),
        Implementation("loop", lambda *_: None, lambda head, *args: loop(head.folded, *args)),
        Implementation("torch", lambda *_: None, reference),
    ],
    None,  # made by engine.action_ode.program
)
