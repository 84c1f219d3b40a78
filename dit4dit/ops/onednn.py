"""Matrices laid out for oneDNN, the library behind PyTorch on CPUs, once: a product then reads them as they are.

PyTorch's own `linear` lays a matrix out anew in each call, or goes to another library; for the few rows of one request that
costs more than the product itself. A packed matrix is a second copy of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def refuse(weight: Tensor) -> str | None:
    """Why a matrix on this device and of this dtype cannot be packed, or None."""
    if weight.device.type != "cpu":
        return f"weight is on {weight.device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if weight.dtype != torch.float32:
        # oneDNN's own bfloat16 products need a processor with bfloat16 instructions, and are not tried here
        return f"weight is {weight.dtype}"
    return None


def pack(weight: Tensor, rows: int) -> None:
    """Keep a packed copy of weight [N, K] for products with about `rows` rows, as long as `weight` lives."""
    if refuse(weight) is None and weight not in _packed:
        _packed[weight] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def is_packed(weight: Tensor) -> bool:
    """Whether `pack` was called with this very tensor."""
    return weight in _packed


def prepare(x: Tensor, weight: Tensor, *_: object) -> None:
    """`pack` for the products of a plan: by the rows of one sample, so that all batches share one layout."""
    if x.dtype == weight.dtype:
        pack(weight, x.numel() // (x.shape[-1] * (x.shape[0] if x.ndim > 2 else 1)))


def refuse_product(x: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why a product with this weight cannot be oneDNN's, or None."""
    if torch.is_grad_enabled():
        return "it has no gradients"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}"
    return refuse(weight) or (None if is_packed(weight) else "weight is not packed")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = "") -> Tensor:
    """activation(x @ weight^T + bias) with the packed copy of `weight`; x [..., K] -> [..., N].

    activation: "none" or "gelu" (algorithm "none" or "tanh").
    """
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, _packed[weight], bias, activation, [], algorithm)
    return out.view(*x.shape[:-1], -1)
