"""The loop of flash attention over the keys, shared by self- and cross-attention."""

import triton
import triton.language as tl
from dit4dit.kernels.common import dot, narrow


@triton.jit
def _step(
    q,
    k,
    v,
    start,
    end,
    largest,
    total,
    result,
    scale,
    k_row,
    v_row,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    key = tl.arange(0, KEYS)
    column = tl.arange(0, COLUMNS)
    # keys past the end read the last one again, which costs less than masks; their scores are put out below
    source = tl.minimum(key, end - 1 - start) if MASKED else key
    # the start joins the scalar address, so that the offsets are the same in every turn
    k_at = (k + start * k_row) + (source[:, None] * k_row + column[None, :])
    v_at = (v + start * v_row) + (source[:, None] * v_row + column[None, :])
    if DIM < COLUMNS:
        k_tile = tl.load(k_at, mask=(column < DIM)[None, :], other=0.0)
        v_tile = tl.load(v_at, mask=(column < DIM)[None, :], other=0.0)
    else:
        k_tile = tl.load(k_at)
        v_tile = tl.load(v_at)
    score = dot(q, tl.trans(k_tile), tl.zeros([q.shape[0], KEYS], tl.float32)) * scale
    if MASKED:
        score = tl.where((start + key < end)[None, :], score, float("-inf"))
    new = tl.maximum(largest, tl.max(score, axis=1))
    weight = tl.exp2(score - new[:, None])
    fade = tl.exp2(largest - new)
    total = total * fade + tl.sum(weight, axis=1)
    result = dot(narrow(weight, v_tile.dtype), v_tile, result * fade[:, None])
    return new, total, result


@triton.jit
def attend(
    q,  # [ROWS, COLUMNS], zero beyond DIM
    k,  # pointer to the first key of this head; rows k_row apart
    v,
    begin,  # first key
    end,  # one past the last key, more than begin
    scale,  # of the scores, times log2(e): powers of two are what the hardware has
    k_row,
    v_row,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Softmax over the keys begin..end: the largest score [ROWS], the sum of the weights [ROWS], weights @ v (not divided)."""
    largest = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    result = tl.zeros([q.shape[0], COLUMNS], tl.float32)
    # only the last block of keys can be ragged; the others carry no masks
    whole = begin + (end - begin) // KEYS * KEYS
    for start in range(begin, whole, KEYS):
        largest, total, result = _step(
            q, k, v, start, end, largest, total, result, scale, k_row, v_row, DIM, KEYS, COLUMNS, False
        )
    if whole < end:
        largest, total, result = _step(
            q, k, v, whole, end, largest, total, result, scale, k_row, v_row, DIM, KEYS, COLUMNS, True
        )
    return largest, total, result
