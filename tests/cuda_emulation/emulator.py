"""Builds the kernel for a CPU and runs launches of it: `Emulator(variant, folder)(schedule, packed, noise, context, prefix)`."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit4dit.engine.action_ode import Schedule
    from dit4dit.engine.action_ode.twin import Twin
    from dit4dit.engine.action_ode.weights import PackedHead
    from dit4dit.model.flow import GuidanceTensors

ROOT = Path(__file__).parents[2]
# name -> what stands for the GPU, bulk copies and clusters, warpgroup products: sm_80; sm_90 and later; sm_90a
VARIANTS = {"copies": (0, 0), "bulk": (1, 0), "warpgroups": (1, 1)}
CTYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "std::int64_t": ctypes.c_int64}
GUARD = 64  # elements before and after what the kernel may write
SETS = 3
EMPTY = -1


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
    return name, ctypes.c_void_p if kind.endswith("*") else CTYPES[kind]


def compile_for_cpu(source: str, output: Path, *flags: str, kernels: Path = ROOT / "kernels", variant: str) -> None:
    """SOURCE of this folder with the headers of `kernels`, for one of VARIANTS."""
    bulk, warpgroups = VARIANTS[variant]
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    command += [f"-DEMULATE_BULK_COPIES={bulk}", f"-DEMULATE_WARPGROUPS={warpgroups}"]
    command += [f"-I{kernels}", f"-I{Path(__file__).parent}"]
    subprocess.run([*command, str(Path(__file__).with_name(source)), "-o", str(output)], check=True)


def build(name: str, variant: str, folder: Path, kernels: Path = ROOT / "kernels") -> ctypes.CDLL:
    """NAME.cpp as a library, which goes into `folder`."""
    library = folder / f"{name}_{variant}.so"
    quick = () if kernels == ROOT / "kernels" else ("-O1",)  # changed ones run a few times only
    compile_for_cpu(f"{name}.cpp", library, "-shared", "-fPIC", *quick, kernels=kernels, variant=variant)
    return ctypes.CDLL(str(library))


def changed_kernels(folder: Path, part: str, old: str, new: str) -> Path:
    """A copy of the kernels in `folder`, with other text in action_ode_PART.cuh, which must have `old` once.

    Called again, it changes the copy that is there.
    """
    kernels = folder / "kernels"
    if not kernels.exists():
        shutil.copytree(ROOT / "kernels", kernels)
    path = kernels / f"action_ode_{part}.cuh"
    text = path.read_text()
    assert text.count(old) == 1, "the kernel has another text"
    path.write_text(text.replace(old, new))
    return kernels


FORGET = (
    "worker",
    "            if (tile.opcode == kProduct)\n",
    "            sync_computing();\n"
    "            for (int i = thread; i < launch.staging / 4; i += kComputing)\n"
    "                reinterpret_cast<std::uint32_t*>(block.staging)[i] = kEmpty;\n"
    "            sync_computing();\n"
    "            if (tile.opcode == kProduct)\n",
)
"""For `changed_kernels`: fills the staging memory with NaN where a tile begins."""


class LaunchRecord(ctypes.Structure):
    """`Launch` of kernels/action_ode_tiles.cuh."""

    _fields_ = [_ctype(*field) for field in fields("Launch")]


def guarded(count: int, value: int) -> tuple[Tensor, Tensor]:
    """(int32 of `value` with GUARD elements of another one before and after, those in between)."""
    whole = torch.full((count + 2 * GUARD,), 0x5A5A5A5A, dtype=torch.int32)
    inner = whole[GUARD : GUARD + count]
    inner.fill_(value)
    return whole, inner


class State:
    """What a schedule's launches leave each other: words, progress, status; the first launch finds it as it is made here."""

    def __init__(self, schedule: Schedule) -> None:
        self._words, words = guarded(SETS * schedule.set_words, EMPTY)
        self.words = words.view(SETS, schedule.set_words)
        self._progress, self.progress = guarded(2, 0)
        self._status, self.status = guarded(4, 0)

    def buffer(self, schedule: Schedule, name: str, step: int) -> Tensor:
        """[rows, columns] as they are in the set of step `step`; EMPTY words are NaN."""
        b = schedule.buffers[name]
        return self.words[step, b.offset : b.offset + b.words].view(torch.bfloat16).view(b.rows, b.columns).float()

    def error(self, twin: Twin, first: int = 0) -> tuple[float, str, int]:
        """Of the buffer furthest from the twin's, relative to its largest number: how far; its name; the step.

        first: the set of the launch's first step. Infinite where other words are EMPTY.
        """
        errors = []
        for step in range(SETS):
            for name in twin.schedule.buffers:
                got = self.buffer(twin.schedule, name, (first + step) % SETS)
                want = twin.buffer(name, step).float()
                same = torch.equal(got.isnan(), want.isnan())
                apart = (got - want).nan_to_num().abs().max() / want.nan_to_num().abs().max().clamp(min=1e-30)
                errors.append((apart.item() if same else math.inf, name, step))
        return max(errors)

    def check(self) -> None:
        for whole in (self._words, self._progress, self._status):
            check_guards(whole)


def followed_by_nan(context: Tensor) -> Tensor:
    """[..., columns] in bf16 with GUARD rows behind it, which are no features."""
    rows = context.bfloat16().reshape(-1, context.shape[-1])
    return torch.cat([rows, rows.new_full((GUARD, rows.shape[1]), math.nan)])


def check_guards(whole: Tensor) -> None:
    assert bool((torch.cat([whole[:GUARD], whole[-GUARD:]]) == 0x5A5A5A5A).all()), "written outside of a tensor"


@dataclass
class Result:
    """actions: [batch, horizon, actions]. state: as the launch has left it."""

    actions: Tensor
    state: State

    @property
    def status(self) -> list[int]:
        numbers: list[int] = self.state.status.tolist()
        return numbers


class Emulator:
    """Of the kernel as it is, `built` has one."""

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
        state: State | None = None,
    ) -> Result:
        """One launch, on the state that others have left, or a new one. Private memory begins as NaN, as the result does.

        RuntimeError: threads that wait for each other, or an instruction misused.
        """
        shape, device_state = schedule.shape, State(schedule) if state is None else state
        out_whole, out = guarded(shape.batch * shape.horizon * shape.actions, -1)
        private_whole, private_memory = guarded(schedule.private_floats, -1)
        tensors = {
            "tiles": torch.from_numpy(schedule.tiles),
            "first_tile": torch.from_numpy(schedule.first_tile),
            "weights": packed.bytes(),
            "constants": packed.constants,
            "noise": noise.float().contiguous(),
            "context": followed_by_nan(context),
            "prefix": None if prefix is None else prefix.float().contiguous(),
            "previous": None if guidance is None else guidance.previous,
            "guidance": None if guidance is None else guidance.weights,
            "out": out,
            "words": device_state.words,
            "private_memory": private_memory,
            "progress": device_state.progress,
            "status": device_state.status,
        }
        numbers = {
            "rows": shape.rows,
            "context_tokens": shape.context,
            "context_columns": context.shape[-1],
            "times": schedule.constants["times"][0],
            "max_guidance": 0.0 if guidance is None else guidance.max_guidance,
            "limit_ns": limit_ns,
        }
        names = ("width", "head_dim", "heads", "horizon", "actions", "padded_actions", "steps", "batch")
        numbers |= {name: getattr(shape, name) for name in names}
        names = ("set_words", "private_floats", "teams", "ranks", "padded_tokens", "part", "slots", "staging", "inbox")
        numbers |= {name: getattr(schedule, name) for name in names}
        assert set(tensors) | set(numbers) == {name for name, _ in LaunchRecord._fields_}
        record = LaunchRecord(**numbers)
        for name, tensor in tensors.items():
            setattr(record, name, None if tensor is None else tensor.data_ptr())
        message = ctypes.create_string_buffer(400)
        if self.library.emulate_action_ode(ctypes.byref(record), schedule.shared_bytes, seed, message, len(message)):
            raise RuntimeError(message.value.decode())
        device_state.check()
        check_guards(out_whole)
        check_guards(private_whole)
        return Result(out.view(torch.float32).view(shape.batch, shape.horizon, shape.actions), device_state)


@cache
def built(variant: str) -> Emulator:
    """Of the kernel as it is, for one of VARIANTS; compiled once."""
    with TemporaryDirectory() as folder:
        return Emulator(variant, Path(folder))
