"""The noise of a request drawn where it is needed: Philox 4x32-10 and Box-Muller, the numbers of `dit4dit.noise`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes
from dit4dit.ops.dispatch import Implementation, Op

MOST = 3
"""Draws of one call: as many as a request has (`dit4dit.noise.STREAMS`)."""
_WORD = 0xFFFFFFFF
_Draws = tuple[tuple[int, tuple[int, ...]], ...]
_Args = tuple[Tensor, _Draws]
_Places = tuple[Tensor | None, ...]


def reference(requests: Tensor, draws: _Draws, out: _Places | None = None) -> tuple[Tensor, ...]:
    """The definition: see `philox_normal` for the arguments and the results."""
    places = (None,) * len(draws) if out is None else out
    return tuple(_draw(requests, *draw, place) for draw, place in zip(draws, places, strict=True))


def _draw(requests: Tensor, stream: int, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
    count = math.prod(shape)
    batch, device = requests.shape[0], requests.device
    seed, chunk, given = requests[:, :1], requests[:, 1:2], requests[:, 2:] != 0
    position = torch.arange(-(-count // 4), device=device, dtype=torch.int64).expand(batch, -1)
    c0, c1 = position, torch.full_like(position, stream)
    c2, c3 = (chunk & _WORD).expand_as(position), (chunk >> 32 & _WORD).expand_as(position)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # products of 32-bit words wrap in int64, which keeps all their bits
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    drawn = []
    for first, second in ((c0, c1), (c2, c3)):
        radius = (-2.0 * torch.log((first.double() + 1.0) * 2.0**-32)).sqrt()
        angle = second.double() * (2.0 * math.pi * 2.0**-32)
        drawn += [radius * angle.cos(), radius * angle.sin()]
    numbers = torch.stack(drawn, dim=-1).flatten(1)[:, :count].float()
    if out is None:
        return numbers.masked_fill_(given, 0.0).view(batch, *shape)
    rows = out.view(batch, count)
    rows.copy_(torch.where(given, rows, numbers))
    return out


def philox_normal(
    requests: Tensor, draws: _Draws, *, out: _Places | None = None, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Standard normal float32 [B, *shape] for each draw, each sample a function of its own seed and chunk alone.

    requests: int64 [B, 3]: seed and chunk of each request, their 64 bits taken as unsigned, and whether its noise is given by
        whoever asks (not 0): nothing is drawn for such a request.
    draws: up to MOST of (stream, shape): which of a request's draws (`dit4dit.noise.STREAMS`), 0 to 2^31 - 1, and the shape of
        one request's. A draw does not depend on those beside it.
    out: for each draw a contiguous float32 [B, *shape] to draw into, or None; samples of given requests keep what is there.
        Without it theirs are zeros.
    backend: "triton" (one launch) or "torch"; None chooses.

    The integers are those of `dit4dit.noise.normal` to the bit; the logarithm and the cosine are the device's own in float64,
    which after rounding to float32 differ from the host's in the last bit at most.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    sizes = Shapes("philox_normal").of("requests", requests, "B 3")
    if requests.dtype != torch.int64:
        raise InputError(f"philox_normal: requests: expected int64, got {requests.dtype}")
    if not 1 <= len(draws) <= MOST or (out is not None and len(out) != len(draws)):
        got = len(draws) if out is None else f"{len(draws)} and {len(out)} places"
        raise InputError(f"philox_normal: draws: expected 1 to {MOST}, and as many places, got {got}")
    for i, (stream, shape) in enumerate(draws):
        if not 0 <= stream < 2**31:
            raise InputError(f"philox_normal: stream: expected 0 to 2^31 - 1, got {stream}")
        if math.prod(shape) < 1:
            raise InputError(f"philox_normal: shape: expected at least one element, got {shape}")
        place = None if out is None else out[i]
        if place is not None:
            sizes.of("out", place, " ".join(["B", *map(str, shape)]))
            if place.dtype != torch.float32 or not place.is_contiguous() or place.device != requests.device:
                raise InputError(
                    f"philox_normal: out: expected contiguous float32 on {requests.device}, got {place.dtype} with strides "
                    f"{place.stride()} on {place.device}"
                )
    made = tuple((stream, tuple(shape)) for stream, shape in draws)
    result: tuple[Tensor, ...] = _op(requests, made, backend=backend, out=out)
    return result


def launches(args: _Args, architecture: str, out: _Places | None = None) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    requests, draws = args
    batch, device = requests.shape[0], requests.device
    places = (None,) * len(draws) if out is None else out
    drawn = tuple(
        torch.zeros(batch, *shape, dtype=torch.float32, device=device) if place is None else place
        for (_, shape), place in zip(draws, places, strict=True)
    )
    tile = tiles.lookup("philox_normal", architecture)
    arguments: dict[str, Any] = dict(requests=requests)
    blocks = 0
    for i, name in enumerate(("first", "second", "third")):
        there = i < len(draws)
        count = math.prod(draws[i][1]) if there else 0
        blocks += launch.blocks(-(-count // 4), tile["BLOCK"])
        arguments |= {name: drawn[i] if there else None, f"{name}_count": count}
        arguments |= {f"{name}_draw": draws[i][0] if there else 0}
        if name != "third":
            arguments[f"{name}_end"] = blocks  # of this draw and of those before it
    return [Launch("philox_normal", (blocks, batch), arguments, {}, tile)], drawn


def _refuse(requests: Tensor, draws: _Draws) -> str | None:
    if any(requests.shape[0] * math.prod(shape) >= 2**31 for _, shape in draws):
        return "a result has 2^31 elements or more, its offsets have 31 bits"
    return launch.refuse(dtypes=(torch.int64,), requests=requests)


_op = Op(
    "philox_normal",
    [
        Implementation("triton", launch.refuser(_refuse, launches), launch.runner(launches), device="cuda", into=True),
        Implementation("torch", lambda *_: None, reference, into=True),
    ],
    lambda device: (torch.zeros(1, 3, dtype=torch.int64, device=device), ((0, (16, 2, 4)),)),
)
