"""Cross-attention to cached keys and values, the norm of q included; the keys may be split among thread blocks."""

import triton
import triton.language as tl
from dit4dit.kernels.attention import attend
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def cross_attention(
    q,  # [batch, length, HEADS * DIM], not normed
    k,  # [batch or 1, HEADS, keys, DIM], strided
    v,
    norm_q,  # [DIM], or None
    out,  # [batch, length, HEADS * DIM]; None where the keys are split
    partial,  # float32 [splits, batch * HEADS, length, DIM]; None where they are not
    largest_out,  # float32 [splits, batch * HEADS, length]
    total_out,
    length,
    keys,
    eps,
    scale,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of two, at least DIM and 16
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,  # keys of one thread block; 0: all
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) % HEADS
    batch = tl.program_id(1) // HEADS
    column = tl.arange(0, COLUMNS)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    at = (batch * length + row)[:, None] * (HEADS * DIM) + head * DIM + column[None, :]

    q_tile = tl.load(q + at, mask=inside, other=0.0)
    if norm_q is not None:
        wide = q_tile.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
        weight = tl.load(norm_q + column, mask=column < DIM, other=0.0).to(tl.float32)
        q_tile = narrow(wide * inverse[:, None] * weight[None, :], q.dtype.element_ty)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    begin = 0
    end = keys
    if SPAN > 0:
        begin = tl.program_id(2) * SPAN
        end = tl.minimum(begin + SPAN, keys)
    largest, total, result = attend(q_tile, k, v, begin, end, scale, k_row, v_row, DIM, KEYS, COLUMNS)
    if SPAN > 0:
        place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * length + row
        tl.store(partial + place[:, None] * DIM + column[None, :], result, mask=inside)
        tl.store(largest_out + place, largest, mask=row < length)
        tl.store(total_out + place, total, mask=row < length)
    else:
        tl.store(out + at, narrow(result / total[:, None], out.dtype.element_ty), mask=inside)


@triton.jit
def combine(
    partial,  # as cross_attention has written them
    largest_in,
    total_in,
    out,  # [batch, length, HEADS * DIM]
    length,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) % HEADS
    batch = tl.program_id(1) // HEADS
    column = tl.arange(0, COLUMNS)
    inside = (row < length)[:, None] & (column < DIM)[None, :]

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(splits):
        place = (i * tl.num_programs(1) + tl.program_id(1)) * length + row
        # rows past the end: zero, not -inf, whose difference to itself is NaN
        here = tl.load(largest_in + place, mask=row < length, other=0.0)
        new = tl.maximum(largest, here)
        fade = tl.exp2(largest - new)
        grow = tl.exp2(here - new)
        total = total * fade + tl.load(total_in + place, mask=row < length, other=1.0) * grow
        part = tl.load(partial + place[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        result = result * fade[:, None] + part * grow[:, None]
        largest = new
    at = out + (batch * length + row)[:, None] * (HEADS * DIM) + head * DIM + column[None, :]
    tl.store(at, narrow(result / total[:, None], out.dtype.element_ty), mask=inside)
