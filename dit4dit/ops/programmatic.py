"""Programmatic dependent launch: on Hopper and later our kernels may be started while the one before them still runs.

    with programmatic.launches(True):
        function()

Inside, every kernel of ours is launched with the attribute "programmatic stream serialization" where the GPU has it (compute
capability 9.0 on). The GPU then starts it as soon as each block of the kernel before it in the stream has said so, which ours do
first, or has ended, so that its launch is hidden. Off by default; `dit4dit tune` measures whether a step is faster with it.

Why results stay the same:

- Such a kernel begins with `wait_for_inputs` (kernels/common.py, kernels/target.cuh): it touches no memory before all that it
  depends on has ended, and what that wrote is seen. Tests hold every kernel's code to that. Code for older GPUs has no such
  instruction, and is never launched with the attribute, whichever GPU runs it (`cuda_kernels`).
- It ends after its own wait, thus after the kernel before it has ended, and by the same argument after all before that one.
  Whatever comes after it and depends on it in any way, a library's kernel, a copy, an event, depends on all of them, as without.
- Memory that the allocator gives out again, in a stream or inside a graph, was last read by a kernel earlier in the stream, which
  has ended before the new owner writes. A block that waits holds registers and shared memory, never data.
- Nothing waits for ever: a kernel is started only when every block of the one before it has begun or ended, so that a waiting
  block takes the place of none that it waits for.
- Kernels of libraries are launched as they launch them, and the one-launch action head without the attribute: they start when
  the kernel before them has ended.

In a CUDA graph the dependency becomes an edge of the programmatic type, which CUDA documents between kernels alone. What it makes
of the attribute behind a copy or a memset, or in a stream that has just waited for another one's event, it does not say. Results
do not hang on that: the wait is for all that the kernel depends on. A capture may fail, which `dit4dit tune` finds out and leaves
the step without. Where a step runs on two streams, the first kernel of one that has waited for the other, at the fork and at the
join, is launched `plainly`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

from dit4dit.ops import native

ProgrammaticLaunch = Literal["cached", "on", "off"]
CHOICES = ("cached", "on", "off")
"""Of an engine: "cached" is where a verdict says so."""
LEAST_CAPABILITY = 90
"""Compute capability, without its dot."""

log = logging.getLogger("dit4dit.ops")
_on: ContextVar[bool] = ContextVar("dit4dit_programmatic_launch", default=False)


@contextmanager
def launches(on: bool) -> Iterator[None]:
    """Inside, kernels are launched with the attribute, or without it. Only launches of the same thread are meant."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def plainly() -> AbstractContextManager[None]:
    """`launches(False)`, for the first kernel of a stream that has just waited for another one."""
    return launches(False)


def around(on: bool, function: Callable[[], None]) -> Callable[[], None]:
    """`function` inside of `launches(on)`."""

    def run() -> None:
        with launches(on):
            function()

    return run


def triton_kernels(architecture: str) -> bool:
    """Whether a Triton kernel is now to be launched with the attribute; its code is for `architecture`, such as "90"."""
    return _on.get() and architecture.isdecimal() and int(architecture) >= LEAST_CAPABILITY


def cuda_kernels(device: torch.device) -> bool:
    """Whether a CUDA kernel of this build is now to be launched with the attribute on a GPU."""
    return _on.get() and _code_waits(torch.cuda.get_device_capability(device))


@functools.cache
def _code_waits(capability: tuple[int, int]) -> bool:
    """Whether the code of this build that serves such a GPU was compiled for one that has the instruction.

    A GPU of 11.0 may be served by PTX for 8.0, which waits for nothing.
    """
    name = native.serving(tuple(native.compiled().cuda_architectures), capability)
    return name is not None and int(name.partition("_")[2].rstrip("af")) >= LEAST_CAPABILITY


@functools.cache
def driver_can() -> bool:
    """Whether this machine's driver has such launches; a driver before CUDA 11.8 has not, and that is said once."""
    can = native.driver().programmatic
    if not can:
        log.warning(
            "programmatic launches: this CUDA driver has no cuLaunchKernelEx: kernels are launched without; update it"
        )
    return can
