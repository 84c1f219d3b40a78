"""A CUDA source by nvcc alone: what the compiler says of each kernel in it, and the machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "89", "90a", "100", "120")
REGISTERS = 65536  # of a multiprocessor
SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

# a module's pytestmark
needs_nvcc = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
]


@dataclass(frozen=True)
class Compiled:
    """`report`: everything that nvcc and ptxas said."""

    architecture: str
    report: str
    cubin: Path

    @property
    def capability(self) -> int:
        return int(self.architecture.rstrip("a"))

    @property
    def spills(self) -> list[tuple[str, ...]]:
        """(stack, spill stores, spill loads) in bytes of each kernel."""
        return SPILLED.findall(self.report)

    def of_each(self, what: str) -> dict[str, int]:
        """Name of each kernel, mangled -> the number before or after `what`, such as "registers"; 0 where none is said."""
        found = {}
        for part in self.report.split("Compiling entry function '")[1:]:
            number = re.search(rf"(\d+) {what}", part)
            found[part.partition("'")[0]] = int(number[1]) if number else 0
        return found

    @property
    def assembly(self) -> str:
        triton = pytest.importorskip("triton")
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        done = subprocess.run([tools / "cuobjdump", "-sass", self.cubin], capture_output=True, text=True, check=False)
        if done.returncode and "nvdisasm" in done.stderr:
            done = subprocess.run([tools / "nvdisasm", self.cubin], capture_output=True, text=True, check=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def compile_for(architecture: str, source: str, folder: Path) -> Compiled:
    """kernels/SOURCE for one of ARCHITECTURES, with the flags of the build and warnings as errors."""
    cubin = folder / f"{source}.{architecture}.cubin"
    command = ["nvcc", "-std=c++17", "--fmad=false", "--Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}", "-o", str(cubin), str(ROOT / "kernels" / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Compiled(architecture, done.stderr, cubin)
