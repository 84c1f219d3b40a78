"""How much dynamic shared memory a kernel may have: what a device gives a block, less what the kernel declares itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from compiled import ROOT
from emulator import needs_compiler

HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


@needs_compiler
@pytest.mark.skipif(not (HEADERS / "cuda_runtime.h").is_file(), reason="needs the CUDA toolkit's headers")
def test_what_a_kernel_declares_is_left_for_it(tmp_path: Path) -> None:
    program = tmp_path / "shared_memory"
    source = ROOT / "tests" / "cuda_emulation" / "shared_memory.cpp"
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-I{HEADERS}", source, "-o", program], check=True)
    for declared in (0, 1024, 16_000):
        done = subprocess.run([program, "232448", str(declared)], capture_output=True, text=True, check=True)
        assert done.stdout == str(232_448 - declared)


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.cu")), ids=lambda file: file.name)
def test_no_kernel_takes_all_that_a_device_has(file: Path) -> None:
    """By cuda_check.h's function alone, which leaves room for static shared memory; a constant is checked by its own test."""
    assert "SharedMemoryPerBlockOptin" not in file.read_text()
