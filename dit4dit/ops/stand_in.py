"""Tensors without data as those of a GPU that need not be here: what our implementations ask of a device, and their launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from dit4dit.ops.aot.launch_record import Launch


@dataclass(frozen=True)
class StandIn:
    """The GPU that tensors on the meta device stand for.

    Attributes:
        architecture: "90" for compute capability 9.0.
        multiprocessors, shared_memory: how many there are, and bytes of shared memory that one block may have.
        clusters: how many clusters of 2, 4 and 8 blocks can be resident at once, a block an SM (measured on an H100); they count
            from architecture 90 on.
        record: is given the kernels of ours in the place of their launches.
    """

    architecture: str = "90"
    multiprocessors: int = 132
    shared_memory: int = 227 << 10
    clusters: tuple[int, ...] = (66, 30, 15)
    record: Callable[[Sequence[Launch]], None] | None = None

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = divmod(int(self.architecture), 10)
        return major, minor


_current: ContextVar[StandIn | None] = ContextVar("dit4dit_stand_in", default=None)


@contextlib.contextmanager
def without_data(gpu: StandIn | None = None) -> Iterator[None]:
    """Inside, tensors on the meta device stand for a GPU's, and our implementations give what they would have written."""
    token = _current.set(gpu or StandIn())
    try:
        yield
    finally:
        _current.reset(token)


def of(device: torch.device) -> StandIn | None:
    """The GPU that tensors on this device stand for, if any."""
    return _current.get() if device.type == "meta" else None


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device are a GPU's, or stand for one's (`without_data`)."""
    return device.type == "cuda" or of(device) is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, or of the one that tensors on this device stand for."""
    stands = of(device)
    return torch.cuda.get_device_capability(device) if stands is None else stands.capability


def recorded(device: torch.device, steps: Sequence[Launch]) -> bool:
    """Whether tensors on this device only stand for a GPU's, in which case the launches are recorded and must not run."""
    stands = of(device)
    if stands is not None and stands.record is not None:
        stands.record(steps)
    return stands is not None
