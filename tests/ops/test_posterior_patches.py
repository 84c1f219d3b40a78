"""posterior_patches: what the model makes of the VAE's moments, as rows for its patch embedding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.checkpoints.weights import random_model
from dit4dit.errors import InputError
from dit4dit.ops import posterior_patches
from dit4dit.ops.posterior_patches import reference
from dit4dit.presets import preset

TINY = preset("tiny").model
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(
    batch: int,
    z: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    layout: str,
    noisy: bool = True,
    biased: bool = True,
):
    """Moments whose variances go beyond their bounds on both sides, their bias, noise, and numbers of the latents."""
    generator = torch.Generator().manual_seed(rows * columns)
    moments = torch.randn(batch, 2 * z, rows, columns, generator=generator)
    moments[:, z:] *= 4
    moments[0, z, 0, 0], moments[-1, -1, -1, -1] = -50.0, 21.0
    moments = moments.to(dtype)
    if layout == "channels last":
        moments = moments.contiguous(memory_format=torch.channels_last)
    elif layout == "a slice":
        moments = torch.full((batch, 2 * z + 3, rows + 1, columns), torch.nan, dtype=dtype)[:, 1:-2, 1:].copy_(moments)
    noise = torch.randn(batch, z, 1, rows, columns, generator=generator) if noisy else None
    bias = torch.randn(2 * z, generator=generator).to(dtype) if biased else None
    return moments, bias, noise, torch.randn(z, generator=generator), torch.rand(z, generator=generator) + 0.5


@pytest.mark.parametrize("layout", ["channels last", "contiguous", "a slice"])
@pytest.mark.parametrize("dtype, out", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("size, patch", [((1, 16, 4, 6), 2), ((3, 5, 7, 9), 1), ((2, 3, 6, 9), 3), ((2, 1, 2, 2), 2)])
@pytest.mark.parametrize("biased", [True, False])
def test_triton(triton_op, size, patch, dtype, out, layout, biased) -> None:
    if out == F16:
        size = (*size[:3], size[3])
    args = (*make(*size, dtype, layout=layout, biased=biased), patch, out)
    if out == F16:
        args[0][:, size[1] :].clamp_(max=8)  # the result would not be finite
    assert_no_worse(partial(triton_op, "posterior_patches"), reference, args, float32_limit=2e-6)


def test_triton_without_noise(triton_op) -> None:
    args = (*make(2, 4, 4, 6, F32, layout="channels last", noisy=False), 2, F32)
    torch.testing.assert_close(triton_op("posterior_patches", *args), reference(*args), rtol=1e-6, atol=1e-6)


def test_nan_is_not_hidden(triton_op) -> None:
    """By the bounds of the variance: what spoils a chunk is to be seen in its actions."""
    moments, bias, noise, mean, std = make(1, 4, 2, 4, F32, layout="channels last")
    moments[0, 5, 1, 2] = torch.nan  # the variance of channel 1, row 1, column 2: token 1
    for got in (
        posterior_patches(moments, bias, noise, mean, std, 2, F32),
        triton_op("posterior_patches", moments, bias, noise, mean, std, 2, F32),
    ):
        assert got.isnan().nonzero().tolist() == [[0, 1, 1 * 4 + 2]]


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_is_what_the_model_computes(posterior: str) -> None:
    model = random_model(TINY, 1, with_text=False)
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(2, 3, 32, 64, generator=generator)
    noise = torch.randn(2, TINY.vae.z_dim, 1, *TINY.latent_size(32, 64), generator=generator)
    backbone = model.backbone
    with torch.no_grad():
        wanted = backbone.condition(frame, noise if posterior == "sample" else torch.zeros_like(noise))
        wanted = backbone.transformer._patchify(wanted)[:, 0]  # with the mask channels
        moments = backbone.frame_encoder.moments(frame)
    mean, std = backbone.scale.mean.flatten(), backbone.scale.std.flatten()
    got = posterior_patches(moments, None, noise if posterior == "sample" else None, mean, std, TINY.dit.patch, F32)
    assert torch.equal(got, wanted[..., : got.shape[-1]])


@pytest.mark.parametrize("noisy", [True, False])
def test_the_bias_is_added_in_float32(triton_op, noisy: bool) -> None:
    """Not in the moments' dtype, where the sum would be rounded once more."""
    moments, bias, noise, mean, std = make(2, 4, 4, 6, BF16, layout="channels last", noisy=noisy)
    whole = moments.float() + bias.float()[:, None, None]
    want = reference(whole, None, noise, mean, std, 2, F32)
    for call in (partial(posterior_patches, backend="torch"), partial(triton_op, "posterior_patches")):
        torch.testing.assert_close(call(moments, bias, noise, mean, std, 2, F32), want, rtol=1e-6, atol=1e-6)


def test_refuses_what_does_not_fit() -> None:
    moments, bias, noise, mean, std = make(2, 4, 4, 6, F32, layout="contiguous")
    with pytest.raises(InputError, match=r"moments: expected \[B, 2z, h, w\] = \[2, 8, 4, 6\], got \[2, 7, 4, 6\]"):
        posterior_patches(moments[:, 1:], bias, noise, mean, std, 2, F32)
    with pytest.raises(InputError, match="patch: expected a divisor of 4 and 6, got 4"):
        posterior_patches(moments, bias, noise, mean, std, 4, F32)
    with pytest.raises(InputError, match=r"noise: expected torch\.float32"):
        posterior_patches(moments, bias, noise.bfloat16(), mean, std, 2, F32)
    with pytest.raises(InputError, match="std: expected"):
        posterior_patches(moments, bias, noise, mean, std[1:], 2, F32)
    with pytest.raises(InputError, match=r"bias: expected \[2z\] = \[8\], got \[7\]"):
        posterior_patches(moments, bias[1:], noise, mean, std, 2, F32)
    with pytest.raises(InputError, match=r"bias: expected torch\.float32 as moments, got torch\.bfloat16"):
        posterior_patches(moments, bias.bfloat16(), noise, mean, std, 2, F32)
