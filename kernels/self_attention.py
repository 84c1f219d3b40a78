"""Self-attention over q, k, v [batch, heads, length, DIM] of any strides (the last one 1)."""

import triton
import triton.language as tl
from dit4dit.kernels.attention import attend
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def self_attention(
    q,
    k,
    v,
    out,  # [batch, length, HEADS * DIM]
    length,
    scale,
    q_batch,
    q_head,
    q_row,
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
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) % HEADS
    batch = tl.program_id(1) // HEADS
    column = tl.arange(0, COLUMNS)
    inside = (row < length)[:, None] & (column < DIM)[None, :]

    q_at = q + batch * q_batch + head * q_head + row[:, None] * q_row + column[None, :]
    q_tile = tl.load(q_at, mask=inside, other=0.0)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    _, total, result = attend(q_tile, k, v, 0, length, scale, k_row, v_row, DIM, KEYS, COLUMNS)
    at = out + (batch * length + row)[:, None] * (HEADS * DIM) + head * DIM + column[None, :]
    tl.store(at, narrow(result / total[:, None], out.dtype.element_ty), mask=inside)
