"""Named tensors that lie together: one block of memory on the host, one on the device, and one copy between them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""name -> shape and dtype."""
_ALIGNMENT = 256  # bytes; what CUDA gives its own allocations


class Staging:
    """Fixed tensors with a side on the host (page-locked for a GPU) and one on the device; on a CPU both are the same.

    Attributes:
        bytes: what both sides take.
        host: name -> array to write a request into, or to read a result from.
        device: name -> the same tensor for kernels.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        offsets, end = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = end
            end += math.prod(shape) * dtype.itemsize
            end += -end % _ALIGNMENT
        if device.type == "cpu":
            self._host = self._device = _mapped(end)
        else:
            self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=self._on_gpu, device="cpu")
            self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        # PyTorch's allocator of page-locked memory gives powers of two
        self.bytes = end + (1 << (end - 1).bit_length()) if self._on_gpu else end

        def views(block: Tensor) -> dict[str, Tensor]:
            return {
                name: block[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for name, (shape, dtype) in fields.items()
            }

        self._pinned = views(self._host)
        self.host: dict[str, NDArray[np.generic]] = {name: view.numpy() for name, view in self._pinned.items()}
        self.device: dict[str, Tensor] = views(self._device)

    def upload(self) -> None:
        """Host to device, in the order of the current stream; the host side must not change before it has run."""
        if self._on_gpu:
            self._device.copy_(self._host, non_blocking=True)

    def upload_rows(self, rows: Sequence[int]) -> None:
        """The same for some rows of every tensor; the device keeps its others."""
        if self._on_gpu:
            for name, tensor in self.device.items():
                for row in rows:
                    tensor[row].copy_(self._pinned[name][row], non_blocking=True)

    def download(self) -> None:
        """Device to host, likewise; the host side is there when the stream has come so far."""
        if self._on_gpu:
            self._host.copy_(self._device, non_blocking=True)


def _mapped(size: int) -> Tensor:
    """Zeros in pages of their own, which go back to the system with the tensor.

    The C library may keep what is freed (`host_memory`), and finds little use for holes of many sizes.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    # private: a process that is forked has buffers of its own
    pages = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size)
