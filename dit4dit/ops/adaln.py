"""The start of every part of a block: add the gated result of the part before, layer norm, scale and shift."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, torch.dtype]


def reference(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The definition: see `adaln` for the arguments and the result."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if y is not None:
        y = y.to(wide)
        total = x.to(wide) + y if gate is None else torch.addcmul(x.to(wide), gate.to(wide)[:, None], y)
        x = total.to(x.dtype)
    h = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    if shift is not None and scale is not None:
        h = torch.addcmul(shift.to(wide)[:, None], h, 1 + scale.to(wide)[:, None])
    return x, h.to(out_dtype)


def adaln(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate * y; h = layernorm(x_new) * (1 + scale) + shift.

    x: residual stream [B, T, N, D]: N tokens in each of T latent frames (T = 1 in the action head). Where y is given it may be
        expanded from fewer samples, frames or tokens.
    y: what the part before adds to it, [B, T, N, D], or None.
    gate: float32 [T, D]; None adds y as it is. It means nothing without y.
    shift, scale: float32 [T, D] both, or both None: a plain layer norm.
    eps: of the layer norm, which has no weights of its own.
    out: where x_new goes, like it; only with y. None: to a new tensor.
    out_dtype: of h. The arithmetic is in float32; the norm sees x_new as rounded to x's dtype.
    backend: "triton", "rows" (Triton, several rows of one frame a thread block) or "torch"; None chooses.

    Returns x_new in x's dtype (x itself where y is None) and h, both [B, T, N, D].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    shapes = Shapes("adaln").of("x", x, "B T N D").of("y", y, "B T N D").of("gate", gate, "T D")
    shapes.of("shift", shift, "T D").of("scale", scale, "T D")
    floating("adaln", x=x, y=y, gate=gate, shift=shift, scale=scale)
    if (shift is None) != (scale is None):
        raise InputError("adaln: expected shift and scale both or neither, got one of them")
    if gate is not None and y is None:
        raise InputError("adaln: gate: expected None where y is None")
    if out is not None and (y is None or out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise InputError(f"adaln: out: expected y and a tensor like x, {list(x.shape)}, got {list(out.shape)}")
    place = None if out is None else (out, None)
    result: tuple[Tensor, Tensor] = _op(x, y, gate, shift, scale, eps, out_dtype, backend=backend, out=place)
    return result


def launches(
    args: _Args, architecture: str, out: tuple[Tensor, None] | None = None, *, shared: bool = False
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device.

    shared: a thread block takes rows of one frame only, and reads its gate, shift and scale once for all of them.
    """
    x, y, gate, shift, scale, eps, out_dtype = args
    _, frames, tokens, width = x.shape
    rows = x.numel() // width
    tile = tiles.lookup("adaln", architecture, rows=rows, width=width, shared=int(shared))
    if shared:
        tile["ROWS"] = _shared_rows(tokens, tile["ROWS"])
    h = x.new_empty(x.shape, dtype=out_dtype)  # dense, whatever the layout of x
    x_new = None if y is None else x.new_empty(x.shape) if out is None else out[0]
    # of a dense residual stream, which all but the first are, the kernel needs no strides
    strides = (None, None, None) if x.is_contiguous() else x.stride()[:3]
    arguments = dict(
        x=x,
        y=y,
        gate=gate,
        shift=shift,
        scale=scale,
        x_new=x_new,
        h=h,
        rows=rows,
        frames=frames,
        tokens=tokens,
        eps=eps,
        sample_stride=strides[0],
        frame_stride=strides[1],
        token_stride=strides[2],
    )
    constants = dict(WIDTH=width, COLUMNS=launch.power_of_2(width), SHARED=shared)
    return [Launch("adaln", (launch.blocks(rows, tile["ROWS"]),), arguments, constants, tile)], (
        x if x_new is None else x_new,
        h,
    )


def _shared_rows(tokens: int, most: int) -> int:
    """The largest power of two up to `most` that divides the tokens of a frame."""
    return min(most, tokens & -tokens)


def _refuse(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, *rest: object
) -> str | None:
    if rest[-1] not in launch.DTYPES:
        return f"out_dtype is {rest[-1]}"
    for name, table in (("gate", gate), ("shift", shift), ("scale", scale)):
        if table is not None and table.dtype != torch.float32:
            return f"{name} is {table.dtype}, not float32"
    if x.shape[-1] > _WIDEST:
        return f"rows of {x.shape[-1]}, it takes at most {_WIDEST}"
    if y is None and not x.is_contiguous():
        return "x is not contiguous, and without y it is one of the results"
    return launch.refuse(strided=("x",), x=x, y=y, gate=gate, shift=shift, scale=scale)


def _refuse_rows(x: Tensor, *rest: Any) -> str | None:
    if x.shape[2] % 2:
        return f"{x.shape[2]} tokens in a frame, an odd number, which no two rows divide"
    return _refuse(x, *rest)


_WIDEST = 8192  # a row stays in the registers of one thread block


def _example(device: torch.device) -> _Args:
    x = torch.zeros(1, 2, 4, 64, device=device)
    table = torch.zeros(2, 64, device=device)
    return x, x.bfloat16(), table, table, table, 1e-6, torch.bfloat16


_launches_rows = partial(launches, shared=True)

_op = Op(
    "adaln",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", into=True),
        # by counting, 6 KB of tables a row instead of 24 of a backbone's 48 KB; not measured
        Implementation(
            "rows",
            launch.refuser(_refuse_rows, _launches_rows),
            launch.runner(_launches_rows),
            device="cuda",
            measured_only=True,
            into=True,
        ),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
