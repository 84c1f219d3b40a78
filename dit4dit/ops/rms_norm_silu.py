"""The VAE's norm: root mean square over the channels of each pixel, with the swish that follows it nearly everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.model import vae
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, bool]


def reference(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """The definition: see `rms_norm_silu` for the arguments and the result."""
    return vae.rms_norm_silu(x, gamma, silu)


def rms_norm_silu(x: Tensor, gamma: Tensor, silu: bool, *, backend: str | None = None) -> Tensor:
    """x / |x| * sqrt(C) * gamma, |x| being the length of a pixel's channel vector; then y * sigmoid(y) where `silu`.

    x: [B, C, H, W], channels last in memory or not; the result has its shape, dtype and layout.
    gamma: [C, 1, 1].
    backend: "triton" (channels last only) or "torch"; None chooses.

    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    Shapes("rms_norm_silu").of("x", x, "B C H W").of("gamma", gamma, "C 1 1")
    floating("rms_norm_silu", x=x, gamma=gamma)
    if x.dtype != gamma.dtype:
        raise InputError(f"rms_norm_silu: gamma: expected {x.dtype} as x, got {gamma.dtype}")
    result: Tensor = _op(x, gamma, silu, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    x, gamma, silu = args
    channels = x.shape[1]
    rows = x.numel() // channels
    tile = tiles.lookup("rms_norm_silu", architecture, channels=channels)
    out = torch.empty_like(x)
    arguments: dict[str, Any] = dict(x=x, gamma=gamma, out=out, rows=rows, smallest=vae.SMALLEST_NORM)
    constants = dict(CHANNELS=channels, COLUMNS=launch.power_of_2(channels), SILU=silu)
    return [Launch("rms_norm_silu", (launch.blocks(rows, tile["ROWS"]),), arguments, constants, tile)], out


def _refuse(x: Tensor, gamma: Tensor, _: bool) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels last in memory"
    if x.shape[1] > _WIDEST:
        return f"{x.shape[1]} channels, it takes at most {_WIDEST}"
    return launch.refuse(x=x.permute(0, 2, 3, 1), gamma=gamma)


_WIDEST = 4096  # a pixel stays in the registers of one thread block


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 96, 4, 4, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.ones(96, 1, 1, dtype=torch.bfloat16, device=device), True


_op = Op(
    "rms_norm_silu",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
