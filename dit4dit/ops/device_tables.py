"""Small tensors that an op makes once for its sizes and leaves on the device.

The cache of them is bounded, as sizes come from requests. A CUDA graph reads them by address for as long as it is replayed, so
whoever captures one collects what it has read and keeps that beside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])

KEPT = 64
"""Sizes of each kind of table that are kept."""


class Sized(Protocol):
    """Tensors, or what holds some."""

    @property
    def nbytes(self) -> int:
        """What they take on the device."""


_read: ContextVar[list[Sized] | None] = ContextVar("dit4dit_tables_read", default=None)


class DeviceTable(Generic[Arguments, Tensors]):
    """Decorator of a function of sizes and a device (hashable) that makes tensors there; those last asked for are kept."""

    def __init__(self, make: Callable[Arguments, Tensors], kept: int = KEPT) -> None:
        self._kept: Any = lru_cache(maxsize=kept)(make)
        update_wrapper(self, make)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensors:
        tensors: Tensors = self._kept(*args, **kwargs)
        # torch.compile, which makes constants of them, cannot look into a ContextVar
        if not torch.compiler.is_compiling():
            for tensor in tensors:
                note(tensor)
        return tensors


def note(read: Sized) -> None:
    """Whoever collects keeps this too: memory that kernels read by address and that may be left by all others."""
    if (collecting := _read.get()) is not None:
        collecting.append(read)


@contextmanager
def collected() -> Iterator[list[Sized]]:
    """The list of all tables that are read inside, by this thread. Whoever holds it keeps them alive."""
    read: list[Sized] = []
    token = _read.set(read)
    try:
        yield read
    finally:
        _read.reset(token)
