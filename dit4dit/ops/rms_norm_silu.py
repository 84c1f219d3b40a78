"""The VAE's norm: add what belongs together, root mean square over the channels of each pixel, and the swish behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.model import vae
from dit4dit.ops import launch, tiles
from dit4dit.ops.add_pad import added, check, refuse_sum
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor, bool, bool]
_Result = tuple[Tensor, ...]


def reference(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, silu: bool, keep: bool
) -> _Result:
    """The definition: see `rms_norm_silu` for the arguments and the result."""
    x = added(x, bias, residual)
    y = vae.rms_norm_silu(x, gamma, silu)
    return (y, x) if keep else (y,)


def rms_norm_silu(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor,
    silu: bool,
    keep: bool,
    *,
    backend: str | None = None,
) -> _Result:
    """x_new = x + bias + residual; y = x_new / |x_new| * sqrt(C) * gamma, |x_new| being the length of a pixel's channel
    vector; then y * sigmoid(y) where `silu`.

    x: [B, C, H, W], channels last in memory or not; the results have its shape, dtype and layout.
    bias: [C], or None. residual: [B, C, H, W], or None. gamma: [C, 1, 1]. All of x's dtype; the arithmetic is in float32, and
        the norm sees x_new as rounded to x's dtype.
    keep: whether x_new is wanted.
    backend: "triton" (channels last only) or "torch"; None chooses.

    Returns (y, x_new) where `keep`, x_new being x itself where nothing is added; else (y,).
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    check("rms_norm_silu", x, bias, residual)
    if gamma.shape != (x.shape[1], 1, 1) or gamma.dtype != x.dtype or gamma.device != x.device:
        Shapes("rms_norm_silu", C=x.shape[1]).of("gamma", gamma, "C 1 1")
        floating("rms_norm_silu", x=x, gamma=gamma)
        raise InputError(f"rms_norm_silu: gamma: expected {x.dtype} as x, got {gamma.dtype}")
    result: _Result = _op(x, bias, residual, gamma, silu, keep, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], _Result]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    x, bias, residual, gamma, silu, keep = args
    channels = x.shape[1]
    rows = x.numel() // channels
    tile = tiles.lookup("rms_norm_silu", architecture, channels=channels)
    out = torch.empty_like(x)
    same = bias is None and residual is None
    x_new = torch.empty_like(x) if keep and not same else None
    arguments: dict[str, Any] = dict(x=x, bias=bias, residual=residual, gamma=gamma, x_new=x_new, out=out, rows=rows)
    arguments |= dict(smallest=vae.SMALLEST_NORM)
    constants = dict(CHANNELS=channels, COLUMNS=launch.power_of_2(channels), SILU=silu)
    step = Launch("rms_norm_silu", (launch.blocks(rows, tile["ROWS"]),), arguments, constants, tile)
    return [step], (out, x if x_new is None else x_new) if keep else (out,)


def _refuse(x: Tensor, bias: Tensor | None, residual: Tensor | None, gamma: Tensor, *_: bool) -> str | None:
    return refuse_sum(x, bias, residual, gamma)


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 96, 4, 4, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(96, dtype=torch.bfloat16, device=device)
    return x, bias, x, torch.ones(96, 1, 1, dtype=torch.bfloat16, device=device), True, True


_op = Op(
    "rms_norm_silu",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
