"""The end of a level of the VAE: add what belongs together, and pad for the convolution that halves the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor | None, Tensor | None]
WIDEST = 4096
"""Channels: a pixel stays in the registers of one thread block."""


def reference(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The definition: see `add_pad` for the arguments and the result."""
    return F.pad(added(x, bias, residual), (0, 1, 0, 1))


def add_pad(x: Tensor, bias: Tensor | None, residual: Tensor | None, *, backend: str | None = None) -> Tensor:
    """x + bias + residual, with a column of zeros on the right and a row of zeros below.

    x: [B, C, H, W], channels last in memory or not; the result has its dtype and layout.
    bias: [C], or None. residual: [B, C, H, W], or None. In x's dtype; added in float32, rounded once.
    backend: "triton" (channels last only) or "torch"; None chooses.

    Returns [B, C, H + 1, W + 1].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    check("add_pad", x, bias, residual)
    result: Tensor = _op(x, bias, residual, backend=backend)
    return result


def added(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + bias + residual in float32, rounded once to x's dtype; x itself where both are None."""
    if bias is None:
        return x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) + bias.to(wide)[:, None, None]
    return (total if residual is None else total + residual.to(wide)).to(x.dtype)


def check(op: str, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """InputError unless these fit each other; for the ops that begin with the sum."""
    # a chunk has dozens of these: what fits is seen without building the message for what does not
    if (
        x.ndim == 4
        and x.numel() > 0
        and x.is_floating_point()
        and (bias is None or (bias.shape == x.shape[1:2] and bias.dtype == x.dtype and bias.device == x.device))
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
        and (residual is None or residual.device == x.device)
    ):
        return
    Shapes(op).of("x", x, "B C H W").of("bias", bias, "C").of("residual", residual, "B C H W")
    floating(op, x=x, bias=bias, residual=residual)
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{op}: {name}: expected {x.dtype} as x, got {tensor.dtype}")


def refuse_sum(x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None = None) -> str | None:
    """Why a Triton kernel that reads pixel after pixel cannot take these, or None."""
    for name, image in (("x", x), ("residual", residual)):
        if image is not None and not image.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels last in memory"
    if x.shape[1] > WIDEST:
        return f"{x.shape[1]} channels, it takes at most {WIDEST}"
    rows = None if residual is None else residual.permute(0, 2, 3, 1)
    return launch.refuse(x=x.permute(0, 2, 3, 1), bias=bias, residual=rows, gamma=gamma)


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    x, bias, residual = args
    batch, channels, height, width = x.shape
    out = torch.empty(
        (batch, channels, height + 1, width + 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    pixels = out.numel() // channels
    tile = tiles.lookup("add_pad", architecture, channels=channels)
    arguments = dict(x=x, bias=bias, residual=residual, out=out, pixels=pixels, height=height, width=width)
    constants = dict(CHANNELS=channels, COLUMNS=launch.power_of_2(channels))
    return [Launch("add_pad", (launch.blocks(pixels, tile["ROWS"]),), arguments, constants, tile)], out


def _refuse(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    batch, channels, height, width = x.shape
    if batch * channels * (height + 1) * (width + 1) >= 2**31:
        return "the result has 2^31 elements or more, its offsets have 31 bits"
    return refuse_sum(x, bias, residual)


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 96, 4, 4, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(96, dtype=torch.bfloat16, device=device), x


_op = Op(
    "add_pad",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
