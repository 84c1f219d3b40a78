"""The end of a part of a block: matrix product, bias, gate, and the residual stream it is added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.ops import launch, tiles
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op
from dit4dit.ops.launch import Launch
from dit4dit.ops.linear_gelu import check

_Args = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gate: Tensor | None) -> Tensor:
    """The definition: see `linear_gated` for the arguments and the result."""
    y = F.linear(x, weight, bias)
    wide = torch.promote_types(residual.dtype, torch.float32)
    if gate is None:
        return (residual.to(wide) + y.to(wide)).to(residual.dtype)
    return torch.addcmul(residual.to(wide), gate.to(wide)[:, None], y.to(wide)).to(residual.dtype)


def linear_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """residual + gate * (x @ weight^T + bias).

    x: [B, T, N, K]. weight: [D, K]. bias: [D] or None. These of one dtype; sums in float32.
    residual: [B, T, N, D], of any floating dtype.
    gate: float32 [T, D], one row a latent frame, or None: 1.
    backend: "triton" or "torch"; None chooses.

    Returns [B, T, N, D] in residual's dtype, a new tensor.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    shapes = Shapes("linear_gated").of("x", x, "B T N K").of("weight", weight, "D K")
    shapes.of("residual", residual, "B T N D").of("gate", gate, "T D")
    check("linear_gated", x, weight, bias)
    floating("linear_gated", x=x, residual=residual, gate=gate)
    result: Tensor = _op(x, weight, bias, residual, gate, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device.

    With 2048 columns and 588 rows there are 80 blocks of 128 x 128 for 132 multiprocessors. Where the table says so the
    sum over a long inner width is split among blocks, and a second kernel adds the parts in a fixed order.
    """
    x, weight, bias, residual, gate = args
    columns, inner = weight.shape
    _, frames, tokens, _ = x.shape
    rows = x.numel() // inner
    tile = tiles.lookup("linear_gated", architecture, rows=rows, columns=columns, inner=inner)
    span = launch.blocks(launch.blocks(inner, tile.pop("SPLIT")), tile["DEPTH"]) * tile["DEPTH"]
    splits = launch.blocks(inner, span)
    if splits == 1:
        span = inner
    out = torch.empty_like(residual)
    partial = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device) if splits > 1 else None
    end = dict(bias=bias, residual=residual, gate=gate, out=out)
    shape = dict(rows=rows, columns=columns, frames=frames, tokens=tokens)
    first = end if partial is None else dict.fromkeys(end)
    grid = (launch.blocks(rows, tile["ROWS"]) * launch.blocks(columns, tile["COLUMNS"]), splits)
    constants = dict(INNER=inner, SPAN=span)
    todo = [Launch("linear_gated", grid, dict(x=x, weight=weight, partial=partial, **first, **shape), constants, tile)]
    if partial is not None:
        last = dict(ROWS=1, COLUMNS=1024, num_warps=4, num_stages=1)
        grid = (rows, launch.blocks(columns, last["COLUMNS"]))
        arguments = dict(partial=partial, **end, **shape)
        todo.append(Launch("linear_gated.combine", grid, arguments, dict(SPLITS=splits), last))
    return todo, out


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gate: Tensor | None) -> str | None:
    if gate is not None and gate.dtype != torch.float32:
        return f"gate is {gate.dtype}, not float32"
    return launch.refuse(products=True, x=x, weight=weight, bias=bias, residual=residual, gate=gate)


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 2, 4, 128, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(64, 128, dtype=torch.bfloat16, device=device)
    return x, weight, None, torch.zeros(1, 2, 4, 64, device=device), torch.zeros(2, 64, device=device)


_op = Op(
    "linear_gated",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
