"""add_pad: the sum in front of a convolution that halves the image, with the zeros that it needs on two sides."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import add_pad
from dit4dit.ops.add_pad import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = [(False, False), (True, False), (False, True), (True, True)]


def given(shape, dtype=torch.float32, *, bias=True, residual=True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def image() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)

    offset = torch.randn(shape[1], generator=generator).to(dtype)
    return image(), offset if bias else None, image() if residual else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "residual"), SUMS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 12, 5, 7), (3, 96, 4, 9), (1, 193, 9, 2)])
def test_triton(triton_op, shape, bias, residual, dtype):
    run = partial(triton_op, "add_pad")
    args = given(shape, dtype, bias=bias, residual=residual)
    assert_no_worse(run, reference, args, float32_limit=0)
    got, want = run(*args), reference(*args)
    assert torch.equal(got, want), "one rounding of the same sum"
    assert got.stride() == want.stride() or 1 in shape


def test_the_border_is_zero_whatever_is_inside_and_whatever_the_memory_held(triton_op):
    """Values at the end of a row and of an image are read by no pixel of the border, nor is what the memory held (NaN)."""
    for seed, value in enumerate((float("inf"), float("nan"), 1e30)):
        x, bias, _ = given((2, 6, 3, 5), seed=seed)
        x[:, :, -1], x[:, :, :, -1], x[0, :, 0, 0] = value, value, value
        got = triton_op("add_pad", x, bias, None)
        assert got.shape == (2, 6, 4, 6)
        assert not got[:, :, -1].any()
        assert not got[:, :, :, -1].any()
        torch.testing.assert_close(got[:, :, :-1, :-1], x + bias[:, None, None], equal_nan=True, rtol=0, atol=0)


def test_the_sum_is_rounded_once():
    """1 + 2^-8 + 2^-8 is 1 + 2^-7 in bfloat16, and 1 where each addition is rounded."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    small = 2**-8 * one
    assert add_pad(one, small.flatten(), small)[0, 0, 0, 0].item() == 1 + 2**-7


def test_gradients():
    tensors = [x.double().requires_grad_() for x in given((1, 2, 2, 3))]
    assert torch.autograd.gradcheck(reference, tensors)


def test_what_does_not_fit():
    x, bias, residual = given((1, 4, 8, 8))
    with pytest.raises(InputError, match=r"add_pad: bias: expected \[C\] = \[4\], got \[3\]"):
        add_pad(x, bias[:3], None)
    with pytest.raises(InputError, match=r"add_pad: residual: expected \[B, C, H, W\]"):
        add_pad(x, None, residual[:, :, 1:])
    with pytest.raises(InputError, match=r"add_pad: residual: expected torch.float32 as x"):
        add_pad(x, None, residual.half())
