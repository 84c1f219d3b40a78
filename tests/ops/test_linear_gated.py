"""linear_gated: the Triton kernels (sum whole and split) against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import linear_gated, tiles
from dit4dit.ops.linear_gated import launches, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, columns, dtype, residual_dtype, *, bias=True, gate=True):
    generator = torch.Generator().manual_seed(columns)
    return (
        torch.randn(shape, generator=generator).to(dtype),
        (torch.randn(columns, shape[-1], generator=generator) / shape[-1] ** 0.5).to(dtype),
        torch.randn(columns, generator=generator).to(dtype) if bias else None,
        torch.randn(*shape[:-1], columns, generator=generator).to(residual_dtype),
        torch.randn(shape[1], columns, generator=generator) if gate else None,
    )


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize(
    ("shape", "columns", "parts"),
    [
        ((1, 1, 1, 16), 16, {}),
        ((1, 1, 9, 192), 48, dict(gate=False)),
        ((2, 1, 17, 100), 33, {}),
        ((1, 3, 17, 128), 64, dict(bias=False)),
        ((2, 3, 23, 96), 130, {}),
        ((1, 2, 65, 65), 257, dict(bias=False, gate=False)),
    ],
)
def test_triton(triton_op, shape, columns, parts, dtypes):
    args = make(shape, columns, *dtypes, **parts)
    assert_no_worse(partial(triton_op, "linear_gated"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("columns", [64, 70])
def test_triton_with_the_sum_split(triton_op, columns):
    """A long inner width on 9.0: three parts, the last one shorter, and rows and columns past the end."""
    args = make((1, 2, 40, 4160), columns, BF16, F32)
    assert tiles.lookup("linear_gated", "90", rows=80, columns=columns, inner=4160)["SPLIT"] == 3
    meta = tuple(x.to("meta") for x in args)
    assert [step.kernel for step in launches(meta, "90")[0]] == ["linear_gated", "linear_gated.combine"]
    assert_no_worse(partial(triton_op, "linear_gated"), reference, args)


def test_gradients():
    tensors = [x.double().requires_grad_() for x in make((1, 2, 3, 4), 5, F32, F32)]
    assert torch.autograd.gradcheck(linear_gated, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(5, 3)), r"weight: expected \[D, K\] = \[5, 4\], got \[5, 3\]"),
        (
            dict(residual=torch.zeros(1, 2, 3, 6)),
            r"residual: expected \[B, T, N, D\] = \[1, 2, 3, 5\], got \[1, 2, 3, 6\]",
        ),
        (dict(gate=torch.zeros(3, 5)), r"gate: expected \[T, D\] = \[2, 5\], got \[3, 5\]"),
        (dict(weight=torch.zeros(5, 4).half()), "weight: expected torch.float32 as x, got torch.float16"),
        (dict(gate=torch.zeros(2, 5, device="meta")), "gate: expected device cpu as x, got meta"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = dict(
        x=torch.zeros(1, 2, 3, 4),
        weight=torch.zeros(5, 4),
        bias=torch.zeros(5),
        residual=torch.zeros(1, 2, 3, 5),
        gate=torch.zeros(2, 5),
    )
    with pytest.raises(InputError, match=message):
        linear_gated(**{**given, **change})
