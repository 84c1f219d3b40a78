"""self_attention's CUDA kernel for every architecture, by nvcc alone: no spills, tensor cores, room for its blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from attention_emulator import AttentionEmulator
from compiled import ARCHITECTURES, REGISTERS, Compiled, compile_for, needs_nvcc
from emulator import needs_compiler

# compute capability -> bytes of shared memory of a multiprocessor, of which each block takes 1024 more than it asks for
MULTIPROCESSOR = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
SHARED = 4 * 16 * (64 * 16 + 16)  # bytes of a block: tiles of 16 groups of eight columns by 64 rows; checked below
QUERIES = (64, 128)  # of a block

pytestmark = needs_nvcc


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_for(request.param, "self_attention.cu", tmp_path_factory.mktemp("cubin"))


def test_no_spills_and_room_for_a_block(compiled: Compiled) -> None:
    assert compiled.spills == [("0", "0", "0")] * 2, compiled.report
    registers, static = compiled.of_each("registers"), compiled.of_each("bytes smem")
    for queries in QUERIES:
        (name,) = (name for name in registers if f"ILi{queries}E" in name)
        assert 0 < 2 * queries * -(-registers[name] // 8) * 8 <= REGISTERS
        assert SHARED + static[name] + 1024 <= MULTIPROCESSOR[compiled.capability]


@needs_compiler
def test_shared_memory_is_what_is_counted_with(tmp_path: Path) -> None:
    assert AttentionEmulator("copies", tmp_path).library.shared_bytes() == SHARED


def test_tensor_cores_and_copies_are_used(compiled: Compiled) -> None:
    assembly = compiled.assembly
    hopper = compiled.architecture == "90a"
    assert ("HGMMA.64x64x16.F32.BF16" in assembly) == hopper
    assert ("HGMMA.64x128x16.F32.BF16" in assembly) == hopper
    assert ("HMMA.16816.F32.BF16" in assembly) == (not hopper)
    assert "LDSM" in assembly
    assert "LDGSTS" in assembly, "cp.async"
    assert "STG.E.128" in assembly, "rows written whole"
    assert "serialized" not in compiled.report, "warpgroup products that wait for each other"
    for spill in ("LDL", "STL"):
        assert not re.search(rf"\b{spill}\b", assembly)


def test_weights_are_made_while_values_are_summed(compiled: Compiled) -> None:
    """On Hopper, in a turn of the loop: no wait for all products between those of a tile of values and the last power of two."""
    if compiled.architecture != "90a":
        assert "WARPGROUP" not in compiled.assembly
        return
    found = re.findall(r"(HGMMA\.64x128x16|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|BAR\.SYNC)", compiled.assembly)
    begun = [i for i in range(1, len(found)) if found[i - 1].startswith("HGMMA") and not found[i].startswith("HGMMA")]
    turns = [found[i:] for i in begun if found[i].endswith("0x1")]
    assert len(turns) == len(QUERIES)
    for turn in turns:
        # 64 keys for two rows of a thread: 32 weights, and what both rows fade by
        assert turn[1:35] == ["MUFU.EX2"] * 34, turn[:40]
