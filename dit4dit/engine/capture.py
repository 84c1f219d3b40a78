"""Capturing a CUDA graph. Where it fails, what failed is what is raised, and the process can go on without graphs.

`torch.cuda.graph` ends the capture first and raises what that raises: "operation failed due to a previous error during
capture", whatever the error was. It also leaves PyTorch's allocator and random generator in the middle of a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from dit4dit.errors import BackendError
from dit4dit.ops import native

_given_up: list[torch.cuda.CUDAGraph] = []
"""Captures that CUDA invalidated. PyTorch's allocator of pinned memory keeps a pointer to each, so none may be freed."""


def capture(what: str, function: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    """The kernels of `function`, which must have run on `stream` before, as a graph on the GPU.

    The graph is replayed once, on whatever its buffers hold: the first replay uploads it, which would cost the first request.

    Args:
        what: names the graph in an error.
        stream: where to capture; not the default one. pool: from `torch.cuda.graph_pool_handle`.

    Raises:
        BackendError: the capture or the first replay failed; its cause is the error that came first. Nothing is being
            captured any more, and other work on the device goes on; take a new pool for the next capture.
        DeviceError: nothing works on the device any more.
    """
    torch.cuda.synchronize(stream.device)
    torch.cuda.empty_cache()  # what the runs before have left, for the graph's own pool
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        try:
            # other threads may allocate meanwhile, which the default mode would not let them
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            function()
            graph.capture_end()
            graph.replay()
            stream.synchronize()
        except BaseException as error:
            _give_up(graph, stream, pool)
            if not isinstance(error, Exception):
                raise
            native.check_device(stream.device, error)
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise BackendError(
                f"engine: {what} cannot be captured as a CUDA graph: {type(error).__name__}: {reason}; load with "
                "engine='off', which captures none"
            ) from error
    return graph


def _give_up(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Leave nothing of a failed capture behind: on the stream, in the allocator, in the random generator."""
    _given_up.append(graph)
    # the error that came first is the one to report; the allocator's two functions are PyTorch's own
    suppressed = contextlib.suppress(RuntimeError, AttributeError)
    with suppressed:
        graph.capture_end()
    with suppressed:  # an error where `capture_end` came as far as this itself
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with suppressed:
        graph.reset()
    with suppressed:
        # up to PyTorch 2.12 a generator that was in the capture refuses to draw ("Offset increment outside graph capture")
        # until another capture has ended well
        zero, healthy = torch.zeros(1, device=stream.device), torch.cuda.CUDAGraph()
        stream.synchronize()
        healthy.capture_begin(capture_error_mode="thread_local")
        zero.zero_()
        healthy.capture_end()
        healthy.reset()
