"""linear_gelu: the Triton kernel against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import linear_gelu
from dit4dit.ops.linear_gelu import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, columns, dtype, approximate, *, bias=True):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (2 * torch.randn(columns, shape[-1], generator=generator) / shape[-1] ** 0.5).to(dtype)
    return x, weight, torch.randn(columns, generator=generator).to(dtype) if bias else None, approximate


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("shape", "columns", "bias"),
    [
        ((1, 16), 16, True),
        ((9, 192), 96, True),
        ((2, 17, 100), 33, False),
        ((1, 51, 128), 64, True),
        ((2, 70, 96), 130, True),
        ((1, 2, 131, 65), 257, False),
    ],
)
def test_triton(triton_op, shape, columns, bias, approximate, dtype):
    args = make(shape, columns, dtype, approximate, bias=bias)
    assert_no_worse(partial(triton_op, "linear_gelu"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("tiles", ["80", "interpreter"])
def test_triton_with_other_tiles(interpreter, tiles):
    args = make((150, 96), 130, BF16, "none")
    assert_no_worse(partial(interpreter, "linear_gelu", tiles=tiles), reference, args)


def test_gradients():
    tensors = [x.requires_grad_() for x in make((2, 3, 4), 5, torch.float64, "tanh")[:3]]
    assert torch.autograd.gradcheck(lambda *x: linear_gelu(*x, "tanh"), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(5, 3)), r"weight: expected \[N, K\] = \[5, 4\], got \[5, 3\]"),
        (dict(bias=torch.zeros(4)), r"bias: expected \[N\] = \[5\], got \[4\]"),
        (dict(bias=torch.zeros(5).half()), "bias: expected torch.float32 as x, got torch.float16"),
        (dict(approximate="erf"), "approximate: expected 'none' or 'tanh', got 'erf'"),
        (dict(x=torch.zeros(0, 4)), "x: expected .* with elements"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = dict(x=torch.zeros(2, 4), weight=torch.zeros(5, 4), bias=torch.zeros(5), approximate="none")
    with pytest.raises(InputError, match=message):
        linear_gelu(**{**given, **change})
