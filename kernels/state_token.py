"""Two layers of a few rows in one launch: each thread block has the whole hidden layer, and some columns of the result.

The first layer's weights are few (0.3 MB of the released models) and in L2, so that every block can make the hidden layer itself.
"""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def state_token(
    state,  # [batch, SIZE]
    weight1,  # [INNER, SIZE]
    bias1,  # [INNER]
    weight2,  # [columns, INNER]
    bias2,  # [columns]
    out,  # [batch, columns]
    columns,
    INNER: tl.constexpr,  # hidden layer
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # power of two: at least SIZE
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    wait_for_inputs()
    dtype = weight1.dtype.element_ty
    sample = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = tl.minimum(column, columns - 1)
    i = tl.arange(0, WIDE)
    x = tl.load(state + sample * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    x = narrow(x, dtype).to(tl.float32)
    result = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(0, INNER, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        there = depth < INNER
        inside = there[:, None] & (i < SIZE)[None, :]
        first = tl.load(weight1 + depth[:, None] * SIZE + i[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(weight2 + known[:, None] * INNER + depth[None, :], mask=there[None, :], other=0.0)
        hidden = tl.sum(first * x[None, :], axis=1) + tl.load(bias1 + depth, mask=there, other=0.0).to(tl.float32)
        hidden = tl.where(hidden < 0.0, 0.0, hidden)  # what is not a number stays so
        result += second.to(tl.float32) * narrow(hidden, dtype).to(tl.float32)[None, :]
    token = tl.sum(result, axis=1) + tl.load(bias2 + known).to(tl.float32)
    token = narrow(token, dtype).to(tl.float32)
    tl.store(out + sample * columns + column, narrow(token, out.dtype.element_ty), mask=column < columns)
