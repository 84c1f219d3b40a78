"""Residual, layer norm and modulation in front of a matrix product for few rows, in one launch.

Every thread block norms the rows itself: they are few, and in L2. It starts to bring its slice of the weight there first, and
takes mean and variance while that is on the way.
"""

import triton
import triton.language as tl
from dit4dit.kernels.common import INTERPRETED, dot, narrow, wait_for_inputs
from dit4dit.kernels.products import gelu


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return gelu(x, False)
    if ACTIVATION == "gelu_tanh":
        return gelu(x, True)
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # what is not a number stays so
    return x


@triton.jit
def _prefetch(weight, column, INNER: tl.constexpr, STEP: tl.constexpr, LINES: tl.constexpr):
    """Start to bring these rows of `weight` to L2, a line of STEP values each time; nothing waits for it."""
    if not INTERPRETED:
        depth = tl.minimum(tl.arange(0, LINES) * STEP, INNER - 1)
        at = (weight + column[:, None] * INNER + depth[None, :]).to(tl.uint64)
        text: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(text, "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def _residual(x, y, at, mask):
    """float32 x + y."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if y is not None:
        value += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def norm_linear(
    x,  # float32 [rows, INNER]
    y,  # [rows, INNER], or None
    shift,  # float32 [INNER], or None
    scale,
    weight,  # [columns, INNER]
    bias,  # [columns], or None
    x_new,  # float32 [rows, INNER]; None where y is
    out,  # [rows, columns]
    rows,
    columns,
    eps,
    INNER: tl.constexpr,
    STEP: tl.constexpr,  # values of the weight in a line of L2
    LINES: tl.constexpr,  # power of two: at least as many as a row of the weight has
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0)
    column = first * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    here = (row < rows)[:, None]

    known = tl.minimum(column, columns - 1)[:, None]
    row_at = row[:, None] * INNER + depth[None, :]
    _prefetch(weight, tl.minimum(column, columns - 1), INNER, STEP, LINES)

    # sums of the differences from a row's first value: one pass, and the mean does not drown the variance
    pivot = _residual(x, y, row * INNER, row < rows)[:, None]
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in tl.static_range(0, INNER, DEPTH):
        inside = here & (start + depth < INNER)[None, :]
        value = _residual(x, y, row_at + start, inside)
        if y is not None:
            # the thread blocks of a row take turns: each part of x_new is written by one of them, and read by none
            mine = start // DEPTH % tl.num_programs(0) == first
            tl.store(x_new + row_at + start, value, mask=inside & mine)
        apart = tl.where(inside, value - pivot, 0.0)
        total += apart
        squares += apart * apart
    ahead = tl.sum(total, axis=1) / INNER
    variance = tl.maximum(tl.sum(squares, axis=1) / INNER - ahead * ahead, 0.0)
    mean = pivot + ahead[:, None]
    inverse = tl.rsqrt(variance + eps)[:, None]

    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        wide = start + depth < INNER
        if INNER % DEPTH != 0:
            weight_tile = tl.load(weight + known * INNER + start + depth[None, :], mask=wide[None, :], other=0.0)
            normed = _residual(x, y, row_at + start, here & wide[None, :])
        else:
            weight_tile = tl.load(weight + known * INNER + start + depth[None, :])
            normed = _residual(x, y, row_at + start, here)
        normed = (normed - mean) * inverse
        if scale is not None:
            normed *= 1.0 + tl.load(scale + start + depth, mask=wide, other=0.0)[None, :]
            normed += tl.load(shift + start + depth, mask=wide, other=0.0)[None, :]
        if INNER % DEPTH != 0:
            normed = tl.where(wide[None, :], normed, 0.0)
        result = dot(narrow(normed, weight.dtype.element_ty), tl.trans(weight_tile), result)
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * columns + column[None, :]
    result = narrow(_activated(result, ACTIVATION), out.dtype.element_ty)
    tl.store(out + at, result, mask=here & (column < columns)[None, :])
