"""Memory of outputs that shows what was written where: each new tensor lies between two guard bands, and is full of poison.

    with Guarded(poison=0xFF) as memory:
        result = implementation(*args)
    memory.check()

What is allocated inside, by any of torch's functions that return memory without data, has NaN in every element (poison 0xFF), so
that an element that is never written disagrees with everything; memory with data (zeros) has the bands alone. What a library
allocates within one of torch's own operators is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 16 << 10
"""Bytes of a band; a multiple of the alignment that torch's allocators give, so that the tensor keeps it."""
NAN = 0xFF
"""A byte of which every float is NaN, and every signed integer -1."""
_aten = torch.ops.aten
EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.empty_permuted.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
"""Memory without data."""
FILLED = {
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten.ones.default,
    _aten.ones_like.default,
    _aten.new_ones.default,
    _aten.full.default,
    _aten.full_like.default,
    _aten.new_full.default,
}
# the two dtypes whose one NaN is minus zero of the others
_OTHER_NAN = {torch.float8_e4m3fnuz: 0x80, torch.float8_e5m2fnuz: 0x80}


class OutOfBounds(Exception):
    """Something outside of a tensor was written."""


class Guarded(TorchDispatchMode):
    """See above. For one thread; the tensors stay usable afterwards."""

    def __init__(self, poison: int = NAN, band: int = 0xA5) -> None:
        """poison, band: the byte of memory without data, and of the bands."""
        super().__init__()
        self._poison, self._band = poison, band
        self._buffers: list[tuple[Tensor, int, str]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call inside imports the compiler, a second in the time of whoever makes it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in EMPTY and func not in FILLED:
            return out
        if type(out) is not Tensor or out.layout != torch.strided or not out.numel() or out.is_meta or out.is_quantized:
            return out
        return self._between_bands(out, func in FILLED)

    def _between_bands(self, out: Tensor, filled: bool) -> Tensor:
        """A tensor like `out` in memory of ours; it begins its storage, as `out` does."""
        size = out.untyped_storage().nbytes()
        buffer = torch.empty(size + 2 * BAND, dtype=torch.uint8, device=out.device)
        buffer.fill_(self._band)
        storage = buffer.untyped_storage()[BAND : BAND + size]
        guarded = torch.empty(0, dtype=out.dtype, device=out.device).set_(
            storage, out.storage_offset(), out.shape, out.stride()
        )
        if filled:
            guarded.copy_(out)
        else:
            buffer[BAND : BAND + size].fill_(_OTHER_NAN.get(out.dtype, NAN) if self._poison == NAN else self._poison)
        what = f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)}"
        self._buffers.append((buffer, size, what))
        return guarded

    def check(self) -> None:
        """OutOfBounds where a band is not as it was. Lets go of the memory. On a GPU after the work there is done."""
        buffers, self._buffers = self._buffers, []
        for buffer, size, what in buffers:
            before, after = buffer[:BAND] != self._band, buffer[BAND + size :] != self._band
            for band, where in ((before, "before"), (after, "behind")):
                if count := int(band.sum()):
                    raise OutOfBounds(f"{count} bytes {where} a tensor ({what}) were written")
