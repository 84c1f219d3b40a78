"""q and k out of the qkv matrix: RMS norm per head, then the half-split rotation. v needs no work and is left in place."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def qk_norm_rope(
    qkv,  # [batch, length, 3 * HEADS * DIM]
    norm_q,  # [DIM], or None
    norm_k,
    rotary,  # float32 [2, length, ANGLES], or None
    qk,  # [2, batch, length, HEADS, DIM]; one tensor, because a choice between two pointers forgets their alignment
    length,
    batches,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ANGLES: tl.constexpr,  # DIM, or DIM / 2: both halves turn by the same
    HALF: tl.constexpr,  # power of two, at least DIM / 2
    ROWS: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) % HEADS
    which = tl.program_id(1) // HEADS  # 0: q, 1: k
    batch = tl.program_id(2)
    # the halves apart: dimension i turns with i + DIM / 2, and nothing has to cross threads
    column = tl.arange(0, HALF)
    inside = (row < length)[:, None] & (column < DIM // 2)[None, :]

    source = qkv + (batch * length + row)[:, None] * (3 * HEADS * DIM) + (which * HEADS + head) * DIM + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if norm_q is not None:
        mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM
        scale = tl.rsqrt(mean + eps)[:, None]
        weight = norm_q if which == 0 else norm_k
        first *= scale * tl.load(weight + column, mask=column < DIM // 2, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight + DIM // 2 + column, mask=column < DIM // 2, other=0.0).to(tl.float32)[None, :]
    if rotary is not None:
        cos_at = rotary + row[:, None] * ANGLES + column[None, :]
        sin_at = cos_at + length * ANGLES
        cos = tl.load(cos_at, mask=inside, other=0.0)
        sin = tl.load(sin_at, mask=inside, other=0.0)
        turned = first * cos - second * sin
        if ANGLES == DIM:
            cos = tl.load(cos_at + DIM // 2, mask=inside, other=0.0)
            sin = tl.load(sin_at + DIM // 2, mask=inside, other=0.0)
        second = second * cos + first * sin
        first = turned
    at = qk + (((which * batches + batch) * length + row) * HEADS + head)[:, None] * DIM + column[None, :]
    tl.store(at, narrow(first, qk.dtype.element_ty), mask=inside)
    tl.store(at + DIM // 2, narrow(second, qk.dtype.element_ty), mask=inside)
