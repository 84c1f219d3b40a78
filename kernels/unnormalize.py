"""Model values to robot units, one lane an action value, in float64 as on the host."""

import triton
import triton.language as tl
from dit4dit.kernels.common import wait_for_inputs


@triton.jit
def unnormalize(
    actions,  # float32 [rows, width]
    table,  # float64 [5, size]: threshold (NaN: none), low, high, scale, offset
    out,  # float32 [rows, size]
    copy,  # float32 [rows, width]
    count,  # rows * width
    width,
    size,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = i // width, i % width
    given = tl.load(actions + i, mask=i < count, other=0.0)
    tl.store(copy + i, given, mask=i < count)
    inside = (i < count) & (column < size)
    y = given.to(tl.float64)
    at = tl.load(table + column, mask=inside, other=0.0)
    low = tl.load(table + size + column, mask=inside, other=0.0)
    high = tl.load(table + 2 * size + column, mask=inside, other=0.0)
    scale = tl.load(table + 3 * size + column, mask=inside, other=0.0)
    offset = tl.load(table + 4 * size + column, mask=inside, other=0.0)
    y = tl.where(at == at, (y >= at).to(tl.float64), y)
    # written so that NaN stays NaN and is seen by the host
    y = tl.where(y < low, low, y)
    y = tl.where(y > high, high, y)
    tl.store(out + row * size + column, (y * scale + offset).to(tl.float32), mask=inside)
