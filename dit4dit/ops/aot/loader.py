"""Launching what was compiled ahead of time, through the driver alone: no compiler, no Triton, nothing written anywhere."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from torch import Tensor

from dit4dit.ops import native
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.aot.manifest import Compiled, Manifest, installed
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.programmatic import driver_can

if TYPE_CHECKING:
    from dit4dit import _C

VARIABLE = "DIT4DIT_CUBINS"
"""Environment: "off" leaves everything to Triton's just-in-time compiler."""

_loaded: dict[
    tuple[int, str], _C.Kernel
] = {}  # (device, key); a kernel stays where it is for as long as the process lives
_lock = threading.Lock()


def usable(architecture: str) -> Manifest | str:
    """The manifest that serves a chip such as "90", or why kernels are compiled just in time on it."""
    if os.environ.get(VARIABLE, "").lower() in ("off", "0"):
        return f"{VARIABLE}={os.environ[VARIABLE]}"
    manifest = installed()
    if isinstance(manifest, str):
        return manifest
    chip = f"sm_{architecture}"
    if chip not in manifest.kernels:
        return f"kernels are compiled ahead of time for {', '.join(manifest.kernels)}, not for {chip}"
    return manifest


def explain(architecture: str) -> str:
    """Where kernels come from on a chip such as "90", in words."""
    manifest = usable(architecture)
    if isinstance(manifest, str):
        return f"just in time: {manifest}"
    reason = _too_old(manifest, architecture)
    if reason is not None:
        return f"just in time: {reason}"
    count = len(manifest.kernels[f"sm_{architecture}"])
    return f"{count} ahead of time for sm_{architecture} (Triton {manifest.triton}), other sizes just in time"


def late(architecture: str) -> str | None:
    """Why this machine's driver cannot load what was compiled for a chip, or None; it asks the driver."""
    manifest = usable(architecture)
    return manifest if isinstance(manifest, str) else _too_old(manifest, architecture)


def find(step: Launch, architecture: str) -> Compiled | str:
    """The cubin of a launch on a chip such as "90", or why there is none."""
    manifest = usable(architecture)
    if isinstance(manifest, str):
        return manifest
    key = Specialization.of(step).key
    found = manifest.kernels[f"sm_{architecture}"].get(key)
    return found or f"no kernel was compiled ahead of time for {key}"


def start(step: Launch, device: int, stream: int, architecture: str, programmatic: bool = False) -> str | None:
    """Enqueue a launch on a stream of a device; None when that is done, else why there is no kernel for it.

    The first launch of a kernel on a device loads it, which a stream that is being captured does not allow. programmatic: as
    in `ops.programmatic`, where the driver can; the cubin is the same.

    Raises:
        ValueError, TypeError: an argument that the kernel cannot take. CudaError: the driver refuses.
        DeviceError: the device has failed, and the process must restart.
    """
    found = find(step, architecture)
    if isinstance(found, str):
        return found
    kernel = _loaded.get((device, found.key))
    if kernel is None:
        manifest = installed()
        assert isinstance(manifest, Manifest)
        reason = _too_old(manifest, architecture)
        if reason is not None:
            return reason
        kernel = _load(manifest, found, device)
    values = [_value(step, name, device) for name, _ in found.arguments]
    kernel.launch(step.grid, stream, values, programmatic and driver_can())
    return None


def _value(step: Launch, name: str, device: int) -> int | float:
    value = step.arguments[name]
    assert value is not None
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cuda" or value.device.index != device:
        raise ValueError(f"{step.kernel}: {name}: expected device cuda:{device}, got {value.device}")
    return value.data_ptr()


def _load(manifest: Manifest, found: Compiled, device: int) -> _C.Kernel:
    with _lock:
        if (device, found.key) not in _loaded:
            _loaded[device, found.key] = native.driver().load(
                manifest.image(found), found.entry, device, found.threads, found.shared, found.arguments, found.scratch
            )
        return _loaded[device, found.key]


def _too_old(manifest: Manifest, architecture: str) -> str | None:
    """Why the driver cannot load a chip's cubins, or None. Within a major version of CUDA every driver takes them."""
    need, have = manifest.ptxas[f"sm_{architecture}"], native.driver().version
    if have // 1000 >= int(need.partition(".")[0]):
        return None
    return f"kernels were compiled ahead of time with CUDA {need}, the driver is for {have // 1000}.{have % 1000 // 10}"
