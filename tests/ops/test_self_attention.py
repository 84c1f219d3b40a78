"""self_attention: every implementation that runs here against the reference, sizes odd and as the model has them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import BackendError
from dit4dit.ops import self_attention
from dit4dit.ops.self_attention import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch, length, heads, dim, dtype, *, norm=True, rope=True):
    generator = torch.Generator().manual_seed(length * dim)
    angles = torch.randn(length, dim // 2, generator=generator).repeat(1, 2)
    weight = (1 + 0.2 * torch.randn(2, dim, generator=generator)).to(dtype)
    return (
        (2 * torch.randn(batch, length, 3 * heads * dim, generator=generator)).to(dtype),
        weight[0] if norm else None,
        weight[1] if norm else None,
        torch.stack([angles.cos(), angles.sin()]) if rope else None,
        heads,
        1e-5,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 1, 16), {}),
        ((2, 67, 2, 32), {}),
        ((1, 131, 1, 128), {}),
        ((1, 128, 1, 64), {}),  # no ragged block of keys
        ((2, 9, 2, 64), dict(norm=False, rope=False)),
        ((1, 17, 3, 64), dict(norm=False, rope=False)),
        ((1, 51, 2, 48), dict(norm=False, rope=False)),
    ],
)
def test_triton(triton_op, sizes, parts, dtype):
    args = make(*sizes, dtype, **parts)
    assert_no_worse(partial(triton_op, "self_attention"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("tiles", ["80", "interpreter"])
def test_triton_with_other_tiles(interpreter, tiles):
    args = make(1, 150, 2, 32, BF16)
    assert_no_worse(partial(interpreter, "self_attention", tiles=tiles), reference, args)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash"])
@pytest.mark.parametrize("sizes", [(1, 588, 16, 128), (1, 784, 16, 128), (2, 17, 12, 64)])
def test_on_a_gpu_at_full_size(backend, sizes):
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in make(*sizes, BF16)]
    try:
        self_attention(*args, backend=backend)
    except BackendError as error:
        pytest.skip(str(error))
    assert_no_worse(partial(self_attention, backend=backend), reference, args)


def test_gradients():
    qkv, norm_q, norm_k, rotary, heads, eps = make(1, 3, 2, 4, torch.float64)
    tensors = [x.requires_grad_() for x in (qkv, norm_q, norm_k)]
    assert torch.autograd.gradcheck(lambda *x: self_attention(*x, rotary.double(), heads, eps), tensors)


@pytest.mark.parametrize(
    ("backend", "message"),
    [("triton", "qkv is on cpu"), ("cudnn", "the tensors are on cpu"), ("flash", "the tensors are on cpu")],
)
def test_a_wish_that_cannot_be_met_raises(backend, message):
    with pytest.raises(BackendError, match=f"self_attention: '{backend}' refused: {message}"):
        self_attention(*make(1, 3, 1, 16, F32), backend=backend)
