"""The start of a part of an action head's block: residual, layer norm and modulation, and the matrix product behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError, shown
from dit4dit.ops import launch, onednn, tiles
from dit4dit.ops.adaln import reference as adaln
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op, find
from dit4dit.ops.linear import reference as linear
from dit4dit.ops.linear_gelu import reference as linear_gelu

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float, Tensor, Tensor | None, str | None]

ACTIVATIONS = {None: None, "gelu": "none", "gelu_tanh": "tanh", "relu": None}
"""activation -> `approximate` of the op linear_gelu, where it is a GELU."""
MOST_ROWS = 256
"""Rows of the whole batch that the kernel takes: each of its thread blocks norms all of its rows."""


def reference(
    x: Tensor,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The definition: see `norm_linear` for the arguments and the result."""
    return _composed((adaln, linear, linear_gelu), x, y, shift, scale, eps, weight, bias, activation)


def norm_linear(
    x: Tensor,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_new = x + y; out = activation((layernorm(x_new) * (1 + scale) + shift) @ weight^T + bias).

    x: residual stream [B, 1, N, W]. y: what the part before adds to it, [B, 1, N, W], or None.
    shift, scale: float32 [1, W] both, or both None: a plain layer norm.
    eps: of the layer norm, which has no weights of its own. Its arithmetic is in float32; what is multiplied has weight's dtype.
    weight: [O, W]. bias: [O] in weight's dtype, or None.
    activation: None, "gelu" (by the error function), "gelu_tanh" or "relu".
    backend: "parts" (the ops adaln, linear and linear_gelu, each as it is chosen), "triton" (few rows, x float32) or "torch";
        None chooses.

    Returns x_new in x's dtype (x itself where y is None) and out [B, 1, N, O] in weight's dtype.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    # a chunk has hundreds of these: what fits is seen without building the message for what does not
    if not (
        x.ndim == 4
        and x.shape[1] == 1
        and x.numel() > 0
        and x.is_floating_point()
        and weight.ndim == 2
        and weight.shape[1] == x.shape[3]
        and weight.is_floating_point()
        and weight.device == x.device
        and (y is None or (y.shape == x.shape and y.is_floating_point() and y.device == x.device))
        and (
            bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.device == x.device)
        )
        and (shift is None) == (scale is None)
        and all(t is None or (t.shape == (1, x.shape[3]) and t.device == x.device) for t in (shift, scale))
        and activation in ACTIVATIONS
    ):
        _check(x, y, shift, scale, weight, bias, activation)
    result: tuple[Tensor, Tensor] = _op(x, y, shift, scale, eps, weight, bias, activation, backend=backend)
    return result


def _check(
    x: Tensor,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    """InputError for what does not fit."""
    shapes = Shapes("norm_linear").of("x", x, "B 1 N W").of("y", y, "B 1 N W").of("shift", shift, "1 W")
    shapes.of("scale", scale, "1 W").of("weight", weight, "O W").of("bias", bias, "O")
    floating("norm_linear", x=x, y=y, shift=shift, scale=scale, weight=weight, bias=bias)
    if (shift is None) != (scale is None):
        raise InputError("norm_linear: expected shift and scale both or neither, got one of them")
    if bias is not None and bias.dtype != weight.dtype:
        raise InputError(f"norm_linear: bias: expected {weight.dtype} as weight, got {bias.dtype}")
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise InputError(f"norm_linear: activation: expected one of {known}, got {shown(activation)}")


def launches(args: _Args, architecture: str) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    x, y, shift, scale, eps, weight, bias, activation = args
    columns, inner = weight.shape
    rows = x.numel() // inner
    tile = tiles.lookup("norm_linear", architecture, rows=rows, columns=columns, inner=inner)
    x_new = None if y is None else torch.empty_like(x)
    out = torch.empty(*x.shape[:-1], columns, dtype=weight.dtype, device=x.device)
    arguments = dict(x=x, y=y, shift=shift, scale=scale, weight=weight, bias=bias, x_new=x_new, out=out)
    sizes = dict(rows=rows, columns=columns, eps=eps)
    step = _LINE // weight.element_size()
    constants = dict(INNER=inner, STEP=step, LINES=launch.power_of_2(launch.blocks(inner, step)), ACTIVATION=activation)
    grid = (launch.blocks(columns, tile["COLUMNS"]), launch.blocks(rows, tile["ROWS"]))
    todo = [Launch("norm_linear", grid, {**arguments, **sizes}, constants, tile)]
    return todo, (x if x_new is None else x_new, out)


_LINE = 128  # bytes of a line of L2
_WIDEST = 4096  # the first pass over a row is unrolled


def _refuse(
    x: Tensor,
    y: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> str | None:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if rows > MOST_ROWS:
        return f"x has {rows} rows, it takes at most {MOST_ROWS}"
    if width > _WIDEST:
        return f"rows of {width}, it takes at most {_WIDEST}"
    for name, tensor in (("x", x), ("shift", shift), ("scale", scale)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    if (reason := launch.refuse(products=True, weight=weight, bias=bias)) is not None:
        return reason
    return launch.refuse(x=x, y=y, shift=shift, scale=scale)


def _composed(
    ops: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]], x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """By adaln, linear and linear_gelu, in this order in `ops`; rest: the other arguments."""
    norm, product, product_gelu = ops
    y, shift, scale, eps, weight, bias, activation = rest
    x, h = norm(x, y, None, shift, scale, eps, weight.dtype)
    if approximate := ACTIVATIONS[activation]:
        return x, product_gelu(h, weight, bias, approximate)
    out = product(h, weight, bias)
    return x, torch.relu(out) if activation == "relu" else out


def _parts(*args: Any) -> tuple[Tensor, Tensor]:
    """The ops themselves: the door above has checked what theirs would check again."""
    return _composed((find("adaln"), find("linear"), find("linear_gelu")), *args)


def _prepare(x: Tensor, y: Tensor | None, shift: object, scale: object, eps: float, weight: Tensor, *_: object) -> None:
    onednn.prepare(x, weight)


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, table = torch.zeros(1, 1, 16, 64, device=device), torch.zeros(1, 64, device=device)
    return x, x.to(dtype), table, table, 1e-5, torch.zeros(128, 64, dtype=dtype, device=device), None, None


_op = Op(
    "norm_linear",
    [
        # before the kernel: whoever lists the calls of a step without a GPU sees the ops that run where nothing was measured
        Implementation("parts", lambda *_: None, _parts, prepare=_prepare),
        Implementation(
            "triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", measured_only=True
        ),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
