"""Named tensors that lie together: one block of memory on the host, one on the device, and one copy between them."""

from __future__ import annotations

import math
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
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=self._on_gpu, device="cpu")
        self._device = self._host if device.type == "cpu" else torch.zeros(end, dtype=torch.uint8, device=device)

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
