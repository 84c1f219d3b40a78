"""The beginning of the video transformer: patches of latents to tokens, and block 0's first layer norm and modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, onednn, tiles
from dit4dit.ops.adaln import reference as adaln
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op, find
from dit4dit.ops.linear import reference as linear

_Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]
_Places = tuple[Tensor | None, None]


def reference(
    patches: Tensor, weight: Tensor, begin: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition: see `patch_tokens` for the arguments and the results."""
    y = linear(_rows(patches, weight.dtype), weight, None)
    return adaln(begin, y, None, shift, scale, eps, weight.dtype)


def patch_tokens(
    patches: Tensor,
    weight: Tensor,
    begin: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x = begin + patches @ weight^T; h = layernorm(x) * (1 + scale) + shift.

    patches: [B, T, r, c, z, p, p], a token's vector last, as (channel, row, column); a view of latents in any layout and dtype
        (`model.video_dit.patches`), rounded to weight's.
    weight: [D, z * p * p]. The product is rounded to its dtype before it is added; sums in float32.
    begin: float32 [B, T, r * c, D], what the residual stream begins with; may be expanded from fewer samples, frames or tokens.
    shift, scale: float32 [T, D]. eps: of the layer norm.
    out: where x goes, like begin. None: to a new tensor.
    backend: "triton" (one launch), "parts" (the ops linear and adaln, each as it is chosen) or "torch"; None chooses.

    Returns x in float32 and h in weight's dtype, both [B, T, r * c, D].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    shapes = Shapes("patch_tokens").of("patches", patches, "B T r c z p p")
    shapes.sizes |= {"N": shapes["r"] * shapes["c"], "K": shapes["z"] * shapes["p"] ** 2}
    shapes.of("weight", weight, "D K").of("begin", begin, "B T N D").of("shift", shift, "T D").of("scale", scale, "T D")
    floating("patch_tokens", patches=patches, weight=weight, begin=begin, shift=shift, scale=scale)
    for name, tensor in (("begin", begin), ("shift", shift), ("scale", scale)):
        if tensor.dtype != torch.float32:
            raise InputError(f"patch_tokens: {name}: expected torch.float32, got {tensor.dtype}")
    if out is not None and (out.shape != begin.shape or out.dtype != begin.dtype or out.device != begin.device):
        got = f"{out.dtype} {list(out.shape)} on {out.device}"
        raise InputError(f"patch_tokens: out: expected a tensor like begin, {list(begin.shape)}, got {got}")
    place = None if out is None else (out, None)
    result: tuple[Tensor, Tensor] = _op(patches, weight, begin, shift, scale, eps, backend=backend, out=place)
    return result


def _rows(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, r, c, z, p, p] -> dense rows [B, T, r * c, z * p * p] in `dtype`, by at most one copy."""
    batch, frames, rows, columns, *token = patches.shape
    dense = patches.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return dense.view(batch, frames, rows * columns, token[0] * token[1] * token[2])


def launches(args: _Args, architecture: str, out: _Places | None = None) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    patches, weight, begin, shift, scale, eps = args
    width, inner = weight.shape
    batch, frames, tokens, _ = begin.shape
    rows = batch * frames * tokens
    tile = tiles.lookup("patch_tokens", architecture)
    tile["DEPTH"] = launch.power_of_2(inner, 16)
    x = torch.empty(begin.shape, dtype=begin.dtype, device=begin.device) if out is None or out[0] is None else out[0]
    h = torch.empty(begin.shape, dtype=weight.dtype, device=begin.device)
    arguments: dict[str, Any] = dict(patches=patches, weight=weight, begin=begin, shift=shift, scale=scale, x=x, h=h)
    arguments |= dict(rows=rows, frames=frames, tokens=tokens, columns=patches.shape[3], eps=eps)
    names = ("sample", "frame", "row", "column", "channel", "down", "right")
    arguments |= {f"{name}_stride": step for name, step in zip(names, patches.stride(), strict=True)}
    arguments |= {f"begin_{name}": begin.stride(i) for i, name in enumerate(("sample", "frame", "token"))}
    constants = dict(WIDTH=width, INNER=inner, PATCH=patches.shape[6])
    return [Launch("patch_tokens", (launch.blocks(rows, tile["ROWS"]),), arguments, constants, tile)], (x, h)


_DEEPEST = 128  # a token's vector is read at once; of more, shared memory of 99 KB does not hold the weights


def _refuse(patches: Tensor, weight: Tensor, begin: Tensor, shift: Tensor, scale: Tensor, eps: float) -> str | None:
    if weight.shape[1] > _DEEPEST:
        return f"patches of {weight.shape[1]} numbers, it takes at most {_DEEPEST}"
    if (reason := launch.refuse(products=True, weight=weight)) is not None:
        return reason
    # whatever the layout of the patches, which the kernel has strides for, their dtype and device are looked at
    steps = patches.stride()
    layout = sorted(range(7), key=lambda i: (patches.shape[i] > 1, -steps[i]))
    return launch.refuse(
        strided=("patches", "begin"), patches=patches.permute(layout), begin=begin, shift=shift, scale=scale
    )


def _parts(
    patches: Tensor,
    weight: Tensor,
    begin: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out: _Places | None = None,
) -> tuple[Tensor, Tensor]:
    """The ops themselves: the door above has checked what theirs would check again."""
    y = find("linear")(_rows(patches, weight.dtype), weight, None)
    result: tuple[Tensor, Tensor] = find("adaln")(begin, y, None, shift, scale, eps, weight.dtype, out=out)
    return result


def _prepare(patches: Tensor, weight: Tensor, begin: Tensor, *_: object) -> None:
    onednn.pack(weight, begin.shape[1] * begin.shape[2])  # as `linear` does in a plan; by the rows of one sample


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    table = torch.zeros(2, 64, device=device)
    weight = torch.zeros(64, 16, dtype=dtype, device=device)
    return (
        torch.zeros(1, 2, 2, 2, 4, 2, 2, device=device),
        weight,
        torch.zeros(1, 2, 4, 64, device=device),
        table,
        table,
        1e-6,
    )


_op = Op(
    "patch_tokens",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", into=True),
        Implementation("parts", lambda *_: None, _parts, prepare=_prepare, into=True),
        Implementation("torch", lambda *_: None, reference),
    ],
    _example,
)
