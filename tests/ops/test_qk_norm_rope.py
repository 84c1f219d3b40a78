"""qk_norm_rope: the Triton kernel against the reference, and the reference against the model's layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.config import VideoDitConfig
from dit4dit.errors import InputError
from dit4dit.model.video_dit import RmsNorm, rotary_table, rotate
from dit4dit.ops import qk_norm_rope
from dit4dit.ops.qk_norm_rope import launches, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch, length, heads, dim, dtype, *, norm=True, rope=True, norm_dtype=None, halves=False):
    """halves: each half of a head turns by angles of its own."""
    generator = torch.Generator().manual_seed(length * dim)
    angles = torch.randn(length, dim if halves else dim // 2, generator=generator)
    weight = 1 + 0.2 * torch.randn(2, dim, generator=generator)
    return (
        torch.randn(batch, length, 3 * heads * dim, generator=generator).to(dtype),
        weight[0].to(norm_dtype or dtype) if norm else None,
        weight[1].to(norm_dtype or dtype) if norm else None,
        torch.stack([angles.cos(), angles.sin()]) if rope else None,
        heads,
        1e-5,
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 1, 16), {}),
        ((2, 37, 2, 32), {}),
        ((1, 19, 3, 128), {}),
        ((2, 37, 2, 48), dict(halves=True)),
        ((2, 17, 2, 48), dict(rope=False)),
        ((1, 9, 2, 64), dict(norm=False)),
        ((1, 9, 2, 64), dict(norm=False, rope=False)),
    ],
)
def test_triton(triton_op, sizes, parts, dtype):
    assert_no_worse(partial(triton_op, "qk_norm_rope"), reference, make(*sizes, dtype, **parts), float32_limit=1e-5)


@pytest.mark.parametrize("parts", [{}, dict(rope=False), dict(norm=False), dict(norm=False, rope=False)], ids=str)
def test_layout_that_attention_kernels_read_where_it_is(parts):
    """Token after token, rows of d dense: the kernel's as the reference's."""
    args = make(2, 5, 3, 16, BF16, **parts)
    for q, k, v in (reference(*args), launches(args, "90")[1]):
        row = 3 * 16 if parts != dict(norm=False, rope=False) else 3 * 3 * 16
        assert q.stride() == k.stride() == (5 * row, 16, row, 1)
        assert v.stride() == (5 * 3 * 3 * 16, 16, 3 * 3 * 16, 1)
        assert torch.empty_like(q).transpose(1, 2).is_contiguous()  # cuDNN's and flash-attn's results


def test_angles_once_or_for_both_halves():
    qkv, norm_q, norm_k, rotary, *rest = make(2, 9, 2, 32, BF16)
    twice = torch.cat([rotary, rotary], dim=-1)
    for got, want in zip(
        qk_norm_rope(qkv, norm_q, norm_k, rotary, *rest), qk_norm_rope(qkv, norm_q, norm_k, twice, *rest), strict=True
    ):
        assert torch.equal(got, want)


def test_triton_with_float32_weights(triton_op):
    args = make(1, 21, 2, 32, BF16, norm_dtype=F32)
    assert_no_worse(partial(triton_op, "qk_norm_rope"), reference, args)


def test_is_what_the_model_computes():
    config = VideoDitConfig(num_heads=2, head_dim=32)
    qkv, norm_q, norm_k, _, heads, eps = make(2, 24, 2, 32, F32)
    rotary = rotary_table(config, 2, 3, 4, torch.device("cpu"))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    for got, x, weight in zip(
        qk_norm_rope(qkv, norm_q, norm_k, rotary, heads, eps), (q, k), (norm_q, norm_k), strict=False
    ):
        norm = RmsNorm(32, eps)
        norm.weight.data = weight
        torch.testing.assert_close(got, rotate(norm(x), rotary), rtol=1e-6, atol=1e-6)
    assert torch.equal(qk_norm_rope(qkv, norm_q, norm_k, rotary, heads, eps)[2], v)


def test_gradients():
    qkv, norm_q, norm_k, rotary, heads, eps = make(1, 3, 2, 4, torch.float64)
    tensors = [x.requires_grad_() for x in (qkv, norm_q, norm_k)]
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, rotary.double(), heads, eps), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=5), r"qkv: expected 3 \* heads \* \(an even number\) columns for 5 heads, got 48"),
        (dict(norm_q=torch.ones(9)), r"norm_q: expected \[d\] = \[8\], got \[9\]"),
        (dict(norm_k=None), "norm_q and norm_k both or neither"),
        (dict(rotary=torch.ones(2, 4, 8)), r"rotary: expected \[2, S, d\] = \[2, 3, 8\], got \[2, 4, 8\]"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    given = dict(qkv=torch.zeros(1, 3, 48), norm_q=torch.ones(8), norm_k=torch.ones(8), rotary=None, heads=2, eps=1e-5)
    with pytest.raises(InputError, match=message):
        qk_norm_rope(**{**given, **change})
