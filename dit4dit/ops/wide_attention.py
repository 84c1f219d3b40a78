"""Two implementations of `self_attention` for heads wider than flash attention kernels take: the VAE's one head of 384.

Both take q, k and v as they are in qkv: no norms, no positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.attention_libraries import WIDEST_HEAD

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, float]

SLICE = 128
"""Columns of a head that the kernel holds in one piece."""
WIDEST = 4 * SLICE
MOST_SCORES = 2**23
"""Of `product`: in float32 and again as weights in 2 bytes they are 48 MiB, about what the L2 cache of an H100
holds; more would go through memory four times. One image of 28 x 56 latents has 2.5 million, of 28 x 28 a quarter of that."""


def _refuse(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, widest: int
) -> str | None:
    """Why neither can take these, or None."""
    dim = qkv.shape[-1] // (3 * heads)
    if not WIDEST_HEAD < dim <= widest:
        return f"heads of {dim}; it takes more than {WIDEST_HEAD}" + (f", at most {widest}" if dim > widest else "")
    if norm_q is not None or norm_k is not None or rotary is not None:
        return "it takes q and k as they are, without norms and positions"
    return None


def refuse_split(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, *_: object
) -> str | None:
    """Why the Triton kernels cannot take these, or None."""
    reason = _refuse(qkv, norm_q, norm_k, rotary, heads, WIDEST)
    return reason or launch.refuse(products=True, strided=("qkv",), qkv=qkv)


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    One head of one image has few blocks of queries (784 pixels: 13 of 64), so the keys are split as well, and a second kernel
    puts the parts together, in a fixed order.
    """
    qkv, _, _, _, heads, _ = args
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    batch, _, length, dim = q.shape
    tile = tiles.lookup("wide_attention", architecture, length=length, dim=dim, heads=batch * heads)
    splits = launch.blocks(length, tile["SPAN"]) if tile["SPAN"] else 1
    split = splits > 1 and splits * q.numel() < 2**31
    tile["SPAN"] = tile["SPAN"] if split else 0
    out = torch.empty(batch, length, heads * dim, dtype=q.dtype, device=q.device)

    def scratch(*shape: int) -> Tensor | None:
        wanted = (splits, batch * heads, length, *shape)
        return torch.empty(wanted, dtype=torch.float32, device=q.device) if split else None

    partial, largest, total = scratch(dim), scratch(), scratch()
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, out=None if split else out, partial=partial)
    arguments |= dict(largest_out=largest, total_out=total, length=length, scale=math.log2(math.e) / math.sqrt(dim))
    arguments |= dict(x_batch=q.stride(0) if batch > 1 else 0, x_head=dim, x_row=q.stride(2))
    grid = (launch.blocks(length, tile["ROWS"]), batch * heads)
    first = Launch(
        "wide_attention", (*grid, splits if split else 1), arguments, dict(HEADS=heads, DIM=dim, SLICE=SLICE), tile
    )
    if not split:
        return [first], out
    arguments = dict(partial=partial, largest_in=largest, total_in=total, out=out, length=length, splits=splits)
    last = dict(ROWS=4, num_warps=4, num_stages=1)
    constants = dict(HEADS=heads, DIM=dim, COLUMNS=launch.power_of_2(dim))
    grid = (launch.blocks(length, last["ROWS"]), batch * heads)
    return [first, Launch("cross_attention.combine", grid, arguments, constants, last)], out


def refuse_product(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, *_: object
) -> str | None:
    """Why `product` does not take these, or None."""
    reason = _refuse(qkv, norm_q, norm_k, rotary, heads, qkv.shape[-1])
    if reason is not None:
        return reason
    scores = qkv.shape[0] * heads * qkv.shape[1] ** 2
    if scores > MOST_SCORES:
        return f"{scores} scores; it takes at most {MOST_SCORES}, which stay in the L2 cache"
    if qkv.requires_grad and torch.is_grad_enabled():
        return "qkv needs a gradient"
    return None


def product(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, eps: float
) -> Tensor:
    """Attention as two products of the library with a softmax between them; scores in float32."""
    batch, length, _ = qkv.shape
    q, k, v = (x.reshape(batch * heads, length, -1) for x in qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if wide != qkv.dtype and qkv.device.type != "cpu":
        # rounded to qkv's dtype, large scores would lose more than all the rest does; a CPU's product has no such result
        scores = torch.bmm(q, k.mT, out_dtype=wide)
    else:
        scores = torch.bmm(q.to(wide), k.to(wide).mT)
    weights = torch.softmax(scores.mul_(1 / math.sqrt(q.shape[-1])), dim=-1).to(qkv.dtype)
    return torch.bmm(weights, v).unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)
