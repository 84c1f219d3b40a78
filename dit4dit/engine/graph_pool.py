"""The memory of CUDA graphs, which those of an engine share: plans never run side by side, so one takes what another has left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class GraphPool:
    """One pool of PyTorch's allocator. Nothing of it is given back before the last graph in it is gone.

    Attributes:
        handle: what a capture takes.
        bytes: its memory when last looked at.
    """

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        self.bytes = 0
        self._used = False
        self._largest = 0
        self._owners: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    @property
    def over(self) -> bool:
        """Whether all that was captured in it is gone: PyTorch has given its memory back and takes its handle no more."""
        return self._used and not self._owners

    @contextmanager
    def growing(self, owner: object) -> Iterator[None]:
        """Something is captured inside, for `owner`."""
        before = self.bytes
        yield
        self._used = True
        self.bytes = _size(self.handle)
        grown = self._owners.get(owner, 0) + max(0, self.bytes - before)
        self._owners[owner] = grown
        self._largest = max(self._largest, grown)

    @property
    def share(self) -> int:
        """Bytes that each owner alive has to answer for: one part each of what the largest of them would not need alone.

        One pass needs as much in any case. The rest are holes: a capture could not use what smaller ones before it had left.
        """
        return max(0, self.bytes - self._largest) // max(1, len(self._owners))


def _size(handle: Any) -> int:
    if torch.cuda.get_allocator_backend() != "native":
        return 0  # cudaMallocAsync keeps no such list
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(handle))
