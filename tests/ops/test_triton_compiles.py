"""Every Triton kernel, as the released models call it, compiles for every architecture without spilling a register.

No GPU is needed. DIT4DIT_KERNELS_REPORT=file.json writes what the compiler said.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import kernels

from dit4dit.aot_build.compiler import compiled, resources
from dit4dit.model.video_dit import patches
from dit4dit.ops import launch, stand_in, tiles
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.linear_fp8 import FP8, LEAST_CAPABILITY, launches

pytest.importorskip("triton")
from triton.backends.nvidia.compiler import CUDAOptions

pytestmark = pytest.mark.kernels

# (kernel, capability) -> reason why it may spill. Keep it empty if you can.
MAY_SPILL: dict[tuple[str, int], str] = {
    (
        "philox_normal",
        capability,
    ): "48 bytes for the float64 cosine of huge angles, a path that angles below 2 pi do not take"
    for capability in kernels.SHARED_MEMORY
}

# One batch of 1, the robot's own; one of 16, the most that an evaluation server runs
BATCHES = (1, 16)


@pytest.fixture(scope="module")
def rows():
    found: list[dict] = []
    yield found
    path = os.environ.get("DIT4DIT_KERNELS_REPORT")
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")


def test_no_argument_has_a_name_that_triton_keeps_for_itself():
    """A keyword argument of that name is Triton's own: the kernel cannot be launched just in time."""
    from triton.runtime.jit import JITFunction

    source = inspect.getsource(inspect.getmodule(JITFunction))
    own = {*inspect.signature(JITFunction.run).parameters, *re.findall(r'"(\w+)" not in kwargs', source)}
    own |= {field.name for field in dataclasses.fields(CUDAOptions)} - {"num_warps", "num_stages"}
    assert {"grid", "warmup", "stream", "device"} <= own
    found = 0
    for path in KERNELS.glob("*.py"):
        module = importlib.import_module(f"dit4dit.kernels.{path.stem}")
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction):
                found += 1
                assert not own & set(kernel.arg_names), f"{path.stem}.{name}"
    assert found > 10


@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize("capability", kernels.SHARED_MEMORY)
def test_compiles_without_spills(capability, rows):
    mine = [row for batch in BATCHES for row in kernels.report(capability, batch)]
    rows += mine
    names = {row["kernel"].partition(".")[0] for row in mine}
    absent = {"linear_fp8"} if capability < LEAST_CAPABILITY else set()
    assert names == {path.stem for path in KERNELS.glob("*.py")} - SHARED - absent
    for row in mine:
        where = f"{row['kernel']} for {capability}, {row['case']}, {row['tile']}"
        spilled = row["stack"] + row["local"]
        assert not spilled or (row["kernel"], capability) in MAY_SPILL, f"{where}: {spilled} bytes spilled"
        assert row["waits"] == ("first" if capability >= 90 else "no"), where
        limit = kernels.SHARED_MEMORY[capability]
        assert row["shared"] <= limit, f"{where}: {row['shared']} bytes of shared memory of {limit}"
        if row["kernel"] in PRODUCTS:
            # the chip's own instructions for the backbone; a few rows of the action head fill none of their tiles
            best = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma")
            large = row["case"].split()[1] in ("588", "784") or row["kernel"] in LARGE
            assert row["products"] == best if large else row["products"], f"{where}: {row['products']}"
            assert row["fp8"] == (row["kernel"] == "linear_fp8"), where
    spilling = {(row["kernel"], capability) for row in mine if row["stack"] + row["local"]}
    assert spilling == {key for key in MAY_SPILL if key[1] == capability}, "an exception that is no longer needed"


@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize("capability", [c for c in kernels.SHARED_MEMORY if c >= LEAST_CAPABILITY])
@pytest.mark.parametrize("rows", [9, 64, 588])
def test_fp8_quantised_inside_the_product_compiles(capability, rows):
    """No call of the released models has so few rows; with 588 it is what `tune` may choose."""
    x = torch.empty(1, rows, 2048, dtype=torch.bfloat16, device="meta")
    args = (x, 0.5, torch.empty(2048, 2048, dtype=FP8, device="meta"), torch.empty(2048, device="meta"), None)
    tile = tiles.lookup("linear_fp8", str(capability), rows=rows, columns=2048, inner=2048)
    with tiles.trying("linear_fp8", {**tile, "FUSED": 1, "num_stages": 2}):
        (step,), _ = launches((*args, "none", torch.bfloat16), str(capability))
    kernel = compiled(Specialization.of(step), capability)
    found = resources(kernel.asm["cubin"])
    assert found["stack"] + found["local"] == 0
    assert kernel.metadata.shared <= kernels.SHARED_MEMORY[capability]
    # below 64 rows Triton widens the operands to float16 on 9.0 and 10.0: exact, and there the weights' bytes are what counts
    assert kernels.multiplies_fp8(kernel.asm["ptx"]) or (rows < 64 and capability in (90, 100))


@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize("capability", kernels.SHARED_MEMORY)
def test_the_longest_patch_fits_every_gpu(capability):
    """Longer than that of the released models: what is not refused must run."""
    op = importlib.import_module("dit4dit.ops.patch_tokens")

    def arguments(channels):
        f32, weight = partial(torch.empty, device="meta"), torch.empty(2048, 4 * channels, dtype=torch.bfloat16)
        latents, table = f32(1, channels, 2, 28, 28), f32(2, 2048)
        return patches(latents, 2), weight.to("meta"), f32(1, 2, 196, 2048), table, table, 1e-6

    deepest = op._DEEPEST // 4
    with stand_in.without_data():
        assert op._refuse(*arguments(deepest)) is None
        assert "it takes at most" in op._refuse(*arguments(deepest + 1))
    (step,), _ = op.launches(arguments(deepest), str(capability))
    kernel = compiled(Specialization.of(step), capability)
    found = resources(kernel.asm["cubin"])
    assert found["stack"] + found["local"] == 0
    assert kernel.metadata.shared <= kernels.SHARED_MEMORY[capability]


LARGE = ("conv2d", "wide_attention")  # products of which all calls are large
KERNELS = Path(__file__).parents[2] / "kernels"
PRODUCTS = ("self_attention", "cross_attention", "linear", "linear_gelu", "linear_fp8", "norm_linear", *LARGE)
SHARED = {"attention", "common", "products"}  # functions that kernels call


def test_a_spill_is_seen():
    """Asked for more than the registers hold, the compiler spills and the report says so."""
    case, step = next(
        (case, step)
        for case, step in kernels.launches(80)
        if case == "linear_gelu 784" and step.kernel == "linear_gelu"
    )
    tile = {**step.tile, "ROWS": 128, "COLUMNS": 256, "num_warps": 4}
    kernel = compiled(Specialization.of(replace(step, tile=tile)), 80)
    found = resources(kernel.asm["cubin"])
    assert found["stack"] + found["local"] > 0, (case, found)
