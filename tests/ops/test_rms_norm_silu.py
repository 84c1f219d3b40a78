"""rms_norm_silu: the norm in front of every convolution of the VAE."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import rms_norm_silu
from dit4dit.ops.rms_norm_silu import reference


def given(channels: int, dtype=torch.float32, rows: int = 5, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, rows, columns, generator=generator) * 3
    x[0, :, 0, 0] = 0
    gamma = 1 + 0.3 * torch.randn(channels, 1, 1, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), gamma.to(dtype)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 12, 96, 193, 384])
def test_triton(triton_op, channels, dtype, silu):
    run = partial(triton_op, "rms_norm_silu")
    x, gamma = given(channels, dtype)
    assert_no_worse(run, reference, (x, gamma, silu), float32_limit=1e-6)
    got = run(x, gamma, silu)
    assert got.dtype == dtype
    assert not got[0, :, 0, 0].any(), "a black pixel stays black"


@pytest.mark.parametrize("silu", [True, False])
def test_reference_is_torchs_normalize(silu):
    x, gamma = given(24)
    wanted = F.normalize(x, dim=1) * 24**0.5 * gamma
    torch.testing.assert_close(rms_norm_silu(x, gamma, silu), F.silu(wanted) if silu else wanted)


def test_float16_holds_the_squares(triton_op):
    x = torch.tensor([300.0, 100.0] * 48, dtype=torch.float16).reshape(1, 96, 1, 1)
    x = torch.cat([x, torch.zeros_like(x)], dim=3).contiguous(memory_format=torch.channels_last)
    gamma = torch.ones(96, 1, 1, dtype=torch.float16)
    wanted = (F.normalize(x.double(), dim=1) * 96**0.5).half()
    for got in (reference(x, gamma, False), triton_op("rms_norm_silu", x, gamma, False)):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)
        assert not got[..., 1].any()


def test_gradients_where_they_are_wanted():
    x, gamma = (tensor.double().requires_grad_() for tensor in given(3, rows=2, columns=2))
    shifted = (x + 0.5).detach().requires_grad_()  # away from the black pixel, where the norm has none
    assert torch.autograd.gradcheck(lambda a, b: reference(a, b, True), (shifted, gamma))


def test_refuses_what_does_not_fit():
    x, gamma = given(8)
    with pytest.raises(InputError, match=r"gamma: expected \[C, 1, 1\] = \[8, 1, 1\], got \[7, 1, 1\]"):
        rms_norm_silu(x, gamma[:7], True)
    with pytest.raises(InputError, match=r"gamma: expected torch.float32 as x"):
        rms_norm_silu(x, gamma.double(), True)
