"""CUDA graphs without a GPU, as far as recording a plan goes: what PyTorch does when a capture begins, ends and fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

HIDDEN = "operation failed due to a previous error during capture"


class FakeStream:
    """A stream on the CPU: everything on it has run already.

    One that waits for a capture is part of it until it is waited for.
    """

    device, device_index = torch.device("cpu"), 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def wait_stream(self, other: Any) -> None:
        cuda = self.cuda
        if cuda.capturing is None:
            return
        if cuda.invalid:
            raise torch.AcceleratorError(HIDDEN)
        if other is cuda.stream or other in cuda.forked:
            cuda.log.append("fork" if self is not cuda.stream else "join")
            cuda.forked = cuda.forked - {other} if self is cuda.stream else cuda.forked | {self}

    def synchronize(self) -> None:
        assert self.cuda.capturing is None, "a stream that is being captured cannot be waited for"
        self.cuda.log.append("synchronize")


class FakeGraph:
    """`torch.cuda.CUDAGraph`; `capture_end` of PyTorch 2.10 to 2.13: its clean-up is left out where ending fails."""

    cuda: FakeCuda

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        assert self.cuda.current is self.cuda.stream, "captured on another stream"
        self.pool = pool or (1, 0)
        self.cuda.capturing, self.cuda.allocating = self, self.cuda.allocating | {self.pool}
        self.cuda.generator_captured = True
        self.cuda.log.append("begin")

    def capture_end(self) -> None:
        cuda = self.cuda
        was, cuda.capturing = cuda.capturing, None
        invalid, cuda.invalid = cuda.invalid, False
        forked, cuda.forked = cuda.forked, frozenset()
        if forked:
            raise torch.AcceleratorError("capture has unjoined work")
        if was is not self or invalid:
            raise torch.AcceleratorError(HIDDEN)
        cuda.allocating -= {self.pool}
        cuda.generator_captured = False
        cuda.log.append("end")

    def replay(self) -> None:
        if self.cuda.broken:
            raise torch.AcceleratorError("unspecified launch failure")
        self.cuda.log.append("replay")

    def reset(self) -> None:
        self.cuda.log.append("reset")


class FakeCuda:
    """Stands for `torch.cuda` once `install` has run. `stream` is a plan's, `branch` another one.

    Attributes:
        capturing: the graph that is being captured. forked: streams that are in it beside the plan's.
        invalid: whether an operation has made this capture invalid.
        allocating: pools that the allocator believes to be captured into. released: those given back.
        segments: sizes of what each pool has.
        generator_captured: whether the random generator believes to be captured. broken: whether replays fail.
        current: the current stream; None is the default one. log: what has happened.
    """

    def __init__(self) -> None:
        self.stream, self.branch = FakeStream(self), FakeStream(self)
        self.current: FakeStream | None = None
        self.capturing: FakeGraph | None = None
        self.forked: frozenset[FakeStream] = frozenset()
        self.allocating: set[Any] = set()
        self.released: list[Any] = []
        self.invalid = self.generator_captured = self.broken = False
        self.log: list[str] = []
        self.segments: dict[Any, list[int]] = {}
        self._pools = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self
        graph = type("CUDAGraph", (FakeGraph,), {"cuda": cuda})

        @contextlib.contextmanager
        def stream(new: FakeStream) -> Iterator[None]:
            before, cuda.current = cuda.current, new
            try:
                yield
            finally:
                cuda.current = before

        def handle() -> tuple[int, int]:
            cuda._pools += 1
            return (0, cuda._pools)

        def end(device: int, pool: Any) -> None:
            if pool not in cuda.allocating:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            cuda.allocating -= {pool}

        patches: dict[str, Callable[..., Any]] = {
            "CUDAGraph": graph,
            "stream": stream,
            "graph_pool_handle": handle,
            "current_stream": lambda device=None: cuda.current,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_allocator_backend": lambda: "native",
            "memory_snapshot": lambda pool: [{"total_size": size} for size in cuda.segments.get(pool, [])],
            "is_current_stream_capturing": lambda: cuda.capturing is not None,
        }
        for name, patch in patches.items():
            monkeypatch.setattr(torch.cuda, name, patch)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        release = lambda device, pool: cuda.released.append(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
