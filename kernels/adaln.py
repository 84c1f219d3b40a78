"""Gated residual, layer norm and modulation in one pass over the rows: each element is read once and written once."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def adaln(
    x,  # rows of WIDTH; a row is (sample, frame, token)
    y,  # [rows, WIDTH], or None
    gate,  # float32 [frames, WIDTH], or None
    shift,  # float32 [frames, WIDTH], or None
    scale,
    x_new,  # [rows, WIDTH] in x's dtype; None where y is
    h,  # [rows, WIDTH]
    rows,
    frames,
    tokens,
    eps,
    sample_stride,  # of x; None, as the two below, where x is [rows, WIDTH]
    frame_stride,
    token_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,  # all rows of a block are of one frame (ROWS divides tokens), whose tables are read once
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    if SHARED:
        table = (((tl.program_id(0) * ROWS) // tokens) % frames) * WIDTH + column[None, :]
        of_table = (column < WIDTH)[None, :]
    else:
        table = ((row // tokens) % frames)[:, None] * WIDTH + column[None, :]
        of_table = inside

    if sample_stride is None:
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    else:
        frame = row // tokens
        begin = frame // frames * sample_stride + frame % frames * frame_stride + row % tokens * token_stride
        value = tl.load(x + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            branch *= tl.load(gate + table, mask=of_table, other=0.0)
        # the norm sees what later parts will read, so the sum is rounded first
        stored = narrow(value + branch, x.dtype.element_ty)
        tl.store(x_new + at, stored, mask=inside)
        value = stored.to(tl.float32)

    mean = tl.sum(value, axis=1) / WIDTH
    centred = tl.where(inside, value - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    result = centred * tl.rsqrt(variance + eps)[:, None]
    if scale is not None:
        result *= 1.0 + tl.load(scale + table, mask=of_table, other=0.0)
        result += tl.load(shift + table, mask=of_table, other=0.0)
    tl.store(h + at, narrow(result, h.dtype.element_ty), mask=inside)
