"""Attention to keys and values that are made once: of the text for the backbone, of the features for the action head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import attention_libraries as libraries
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op
from dit4dit.ops.qk_norm_rope import rms_norm

_Args = tuple[Tensor, Tensor, Tensor, Tensor | None, int, float]


def reference(q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, heads: int, eps: float) -> Tensor:
    """The definition: see `cross_attention` for the arguments and the result."""
    return libraries.sdpa(*_heads(q, k, v, norm_q, heads, eps))


def _heads(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, S or L, d], q normed."""
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    if norm_q is not None:
        q = rms_norm(q.to(torch.promote_types(q.dtype, torch.float32)), norm_q, eps).to(q.dtype)
    shape = (q.shape[0], *k.shape[1:])
    return q, k.expand(shape), v.expand(shape)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, heads: int, eps: float, *, backend: str | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, every query to every key.

    q: the raw projection [B, S, H * d], head after head.
    k, v: [B or 1, H, L, d], ready as they are (k normed where the model norms it); a batch of 1 serves every sample. Any
        strides whose last is 1, so they may be views of a larger matrix.
    norm_q: weights [d] of q's RMS norm per head (in float32, rounded once), or None: q as it is. eps: of that norm.
    backend: "triton", "cudnn", "flash" (needs flash-attn 2 or 3) or "torch"; None chooses.

    Returns [B, S, H * d] in q's dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    shapes = Shapes("cross_attention", H=heads).of("q", q, "B S E")
    dim, rest = divmod(shapes["E"], heads)
    if rest:
        raise InputError(f"cross_attention: q: expected a multiple of {heads} heads as its width, got {shapes['E']}")
    shapes.sizes["d"] = dim
    batch = "B" if k.ndim < 1 or k.shape[0] != 1 else "1"
    shapes.of("k", k, f"{batch} H L d").of("v", v, f"{batch} H L d").of("norm_q", norm_q, "d")
    floating("cross_attention", q=q, k=k, v=v, norm_q=norm_q)
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"cross_attention: expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    result: Tensor = _op(q, k, v, norm_q, heads, eps, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    A few queries (the action head has 9 to 51) would leave most of the chip idle with one thread block a head, so there
    the keys are split as well, and a second kernel puts the parts together, in a fixed order.
    """
    q, k, v, norm_q, heads, eps = args
    batch, length, width = q.shape
    dim, keys = width // heads, k.shape[2]
    tile = tiles.lookup("cross_attention", architecture, length=length, dim=dim, heads=batch * heads)
    span = tile["SPAN"] if keys > tile["SPAN"] else 0
    splits = launch.blocks(keys, span) if span else 1
    constants = dict(HEADS=heads, DIM=dim, COLUMNS=launch.power_of_2(dim, least=16))
    out = torch.empty_like(q)

    def scratch(*shape: int) -> Tensor | None:
        wanted = (splits, batch * heads, length, *shape)
        return torch.empty(wanted, dtype=torch.float32, device=q.device) if span else None

    partial, largest, total = scratch(dim), scratch(), scratch()
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, norm_q=norm_q, out=None if span else out, partial=partial)
    arguments |= dict(largest_out=largest, total_out=total, length=length, keys=keys, eps=eps)
    arguments["scale"] = math.log2(math.e) / math.sqrt(dim)
    for name, x in (("k", k), ("v", v)):
        step = x.stride(0) if x.shape[0] > 1 else 0
        arguments |= {f"{name}_batch": step, f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}
    grid = (launch.blocks(length, tile["ROWS"]), batch * heads)
    first = Launch("cross_attention", (*grid, splits), arguments, constants, {**tile, "SPAN": span})
    if not span:
        return [first], out
    arguments = dict(partial=partial, largest_in=largest, total_in=total, out=out, length=length, splits=splits)
    last = dict(ROWS=4, num_warps=4, num_stages=1)
    grid = (launch.blocks(length, last["ROWS"]), batch * heads)
    return [first, Launch("cross_attention.combine", grid, arguments, constants, last)], out


def _refuse_triton(q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, heads: int, *_: object) -> str | None:
    if q.shape[-1] // heads > libraries.WIDEST_HEAD:
        return f"heads of {q.shape[-1] // heads}; it takes at most {libraries.WIDEST_HEAD}"
    return launch.refuse(products=True, strided=("k", "v"), q=q, k=k, v=v, norm_q=norm_q)


def _example(device: torch.device) -> _Args:
    k = torch.zeros(1, 2, 32, 64, dtype=torch.bfloat16, device=device)
    q = torch.zeros(1, 16, 2 * 64, dtype=torch.bfloat16, device=device)
    return q, k, k, torch.ones(64, dtype=torch.bfloat16, device=device), 2, 1e-5


_op = Op(
    "cross_attention",
    [
        # the fastest on an H200 at 588 queries: 23 us, norm included, where the others take 52
        Implementation("triton", launch.refuser(_refuse_triton, launches), launch.runner(launches), device="cuda"),
        Implementation(
            "cudnn",
            lambda q, k, v, norm_q, heads, eps: libraries.refuse_cudnn(q, k.shape[-1]),
            lambda *args: libraries.cudnn(*_heads(*args)),
        ),
        Implementation(
            "flash",
            lambda q, k, v, norm_q, heads, eps: libraries.refuse_flash(q, k.shape[-1]),
            lambda *args: libraries.flash(*_heads(*args)),
        ),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
