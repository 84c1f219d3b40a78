"""What the build writes: cubins whose parameters are those that the launcher packs, and a manifest that says so."""

from __future__ import annotations

import hashlib
import re

import pytest
from dit4dit.benchmarks import kernels

from dit4dit.aot_build import compiler
from dit4dit.ops import launch
from dit4dit.ops.aot.manifest import Manifest
from dit4dit.ops.aot.specialization import Specialization

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile"),
]


def test_layout():
    assert compiler.layout(["*bf16:16", "i32", "fp32", "i32:16", "*fp32", "i64"], 2) == [
        *((0, 8), (8, 4), (12, 4), (16, 4), (24, 8), (32, 8)),
        *((40, 8), (48, 8)),
    ]


def test_parameters_of_the_machine_code_are_those_of_the_assembly(samples):
    """Read a second time, from the text before the assembler."""
    sizes = {"u64": 8, "u32": 4, "f32": 4}
    assert len(samples) >= 5
    for step in samples:
        kernel = compiler.compiled(Specialization.of(step), 90)
        head = kernel.asm["ptx"].partition(".entry")[2].partition(")")[0]
        wanted = [sizes[kind] for kind in re.findall(r"\.param \.(\w+)", head)]
        assert [size for _, size in compiler.parameters(kernel.asm["cubin"], kernel.metadata.name)] == wanted
        given = Specialization.of(step).arguments
        assert len(wanted) == len(given) + compiler.SCRATCH


def test_a_kernel_that_reads_other_parameters_is_not_shipped(samples, monkeypatch):
    special = Specialization.of(samples[0])
    kernel = compiler.compiled(special, 90)
    assert compiler.describe(special, kernel, 90).threads == 32 * special.options["num_warps"]
    monkeypatch.setattr(compiler, "SCRATCH", 1)
    with pytest.raises(
        RuntimeError, match=r"adaln for sm_90: parameters: the launcher packs .* the machine code reads"
    ):
        compiler.describe(special, kernel, 90)


def test_a_kernel_that_wants_more_than_the_launcher_gives_is_not_shipped(samples):
    special = Specialization.of(samples[0])
    kernel = compiler.compiled(special, 90)

    class Wanting:
        asm = kernel.asm
        metadata = kernel.metadata._replace(global_scratch_size=128)

    with pytest.raises(RuntimeError, match="global_scratch_size: the launcher expects 0, Triton made 128"):
        compiler.describe(special, Wanting, 90)


def test_arguments_that_the_kernel_does_not_have_are_refused(samples):
    special = Specialization.of(samples[0])
    with pytest.raises(TypeError, match="adaln: takes"):
        compiler.compiled(Specialization("adaln", {**special.arguments, "extra": "i32"}, special.constants, {}), 90)


def test_what_a_build_holds(small_build, samples):
    assert set(small_build.kernels) == {"sm_80", "sm_90"}
    assert set(small_build.kernels["sm_90"]) == {Specialization.of(step).key for step in samples}
    files = {str(path.relative_to(small_build.folder)) for path in small_build.folder.rglob("*.cubin")}
    rows = [row for found in small_build.kernels.values() for row in found.values()]
    assert files == {row.file for row in rows}
    for row in rows:
        image = small_build.image(row)
        assert hashlib.sha256(image).hexdigest() == row.sha256
        assert image[:4] == b"\x7fELF"
        assert b"/" + b"kernels" not in image, "a path of the machine that compiled it"
        assert row.shared <= kernels.SHARED_MEMORY[int(row.file.partition("/")[0][3:])]
    assert Manifest.read(small_build.folder) == small_build


def test_a_build_goes_into_an_empty_folder(small_build):
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        compiler.build(small_build.folder, {}, 1)
