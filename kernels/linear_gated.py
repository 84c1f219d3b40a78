"""Matrix product with bias, gate and residual behind it; the sum over the inner width may be split among thread blocks."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow
from dit4dit.kernels.products import block, halves, product


@triton.jit
def _store(result, bias, residual, gate, out, row, column, rows, columns, frames, tokens):
    """out = residual + gate * (result + bias) for one block, result float32 [row, column]."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        table = ((row // tokens) % frames)[:, None] * columns + column[None, :]
        result *= tl.load(gate + table, mask=inside, other=0.0)
    at = row[:, None] * columns + column[None, :]
    result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def linear_gated(
    x,  # [rows, INNER]; rows are (batch, frame, token)
    weight,  # [columns, INNER]
    bias,  # [columns], or None
    residual,  # [rows, columns]
    gate,  # float32 [frames, columns], or None
    out,  # like residual; None where the sum is split
    partial,  # float32 [splits, rows, columns]; None where it is not
    rows,
    columns,
    frames,
    tokens,
    INNER: tl.constexpr,
    SPAN: tl.constexpr,  # inner indices of one thread block
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    i, j = block(tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS), GROUP)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * SPAN
    result = product(x, weight, row, column, rows, columns, begin, INNER, SPAN, ROWS, COLUMNS, DEPTH)
    if partial is None:
        if COLUMNS >= 64:
            # half at a time: the result beside its gate, residual and addresses is more than the registers hold
            left, right = halves(result)
            first = j * COLUMNS + tl.arange(0, COLUMNS // 2)
            _store(left, bias, residual, gate, out, row, first, rows, columns, frames, tokens)
            _store(right, bias, residual, gate, out, row, first + COLUMNS // 2, rows, columns, frames, tokens)
        else:
            _store(result, bias, residual, gate, out, row, column, rows, columns, frames, tokens)
    else:
        at = (tl.program_id(1) * rows + row)[:, None] * columns + column[None, :]
        tl.store(partial + at, result, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def combine(
    partial,  # as linear_gated has written it
    bias,
    residual,
    gate,
    out,
    rows,
    columns,
    frames,
    tokens,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(SPLITS):
        at = (i * rows + row)[:, None] * columns + column[None, :]
        result += tl.load(partial + at, mask=inside, other=0.0)
    _store(result, bias, residual, gate, out, row, column, rows, columns, frames, tokens)
