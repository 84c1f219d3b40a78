"""conv2d: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.errors import InputError
from dit4dit.ops import conv2d
from dit4dit.ops.conv2d import reference

F32, BF16 = torch.float32, torch.bfloat16


def make(shape, out, side, dtype=F32, *, bias=True):
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, shape[1], side, side, generator=generator) / (shape[1] * side * side) ** 0.5
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(out, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", [n for n in ops.implementations("conv2d") if n != "triton"])
@pytest.mark.parametrize(
    ("shape", "out", "side", "stride", "padding", "bias"),
    [((1, 3, 8, 8), 8, 3, 1, 1, True), ((2, 5, 7, 9), 11, 1, 1, 0, False), ((1, 6, 9, 9), 4, 3, 2, 0, True)],
)
def test_no_worse_than_the_reference(name, shape, out, side, stride, padding, bias, dtype):
    args = (*make(shape, out, side, dtype, bias=bias), stride, padding)
    assert_no_worse(lambda *args: conv2d(*args, backend=name), reference, args, float32_limit=1e-5)


def test_gradients():
    tensors = [x.double().requires_grad_() for x in make((2, 3, 4, 4), 5, 3)]
    assert torch.autograd.gradcheck(lambda *args: conv2d(*args, 1, 1), tensors)


def test_what_does_not_fit():
    x, weight, bias = make((1, 4, 8, 8), 6, 3)
    with pytest.raises(
        InputError, match=r"conv2d: weight: expected \[O, C, h, w\] = \[6, 4, 3, 3\], got \[6, 3, 3, 3\]"
    ):
        conv2d(x, weight[:, :3], bias, 1, 1)
    with pytest.raises(InputError, match=r"conv2d: bias: expected torch.float32 as x"):
        conv2d(x, weight, bias.double(), 1, 1)
    with pytest.raises(InputError, match="a stride of at least 1"):
        conv2d(x, weight, bias, 0, 1)
