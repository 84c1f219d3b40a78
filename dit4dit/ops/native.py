"""The door to the compiled module `dit4dit._C`: how a tensor is described to it, and what it can do here."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit4dit.errors import DeviceError
from dit4dit.ops import stand_in

if TYPE_CHECKING:
    from dit4dit import _C

View = tuple[int, tuple[int, ...], tuple[int, ...], str, str]


@functools.cache
def compiled() -> ModuleType:
    """`dit4dit._C`, loaded at the first call: a source tree that was never built imports everything and runs the references.

    ImportError: this copy of dit4dit has none; it says what to do.
    """
    from dit4dit import _C

    return _C


def view(tensor: Tensor) -> View:
    """(address, shape, strides in elements, dtype, device), as every launcher takes a tensor.

    The tensor must stay alive until the launcher has returned (CPU) or its stream has passed it (CUDA).
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, str(tensor.device)


def stream(device: torch.device) -> int:
    """torch's current CUDA stream on `device`, as an address."""
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def driver() -> _C.Driver:
    """The CUDA driver of this machine. RuntimeError: there is none."""
    found: _C.Driver = compiled().Driver()
    return found


def no_cuda_kernels(device: torch.device) -> str | None:
    """Why this build has no compiled kernel for the GPU `device`, or None; None where tensors only stand for a GPU's."""
    if stand_in.of(device) is not None:
        return None
    built = tuple(compiled().cuda_architectures)
    if not built:
        return "this build of dit4dit has no CUDA kernels (reinstall where nvcc is, or use a wheel that has them)"
    capability = torch.cuda.get_device_capability(device)
    return unsupported(built, capability) or _old_driver(str(serving(built, capability)))


def _old_driver(name: str) -> str | None:
    """Why the driver is too old for this build's code for `name`, or None.

    Within a major version of CUDA every driver runs the runtime and machine code of the others; PTX wants its own or later.
    """
    major, minor = map(int, str(compiled().build_info()["cuda"]).split(".")[:2])
    have = divmod(driver().version, 1000)
    if have >= (major, 10 * minor if name.startswith("compute_") else 0):
        return None
    build = f"this build is for CUDA {major}.{minor}, the driver for {have[0]}.{have[1] // 10}"
    return f"{build}: update the driver{', or install dit4dit-cu12' if major > 12 else ''}"


def serving(built: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Which of the architectures `built` ("sm_90a", "compute_120") runs on a GPU of `capability`, if any.

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
            return name
    return None


def unsupported(built: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Why code for the architectures `built` cannot run on a GPU of `capability`, or None."""
    if serving(built, capability) is not None:
        return None
    return f"no kernel for sm_{capability[0]}{capability[1]} in this build, which has {', '.join(built)}"


def check_device(device: torch.device, error: Exception) -> None:
    """DeviceError where the device answers no more, after a call on it has raised `error`."""
    try:
        torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        raise DeviceError(
            f"{device}: {str(error).splitlines()[0]}; nothing on this device works in this process any more, which must "
            "restart. CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds the kernel that caused it"
        ) from error
