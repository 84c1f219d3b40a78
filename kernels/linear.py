"""Matrix product for few rows: narrow blocks of columns, so that many multiprocessors read weights, each weight once."""

import triton
import triton.language as tl
from dit4dit.kernels.common import dot, narrow, wait_for_inputs


@triton.jit
def linear(
    x,  # [rows, INNER]
    weight,  # [columns, INNER]
    bias,  # [columns], or None
    out,  # [rows, columns]
    rows,
    columns,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # masks, not the last row read again: with 17 rows in a tile of 32 that would be half of what comes from L2
    here = (row < rows)[:, None]
    x_at = x + row[:, None] * INNER + depth[None, :]
    weight_at = weight + tl.minimum(column, columns - 1)[:, None] * INNER + depth[None, :]
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        if INNER % DEPTH != 0:
            inside = (start + depth < INNER)[None, :]
            weight_tile = tl.load(weight_at + start, mask=inside, other=0.0)
            x_tile = tl.load(x_at + start, mask=here & inside, other=0.0)
        else:
            weight_tile = tl.load(weight_at + start)
            x_tile = tl.load(x_at + start, mask=here, other=0.0)
        result = dot(x_tile, tl.trans(weight_tile), result)
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * columns + column[None, :]
    tl.store(at, narrow(result, out.dtype.element_ty), mask=here & (column < columns)[None, :])
