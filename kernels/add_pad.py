"""The sum of an image, a bias and a residual, with zeros on the right and below, in one pass: the images are channels last."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def add_pad(
    x,  # [images, height, width, CHANNELS]
    bias,  # [CHANNELS], or None
    residual,  # as x, or None
    out,  # [images, height + 1, width + 1, CHANNELS]
    pixels,  # of out
    height,
    width,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,  # CHANNELS up to a power of two
    ROWS: tl.constexpr,
):
    wait_for_inputs()
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row = pixel // (width + 1)
    image = row // (height + 1)
    i = row - image * (height + 1)
    j = pixel - row * (width + 1)
    given = (i < height) & (j < width) & (pixel < pixels)
    inside = given[:, None] & (column < CHANNELS)[None, :]
    at = ((image * height + i) * width + j)[:, None] * CHANNELS + column[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(given[:, None], y, 0.0)
    to = pixel[:, None] * CHANNELS + column[None, :]
    tl.store(out + to, narrow(y, out.dtype.element_ty), mask=(pixel < pixels)[:, None] & (column < CHANNELS)[None, :])
