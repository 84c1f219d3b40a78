"""The first half of a feed-forward part: matrix product, bias, GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError, shown
from dit4dit.ops import arguments, launch, onednn, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, Tensor | None, str]

APPROXIMATE = ("none", "tanh")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """The definition: see `linear_gelu` for the arguments and the result."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, *, backend: str | None = None
) -> Tensor:
    """gelu(x @ weight^T + bias).

    x: [..., K]. weight: [N, K]. bias: [N] or None. All of one dtype; sums in float32.
    approximate: "none" (the error function; the backbone) or "tanh" (the action head).
    backend: "triton", "onednn" (a packed weight on a CPU, `ops.onednn.pack`) or "torch"; None chooses.

    Returns [..., N] in x's dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    if approximate not in APPROXIMATE:
        raise InputError(f"linear_gelu: approximate: expected 'none' or 'tanh', got {shown(approximate)}")
    arguments.product("linear_gelu", x, weight, bias)
    result: Tensor = _op(x, weight, bias, approximate, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    x, weight, bias, approximate = args
    columns, inner = weight.shape
    rows = x.numel() // inner
    tile = tiles.lookup("linear_gelu", architecture, rows=rows, columns=columns, inner=inner)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    arguments = dict(x=x, weight=weight, bias=bias, out=out, rows=rows, columns=columns)
    grid = (launch.blocks(rows, tile["ROWS"]) * launch.blocks(columns, tile["COLUMNS"]),)
    return [Launch("linear_gelu", grid, arguments, dict(INNER=inner, TANH=approximate == "tanh"), tile)], out


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    return launch.refuse(products=True, x=x, weight=weight, bias=bias)


def _run_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return onednn.linear(x, weight, bias, "gelu", approximate)


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(1, 16, 64, dtype=dtype, device=device)
    return x, torch.zeros(128, 64, dtype=dtype, device=device), None, "none"


_op = Op(
    "linear_gelu",
    [
        # on Hopper a library's product and GELU behind it take 40 us where this takes 72, at 588 x 2048 x 8192
        Implementation(
            "triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", measured_only=True
        ),
        Implementation("onednn", onednn.refuse_product, _run_onednn, prepare=onednn.prepare),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
