"""A driver that records, and what was compiled for one chip."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit4dit import _C
from dit4dit.ops import launch
from dit4dit.ops.aot import manifest as manifests
from dit4dit.ops.aot.launch_record import Launch


class FakeDriver:
    """The library of fake_driver.c, and the calls that it has seen."""

    def __init__(self, library: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library, self.log, self._monkeypatch = library, log, monkeypatch
        self.set("LOG", str(log))

    def set(self, name: str, value: str) -> None:
        """A variable of fake_driver.c."""
        self._monkeypatch.setenv(f"FAKE_CUDA_{name}", value)

    def open(self) -> _C.Driver:
        return _C.Driver(str(self.library))

    def calls(self, name: str | None = None) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [call for call in map(json.loads, lines) if name in (None, call["call"])]


def samples(chip: int) -> list[Launch]:
    """Small launches with every kind of argument, and one that wants much shared memory."""
    bf16, f32 = torch.bfloat16, torch.float32

    def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, k = empty(1, 1, 9, 64, dtype=f32), empty(1, 2, 80, 64)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("adaln", (x, empty(1, 1, 9, 64), None, empty(1, 64, dtype=f32), empty(1, 64, dtype=f32), 1e-6, bf16)),
        ("cross_attention", (empty(1, 9, 128), k, k, None, 2, 1e-5)),
        ("linear_gelu", (empty(1, 588, 2048), empty(8192, 2048), None, "none")),
        ("philox_normal", (empty(2, 3, dtype=torch.int64), ((3, (16, 2, 4)), (0, (7,))))),
        ("unnormalize", (empty(1, 8, 7, dtype=f32), empty(5, 7, dtype=torch.float64))),
    ]
    return [
        step for op, args in calls for step in importlib.import_module(f"dit4dit.ops.{op}").launches(args, str(chip))[0]
    ]


@pytest.fixture(name="launches_for")
def _launches_for() -> Callable[[int], list[Launch]]:
    """Capability -> those launches."""
    return samples


@pytest.fixture(name="samples")
def _samples() -> list[Launch]:
    """Those of sm_90."""
    return samples(90)


def compile_fake(out: Path, *options: str) -> Path:
    """fake_driver.c compiled with NVIDIA's cuda.h, from the toolkit or out of Triton's wheel."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    headers = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        headers.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    found = [folder for folder in headers if (folder / "cuda.h").is_file()]
    if compiler is None or not found:
        pytest.skip("needs a C compiler and cuda.h (of the CUDA toolkit, or of Triton)")
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-I", found[0], "-o", out, source], check=True)
    return out


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("driver") / "libcuda.so.1")


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of a driver before CUDA 11.8."""
    return compile_fake(tmp_path_factory.mktemp("driver") / "libcuda.so.1", "-DBEFORE_11_8")


@pytest.fixture
def fake(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(fake_library, tmp_path / "calls", monkeypatch)


@pytest.fixture(scope="session")
def small_build(tmp_path_factory: pytest.TempPathFactory) -> manifests.Manifest:
    """A few kernels of every kind of argument, compiled for two chips."""
    pytest.importorskip("triton")
    if launch.interpreting():
        pytest.skip("a process with TRITON_INTERPRET=1 cannot compile")
    from dit4dit.aot_build import compiler
    from dit4dit.ops.aot.specialization import Specialization

    wanted = {chip: [Specialization.of(step) for step in samples(chip)] for chip in (80, 90)}
    return compiler.build(tmp_path_factory.mktemp("build") / "cubins", wanted, jobs=1)
