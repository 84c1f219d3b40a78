"""A matrix product: the backbone's and the head's projections, most of a chunk's time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import arguments, launch, onednn, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, Tensor | None]

MOST_ROWS = 256
"""Rows that the Triton kernel takes: with more of them a library's larger tiles are what a product needs."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The definition: see `linear` for the arguments and the result."""
    if out is None:
        return F.linear(x, weight, bias)
    rows, flat = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.T, out=flat)
    else:
        torch.addmm(bias, rows, weight.T, out=flat)
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x @ weight^T + bias.

    x: [..., K]. weight: [N, K]. bias: [N] or None. All of one dtype and on one device.
    out: [..., N] in x's dtype, to write the result to; not where a gradient is needed. None: to a new tensor.
    backend: "triton" (few rows), "onednn" (a packed weight on a CPU, `ops.onednn.pack`) or "torch" (the library that PyTorch
        calls: cuBLAS on a GPU); None chooses.

    Returns [..., N] in x's dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    # a chunk has hundreds of these: what fits is seen without building the message for what does not
    if not (
        x.ndim > 0
        and x.numel() > 0
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and x.device == weight.device
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.device == x.device))
    ):
        arguments.product("linear", x, weight, bias)
    if out is not None and (
        out.shape != (*x.shape[:-1], len(weight)) or out.dtype != x.dtype or out.device != x.device
    ):
        wanted, got = f"{x.dtype} {[*x.shape[:-1], len(weight)]}", f"{out.dtype} {list(out.shape)}"
        raise InputError(f"linear: out: expected {wanted} on {x.device}, got {got} on {out.device}")
    result: Tensor = _op(x, weight, bias, backend=backend, out=out)
    return result


def launches(args: _Args, architecture: str, out: Tensor | None = None) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    x, weight, bias = args
    columns, inner = weight.shape
    rows = x.numel() // inner
    tile = tiles.lookup("linear", architecture, rows=rows, columns=columns, inner=inner)
    if out is None:
        out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    arguments = dict(x=x, weight=weight, bias=bias, out=out, rows=rows, columns=columns)
    grid = (launch.blocks(columns, tile["COLUMNS"]), launch.blocks(rows, tile["ROWS"]))
    return [Launch("linear", grid, arguments, dict(INNER=inner), tile)], out


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    rows = x.numel() // x.shape[-1]
    if rows > MOST_ROWS:
        return f"x has {rows} rows, it takes at most {MOST_ROWS}"
    return launch.refuse(products=True, x=x, weight=weight, bias=bias)


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(1, 16, 64, dtype=dtype, device=device)
    return x, torch.zeros(128, 64, dtype=dtype, device=device), None


_op = Op(
    "linear",
    [
        Implementation(
            "triton",
            launch.refuser(_refuse, launches),
            launch.runner(launches),
            device="cuda",
            measured_only=True,
            into=True,
        ),
        Implementation("onednn", onednn.refuse_product, onednn.linear, prepare=onednn.prepare),
        Implementation("torch", lambda *_: None, reference, into=True),
    ],
    _example,
)
