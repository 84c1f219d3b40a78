"""action_ode for every architecture, by nvcc alone: no spills, the chip's tensor core instructions, room for one block."""

from __future__ import annotations

import re

import pytest
from compiled import ARCHITECTURES, REGISTERS, Compiled, compile_for, needs_nvcc
from dit4dit.benchmarks.kernels import SHARED_MEMORY

from dit4dit import presets
from dit4dit.engine.action_ode import Device, head_shape, plan
from dit4dit.engine.action_ode.plan import FIXED_SHARED
from dit4dit.engine.action_ode.schedule import THREADS

WORKERS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}

pytestmark = needs_nvcc


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_for(request.param, "action_ode.cu", tmp_path_factory.mktemp("cubin"))


def test_no_spills_and_room_for_one_block(compiled: Compiled) -> None:
    assert compiled.spills == [("0", "0", "0")], compiled.report
    assert "serialized" not in compiled.report, "products of warpgroups that the compiler lets wait for each other"
    (registers,) = compiled.of_each("registers").values()
    assert 0 < registers * THREADS <= REGISTERS
    (static,) = compiled.of_each("bytes smem").values()
    shared = SHARED_MEMORY[compiled.capability]
    for preset in (presets.libero(), presets.robocasa_gr1(), presets.unitree_g1()):
        for batch in (1, 4):
            shape = head_shape(preset.model.head, batch=batch, context=784, prefix=True, steps=1)
            schedule = plan(shape, Device(WORKERS[compiled.capability], shared, compiled.capability))
            assert static + FIXED_SHARED + 8192 * schedule.slots + schedule.staging <= shared


def test_tensor_cores_and_copies_are_used(compiled: Compiled) -> None:
    name, assembly = compiled.architecture, compiled.assembly
    assert "HMMA.16816.F32.BF16" in assembly
    assert "LDSM" in assembly
    assert ("HGMMA" in assembly) == (name == "90a")
    bulk = name not in ("80", "89")
    assert ("UBLKCP" in assembly) == bulk, "bulk copies"
    assert ("LDGSTS" in assembly) == (not bulk), "cp.async"
    for spill in ("LDL", "STL"):
        assert not re.search(rf"\b{spill}\b", assembly)
