"""Kernels compiled beforehand are those that a launch in another process looks for. No GPU: a driver that only takes note."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import compile_ahead as ahead

from dit4dit import ops
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import launch
from dit4dit.ops.dispatch import find

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")

LAUNCHES = """
import importlib, json, pickle, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched, hits = [], {}

class Utils:
    def load_binary(self, name, kernel, shared, device): return 1, 2, 32, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Launcher:
    def __init__(self, src, metadata): self.name = metadata.name
    def __call__(self, *_): launched.append(self.name)

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

device, capability = sys.argv[1:]
if device == "cpu":
    driver.set_active(Driver())

def heard(*, src, cache_hit, **_): hits.setdefault(src.name, []).append(cache_hit)

knobs.compilation.listener = heard
for op, args in pickle.load(sys.stdin.buffer):
    real = [torch.zeros_like(x, device=device) if isinstance(x, torch.Tensor) else x for x in args]
    for step in importlib.import_module(f"dit4dit.ops.{op}").launches(tuple(real), capability)[0]:
        step()
if device == "cuda":
    torch.cuda.synchronize()
print(json.dumps([launched, hits]))
"""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def euler_step(samples: int, guided: bool) -> ops.Call:
    x = meta(samples, 16, 7)
    rest = (1.0, x, meta(16), 5.0) if guided else (None,) * 4
    return "euler_step", (x, x, 0.25, *rest)


def adaln(width: int, dtype: torch.dtype) -> ops.Call:
    x, table = meta(1, 2, 5, width, dtype=dtype), meta(2, width)
    return "adaln", (x, x, table, table, table, 1e-6, torch.bfloat16)


def launched(
    calls: list[ops.Call], device: str, capability: str, folder: Path
) -> tuple[list[str], dict[str, list[bool]]]:
    """The calls in another process, by Triton's own launch: per kernel whether its cache had it; first, on a CPU, what the
    driver was to launch.
    """
    command, given = [sys.executable, "-c", LAUNCHES, device, capability], pickle.dumps(calls)
    # from another folder, where the source tree would be taken for the package
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, cwd=folder)
    names, hits = json.loads(done.stdout)
    return names, hits


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DIT4DIT_CUBINS", "off")
    # what another test's compiler may have left in this process is no part of a launch
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)
    return tmp_path / "cache"


def entries(cache: Path) -> set[str]:
    """Compiled kernels in Triton's cache."""
    return {path.parent.name for path in cache.glob("*/*.cubin")}


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.kernels, pytest.mark.slow]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_launch_in_another_process_finds_everything_compiled(device: str, cache: Path) -> None:
    capability = "90" if device == "cpu" else launch.architecture(torch.device(device))
    calls = [euler_step(1, False), euler_step(3, True), adaln(64, torch.float32), adaln(72, torch.bfloat16)]
    other = ("linear", (meta(1, 4, 64), meta(8, 64), None))  # no kernel of Triton's
    found = ahead.compile_ahead([*calls, other, euler_step(1, False)], capability, jobs=2)
    assert found.refused == {}
    assert (found.kernels, found.compiled, found.shipped) == (4, 4, 0)
    assert 1 <= found.processes <= 2
    assert json.dumps(found.data())
    before = entries(cache)
    assert len(before) == 4
    # the last one was not asked for: that it is compiled would be seen
    names, hits = launched([*calls, adaln(80, torch.float32)], device, capability, cache.parent)
    assert device == "cuda" or names == ["euler_step", "euler_step", "adaln", "adaln", "adaln"]
    assert hits == {"euler_step": [True, True], "adaln": [True, True, False]}
    assert len(entries(cache) - before) == 1


def assembler(folder: Path, does: dict[str, str]) -> str:
    """A ptxas that does something else where it is given one of these kernels."""
    import triton

    real = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    cases = "".join(
        f'if grep -qe "entry {kernel}" -- "$file" 2>/dev/null; then {act}; fi; ' for kernel, act in does.items()
    )
    script = folder / "ptxas"
    script.write_text(f'#!/bin/sh\nfor file in "$@"; do {cases}done\nexec {real} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.kernels
@pytest.mark.slow
def test_a_kernel_that_hangs_or_ends_its_compiler_costs_itself_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = "sleep 600.125"
    does = {"adaln": hangs, "rms_norm_silu": f"kill -SEGV $PPID; {hangs}", "unnormalize": "exit 3"}
    monkeypatch.setenv("TRITON_PTXAS_PATH", assembler(tmp_path, does))
    names = [*does, "euler_step"]
    calls = [(name, find(name).example(torch.device("meta"))) for name in names]  # type: ignore[misc]
    found = ahead.compile_ahead(calls, "90", jobs=1, limit=4)
    reasons = {key.partition(" | ")[0]: reason for key, reason in found.refused.items()}
    assert reasons.pop("unnormalize").startswith("PTXASError: ")
    assert reasons == {
        "adaln": "it took longer than 4 s",
        "rms_norm_silu": "the compile process ended with exit code -11",
    }
    # adaln has two implementations, each a kernel
    assert (found.kernels, found.compiled, found.processes) == (5, 1, 4)
    assert {path.stem for path in cache.glob("*/*.cubin")} == {"euler_step"}
    # the assemblers have ended with their compilers
    assert not [line for line in commands() if hangs.replace(" ", "\0") in line]


def commands() -> list[str]:
    """Command lines of processes of this user that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except OSError:
            continue
    return found


@pytest.mark.kernels
def test_compile_processes_that_do_not_start_end_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode("/bin/false"))
    calls = [adaln(64, torch.float32), euler_step(1, False), euler_step(3, True)]
    found = ahead.compile_ahead(calls, "90", jobs=1)
    assert set(found.refused.values()) == {"the compile process ended with exit code 1"}
    assert (len(found.refused), found.processes) == (3, 1)


@pytest.mark.kernels
def test_what_cannot_be_compiled_here_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[dict[str, Any]] = [{"jobs": 0}, {"limit": 0.0}, {"limit": float("nan")}]
    for options in wrong:
        with pytest.raises(InputError, match=r"compile_ahead (jobs|limit): expected"):
            ahead.compile_ahead([], "90", **options)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    found = ahead.compile_ahead([euler_step(1, False)], "90")
    assert list(found.refused.values()) == ["Triton cannot compile: no C compiler is on PATH"]
    assert found.processes == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"TRITON_INTERPRET=1.*unset it"):
        ahead.compile_ahead([], "90")
