"""Matrix product in e4m3 with scales, bias and GELU behind it; x is quantised on the way in, or by `quantize` before."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, to_e4m3, wait_for_inputs
from dit4dit.kernels.products import block, halves, product


@triton.jit
def quantize(x, out, count, inverse, BLOCK: tl.constexpr):
    """out = e4m3(x * inverse), count elements of both."""
    wait_for_inputs()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(out + at, to_e4m3(value.to(tl.float32) * inverse), mask=at < count)


@triton.jit
def _store(result, scale, bias, out, row, column, rows, columns, x_scale, GELU: tl.constexpr):
    """out = activation(result * x_scale * scale + bias) for one block, result float32 [row, column]."""
    result *= (tl.load(scale + column, mask=column < columns, other=0.0) * x_scale)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if GELU:
        result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def linear_fp8(
    x,  # [rows, INNER]: e4m3, or another dtype where inverse is given
    weight,  # e4m3 [columns, INNER]
    scale,  # float32 [columns]
    bias,  # [columns], or None
    out,  # [rows, columns]
    rows,
    columns,
    x_scale,
    inverse,  # 1 / x_scale where x is to be quantised, or None
    INNER: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    wait_for_inputs()
    i, j = block(tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS), GROUP)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    result = product(x, weight, row, column, rows, columns, INNER, ROWS, COLUMNS, DEPTH, inverse)
    if COLUMNS >= 64:
        left, right = halves(result)
        first = j * COLUMNS + tl.arange(0, COLUMNS // 2)
        _store(left, scale, bias, out, row, first, rows, columns, x_scale, GELU)
        _store(right, scale, bias, out, row, first + COLUMNS // 2, rows, columns, x_scale, GELU)
    else:
        _store(result, scale, bias, out, row, column, rows, columns, x_scale, GELU)
