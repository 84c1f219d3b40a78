"""action_ode for every architecture, by nvcc alone: no spills, the chip's tensor core instructions, room for one block."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dit4dit.benchmarks.kernels import SHARED_MEMORY

from dit4dit import presets
from dit4dit.action_ode import Device, head_shape, plan
from dit4dit.action_ode.plan import FIXED_SHARED
from dit4dit.action_ode.schedule import THREADS

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "89", "90a", "100", "120")
REGISTERS = 65536  # of a multiprocessor
WORKERS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """(architecture, the compiler's report, machine code)"""
    name = request.param
    cubin = tmp_path_factory.mktemp("cubin") / f"action_ode_{name}.cubin"
    source = ROOT / "kernels" / "action_ode.cu"
    command = ["nvcc", "-std=c++17", "--fmad=false", "--Werror=all-warnings", "-Xptxas=-v", "-cubin"]
    command += [f"-gencode=arch=compute_{name},code=sm_{name}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}"]
    done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return name, done.stderr, cubin


def test_no_spills_and_room_for_one_block(compiled: tuple[str, str, Path]) -> None:
    name, report, _ = compiled
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ], report
    assert "serialized" not in report, "products of warpgroups that the compiler lets wait for each other"
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 1
    assert registers[0] * THREADS <= REGISTERS
    capability = int(name.rstrip("a"))
    shared = SHARED_MEMORY[capability]
    static = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    for preset in (presets.libero(), presets.robocasa_gr1(), presets.unitree_g1()):
        for batch in (1, 4):
            shape = head_shape(preset.model.head, batch=batch, context=784, prefix=True, steps=1)
            schedule = plan(shape, Device(WORKERS[capability], shared, capability))
            assert sum(static) + FIXED_SHARED + 8192 * schedule.slots + schedule.staging <= shared


def test_tensor_cores_and_copies_are_used(compiled: tuple[str, str, Path]) -> None:
    name, _, cubin = compiled
    assembly = disassembled(cubin)
    assert "HMMA.16816.F32.BF16" in assembly
    assert "LDSM" in assembly
    assert ("HGMMA" in assembly) == (name == "90a")
    bulk = name not in ("80", "89")
    assert ("UBLKCP" in assembly) == bulk, "bulk copies"
    assert ("LDGSTS" in assembly) == (not bulk), "cp.async"
    for spill in ("LDL", "STL"):
        assert not re.search(rf"\b{spill}\b", assembly)


def disassembled(cubin: Path) -> str:
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=False)
    if done.returncode and "nvdisasm" in done.stderr:
        done = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
