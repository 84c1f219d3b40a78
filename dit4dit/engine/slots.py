"""Where the packs of the requests in flight stand: fixed memory that every plan of an engine reads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from dit4dit.engine.packs import PromptPack


class Slots:
    """One pack for each request of a pass; plans never run side by side, so that they share them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """shape: [slots, blocks, heads, L, head_dim] of keys and of values."""
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._all = PromptPack(keys, values)
        # the cache decides how long packs live, not the slot that one was copied to
        self._filled: list[weakref.ref[PromptPack] | None] = [None] * shape[0]

    def of(self, batch: int) -> PromptPack:
        """The first `batch` slots as the pack of a batch."""
        return PromptPack(self._all.keys[:batch], self._all.values[:batch])

    def fill(self, packs: Sequence[PromptPack]) -> None:
        """Copy those packs that are not where they belong, in the order of the current stream."""
        for i, pack in enumerate(packs):
            filled = self._filled[i]
            if filled is not None and filled() is pack:
                continue
            self._filled[i] = None  # until it is there
            for slot, new in ((self._all.keys, pack.keys), (self._all.values, pack.values)):
                if new.device.type == "cuda":
                    stream = torch.cuda.current_stream(new.device)
                    if pack.ready is not None:
                        stream.wait_event(pack.ready)
                    new.record_stream(stream)
                slot[i].copy_(new)
            self._filled[i] = weakref.ref(pack)
