"""The action head's first token: the robot's state through two layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]


def reference(
    state: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition: see `state_token` for the arguments and the result."""
    hidden = F.relu(F.linear(state.to(weight1.dtype), weight1, bias1))
    return F.linear(hidden, weight2, bias2).to(dtype)


def state_token(
    state: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """relu(state @ weight1^T + bias1) @ weight2^T + bias2.

    state: [B, S], encoded and padded, in any floating dtype.
    weight1: [H, S]. bias1: [H]. weight2: [W, H]. bias2: [W]. All of one dtype, to which the state, the hidden layer and the token
        are rounded; sums in float32.
    dtype: of the result.
    backend: "triton" (one launch) or "torch"; None chooses.

    Returns [B, W].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    given = dict(weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    shapes = Shapes("state_token").of("state", state, "B S").of("weight1", weight1, "H S").of("bias1", bias1, "H")
    shapes.of("weight2", weight2, "W H").of("bias2", bias2, "W")
    floating("state_token", state=state, **given)
    for name, tensor in given.items():
        if tensor.dtype != weight1.dtype:
            raise InputError(f"state_token: {name}: expected {weight1.dtype} as weight1, got {tensor.dtype}")
    result: Tensor = _op(state, weight1, bias1, weight2, bias2, dtype, backend=backend)
    return result


def launches(args: _Args, architecture: str) -> tuple[list[Launch], Tensor]:
    """The kernels to run, and the tensor they will have written. Tensors may be on the meta device."""
    state, weight1, bias1, weight2, bias2, dtype = args
    (columns, inner), size = weight2.shape, weight1.shape[1]
    tile = tiles.lookup("state_token", architecture)
    out = torch.empty(len(state), columns, dtype=dtype, device=state.device)
    arguments: dict[str, Any] = dict(state=state, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, out=out)
    arguments |= dict(columns=columns)
    grid = (launch.blocks(columns, tile["COLUMNS"]), len(state))
    constants = dict(INNER=inner, SIZE=size, WIDE=launch.power_of_2(size))
    return [Launch("state_token", grid, arguments, constants, tile)], out


_WIDEST = 256  # a row of weight1 is read at once


def _refuse(
    state: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dtype: torch.dtype
) -> str | None:
    if dtype not in launch.DTYPES:
        return f"dtype is {dtype}"
    if state.shape[1] > _WIDEST:
        return f"a state of {state.shape[1]}, it takes at most {_WIDEST}"
    return launch.refuse(state=state, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)


def _example(device: torch.device) -> _Args:
    weight1, weight2 = torch.zeros(32, 8, device=device), torch.zeros(16, 32, device=device)
    return (
        torch.zeros(1, 8, device=device),
        weight1,
        weight1[:, 0].clone(),
        weight2,
        weight2[:, 0].clone(),
        torch.float32,
    )


_op = Op(
    "state_token",
    [
        # beside the image encoder, which takes far longer: what counts is that it is one launch
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
