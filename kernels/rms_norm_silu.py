"""A sum, its root mean square norm over the channels of each pixel, and swish, in one pass: images are channels last."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def rms_norm_silu(
    x,  # [rows, CHANNELS]
    bias,  # [CHANNELS], or None
    residual,  # as x, or None
    gamma,  # [CHANNELS]
    x_new,  # as x, or None
    out,  # as x
    rows,
    smallest,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,  # CHANNELS up to a power of two
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
):
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < CHANNELS)[None, :]
    at = row[:, None] * CHANNELS + column[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None or residual is not None:
        total = narrow(y, x.dtype.element_ty)
        if x_new is not None:
            tl.store(x_new + at, total, mask=inside)
        y = total.to(tl.float32)  # the norm sees what is stored
    weight = tl.load(gamma + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, axis=1)), smallest, propagate_nan=tl.PropagateNan.ALL)
    y = y / length[:, None] * (tl.sqrt(CHANNELS * 1.0) * weight)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, narrow(y, out.dtype.element_ty), mask=inside)
