"""Builds kernels/self_attention.cuh for a CPU and runs it: `AttentionEmulator(variant, folder)(*arguments of the op)`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from emulator import ROOT, _ctype, build, fields
from torch import Tensor

from dit4dit.ops.qk_norm_rope import reference as norm_rope

DIM = 128
NAN = 0xFFFF  # of bfloat16


class OperandRecord(ctypes.Structure):
    """`Operand` of kernels/self_attention.cuh."""

    _fields_ = [_ctype(*field) for field in fields("Operand", "self_attention.cuh")]


class RequestRecord(ctypes.Structure):
    """`Request` of kernels/self_attention.cuh."""

    _fields_ = [
        (name, OperandRecord) if kind == "Operand" else _ctype(kind, name)
        for kind, name in fields("Request", "self_attention.cuh")
    ]


class AttentionEmulator:
    def __init__(self, variant: str, folder: Path, kernels: Path = ROOT / "kernels") -> None:
        """Compile `kernels` for one of `emulator.VARIANTS`; the library goes into `folder`."""
        self.library = build("self_attention", variant, folder, kernels)
        assert self.library.request_bytes() == ctypes.sizeof(RequestRecord)

    def __call__(
        self,
        qkv: Tensor,
        norm_q: Tensor | None,
        norm_k: Tensor | None,
        rotary: Tensor | None,
        heads: int,
        eps: float,
        *,
        queries: int = 64,
        seed: int = 0,
    ) -> Tensor:
        """The op's result, q and k normed and turned by qk_norm_rope's reference. RuntimeError: threads that wait for each
        other, or an instruction misused.

        The result begins as NaN, and NaN lies around it and around q, k and v.
        """
        batch, length = qkv.shape[:2]
        out = torch.full((batch, length + 2, heads * DIM + 16), NAN, dtype=torch.uint16).view(torch.bfloat16)
        inner = out[:, 1:-1, 8:-8]
        given = [_padded(x, 8 * (i + 1)) for i, x in enumerate(norm_rope(qkv, norm_q, norm_k, rotary, heads, eps))]
        q, k, v = (OperandRecord(x.data_ptr(), *x.stride()[:3]) for x in given)
        strides = dict(out_batch=inner.stride(0), out_row=inner.stride(1))
        record = RequestRecord(q=q, k=k, v=v, out=inner.data_ptr(), heads=heads, length=length, **strides)
        message = ctypes.create_string_buffer(400)
        failed = self.library.emulate_self_attention(ctypes.byref(record), batch, queries, seed, message, len(message))
        if failed:
            raise RuntimeError(message.value.decode())
        around = torch.ones(out.shape, dtype=torch.bool)
        around[:, 1:-1, 8:-8] = False
        assert bool((out.view(torch.uint16)[around] == NAN).all()), "written outside of the result"
        return inner.contiguous()


def _padded(x: Tensor, columns: int) -> Tensor:
    """x [B, H, S, d] as a part of a larger tensor that is NaN elsewhere, token after token as qk_norm_rope leaves it.

    columns: how many more a row has; a multiple of 8, so that rows begin at multiples of 16 bytes.
    """
    batch, heads, length, dim = x.shape
    larger = torch.full((batch, length + 130, heads * dim + columns), float("nan"), dtype=x.dtype)
    inner = larger[:, :length, : heads * dim].unflatten(2, (heads, dim)).transpose(1, 2)
    return inner.copy_(x)
