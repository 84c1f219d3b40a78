"""x @ weight^T, the loop that the linear kernels share: operands as they are, sums in float32; and GELU."""

import triton
import triton.language as tl
from dit4dit.kernels.common import dot, to_e4m3


@triton.jit
def block(width, span, GROUP: tl.constexpr):
    """(row block, column block) of this program. Programs go down GROUP row blocks before the next column, so that the
    programs that run together share the weights they read."""
    program = tl.program_id(0)
    first = program // (GROUP * width) * GROUP
    count = tl.minimum(span - first, GROUP)
    return first + program % (GROUP * width) % count, program % (GROUP * width) // count


@triton.jit
def product(
    x,  # [rows, INNER]
    weight,  # [columns, INNER]
    row,  # [ROWS] indices
    column,  # [COLUMNS] indices
    rows,
    columns,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    inverse=None,  # multiplies x, which then becomes e4m3
):
    """float32 [ROWS, COLUMNS]."""
    # rows and columns past the end read the last one again, which costs less than masks; nobody stores them
    x_at = x + tl.minimum(row, rows - 1)[:, None] * INNER + tl.arange(0, DEPTH)[None, :]
    weight_at = weight + tl.minimum(column, columns - 1)[:, None] * INNER + tl.arange(0, DEPTH)[None, :]
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        if INNER % DEPTH != 0:
            inside = (start + tl.arange(0, DEPTH) < INNER)[None, :]
            x_tile = tl.load(x_at + start, mask=inside, other=0.0)
            weight_tile = tl.load(weight_at + start, mask=inside, other=0.0)
        else:
            x_tile = tl.load(x_at + start)
            weight_tile = tl.load(weight_at + start)
        if inverse is not None:
            x_tile = to_e4m3(x_tile.to(tl.float32) * inverse)
        result = dot(x_tile, tl.trans(weight_tile), result)
    return result


@triton.jit
def halves(x):
    """[ROWS, COLUMNS] -> its left and its right half, for the work behind a product: done half at a time it leaves registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of float32 x, by tanh or by the error function."""
    if TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(z) / 2 + 1 / 2 is the logistic function of 2 z
        return x * tl.sigmoid(2.0 * inner)
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
