"""rms_norm_silu: the norm in front of every convolution of the VAE, and the sums in front of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import rms_norm_silu
from dit4dit.ops.rms_norm_silu import launches, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = [(False, False), (True, False), (False, True), (True, True)]


def given(channels: int, dtype=torch.float32, *, bias=False, residual=False, rows: int = 5, columns: int = 7):
    """x, bias, residual, gamma."""
    generator = torch.Generator().manual_seed(channels)

    def image() -> torch.Tensor:
        x = torch.randn(2, channels, rows, columns, generator=generator) * 3
        x[0, :, 0, 0] = 0
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    x, gamma = image(), 1 + 0.3 * torch.randn(channels, 1, 1, generator=generator)
    offset = torch.randn(channels, generator=generator).to(dtype) if bias else None
    return x, offset, image() if residual else None, gamma.to(dtype)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 12, 96, 193, 384])
def test_triton(triton_op, channels, dtype, silu):
    run = partial(triton_op, "rms_norm_silu")
    args = *given(channels, dtype), silu, False
    assert_no_worse(run, reference, args, float32_limit=1e-6)
    (got,) = run(*args)
    assert got.dtype == dtype
    assert not got[0, :, 0, 0].any(), "a black pixel stays black"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "residual"), SUMS)
@pytest.mark.parametrize("channels", [1, 96, 193])
def test_triton_adds_first(triton_op, channels, bias, residual, dtype, keep):
    run = partial(triton_op, "rms_norm_silu")
    args = *given(channels, dtype, bias=bias, residual=residual), True, keep
    assert_no_worse(run, reference, args, float32_limit=1e-6)
    for got, want in zip(run(*args), reference(*args), strict=True):
        assert got.stride() == want.stride()
    if keep:
        assert torch.equal(run(*args)[1], reference(*args)[1]), "one rounding of the same sum"


@pytest.mark.parametrize("keep", [True, False])
def test_the_norm_sees_the_sum_as_it_is_rounded(triton_op, keep):
    """Bit by bit what a sum that was stored first would give; of an unrounded one many values are another."""
    x, bias, residual, gamma = given(96, torch.bfloat16, bias=True, residual=True)
    total = reference(x, bias, residual, gamma, True, True)[1]
    for run in (reference, partial(triton_op, "rms_norm_silu")):
        y, *_ = run(x, bias, residual, gamma, True, keep)
        assert torch.equal(y, run(total, None, None, gamma, True, False)[0])


@pytest.mark.parametrize("silu", [True, False])
def test_reference_is_torchs_normalize(silu):
    x, bias, residual, gamma = given(24, bias=True, residual=True)
    total = x + bias[:, None, None] + residual
    wanted = F.normalize(total, dim=1) * 24**0.5 * gamma
    y, kept = rms_norm_silu(x, bias, residual, gamma, silu, True)
    torch.testing.assert_close(y, F.silu(wanted) if silu else wanted)
    torch.testing.assert_close(kept, total)
    assert rms_norm_silu(x, None, None, gamma, silu, True)[1] is x


def test_what_is_not_asked_for_is_not_written():
    """norm2 of every residual block: a store of the sum would be half of the kernel's traffic again."""
    args = given(96, torch.bfloat16, bias=True, residual=True)
    assert [launches((*args, True, keep), "90")[0][0].arguments["x_new"] is None for keep in (False, True)] == [
        True,
        False,
    ]
    (plain,), results = launches((args[0], None, None, args[3], True, True), "90")
    assert plain.arguments["x_new"] is None
    assert results[1] is args[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_hidden(triton_op, bad):
    """By the bound of the length: one channel that is no number leaves no number in its pixel, and the others as they are."""
    x, bias, residual, gamma = given(12, bias=True, residual=True)
    residual[1, 3, 2, 4] = bad
    for run in (reference, partial(triton_op, "rms_norm_silu")):
        (got,) = run(x, bias, residual, gamma, False, False)
        # what is infinite makes the others zero
        assert got[1, :, 2, 4].isnan().sum() == (12 if bad != bad else 1)
        assert got.isnan().sum() == got[1, :, 2, 4].isnan().sum()


def test_float16_holds_the_squares(triton_op):
    x = torch.tensor([300.0, 100.0] * 48, dtype=torch.float16).reshape(1, 96, 1, 1)
    x = torch.cat([x, torch.zeros_like(x)], dim=3).contiguous(memory_format=torch.channels_last)
    gamma = torch.ones(96, 1, 1, dtype=torch.float16)
    wanted = (F.normalize(x.double(), dim=1) * 96**0.5).half()
    for run in (reference, partial(triton_op, "rms_norm_silu")):
        (got,) = run(x, None, None, gamma, False, False)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)
        assert not got[..., 1].any()


def test_gradients_where_they_are_wanted():
    given_ = given(3, bias=True, residual=True, rows=2, columns=2)
    x, bias, residual, gamma = (tensor.double().requires_grad_() for tensor in given_)
    shifted = (x + 0.5).detach().requires_grad_()  # away from the black pixel, where the norm has none
    assert torch.autograd.gradcheck(lambda *args: reference(*args, True, True), (shifted, bias, residual, gamma))


def test_what_does_not_fit():
    x, bias, residual, gamma = given(8, bias=True, residual=True)
    with pytest.raises(InputError, match=r"gamma: expected \[C, 1, 1\] = \[8, 1, 1\], got \[7, 1, 1\]"):
        rms_norm_silu(x, None, None, gamma[:7], True, False)
    with pytest.raises(InputError, match=r"gamma: expected torch.float32 as x"):
        rms_norm_silu(x, None, None, gamma.double(), True, False)
    with pytest.raises(InputError, match=r"bias: expected \[C\] = \[8\], got \[7\]"):
        rms_norm_silu(x, bias[:7], None, gamma, True, False)
    with pytest.raises(InputError, match=r"residual: expected torch.float32 as x, got torch.float64"):
        rms_norm_silu(x, None, residual.double(), gamma, True, False)


def test_triton_is_not_for_other_layouts(triton_op):
    x, _, residual, gamma = given(8, residual=True)
    with pytest.raises(Exception, match="residual is not channels last"):
        triton_op("rms_norm_silu", x, None, residual.contiguous(), gamma, True, False)
