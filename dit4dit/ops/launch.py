"""The door to the Triton kernels: what they take, and one launch as data, so that it can also be compiled without a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments. Tensors may be on the meta device where it is only compiled.

    `arguments` are passed at run time (None: absent), `constants` and the tile's block sizes are compiled in.
    """

    kernel: str  # "adaln" or "file.function", in dit4dit/kernels
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    tile: Mapping[str, int]  # block sizes in capitals, num_warps, num_stages

    def function(self) -> Any:
        file, _, name = self.kernel.partition(".")
        return getattr(_module(file), name or file)

    def __call__(self) -> None:
        self.function()[self.grid](**self.arguments, **self.constants, **self.tile)


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"dit4dit.kernels.{name}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, by its interpreter. Decided when they are imported, so set it before."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def architecture(device: torch.device) -> str:
    """Name of the tile table's column: "90" for compute capability 9.0, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
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
    if first.device.type not in ("cpu", "cuda"):
        return f"{name} is on {first.device.type}"
    if not _has_triton():
        return "triton is not installed"
    if first.device.type == "cuda":
        if torch.cuda.get_device_capability(first.device) < (8, 0):
            return "it needs compute capability 8.0 or later"
        if products and first.dtype == torch.float32:
            return "float32 products run without tensor cores, where the library's are faster"
    for name, tensor in given.items():
        if tensor.dtype not in dtypes:
            return f"{name} is {tensor.dtype}"
        if name in strided:
            if tensor.stride(-1) != 1:
                return f"{name}: its last dimension has stride {tensor.stride(-1)}, not 1"
        elif not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.numel() >= 2**31:
            return f"{name} has {tensor.numel()} elements, its offsets have 31 bits"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient"
    return None


def runner(launches: Callable[[Any, str], tuple[list[Launch], Any]]) -> Callable[..., Any]:
    """The `run` of an op's Triton implementation; its first argument is a tensor on the device that is meant."""

    def run(*args: Any) -> Any:
        device = args[0].device
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here:
            todo, results = launches(args, architecture(device))
            for step in todo:
                step()
        return results

    return run


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)
