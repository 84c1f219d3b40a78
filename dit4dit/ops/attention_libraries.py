"""Attention kernels of others: what they take, and calling them. q, k, v [B, H, S or L, d] -> [B, S, H * d]."""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit4dit.ops import stand_in

WIDEST_HEAD = 128


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice; runs anywhere."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def refuse_cudnn(x: Tensor, dim: int) -> str | None:
    """x: any of the operands; dim: width of a head."""
    reason = _refuse(x, dim)
    if reason is None and stand_in.of(x.device) is None and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return reason


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention held to cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def refuse_flash(x: Tensor, dim: int) -> str | None:
    """x: any of the operands; dim: width of a head."""
    reason = _refuse(x, dim)
    if reason is None and stand_in.of(x.device) is not None:
        return "tensors without data: it is not known whether flash-attn is installed there"
    if reason is None and _flash_module(x.device) is None:
        return "flash-attn is not installed (pip install 'dit4dit[flash]')"
    return reason


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 3 on Hopper where it is installed, else 2."""
    name = _flash_module(q.device)
    assert name is not None
    out = importlib.import_module(name).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    if isinstance(out, tuple):  # early versions of 3 give the log-sum-exp too
        out = out[0]
    return out.flatten(2)


def _refuse(x: Tensor, dim: int) -> str | None:
    if not stand_in.on_gpu(x.device):
        return f"the tensors are on {x.device.type}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype}; it takes bfloat16 and float16"
    if stand_in.capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    if dim % 8 or dim > WIDEST_HEAD:
        return f"heads of {dim}; it takes multiples of 8 up to {WIDEST_HEAD}"
    return None


def _flash_module(device: torch.device) -> str | None:
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for name in ("flash_attn_interface", "flash_attn") if hopper else ("flash_attn",):
        if importlib.util.find_spec(name) is not None:
            return name
    return None
