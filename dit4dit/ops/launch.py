"""The door to the Triton kernels: what they take, and running them, compiled ahead of time or by Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit4dit.ops import programmatic, stand_in
from dit4dit.ops.aot import loader
from dit4dit.ops.aot.launch_record import Launch, Launches

log = logging.getLogger("dit4dit.ops")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, by its interpreter. Decided when they are imported, so set it before."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def architecture(device: torch.device) -> str:
    """Name of the tile table's column: "90" for compute capability 9.0, "interpreter" for the CPU."""
    if not stand_in.on_gpu(device):
        return "interpreter"
    major, minor = stand_in.capability(device)
    return f"{major}{minor}"


def refuse(
    products: bool = False,
    strided: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
    **tensors: Tensor | None,
) -> str | None:
    """Why Triton's kernels cannot take these tensors, or None.

    products: the kernel multiplies matrices. strided: names of tensors of which only the last dimension must be dense.
    dtypes: what the tensors may be.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    name, first = next(iter(given.items()))
    if first.device.type == "cpu" and not interpreting():
        return f"{name} is on cpu, where Triton runs only with TRITON_INTERPRET=1"
    if first.device.type != "cpu" and not stand_in.on_gpu(first.device):
        return f"{name} is on {first.device.type}"
    if first.device.type == "cpu" and not _has_triton():
        return "triton is not installed"
    if stand_in.on_gpu(first.device) and stand_in.capability(first.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    if products and first.dtype == torch.float32 and first.device.type != "cpu":
        return "float32 products run without tensor cores, where the library's are faster"
    for name, tensor in given.items():
        if tensor.dtype not in dtypes:
            return f"{name} is {tensor.dtype}"
        if name in strided:
            if tensor.stride(-1) != 1:
                return f"{name}: its last dimension has stride {tensor.stride(-1)}, not 1"
            # the last element's offset, which in part of a larger buffer is more than there are elements
            if sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31:
                return f"{name}: the buffer that it is part of has more elements than offsets of 31 bits reach"
        elif not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.numel() >= 2**31:
            return f"{name} has {tensor.numel()} elements, its offsets have 31 bits"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient"
    return None


def runner(launches: Launches) -> Callable[..., Any]:
    """The `run` of an op's Triton implementation; its first argument is a tensor on the device that is meant.

    `out`, where given, is passed to `launches` (`Implementation.into`).
    """

    def run(*args: Any, **out: Any) -> Any:
        device = args[0].device
        if (stands := stand_in.of(device)) is not None:
            todo, results = launches(args, stands.architecture, **out)
            stand_in.recorded(device, todo)
            return results
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here:
            chip = architecture(device)
            todo, results = launches(args, chip, **out)
            for step in todo:
                if device.type == "cuda":
                    _start(step, device, chip)
                else:
                    step()
        return results

    run.launches = launches  # type: ignore[attr-defined]
    return run


def launches_of(run: Callable[..., Any]) -> Launches | None:
    """What an implementation's `run` launches, where it is one of `runner`'s."""
    found: Launches | None = getattr(run, "launches", None)
    return found


def refuser(refuse: Callable[..., str | None], launches: Launches) -> Callable[..., str | None]:
    """An op's `refuse`, and where Triton cannot compile, whether every kernel is there without it."""

    def refuse_all(*args: Any) -> str | None:
        reason = refuse(*args)
        device = args[0].device
        if reason is not None or device.type != "cuda" or (missing := no_compiler()) is None:
            return reason
        chip = architecture(device)
        late = loader.late(chip)
        if late is not None:
            return f"{late}, and Triton cannot compile: {missing}"
        for step in launches(args, chip)[0]:
            found = loader.find(step, chip)
            if isinstance(found, str):
                return f"{found}, and Triton cannot compile it: {missing}"
        return None

    return refuse_all


def _start(step: Launch, device: torch.device, chip: str) -> None:
    """Launch what was compiled ahead of time, or through Triton, which compiles at the first time."""
    overlapping = programmatic.triton_kernels(chip)
    reason = loader.start(step, device.index, torch.cuda.current_stream(device).cuda_stream, chip, overlapping)
    if reason is None:
        return
    if step.kernel not in _said:
        _said.add(step.kernel)
        # where nothing was compiled ahead of time at all, `explain` and the doctor say so
        level = logging.DEBUG if isinstance(loader.usable(chip), str) else logging.WARNING
        log.log(level, "%s: compiled just in time: %s", step.kernel, reason)
    # told to compile for another GPU, Triton may leave the wait out
    step(programmatic=overlapping and "TRITON_OVERRIDE_ARCH" not in os.environ)


_said: set[str] = set()  # kernels that were compiled just in time


def no_compiler() -> str | None:
    """Why Triton cannot compile here, or None. It builds a launcher of its own, in C."""
    if not _has_triton():
        return "triton is not installed"
    if os.environ.get("CC") or any(map(shutil.which, ("clang", "gcc", "cc"))):
        return None
    return "no C compiler is on PATH"


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)
