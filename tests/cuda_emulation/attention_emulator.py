"""Builds kernels/self_attention.cuh for a CPU and runs it: `AttentionEmulator(variant, folder)(*arguments of the op)`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from emulator import ROOT, _ctype, build, fields
from torch import Tensor

DIM = 128
NAN = 0xFFFF  # of bfloat16


class RequestRecord(ctypes.Structure):
    """`Request` of kernels/self_attention.cuh."""

    _fields_ = [_ctype(*field) for field in fields("Request", "self_attention.cuh")]


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
        """The op's result. RuntimeError: threads that wait for each other, or an instruction misused.

        The result begins as NaN, and NaN lies around it, around qkv and behind the tables.
        """
        batch, length = qkv.shape[:2]
        given = _padded(qkv)
        out = torch.full((batch, length + 2, heads * DIM + 16), NAN, dtype=torch.uint16).view(torch.bfloat16)
        inner = out[:, 1:-1, 8:-8]
        table = None if rotary is None else torch.cat([rotary.flatten(), torch.full((2**14,), float("nan"))])
        tensors = {"qkv": given, "norm_q": norm_q, "norm_k": norm_k, "rotary": table, "out": inner}
        record = RequestRecord(
            qkv_batch=given.stride(0),
            qkv_row=given.stride(1),
            out_batch=inner.stride(0),
            out_row=inner.stride(1),
            heads=heads,
            length=length,
            norm_is_float32=norm_q is not None and norm_q.dtype == torch.float32,
            eps=eps,
        )
        for name, tensor in tensors.items():
            setattr(record, name, None if tensor is None else tensor.data_ptr())
        message = ctypes.create_string_buffer(400)
        failed = self.library.emulate_self_attention(ctypes.byref(record), batch, queries, seed, message, len(message))
        if failed:
            raise RuntimeError(message.value.decode())
        around = torch.ones(out.shape, dtype=torch.bool)
        around[:, 1:-1, 8:-8] = False
        assert bool((out.view(torch.uint16)[around] == NAN).all()), "written outside of the result"
        return inner.contiguous()


def _padded(x: Tensor) -> Tensor:
    """x [B, S, E] as a part of a larger tensor that is NaN elsewhere; rows stay at multiples of 16 bytes."""
    batch, length, columns = x.shape
    larger = torch.full((batch, length + 130, columns + 8), float("nan"), dtype=x.dtype)
    larger[:, :length, :columns] = x
    return larger[:, :length, :columns]
