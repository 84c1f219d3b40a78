"""Matrix product with bias and GELU behind it."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs
from dit4dit.kernels.products import block, gelu, halves, product


@triton.jit
def _store(result, bias, out, row, column, rows, columns, TANH: tl.constexpr):
    """out = gelu(result + bias) for one block, result float32 [row, column]."""
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = out + row[:, None] * columns + column[None, :]
    tl.store(at, narrow(gelu(result, TANH), out.dtype.element_ty), mask=inside)


@triton.jit
def linear_gelu(
    x,  # [rows, INNER]
    weight,  # [columns, INNER]
    bias,  # [columns], or None
    out,  # [rows, columns]
    rows,
    columns,
    INNER: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    wait_for_inputs()
    i, j = block(tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS), GROUP)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    result = product(x, weight, row, column, rows, columns, INNER, ROWS, COLUMNS, DEPTH)
    if COLUMNS >= 64:
        left, right = halves(result)
        first = j * COLUMNS + tl.arange(0, COLUMNS // 2)
        _store(left, bias, out, row, first, rows, columns, TANH)
        _store(right, bias, out, row, first + COLUMNS // 2, rows, columns, TANH)
    else:
        _store(result, bias, out, row, column, rows, columns, TANH)
