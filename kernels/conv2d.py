"""Convolution of channels-last images as a product of matrices that are never written: rows are the result's pixels, columns
its channels, and the sum runs over (kernel row, kernel column, channel). The sum may be split among thread blocks."""

import triton
import triton.language as tl
from dit4dit.kernels.common import dot, narrow, wait_for_inputs


@triton.jit
def _weights(weight, column, columns, first, INNER: tl.constexpr, DEPTH: tl.constexpr):
    """[column, DEPTH] of the weights, from inner index `first`; zero past the last one."""
    inner = first + tl.arange(0, DEPTH)
    # columns past the end read the last one again, which costs less than masks; nobody stores them
    at = weight + tl.minimum(column, columns - 1)[:, None] * INNER + inner[None, :]
    if INNER % DEPTH != 0:
        return tl.load(at, mask=(inner < INNER)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _pixels(
    x,  # [ROWS] pointers to the pixels under the kernels' first positions, perhaps outside of the image
    top,  # [ROWS] rows of those pixels
    left,  # [ROWS] columns
    first,  # inner index
    height,
    width,
    x_row,
    X_COLUMN: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, DEPTH] of the images, from inner index `first`; zero outside."""
    if CHANNELS % DEPTH == 0:  # all of one position of the kernel
        position = first // CHANNELS
        down = position // KERNEL_WIDTH
        right = position % KERNEL_WIDTH
        # not first % CHANNELS, of which the compiler knows no alignment: it would copy two bytes at a time
        start = down * x_row + right * X_COLUMN + (first - position * CHANNELS)
        at = x[:, None] + (start + tl.arange(0, DEPTH))[None, :]
        if PADDED:
            y = top + down
            z = left + right
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            return tl.load(at, mask=inside[:, None], other=0.0)
        return tl.load(at)
    inner = first + tl.arange(0, DEPTH)
    position = inner // CHANNELS
    down = position // KERNEL_WIDTH
    right = position % KERNEL_WIDTH
    at = x[:, None] + (down * x_row + right * X_COLUMN + inner % CHANNELS)[None, :]
    inside = (inner < INNER)[None, :]
    if PADDED:
        y = top[:, None] + down[None, :]
        z = left[:, None] + right[None, :]
        inside = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(result, bias, out, partial, row, column, rows, columns, SPLIT: tl.constexpr):
    """One block, result float32 [row, column]: into its part, or with the bias into out."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    if SPLIT:
        tl.store(partial + tl.program_id(1) * (rows * columns) + at, result, mask=inside)
    else:
        if bias is not None:
            result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, narrow(result, out.dtype.element_ty), mask=inside)


@triton.jit
def conv2d(
    x,  # [batch, height, width, CHANNELS], strided; channels next to each other
    weight,  # [columns, KERNEL_HEIGHT, KERNEL_WIDTH, CHANNELS]
    bias,  # [columns], or None; None where the sum is split
    out,  # [rows, columns], rows = batch * out_height * out_width; None where the sum is split
    partial,  # float32 [parts, rows, columns]; None where it is not
    rows,
    columns,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_row,
    X_COLUMN: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDER: tl.constexpr,  # 1: half as many columns again, as a product of its own: 96, 192 and 384 are no powers of two
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,  # of the sum, in one thread block, a multiple of DEPTH; 0: all
):
    wait_for_inputs()
    INNER: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH * CHANNELS
    TAKEN: tl.constexpr = COLUMNS + WIDER * (COLUMNS // 2)
    # programs that run together share the pixels they read
    across = tl.cdiv(columns, TAKEN)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * TAKEN + tl.arange(0, COLUMNS)
    further = tl.program_id(0) % across * TAKEN + COLUMNS + tl.arange(0, COLUMNS // 2)

    pixel = tl.minimum(row, rows - 1)  # past the end: the last one again
    top = pixel // out_width % out_height * STRIDE - PADDING
    left = pixel % out_width * STRIDE - PADDING
    pixels = x + pixel // (out_width * out_height) * x_batch + top * x_row + left * X_COLUMN

    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    if WIDER:
        more = tl.zeros([ROWS, COLUMNS // 2], tl.float32)
    begin = 0
    end = tl.cdiv(INNER, DEPTH)
    if SPAN > 0:
        begin = tl.program_id(1) * (SPAN // DEPTH)
        end = tl.minimum(begin + SPAN // DEPTH, end)
    for step in range(begin, end):
        first = step * DEPTH
        x_tile = _pixels(
            pixels, top, left, first, height, width, x_row, X_COLUMN, CHANNELS, KERNEL_WIDTH, INNER, PADDING > 0, DEPTH
        )
        result = dot(x_tile, tl.trans(_weights(weight, column, columns, first, INNER, DEPTH)), result)
        if WIDER:
            more = dot(x_tile, tl.trans(_weights(weight, further, columns, first, INNER, DEPTH)), more)
    _store(result, bias, out, partial, row, column, rows, columns, SPAN > 0)
    if WIDER:
        _store(more, bias, out, partial, row, further, rows, columns, SPAN > 0)


@triton.jit
def combine(
    partial,  # float32 [parts, rows, columns], as conv2d has written them
    bias,  # [columns], or None
    out,  # [rows, columns]
    size,  # rows * columns
    columns,
    parts,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    result = tl.zeros([BLOCK], tl.float32)
    for i in range(parts):
        result += tl.load(partial + i * size + at, mask=inside, other=0.0)
    if bias is not None:
        result += tl.load(bias + at % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(result, out.dtype.element_ty), mask=inside)
