"""action_ode for every architecture, by nvcc alone: no spills, room for one block, and a slot loop without a detour."""

from __future__ import annotations

import pytest
from compiled import ARCHITECTURES, REGISTERS, Compiled, compile_for, needs_nvcc
from dit4dit.benchmarks.kernels import SHARED_MEMORY
from sass import Instruction, ahead, innermost, instructions, loops, shortest_turn

from dit4dit import presets
from dit4dit.engine.action_ode import Device, head_shape, plan
from dit4dit.engine.action_ode.schedule import (
    PADDED_TOKENS,
    THREADS,
)
from dit4dit.engine.action_ode.sizes import (
    warp_tiles,
)

SMS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 170}
PARTITIONS = 4
"""Of an SM, with a quarter of the registers each; a block's warps are dealt out to them in turn."""
DIVISION = ("I2F", "F2I", "I2I", "MUFU", "IABS")
"""What integer division and remainders by a number that the compiler does not know are made of."""
MOST_BESIDES = {1: 32, 2: 48}
"""By row groups of a warp: instructions of a step that are neither products nor their loads, at most; two take 16 more moves."""

pytestmark = needs_nvcc


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_for(request.param, "action_ode.cu", tmp_path_factory.mktemp("cubin"))


@pytest.fixture(scope="module")
def code(compiled: Compiled) -> list[Instruction]:
    return instructions(compiled.assembly)


@pytest.fixture(scope="module")
def slot_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops with products but those of attention, which has exponentials."""
    found = innermost(loops(code), "HMMA")
    return [loop for loop in found if not any(i.name.startswith("MUFU.EX2") for i in loop)]


def test_no_spills_and_room_for_one_block(compiled: Compiled) -> None:
    assert compiled.spills == [("0", "0", "0")], compiled.report
    (registers,) = compiled.of_each("registers").values()
    warps = -(-THREADS // 32 // PARTITIONS)  # of the partition that has most
    assert 0 < 32 * registers * warps <= REGISTERS // PARTITIONS
    (static,) = compiled.of_each("bytes smem").values()
    shared, sms = SHARED_MEMORY[compiled.capability], SMS[compiled.capability]
    device = Device(sms, shared - static, compiled.capability, tuple(sms // n for n in (2, 4, 8)))
    for preset in (presets.libero(), presets.robocasa_gr1(), presets.unitree_g1()):
        for batch in (1, 4):
            shape = head_shape(preset.model.head, batch=batch, context=784, prefix=True, steps=1)
            assert plan(shape, device).shared_bytes <= shared - static


def test_tensor_cores_copies_and_clusters_are_used(compiled: Compiled, code: list[Instruction]) -> None:
    names = {i.name for i in code} | {i.base for i in code}
    assert "HMMA.16816.F32.BF16" in names
    assert "LDSM" in names
    assert not names & {"LDL", "STL"}, "memory of a thread"
    bulk = compiled.architecture not in ("80", "89")
    assert "LDGSTS" in names, "cp.async"
    assert ("UBLKCP" in names) == bulk, "bulk copies"
    assert ("STAS" in names) == bulk, "st.async into another block's shared memory"
    assert {"UCGABAR_ARV", "UCGABAR_WAIT"} <= names or not bulk, "barriers of a cluster"


def test_a_slot_loop_for_every_number_of_tokens(slot_loops: list[list[Instruction]]) -> None:
    """And for one row group a warp or two: products of each with tokens by eight, in two halves of a step's columns."""
    found = sorted(sum(i.base == "HMMA" for i in loop) for loop in slot_loops)
    groups = {tokens: range(1, warp_tiles(tokens) + 1) for tokens in PADDED_TOKENS}
    assert found == sorted(2 * count * tokens // 8 for tokens in PADDED_TOKENS for count in groups[tokens])


def test_the_slot_loop_divides_nothing(slot_loops: list[list[Instruction]]) -> None:
    for loop in slot_loops:
        long_way = [i for i in loop if i.base in DIVISION or i.name.startswith("IMAD.HI")]
        assert not long_way, (hex(loop[0].address), long_way)


def test_the_next_weights_are_asked_for_before_this_steps_products(slot_loops: list[list[Instruction]]) -> None:
    """Between a load of weights from shared memory and the first product with them lies another product."""
    for loop in slot_loops:
        weights = [i for i in loop if i.name == "LDS.128"]
        assert weights, hex(loop[0].address)
        assert all(ahead(loop, load) > 0 for load in weights), hex(loop[0].address)


def test_a_step_is_little_more_than_its_products(code: list[Instruction], slot_loops: list[list[Instruction]]) -> None:
    """The shortest way round the loop: all products of a step, all their loads, and little else."""
    for loop in slot_loops:
        turn = shortest_turn(code, loop, "HMMA")
        groups = sum(i.name == "LDS.128" for i in turn) // 2  # in bf16: two halves of a step's columns
        blocks = sum(i.base == "LDSM" for i in turn)
        assert sum(i.base == "HMMA" for i in turn) == sum(i.base == "HMMA" for i in loop) == 2 * groups * blocks
        besides = [i for i in turn if i.base not in ("HMMA", "LDSM", "NOP") and i.name != "LDS.128"]
        assert len(besides) <= MOST_BESIDES[groups], (hex(loop[0].address), besides)
