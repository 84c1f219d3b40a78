"""q, k and v of self-attention out of one matrix: RMS norm per head on q and k, then the rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops import launch, tiles
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, float]


def reference(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: see `qk_norm_rope` for the arguments and the result."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # what is computed from them keeps this order
    if rotary is not None and rotary.shape[-1] < q.shape[-1]:
        rotary = torch.cat([rotary, rotary], dim=-1)
    return _norm_rope(q, norm_q, rotary, eps), _norm_rope(k, norm_k, rotary, eps), v


def _norm_rope(x: Tensor, norm: Tensor | None, rotary: Tensor | None, eps: float) -> Tensor:
    """x [B, H, S, d]; one rounding at the end."""
    if norm is None and rotary is None:
        return x
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        y = rms_norm(y, norm, eps)
    if rotary is not None:
        first, second = y.chunk(2, dim=-1)
        y = y * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]
    return y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] in float32 or wider, weight [d]."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(x.dtype)


def qk_norm_rope(
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    rotary: Tensor | None,
    heads: int,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv into heads; norm q and k; turn them by their positions.

    qkv: [B, S, 3 * H * d], q | k | v, each head after head.
    norm_q, norm_k: weights [d] of the RMS norms both, or both None.
    rotary: float32 [2, S, d/2], cosines and sines; dimension i turns with i + d/2. Or [2, S, d], where the angles of the two
        differ; twice the bytes to read. None: no positions.
    heads: H. eps: of the RMS norms. Norm and rotation in float32, rounded once.
    backend: "triton" or "torch"; None chooses.

    Returns q, k, v [B, H, S, d] in qkv's dtype; v is a view of qkv, and so are q and k where nothing is done to them. All lie
    token after token, [B, S, H, d] in memory with dense rows of d, which every attention kernel reads where it is:
    flash-attn, which takes [B, S, H, d] and copies only where the last stride is not 1; cuDNN, which takes any strides and
    lays its result out as q, so that [B, S, H * d] is a view of it; and ours.
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    check("qk_norm_rope", qkv, norm_q, norm_k, rotary, heads)
    result: tuple[Tensor, Tensor, Tensor] = _op(qkv, norm_q, norm_k, rotary, heads, eps, backend=backend)
    return result


def check(
    op: str, qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, heads: int
) -> None:
    """InputError unless these fit each other; for the ops that begin with this one."""
    shapes = Shapes(op).of("qkv", qkv, "B S E")
    dim, rest = divmod(shapes["E"], 3 * heads)
    if rest or dim % 2:
        raise InputError(
            f"{op}: qkv: expected 3 * heads * (an even number) columns for {heads} heads, got {shapes['E']}"
        )
    shapes.sizes["d"] = dim
    shapes.sizes["d/2"] = dim // 2
    halves = rotary is not None and rotary.ndim > 0 and rotary.shape[-1] == dim
    shapes.of("norm_q", norm_q, "d").of("norm_k", norm_k, "d").of("rotary", rotary, "2 S d" if halves else "2 S d/2")
    floating(op, qkv=qkv, norm_q=norm_q, norm_k=norm_k, rotary=rotary)
    if (norm_q is None) != (norm_k is None):
        raise InputError(f"{op}: expected norm_q and norm_k both or neither, got one of them")


def launches(args: _Args, architecture: str) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The kernels to run, and the tensors they will have written. Tensors may be on the meta device."""
    qkv, norm_q, norm_k, rotary, heads, eps = args
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if norm_q is None and rotary is None:
        return [], (q, k, v)
    batch, _, length, dim = q.shape
    tile = tiles.lookup("qk_norm_rope", architecture, length=length, dim=dim)
    qk = torch.empty(2, batch, length, heads, dim, dtype=qkv.dtype, device=qkv.device)
    arguments = dict(qkv=qkv, norm_q=norm_q, norm_k=norm_k, rotary=rotary, qk=qk, length=length, batches=batch, eps=eps)
    columns = dim if rotary is None else rotary.shape[-1]
    constants = dict(HEADS=heads, DIM=dim, ANGLES=columns, HALF=launch.power_of_2(dim // 2))
    grid = (launch.blocks(length, tile["ROWS"]), 2 * heads, batch)
    return [Launch("qk_norm_rope", grid, arguments, constants, tile)], (qk[0].transpose(1, 2), qk[1].transpose(1, 2), v)


def refuse_triton(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, rotary: Tensor | None, *_: object
) -> str | None:
    """Why the Triton kernel cannot take these, or None."""
    if rotary is not None and rotary.dtype != torch.float32:
        return f"rotary is {rotary.dtype}, not float32"
    return launch.refuse(qkv=qkv, norm_q=norm_q, norm_k=norm_k, rotary=rotary)


def best(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """For the ops that begin with this one: the kernel where it can run, and no wish is asked for."""
    run = _run_triton if _refuse(*args) is None else reference
    result: tuple[Tensor, Tensor, Tensor] = run(*args)  # type: ignore[arg-type]
    return result


_run_triton = launch.runner(launches)
_refuse = launch.refuser(refuse_triton, launches)


def example(device: torch.device) -> _Args:
    """Small arguments of the usual kind."""
    qkv = torch.zeros(1, 16, 3 * 2 * 64, dtype=torch.bfloat16, device=device)
    norm = torch.ones(64, dtype=torch.bfloat16, device=device)
    return qkv, norm, norm, torch.zeros(2, 16, 32, device=device), 2, 1e-5


_op = Op(
    "qk_norm_rope",
    [
        Implementation("triton", _refuse, _run_triton, device="cuda"),
        Implementation("torch", lambda *_: None, reference),
    ],
    example,
)
