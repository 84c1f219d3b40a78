"""Packed matrices: the same products, by the library behind PyTorch on CPUs."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from dit4dit import ops
from dit4dit.ops import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("shape", [(1, 64), (17, 64), (2, 9, 64), (1, 3, 5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_right(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(48, 64)
    b = torch.randn(48) if bias else None
    onednn.pack(weight, 17)
    with torch.no_grad():
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        for algorithm in ("none", "tanh"):
            got = onednn.linear(x, weight, b, "gelu", algorithm)
            assert torch.allclose(got.double(), F.gelu(want, approximate=algorithm), atol=1e-4)
        got = onednn.linear(x, weight, b)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2 * (F.linear(x, weight, b) - want).abs().max() + 1e-5


def test_linear_gelu_takes_it_where_the_weight_is_packed_and_no_gradient_is_wanted() -> None:
    x, weight = torch.randn(3, 64), torch.randn(48, 64)
    with torch.no_grad(), ops.trace() as used:
        plain = ops.linear_gelu(x, weight, None, "none")
    assert used["linear_gelu"] == {"torch"}
    onednn.pack(weight, 3)
    with torch.no_grad(), ops.trace() as used:
        packed = ops.linear_gelu(x, weight, None, "none")
    assert used["linear_gelu"] == {"onednn"}
    assert torch.allclose(plain, packed, atol=1e-5)
    with ops.trace() as used:
        ops.linear_gelu(x.requires_grad_(), weight, None, "none")
    assert used["linear_gelu"] == {"torch"}


def test_a_packed_copy_lives_as_long_as_its_weight() -> None:
    gc.collect()  # what other tests have left behind
    weight = torch.randn(8, 8)
    onednn.pack(weight, 1)
    before = len(onednn._packed)
    assert onednn.is_packed(weight)
    del weight
    gc.collect()
    assert len(onednn._packed) == before - 1


def test_other_dtypes_are_not_packed() -> None:
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    onednn.pack(weight, 1)
    assert not onednn.is_packed(weight)
    assert "bfloat16" in str(onednn.refuse(weight))
