"""cross_attention: the Triton kernels (keys whole and split) against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import BackendError, InputError
from dit4dit.ops import cross_attention
from dit4dit.ops.cross_attention import launches, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch, length, keys, heads, dim, dtype, *, norm=True, shared=False):
    generator = torch.Generator().manual_seed(length * keys)
    k, v = (torch.randn(1 if shared else batch, heads, keys, dim, generator=generator).to(dtype) for _ in range(2))
    q = (2 * torch.randn(batch, length, heads * dim, generator=generator)).to(dtype)
    weight = (1 + 0.2 * torch.randn(dim, generator=generator)).to(dtype)
    return q, k, v, weight if norm else None, heads, 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 1, 1, 16), {}),
        ((2, 71, 65, 2, 32), dict(shared=True)),
        ((1, 130, 128, 1, 128), {}),
        ((2, 9, 150, 2, 64), dict(norm=False)),  # keys split in three, the last one ragged
        ((3, 17, 128, 1, 64), dict(norm=False, shared=True)),  # keys split in two
        ((1, 51, 192, 2, 48), {}),
    ],
)
def test_triton(triton_op, sizes, parts, dtype):
    args = make(*sizes, dtype, **parts)
    assert_no_worse(partial(triton_op, "cross_attention"), reference, args, float32_limit=1e-5)


def test_triton_reads_keys_and_values_out_of_a_larger_matrix(triton_op):
    """The action head has k and v of all its blocks in one matrix."""
    q, _, _, _, heads, eps = make(2, 9, 70, 2, 32, BF16)
    matrix = torch.randn(2, 70, 5, heads, 32).bfloat16()
    k, v = matrix[:, :, 3].transpose(1, 2), matrix[:, :, 1].transpose(1, 2)
    assert_no_worse(partial(triton_op, "cross_attention"), reference, (q, k, v, None, heads, eps))


def test_a_few_queries_split_the_keys():
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in make(1, 17, 588, 12, 64, BF16, norm=False)]
    first, second = launches(tuple(args), "90")[0]
    assert first.grid == (1, 12, 10)
    assert second.kernel == "cross_attention.combine"


def test_gradients():
    q, k, v, weight, heads, eps = make(2, 3, 4, 2, 4, torch.float64, shared=True)
    tensors = [x.requires_grad_() for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(lambda *x: cross_attention(*x, heads, eps), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=5), "q: expected a multiple of 5 heads as its width, got 16"),
        (dict(k=torch.zeros(3, 2, 7, 8)), r"k: expected \[B, H, L, d\] = \[2, 2, 7, 8\], got \[3, 2, 7, 8\]"),
        (dict(v=torch.zeros(2, 2, 6, 8)), r"v: expected \[B, H, L, d\] = \[2, 2, 7, 8\], got \[2, 2, 6, 8\]"),
        (dict(v=torch.zeros(2, 2, 7, 8).half()), "q, k and v of one dtype"),
        (dict(norm_q=torch.zeros(7)), r"norm_q: expected \[d\] = \[8\], got \[7\]"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    kv = torch.zeros(2, 2, 7, 8)
    given = dict(q=torch.zeros(2, 3, 16), k=kv, v=kv, norm_q=None, heads=2, eps=1e-5)
    with pytest.raises(InputError, match=message):
        cross_attention(**{**given, **change})


def test_a_wish_that_cannot_be_met_raises():
    with pytest.raises(BackendError, match="cross_attention: 'triton' refused: q is on cpu"):
        cross_attention(*make(1, 2, 3, 1, 16, F32), backend="triton")
