"""The door to the compiled module `dit4dit._C`: how a tensor is described to it, and what it can do here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit4dit import _C
from dit4dit.errors import DeviceLostError

View = tuple[int, tuple[int, ...], tuple[int, ...], str, str]


def view(tensor: Tensor) -> View:
    """(address, shape, strides in elements, dtype, device), as every launcher takes a tensor.

    The tensor must stay alive until the launcher has returned (CPU) or its stream has passed it (CUDA).
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, str(tensor.device)


def call(launcher: Callable[..., Any], *args: Any) -> Any:
    """A launcher of `_C`. DeviceLostError: a CUDA error that stays with the process; other errors are the launcher's own."""
    try:
        return launcher(*args)
    except _C.DeviceLost as error:
        raise DeviceLostError.of("CUDA", error) from error


def stream(device: torch.device) -> int:
    """torch's current CUDA stream on `device`, as an address."""
    return torch.cuda.current_stream(device).cuda_stream


def no_cuda_kernels(device: torch.device) -> str | None:
    """Why this build has no compiled kernel for the GPU `device`, or None."""
    built = tuple(_C.cuda_architectures)
    if not built:
        return "this build of dit4dit has no CUDA kernels (reinstall where nvcc is, or use a wheel that has them)"
    return unsupported(built, torch.cuda.get_device_capability(device))


def unsupported(built: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Why code for the architectures `built` ("sm_90a", "compute_120") cannot run on a GPU of `capability`, or None.

    Machine code runs on its own generation at the same or a later minor version (with "a", on that chip only); PTX runs
    on the chip it names and every later one.
    """
    for name in built:
        kind, _, number = name.partition("_")
        chip = int(number.rstrip("af"))
        major, minor = divmod(chip, 10)
        if number.endswith("a"):
            fits = capability == (major, minor)
        elif kind == "sm":
            fits = capability[0] == major and capability[1] >= minor
        else:
            fits = capability >= (major, minor)
        if fits:
            return None
    return f"no kernel for sm_{capability[0]}{capability[1]} in this build, which has {', '.join(built)}"
