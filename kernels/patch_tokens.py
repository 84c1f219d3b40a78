"""Patches to tokens, layer norm and modulation: a thread block has whole rows, whose product is one step deep.

It goes over the columns twice. The first time it adds up mean and variance, part by part; the second time it reads back what it
has written, which is in L1 or L2.
"""

import triton
import triton.language as tl
from dit4dit.kernels.common import INTERPRETED, dot, narrow, wait_for_inputs


@triton.jit
def patch_tokens(
    patches,  # [batch, frames, tokens / columns, columns, channels, PATCH, PATCH] by its strides
    weight,  # [WIDTH, INNER]
    begin,  # float32 [batch, frames, tokens, WIDTH] by its strides
    shift,  # float32 [frames, WIDTH]
    scale,
    x,  # float32 [rows, WIDTH]
    h,  # [rows, WIDTH]
    rows,  # batch * frames * tokens
    frames,
    tokens,
    columns,
    eps,
    sample_stride,
    frame_stride,
    row_stride,
    column_stride,
    channel_stride,
    down_stride,
    right_stride,
    begin_sample,
    begin_frame,
    begin_token,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,  # channels * PATCH * PATCH
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # power of two: at least INNER
):
    wait_for_inputs()
    dtype = weight.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    token, frame, sample = row % tokens, row // tokens % frames, row // tokens // frames
    k = tl.arange(0, DEPTH)
    at = sample * sample_stride + frame * frame_stride + token // columns * row_stride + token % columns * column_stride
    inner = k // (PATCH * PATCH) * channel_stride + k // PATCH % PATCH * down_stride + k % PATCH * right_stride
    given = tl.load(patches + at[:, None] + inner[None, :], mask=here[:, None] & (k < INNER)[None, :], other=0.0)
    given = narrow(given.to(tl.float32), dtype)
    first = begin + sample * begin_sample + frame * begin_frame + token * begin_token

    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        wide = column < WIDTH
        inside = here[:, None] & wide[None, :]
        tile = tl.load(
            weight + column[:, None] * INNER + k[None, :], mask=wide[:, None] & (k < INNER)[None, :], other=0.0
        )
        product = dot(given, tl.trans(tile), tl.zeros([ROWS, COLUMNS], tl.float32))
        value = narrow(product, dtype).to(tl.float32)
        value += tl.load(first[:, None] + column[None, :], mask=inside, other=0.0)
        tl.store(x + row[:, None] * WIDTH + column[None, :], value, mask=inside)
        # of this part alone, and then both together
        count = tl.minimum(WIDTH - start, COLUMNS).to(tl.float32)
        part = tl.sum(tl.where(inside, value, 0.0), axis=1) / count
        apart = tl.where(inside, value - part[:, None], 0.0)
        ahead = part - mean
        share = count / (start + count)
        squares += tl.sum(apart * apart, axis=1) + ahead * ahead * (start * share)
        mean += ahead * share
    inverse = tl.rsqrt(squares / WIDTH + eps)
    if not INTERPRETED:
        tl.debug_barrier()  # other threads of the block have written what is read here

    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = here[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        table = frame[:, None] * WIDTH + column[None, :]
        result = (tl.load(x + place, mask=inside, other=0.0) - mean[:, None]) * inverse[:, None]
        result *= 1.0 + tl.load(scale + table, mask=inside, other=0.0)
        result += tl.load(shift + table, mask=inside, other=0.0)
        tl.store(h + place, narrow(result, dtype), mask=inside)
