"""Model values to robot units: threshold, clip, scale, offset, per action dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor]


def reference(actions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: see `unnormalize` for the arguments and the results."""
    at, low, high, scale, offset = table
    y = actions[..., : table.shape[1]].double()
    y = torch.where(at.isnan(), y, (y >= at).double())
    y = torch.minimum(torch.maximum(y, low), high)
    return (y * scale + offset).float(), actions


def unnormalize(
    actions: Tensor,
    table: Tensor,
    *,
    out: Tensor | None = None,
    copy: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised actions float32 [B, K, A_model] -> robot units float32 [B, K, A], and the actions as they are.

    table: float64 [5, A], rows threshold, low, high, scale, offset (`dit4dit.robots.transforms.inverse_table`). Where the
        threshold is a number the value first becomes 0 (below it) or 1; NaN means no threshold. Then
        clip(value, low, high) * scale + offset in float64. A is at most A_model, the rest of which is padding.
    out: float32 [B, K, A] to write the units to; None: to a new tensor.
    copy: like actions, where these are copied to; None: they are returned themselves, or a copy of them.
    backend: "triton" or "torch"; None chooses.

    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    Shapes("unnormalize").of("actions", actions, "B K A_model").of("table", table, "5 A")
    if actions.dtype != torch.float32 or table.dtype != torch.float64:
        raise InputError(
            f"unnormalize: expected float32 actions and a float64 table, got {actions.dtype}, {table.dtype}"
        )
    if table.shape[1] > actions.shape[2]:
        raise InputError(f"unnormalize: table: expected at most {actions.shape[2]} dimensions, got {table.shape[1]}")
    wanted = (*actions.shape[:2], table.shape[1])
    for name, place, shape in (("out", out, wanted), ("copy", copy, tuple(actions.shape))):
        if place is not None and (
            place.shape != shape or place.dtype != torch.float32 or place.device != actions.device
        ):
            got = f"{place.dtype} {list(place.shape)} on {place.device}"
            raise InputError(f"unnormalize: {name}: expected float32 {list(shape)} on {actions.device}, got {got}")
    places = None if out is None and copy is None else (out, copy)
    result: tuple[Tensor, Tensor] = _op(actions, table, backend=backend, out=places)
    return result


def launches(
    args: _Args, architecture: str, out: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    actions, table = args
    batch, horizon, width = actions.shape
    size = table.shape[1]
    units, copy = out
    if units is None:
        units = torch.empty(batch, horizon, size, dtype=torch.float32, device=actions.device)
    if copy is None:  # made here: a kernel without one would be another that has to be compiled ahead of time
        copy = torch.empty_like(actions)
    tile = tiles.lookup("unnormalize", architecture)
    arguments: dict[str, Any] = dict(actions=actions, table=table, out=units, copy=copy)
    arguments |= dict(count=actions.numel(), width=width, size=size)
    step = Launch("unnormalize", (launch.blocks(actions.numel(), tile["BLOCK"]),), arguments, {}, tile)
    return [step], (units, copy)


def _refuse(actions: Tensor, table: Tensor) -> str | None:
    return launch.refuse(dtypes=(torch.float32, torch.float64), actions=actions, table=table)


def _example(device: torch.device) -> _Args:
    return torch.zeros(1, 8, 7, device=device), torch.zeros(5, 7, dtype=torch.float64, device=device)


_op = Op(
    "unnormalize",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", into=True),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
