"""A matrix product in 8-bit floats (e4m3): activations quantised with a fixed scale, weights with one scale a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError, shown
from dit4dit.ops import launch, stand_in, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, float, Tensor, Tensor, Tensor | None, str, torch.dtype]

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ACTIVATIONS = ("none", "gelu")
LEAST_CAPABILITY = 89
"""Compute capability from which tensor cores multiply e4m3."""


def reference(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition: see `linear_fp8` for the arguments and the result."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(quantize(x, x_scale).to(wide), weight.to(wide)) * (x_scale * weight_scale.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    return (F.gelu(y) if activation == "gelu" else y).to(out_dtype)


def quantize(x: Tensor, scale: float) -> Tensor:
    """x / scale in e4m3, to nearest even; beyond its 448 the largest value, NaN stays NaN."""
    # the bound is ours: e4m3 has no infinity, and what a bare cast makes of larger values is each library's own choice
    return (x.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(FP8)


def linear_fp8(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(e4m3(x / x_scale) @ weight^T * x_scale * weight_scale + bias).

    x: [..., K], any floating dtype; where |x| exceeds 448 x_scale it is taken for that.
    x_scale: a power of two, so that dividing by it rounds nothing and every implementation quantises to the same bits.
    weight: float8_e4m3fn [N, K]. weight_scale: float32 [N], one a row of weight. bias: [N] or None.
    activation: "none", or "gelu" (the error function). Sums, scales and activation are in float32.
    out_dtype: of the result. out: [..., N] in it, to write the result to; None: to a new tensor.
    backend: "triton", "scaled_mm" (PyTorch's, rounded to bfloat16 before the activation) or "torch"; None chooses.

    Returns [..., N] in out_dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    if x.ndim < 1 or x.numel() == 0:
        raise InputError(f"linear_fp8: x: expected [..., K] with elements, got {list(x.shape)}")
    shapes = Shapes("linear_fp8", K=x.shape[-1]).of("weight", weight, "N K")
    shapes.of("weight_scale", weight_scale, "N").of("bias", bias, "N")
    floating("linear_fp8", x=x, weight=weight, weight_scale=weight_scale, bias=bias)
    for name, tensor, dtype in (("weight", weight, FP8), ("weight_scale", weight_scale, torch.float32)):
        if tensor.dtype != dtype:
            raise InputError(f"linear_fp8: {name}: expected {dtype}, got {tensor.dtype}")
    if not (x_scale > 0 and math.isfinite(x_scale) and math.frexp(x_scale)[0] == 0.5):
        raise InputError(f"linear_fp8: x_scale: expected a power of two, got {shown(x_scale)}")
    if activation not in ACTIVATIONS:
        raise InputError(f"linear_fp8: activation: expected 'none' or 'gelu', got {shown(activation)}")
    if not out_dtype.is_floating_point:
        raise InputError(f"linear_fp8: out_dtype: expected a floating dtype, got {out_dtype}")
    if out is not None and (
        out.shape != (*x.shape[:-1], len(weight)) or out.dtype != out_dtype or out.device != x.device
    ):
        wanted, got = f"{out_dtype} {[*x.shape[:-1], len(weight)]}", f"{out.dtype} {list(out.shape)}"
        raise InputError(f"linear_fp8: out: expected {wanted} on {x.device}, got {got} on {out.device}")
    result: Tensor = _op(x, x_scale, weight, weight_scale, bias, activation, out_dtype, backend=backend, out=out)
    return result


def launches(args: _Args, architecture: str, out: Tensor | None = None) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    The table chooses between quantising x inside the product and in a kernel before it, by reasoning.
    At 588 rows and 2048 to 8192 columns every value of x is read by 16 to 64 thread blocks: inside, each of them loads two
    bytes instead of one and converts it again, an effort of the order of the tensor cores' own, while the kernel before it
    reads 2 MB once. For few rows there are only the weights to read, and a second launch would cost more than it saves.
    """
    x, x_scale, weight, weight_scale, bias, activation, out_dtype = args
    columns, inner = weight.shape
    rows = x.numel() // inner
    tile = tiles.lookup("linear_fp8", architecture, rows=rows, columns=columns, inner=inner)
    fused = tile.pop("FUSED")
    if out is None:
        out = torch.empty(*x.shape[:-1], columns, dtype=out_dtype, device=x.device)
    todo, given = [], x
    if not fused:
        given = torch.empty_like(x, dtype=FP8)
        count, block = x.numel(), dict(BLOCK=2048, num_warps=4, num_stages=1)
        grid = (launch.blocks(count, block["BLOCK"]),)
        before: Mapping[str, Any] = dict(x=x, out=given, count=count, inverse=1 / x_scale)
        todo.append(Launch("linear_fp8.quantize", grid, before, {}, block))
    arguments: dict[str, Any] = dict(x=given, weight=weight, scale=weight_scale, bias=bias, out=out)
    arguments |= dict(rows=rows, columns=columns, x_scale=float(x_scale), inverse=1 / x_scale if fused else None)
    grid = (launch.blocks(rows, tile["ROWS"]) * launch.blocks(columns, tile["COLUMNS"]),)
    todo.append(Launch("linear_fp8", grid, arguments, dict(INNER=inner, GELU=activation == "gelu"), tile))
    return todo, out


def _no_tensor_cores(x: Tensor) -> str | None:
    """Why no GPU instruction multiplies e4m3 here, or None."""
    if not stand_in.on_gpu(x.device):
        return None
    major, minor = stand_in.capability(x.device)
    if 10 * major + minor < LEAST_CAPABILITY:
        return f"fp8 needs compute capability 8.9 or later, this is {major}.{minor}; leave the quantization out here"
    return None


def _refuse(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> str | None:
    if out_dtype not in launch.DTYPES:
        return f"out_dtype is {out_dtype}"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    return _no_tensor_cores(x) or launch.refuse(x=x, weight_scale=weight_scale, bias=bias)


def _refuse_scaled_mm(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> str | None:
    if not stand_in.on_gpu(x.device):
        return f"x is on {x.device.type}"
    reason = _no_tensor_cores(x)
    if reason is not None:
        return reason
    capability = stand_in.capability(x.device)
    if capability not in ((8, 9), (9, 0), (10, 0)):
        # cuBLAS answers CUBLAS_STATUS_NOT_SUPPORTED on 12.0 (torch 2.10); others are unknown
        return f"PyTorch has no row-wise scales for compute capability {capability[0]}.{capability[1]}"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"weight is {list(weight.shape)}, it takes multiples of 16"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    if out_dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
        return "it writes bfloat16 only, and takes no other bias"
    if torch.is_grad_enabled() and x.requires_grad:
        return "x needs a gradient"
    return None


def _run_scaled_mm(
    x: Tensor,
    x_scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    flat = quantize(x, x_scale).reshape(-1, x.shape[-1])
    rows = torch.full((flat.shape[0], 1), x_scale, device=x.device)
    y: Tensor = torch._scaled_mm(
        flat, weight.T, scale_a=rows, scale_b=weight_scale[None], bias=bias, out_dtype=out_dtype, use_fast_accum=False
    )
    return (F.gelu(y) if activation == "gelu" else y).unflatten(0, x.shape[:-1])


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 16, 64, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(128, 64, device=device).to(FP8)
    return x, 0.5, weight, torch.ones(128, device=device), None, "none", torch.bfloat16


_op = Op(
    "linear_fp8",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", into=True),
        Implementation("scaled_mm", _refuse_scaled_mm, _run_scaled_mm, device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
