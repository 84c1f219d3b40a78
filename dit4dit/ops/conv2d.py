"""A two-dimensional convolution: the VAE's, on images whose channels are last in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, Tensor | None, int, int]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """The definition: see `conv2d` for the arguments and the result."""
    return F.conv2d(x, weight, bias, stride, padding)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, backend: str | None = None
) -> Tensor:
    """The convolution of x with weight, plus bias.

    x: [B, C, H, W]. weight: [O, C, h, w]. bias: [O], or None. All of one dtype; sums in float32. On a GPU x and weight are
        channels last in memory, and so is the result.
    stride, padding: of both sides, zeros around.
    backend: "triton" (channels last in memory; x may be part of a larger buffer) or "torch" (the library that PyTorch calls:
        cuDNN on a GPU, which adds a bias in a kernel of its own); None chooses.

    Returns [B, O, (H + 2 padding - h) // stride + 1, (W + 2 padding - w) // stride + 1].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    # a chunk has dozens of these: what fits is seen without building the message for what does not
    if not (
        x.ndim == weight.ndim == 4
        and x.shape[1] == weight.shape[1]
        and x.numel() > 0
        and weight.numel() > 0
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and x.device == weight.device
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device))
        and stride >= 1
        and padding >= 0
    ):
        _check(x, weight, bias, stride, padding)
    result: Tensor = _op(x, weight, bias, stride, padding, backend=backend)
    return result


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    """InputError for what does not fit."""
    Shapes("conv2d").of("x", x, "B C H W").of("weight", weight, "O C h w").of("bias", bias, "O")
    floating("conv2d", x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"conv2d: {name}: expected {x.dtype} as x, got {tensor.dtype}")
    if stride < 1 or padding < 0:
        raise InputError(f"conv2d: expected a stride of at least 1 and no negative padding, got {stride} and {padding}")


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    A small image has too few tiles to fill a GPU (28 x 28 pixels by 384 channels: 21 of 128 x 128), so there the sum over
    kernel positions and channels is split as well, and a second kernel adds the parts, in a fixed order.
    """
    x, weight, bias, stride, padding = args
    batch, channels, height, width = x.shape
    columns, _, kernel_height, kernel_width = weight.shape
    inner = channels * kernel_height * kernel_width
    out_height, out_width = _size(x, weight, stride, padding)
    rows = batch * out_height * out_width
    tile = tiles.lookup("conv2d", architecture, rows=rows, columns=columns, inner=inner)
    depth = launch.blocks(inner, tile["DEPTH"])  # steps
    span = launch.blocks(tile["SPAN"], tile["DEPTH"])
    parts = launch.blocks(depth, span) if span else 1
    split = parts > 1 and parts * rows * columns < 2**31
    shape = (batch, columns, out_height, out_width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    partial = torch.empty(parts, rows, columns, dtype=torch.float32, device=x.device) if split else None
    arguments: dict[str, Any] = dict(x=x, weight=weight, bias=None if split else bias, out=None if split else out)
    arguments |= dict(partial=partial, rows=rows, columns=columns, height=height, width=width)
    arguments |= dict(out_height=out_height, out_width=out_width)
    arguments |= dict(x_batch=x.stride(0) if batch > 1 else 0, x_row=x.stride(2))
    constants = dict(X_COLUMN=x.stride(3), CHANNELS=channels, STRIDE=stride, PADDING=padding)
    constants |= dict(KERNEL_HEIGHT=kernel_height, KERNEL_WIDTH=kernel_width)
    taken = tile["COLUMNS"] + tile["WIDER"] * tile["COLUMNS"] // 2
    grid = (launch.blocks(rows, tile["ROWS"]) * launch.blocks(columns, taken), parts if split else 1)
    tile["SPAN"] = span * tile["DEPTH"] if split else 0
    first = Launch("conv2d", grid, arguments, constants, tile)
    if not split:
        return [first], out
    arguments = dict(partial=partial, bias=bias, out=out, size=rows * columns, columns=columns, parts=parts)
    last = dict(BLOCK=1024, num_warps=4, num_stages=1)
    return [first, Launch("conv2d.combine", (launch.blocks(rows * columns, last["BLOCK"]),), arguments, {}, last)], out


def _size(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of the result."""
    height, width = (
        (size + 2 * padding - side) // stride + 1 for size, side in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return height, width


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> str | None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.stride(1) != 1:
            return f"{name} is not channels last in memory: its channels have stride {tensor.stride(1)}, not 1"
    if min(_size(x, weight, stride, padding)) < 1:
        return (
            f"the kernel is larger than the image: {list(weight.shape[2:])} against {list(x.shape[2:])} and {padding}"
        )
    pixels = x.permute(0, 2, 3, 1)  # the last dimension is now the dense one
    out = len(weight) * len(x) * math.prod(_size(x, weight, stride, padding))
    if out >= 2**31:
        return f"the result has {out} elements, its offsets have 31 bits"
    return launch.refuse(products=True, strided=("x",), x=pixels, weight=weight.permute(0, 2, 3, 1), bias=bias)


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(1, 16, 8, 8, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(32, 16, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    return x, weight, None, 1, 1


_op = Op(
    "conv2d",
    [
        Implementation(
            "triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", measured_only=True
        ),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
