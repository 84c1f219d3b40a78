"""Self-attention of heads wider than 128, a slice of the head's columns at a time; the keys may be split among thread blocks.

The parts are put together by cross_attention.combine.
"""

import triton
import triton.language as tl
from dit4dit.kernels.common import dot, narrow, wait_for_inputs


@triton.jit
def _slice(rows, NUMBER: tl.constexpr, DIM: tl.constexpr, SLICE: tl.constexpr):
    """[rows, SLICE]: columns NUMBER * SLICE and so on behind these pointers; zero past DIM."""
    column = NUMBER * SLICE + tl.arange(0, SLICE)
    at = rows[:, None] + column[None, :]
    if NUMBER * SLICE + SLICE > DIM:
        return tl.load(at, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(result, total, out, partial, place, inside, NUMBER: tl.constexpr, DIM: tl.constexpr, SPLIT: tl.constexpr):
    """One slice of the result, [rows, SLICE], to the rows `place` of out (divided by the weights' sum) or of its part."""
    column = NUMBER * result.shape[1] + tl.arange(0, result.shape[1])
    mask = inside[:, None] & (column < DIM)[None, :]
    at = place[:, None] + column[None, :]
    if SPLIT:
        tl.store(partial + at, result, mask=mask)
    else:
        tl.store(out + at, narrow(result / total[:, None], out.dtype.element_ty), mask=mask)


@triton.jit
def wide_attention(
    q,  # [batch, HEADS, length, DIM], strided, as k and v
    k,
    v,
    out,  # [batch, length, HEADS * DIM]; None where the keys are split
    partial,  # float32 [splits, batch * HEADS, length, DIM]; None where they are not
    largest_out,  # float32 [splits, batch * HEADS, length]
    total_out,
    length,
    scale,  # of the scores, times log2(e)
    x_batch,  # strides of q, k and v
    x_head,
    x_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,  # more than one slice, at most four
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,  # keys of one thread block; 0: all
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) % HEADS
    batch = tl.program_id(1) // HEADS
    here = batch * x_batch + head * x_head
    begin = 0
    end = length
    if SPAN > 0:
        begin = tl.program_id(2) * SPAN
        end = tl.minimum(begin + SPAN, length)

    rows = q + here + tl.minimum(row, length - 1) * x_row  # past the end: the last one again
    q0 = _slice(rows, 0, DIM, SLICE)
    q1 = _slice(rows, 1, DIM, SLICE)
    result0 = tl.zeros([ROWS, SLICE], tl.float32)
    result1 = tl.zeros([ROWS, SLICE], tl.float32)
    if DIM > 2 * SLICE:
        q2 = _slice(rows, 2, DIM, SLICE)
        result2 = tl.zeros([ROWS, SLICE], tl.float32)
    if DIM > 3 * SLICE:
        q3 = _slice(rows, 3, DIM, SLICE)
        result3 = tl.zeros([ROWS, SLICE], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    key = tl.arange(0, KEYS)
    for start in range(begin, end, KEYS):
        # keys past the end read the last one again; their scores are put out below
        source = tl.minimum(start + key, end - 1) * x_row
        keys = k + here + source
        score = dot(q0, tl.trans(_slice(keys, 0, DIM, SLICE)), tl.zeros([ROWS, KEYS], tl.float32))
        score = dot(q1, tl.trans(_slice(keys, 1, DIM, SLICE)), score)
        if DIM > 2 * SLICE:
            score = dot(q2, tl.trans(_slice(keys, 2, DIM, SLICE)), score)
        if DIM > 3 * SLICE:
            score = dot(q3, tl.trans(_slice(keys, 3, DIM, SLICE)), score)
        score = tl.where((start + key < end)[None, :], score * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - new[:, None])
        fade = tl.exp2(largest - new)
        total = total * fade + tl.sum(weight, axis=1)
        largest = new
        weight = narrow(weight, v.dtype.element_ty)
        values = v + here + source
        result0 = dot(weight, _slice(values, 0, DIM, SLICE), result0 * fade[:, None])
        result1 = dot(weight, _slice(values, 1, DIM, SLICE), result1 * fade[:, None])
        if DIM > 2 * SLICE:
            result2 = dot(weight, _slice(values, 2, DIM, SLICE), result2 * fade[:, None])
        if DIM > 3 * SLICE:
            result3 = dot(weight, _slice(values, 3, DIM, SLICE), result3 * fade[:, None])

    inside = row < length
    place = (batch * length + row) * (HEADS * DIM) + head * DIM
    if SPAN > 0:
        part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * length + row
        tl.store(largest_out + part, largest, mask=inside)
        tl.store(total_out + part, total, mask=inside)
        place = part * DIM
    _store(result0, total, out, partial, place, inside, 0, DIM, SPAN > 0)
    _store(result1, total, out, partial, place, inside, 1, DIM, SPAN > 0)
    if DIM > 2 * SLICE:
        _store(result2, total, out, partial, place, inside, 2, DIM, SPAN > 0)
    if DIM > 3 * SLICE:
        _store(result3, total, out, partial, place, inside, 3, DIM, SPAN > 0)
