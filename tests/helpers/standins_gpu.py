"""As `standins`, of `linear` on a GPU: what only a GPU can do wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dit4dit.ops import register
from dit4dit.ops.dispatch import Implementation


@triton.jit
def _copy(source, out, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at, mask=at < count), mask=at < count)


def copied(x: Tensor, weight: Tensor, bias: Tensor | None, extra: int = 0) -> Tensor:
    """The product, by a kernel that writes so many elements more, or fewer."""
    source = torch.cat([F.linear(x, weight, bias).flatten(), x.new_zeros(64)])
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    count = out.numel() + extra
    _copy[(1,)](source, out, count, BLOCK=triton.next_power_of_2(count))
    return out


def is_right(*args: Tensor) -> Tensor:
    return copied(*args)


def writes_behind(*args: Tensor) -> Tensor:
    return copied(*args, extra=1)


def leaves_one_unwritten(*args: Tensor) -> Tensor:
    return copied(*args, extra=-1)


def loses_the_gpu(x: Tensor, *args: Tensor) -> Tensor:
    torch._assert_async(x.new_zeros(1))
    return copied(x, *args)


def runs_on_another_stream(*args: Tensor) -> Tensor:
    out = torch.empty_like(F.linear(*args))
    with torch.cuda.stream(torch.cuda.Stream()):
        out.copy_(F.linear(*args))
    return out


def hangs(*args: Tensor) -> Tensor:
    torch.cuda._sleep(1 << 60)
    return copied(*args)


def refuse(x: Tensor, *_: object) -> str | None:
    return None if x.is_cuda else "it is for a GPU"


FAULTS: tuple[Callable[..., Tensor], ...] = (
    loses_the_gpu,
    writes_behind,
    leaves_one_unwritten,
    runs_on_another_stream,
    hangs,
    is_right,
)
for _fault in FAULTS:
    register("linear", Implementation(_fault.__name__, refuse, _fault, device="cuda"))
