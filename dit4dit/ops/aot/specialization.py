"""What Triton compiles a kernel for: the types of its arguments, what is known of their values, constants and tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit4dit.ops.aot.launch_record import Launch

POINTERS = {  # Triton's names
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float64: "fp64",
    torch.int64: "i64",
}
ALIGNED = ":16"
"""Behind a type: the kernel relies on the address or number being a multiple of 16."""


@dataclass(frozen=True)
class Specialization:
    """One kernel as it is compiled.

    Attributes:
        kernel: as `Launch.kernel`.
        arguments: name -> kind of what is passed at run time: "*bf16:16", "*fp32", "i32:16", "i32", "i64", "fp32".
        constants: name -> value of what is compiled in: constants, block sizes, None where an argument is absent, and whole
            numbers that are 1.
        options: num_warps and num_stages.
    """

    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    @classmethod
    def of(cls, step: Launch) -> Specialization:
        """The specialisation that Triton would compile for this launch. TypeError: an argument of another type."""
        arguments: dict[str, str] = {}
        constants: dict[str, Any] = {**step.constants}
        for name, value in step.arguments.items():
            if value is None or (type(value) is int and value == 1):
                constants[name] = value
            else:
                arguments[name] = _kind(step.kernel, name, value)
        constants |= {name: value for name, value in step.tile.items() if name.isupper()}
        return cls(step.kernel, arguments, constants, {k: v for k, v in step.tile.items() if not k.isupper()})

    @property
    def key(self) -> str:
        """The same for, and only for, launches that one cubin serves."""
        parts = (self.arguments, self.constants, self.options)
        return " | ".join([self.kernel, *(" ".join(f"{name}={part[name]}" for name in sorted(part)) for part in parts)])


def _kind(kernel: str, name: str, value: object) -> str:
    if isinstance(value, Tensor):
        if value.dtype not in POINTERS:
            raise TypeError(f"{kernel}: {name}: expected one of {', '.join(map(str, POINTERS))}, got {value.dtype}")
        # a tensor without data (meta) stands for one as torch allocates it
        address = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
        return f"*{POINTERS[value.dtype]}{'' if address % 16 else ALIGNED}"
    if type(value) is int:
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        return wide if value % 16 else wide + ALIGNED
    if type(value) is float:
        return "fp32"
    raise TypeError(f"{kernel}: {name}: expected a tensor, int, float or None, got {type(value).__name__}")
