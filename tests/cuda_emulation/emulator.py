"""Builds the kernel for a CPU and runs launches of it: `Emulator(variant)(case, schedule)`."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit4dit.engine.action_ode import Schedule
from dit4dit.engine.action_ode.schedule import COUNTER_STRIDE, Space
from dit4dit.engine.action_ode.weights import PackedHead
from dit4dit.model.flow import GuidanceTensors

ROOT = Path(__file__).parents[2]
# name -> what stands for the chip: sm_80, sm_100 and sm_120, sm_90a
VARIANTS = {"copies": (0, 0), "bulk": (1, 0), "warpgroups": (1, 1)}
CTYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "std::int64_t": ctypes.c_int64}


def needs_compiler(test: Any) -> Any:
    """Marks a test that runs CUDA sources on the CPU: `kernels`, and skipped without g++."""
    without = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernel for the CPU with")
    return pytest.mark.kernels(without(test))


def fields(struct: str, header: str = "action_ode_tiles.cuh") -> list[tuple[str, str]]:
    """(type, name) of a struct of the kernel, in order; arrays and pointers keep their mark in the name and the type."""
    text = re.sub(r"//.*", "", (ROOT / "kernels" / header).read_text())
    body = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)
    assert body is not None, struct
    found = []
    for line in filter(None, (part.strip() for part in body[1].split(";"))):
        kind, names = re.fullmatch(r"((?:const )?[\w:]+\*?) (.*)", line, re.DOTALL).groups()
        found += [(kind, name.strip()) for name in names.split(",")]
    return found


def _ctype(kind: str, name: str) -> tuple[str, Any]:
    if kind.endswith("*"):
        return name, ctypes.c_void_p
    base, _, size = name.partition("[")
    one = CTYPES[kind]
    return base, one * len(Space) if size else one


def build(name: str, variant: str, folder: Path, kernels: Path = ROOT / "kernels") -> ctypes.CDLL:
    """NAME.cpp of this folder with the kernels of `kernels`, for one of VARIANTS; the library goes into `folder`."""
    bulk, warpgroups = VARIANTS[variant]
    library = folder / f"{name}_{variant}.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-DEMULATE_BULK_COPIES={bulk}", f"-DEMULATE_WARPGROUPS={warpgroups}"]
    command += [f"-I{kernels}", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, str(Path(__file__).with_name(f"{name}.cpp")), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class LaunchRecord(ctypes.Structure):
    """`Launch` of kernels/action_ode_tiles.cuh."""

    _fields_ = [_ctype(*field) for field in fields("Launch")]


@dataclass
class Result:
    actions: Tensor
    workspace: Tensor
    counters: Tensor
    status: list[int]


class Emulator:
    def __init__(self, variant: str, folder: Path, kernels: Path = ROOT / "kernels") -> None:
        """Compile `kernels` for one of VARIANTS; the library goes into `folder`."""
        self.library = build("action_ode", variant, folder, kernels)
        assert self.library.launch_bytes() == ctypes.sizeof(LaunchRecord)

    def __call__(
        self,
        schedule: Schedule,
        packed: PackedHead,
        noise: Tensor,
        context: Tensor,
        prefix: Tensor | None = None,
        *,
        guidance: GuidanceTensors | None = None,
        seed: int = 0,
        limit_ns: int = 10**15,
        counters: Tensor | None = None,
    ) -> Result:
        """One launch. RuntimeError: threads that wait for each other, or an instruction misused."""
        shape = schedule.shape
        workspace = torch.full((schedule.workspace_bytes + 256,), 0xFF, dtype=torch.uint8)
        workspace = workspace[-workspace.data_ptr() % 256 :][: schedule.workspace_bytes]
        out = torch.full((shape.batch, shape.horizon, shape.actions), float("nan"))
        if counters is None:
            counters = torch.zeros(schedule.counters + 1, COUNTER_STRIDE, dtype=torch.int32)
        status = torch.zeros(4, dtype=torch.int32)
        tensors = {
            "tiles": torch.from_numpy(schedule.tiles),
            "first_tile": torch.from_numpy(schedule.first_tile),
            "segments": torch.from_numpy(schedule.segments),
            "first_segment": torch.from_numpy(schedule.first_segment),
            "weights": packed.bytes(),
            "constants": packed.constants,
            "noise": noise.float().contiguous(),
            "context": context.bfloat16().contiguous(),
            "prefix": None if prefix is None else prefix.float().contiguous(),
            "previous": None if guidance is None else guidance.previous,
            "guidance": None if guidance is None else guidance.weights,
            "out": out,
            "workspace": workspace,
            "counters": counters,
            "status": status,
        }
        numbers = {
            "rows": shape.rows,
            "counter_count": schedule.counters,
            "workers": schedule.device.workers,
            "context_tokens": shape.context,
            "context_columns": context.shape[-1],
            "times": schedule.constants["times"][0],
            "max_guidance": 0.0 if guidance is None else guidance.max_guidance,
            "limit_ns": limit_ns,
        }
        names = ("width", "head_dim", "heads", "horizon", "actions", "padded_actions", "steps", "batch")
        numbers |= {name: getattr(shape, name) for name in names}
        numbers |= {name: getattr(schedule, name) for name in ("padded_tokens", "part", "slots", "staging")}
        record = LaunchRecord()
        for name, tensor in tensors.items():
            setattr(record, name, None if tensor is None else tensor.data_ptr())
        for name, number in numbers.items():
            setattr(record, name, number)
        for space, buffer in zip(Space, schedule.buffers, strict=True):
            record.offset[space], record.columns[space] = buffer.offset, buffer.columns
        given = set(tensors) | set(numbers) | {"offset", "columns"}
        assert given == {name for name, _ in LaunchRecord._fields_}
        message = ctypes.create_string_buffer(400)
        if self.library.emulate_action_ode(ctypes.byref(record), seed, message, len(message)):
            raise RuntimeError(message.value.decode())
        return Result(out, workspace, counters, status.tolist())
