"""Self-attention straight out of the qkv matrix, with the norms and positions of q and k."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dit4dit.ops import attention_libraries as libraries
from dit4dit.ops import launch, native, programmatic, stand_in, tiles
from dit4dit.ops import wide_attention as wide
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.dispatch import Implementation, Op
from dit4dit.ops.qk_norm_rope import best, check, example
from dit4dit.ops.qk_norm_rope import launches as prologue
from dit4dit.ops.qk_norm_rope import reference as split_norm_rope
from dit4dit.ops.qk_norm_rope import refuse_triton as refuse_prologue

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, float]


def reference(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, eps: float
) -> Tensor:
    """The definition: see `self_attention` for the arguments and the result."""
    q, k, v = split_norm_rope(qkv, norm_q, norm_k, rotary, heads, eps)
    return libraries.sdpa(q, k, v)


def self_attention(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rotary: Tensor | None,
    heads: int,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, every token to every token, with q, k, v as `qk_norm_rope` makes them.

    qkv: [B, S, 3 * H * d]. norm_q, norm_k: [d] both or both None. rotary: float32 [2, S, d/2 or d] or None.
    backend: "cuda" (bfloat16, heads of 128), "triton", "split" or "product" (heads wider than 128, without norms and positions),
        "cudnn", "flash" (needs flash-attn 2 or 3) or "torch"; None chooses.

    Returns [B, S, H * d] in qkv's dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    check("self_attention", qkv, norm_q, norm_k, rotary, heads)
    result: Tensor = _op(qkv, norm_q, norm_k, rotary, heads, eps, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    Norm and rotation are a pass of their own, and none where there is neither: inside attention every block of queries
    would norm and turn all keys again (10 times at 588 tokens and 64 rows a block), reading rotary tables twice the size
    of the keys each time, while the pass moves 10 MB, which the second-level cache holds. A CUDA kernel that did the former
    took 56 us on an H200 where the two kernels took 27.
    """
    todo, (q, k, v) = prologue(args, architecture)
    batch, heads, length, dim = q.shape
    tile = tiles.lookup("self_attention", architecture, length=length, dim=dim, heads=batch * heads)
    out = torch.empty(batch, length, heads * dim, dtype=q.dtype, device=q.device)
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, out=out, length=length, scale=math.log2(math.e) / math.sqrt(dim))
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments |= {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}
    constants = dict(HEADS=heads, DIM=dim, COLUMNS=launch.power_of_2(dim, least=16))
    grid = (launch.blocks(length, tile["ROWS"]), heads * batch)
    return [*todo, Launch("self_attention", grid, arguments, constants, tile)], out


def _refuse_triton(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, *_: object
) -> str | None:
    if _dim(qkv, heads) > libraries.WIDEST_HEAD:
        return f"heads of {_dim(qkv, heads)}; it takes at most {libraries.WIDEST_HEAD}"
    return refuse_prologue(qkv, norm_q, norm_k, rotary) or launch.refuse(products=True, qkv=qkv)


def _dim(qkv: Tensor, heads: int) -> int:
    return qkv.shape[-1] // (3 * heads)


CUDA_DIM = 128


def _refuse_cuda(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, *_: object
) -> str | None:
    """Why the CUDA kernel cannot take these, or None."""
    if not stand_in.on_gpu(qkv.device):
        return f"qkv is on {qkv.device.type}"
    if qkv.dtype != torch.bfloat16:
        return f"qkv is {qkv.dtype}, not bfloat16"
    if _dim(qkv, heads) != CUDA_DIM:
        return f"heads of {_dim(qkv, heads)}; it takes {CUDA_DIM}"
    batch, row, column = qkv.stride()
    if column != 1 or row % 8 or (batch % 8 and qkv.shape[0] > 1) or qkv.data_ptr() % 16:
        return f"qkv: its rows do not begin at multiples of 16 bytes, or are not dense: strides {qkv.stride()}"
    for name, tensor in (("qkv", qkv), ("norm_q", norm_q), ("norm_k", norm_k), ("rotary", rotary)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient"
    return native.no_cuda_kernels(qkv.device)


def queries_a_block(length: int, heads: int, multiprocessors: int) -> int:
    """64 or 128 queries; heads: of all samples. By reasoning, not measured.

    64 where that gives no multiprocessor a second block. Beyond that the busiest one has 128 queries either way, and blocks
    of 128 read keys and values half as often: 24 MB instead of 48 at 588 tokens and 16 heads.
    """
    return 64 if launch.blocks(length, 64) * heads <= multiprocessors else 128


def _multiprocessors(device: torch.device) -> int:
    stands = stand_in.of(device)
    return torch.cuda.get_device_properties(device).multi_processor_count if stands is None else stands.multiprocessors


def _launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, queries: int) -> Launch:
    """The CUDA kernel's launch, as kernels/self_attention.cu makes it: a block for each tile of queries of a head."""
    batch, heads, length, dim = q.shape
    grid = (launch.blocks(length, queries) * heads * batch,)
    arguments: dict[str, Any] = dict(q=q, k=k, v=v, out=out, length=length)
    return Launch(
        "self_attention.cu", grid, arguments, dict(DIM=dim), dict(ROWS=queries, KEYS=64, num_warps=queries // 16)
    )


def _run_cuda(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, eps: float
) -> Tensor:
    batch, length, _ = qkv.shape
    q, k, v = best(qkv, norm_q, norm_k, rotary, heads, eps)
    out = torch.empty(batch, length, heads * CUDA_DIM, dtype=qkv.dtype, device=qkv.device)
    queries = queries_a_block(length, batch * heads, _multiprocessors(qkv.device))
    if stand_in.recorded(qkv.device, [_launch(q, k, v, out, queries)]):
        return out
    stream, early = native.stream(qkv.device), programmatic.cuda_kernels(qkv.device)
    native.compiled().self_attention_cuda(*(native.view(x) for x in (q, k, v, out)), queries, stream, early)
    return out


_op = Op(
    "self_attention",
    [
        # not measured since it takes q and k that are normed and rotated once
        Implementation("cuda", _refuse_cuda, _run_cuda, device="cuda", measured_only=True),
        Implementation(
            "split",
            launch.refuser(wide.refuse_split, wide.launches),
            launch.runner(wide.launches),
            device="cuda",
            measured_only=True,
        ),
        Implementation("product", wide.refuse_product, wide.product, measured_only=True),
        # the fastest on an H200: 27 us where cuDNN took 28, at 588 tokens; then with q and k head after head, so that the
        # result of cuDNN had to be copied
        Implementation("triton", launch.refuser(_refuse_triton, launches), launch.runner(launches), device="cuda"),
        Implementation(
            "cudnn",
            lambda qkv, q, k, r, heads, eps: libraries.refuse_cudnn(qkv, _dim(qkv, heads)),
            lambda *args: libraries.cudnn(*best(*args)),
        ),
        Implementation(
            "flash",
            lambda qkv, q, k, r, heads, eps: libraries.refuse_flash(qkv, _dim(qkv, heads)),
            lambda *args: libraries.flash(*best(*args)),
        ),
        Implementation("torch", lambda *_: None, reference),
    ],
    example,
)
