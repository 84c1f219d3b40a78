"""A sample of the VAE's posterior, normalised and cut into patches: one lane a number of the result."""

import triton
import triton.language as tl
from dit4dit.kernels.common import narrow, wait_for_inputs


@triton.jit
def posterior_patches(
    moments,  # [batch, 2 * channels, rows, columns] by its strides: means, logarithms of variances
    bias,  # [2 * channels], what the moments lack, or None
    noise,  # float32 [batch, channels, rows, columns], or None
    mean,  # float32 [channels], of the latents
    std,
    out,  # [batch, rows / PATCH, columns / PATCH, channels, PATCH, PATCH]
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    channels,
    rows,
    columns,
    PATCH: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    count = channels * rows * columns
    sample = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    token = i // (channels * PATCH * PATCH)
    channel = i // (PATCH * PATCH) % channels
    row = token // (columns // PATCH) * PATCH + i // PATCH % PATCH
    column = token % (columns // PATCH) * PATCH + i % PATCH

    at = moments + sample * sample_stride + channel * channel_stride + row * row_stride + column * column_stride
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if noise is not None:
        logvar = tl.load(at + channels * channel_stride, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            logvar += tl.load(bias + channels + channel, mask=inside, other=0.0).to(tl.float32)
        logvar = tl.clamp(logvar, LOWEST, HIGHEST, propagate_nan=tl.PropagateNan.ALL)
        drawn = tl.load(noise + sample * count + (channel * rows + row) * columns + column, mask=inside, other=0.0)
        value += tl.exp(0.5 * logvar) * drawn
    value -= tl.load(mean + channel, mask=inside, other=0.0)
    value /= tl.load(std + channel, mask=inside, other=1.0)
    tl.store(out + sample * count + i, narrow(value, out.dtype.element_ty), mask=inside)
