"""What the emulation of action_ode's kernel is worth: changes of the kernel that it must see."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator import Emulator, needs_compiler
from head_case import DEVICES, SIZES, Case, tiny

from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.weights import pack

KERNELS = Path(__file__).parents[2] / "kernels"
MUTANTS = {
    "copies: a slot is read before it is there": (
        "block",
        "wait_copies<kCopySlots - 2>()",
        "wait_copies<kCopySlots - 1>()",
    ),
    "copies: no sync after staging": (
        "product",
        "        sync_block();\n        for (int column",
        "        for (int column",
    ),
    "copies: no sync before the sums": ("product", "w);\n    sync_block();\n    float* to", "w);\n    float* to"),
    "copies: scale and shift while others still work": (
        "block",
        "poll(tile, index));\n        sync_block();",
        "poll(tile, index));",
    ),
    "copies: a norm of the wrong part": ("stage", "to.row(c - column, token)", "to.row((c - column) % 16, token)"),
    "copies: ranges of keys without their shares": ("stage", "exponential(score - largest) * sum", "sum"),
    "copies: the stream is added by all warps": (
        "product",
        "first(thread_index() / 32 < w.tile_rows / 16)",
        "first(w.tile_rows > 0)",
    ),
    "copies: the state token is left out": ("product", "launch.prefix != nullptr", "false"),
    "copies: no wait for the counter": ("block", "if (have >= tile.target) return 1;", "return 1;"),
    "copies: a signal before the tile is done": (
        "worker",
        "        if (!run(block",
        "        if (thread == 0 && tile.signal != kNone) add_release(block.counter(tile.signal));\n        if (!run(block",
    ),
    "copies: queries without a sync": (
        "attention",
        "query_tiles * 16, d);\n    sync_block();",
        "query_tiles * 16, d);",
    ),
    "copies: an address off by a row": ("product", "j * 8 + lane % 8)", "j * 8 + (lane + 1) % 8)"),
    "bulk: the other phase": ("block", "full[slot], used_ / slots() & 1);", "full[slot], ~used_ / slots() & 1);"),
    "bulk: a slot filled while it is read": (
        "block",
        "if (fetched_ >= slots())",
        "if (false)",
    ),
    "bulk: a wait that does not wait": ("block", "if (barrier_try_wait(barrier, parity)) return;", "return;"),
    "warpgroups: strides exchanged": (
        "product",
        "along_columns << 16 | along_tokens << 32",
        "along_tokens << 16 | along_columns << 32",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_sees_faults_in_the_kernel(name: str, tmp_path: Path) -> None:
    """What it is worth: each of these changes of the kernel gives an error or wrong actions."""
    variant = name.partition(":")[0]
    file, old, new = MUTANTS[name]
    kernels = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    changed = kernels / f"action_ode_{file}.cuh"
    assert changed.read_text().count(old) == 1, "the kernel no longer says this"
    changed.write_text(changed.read_text().replace(old, new))
    # with more slots a tile, so that the ring turns within one
    size = "9 tokens, batch 4" if variant == "warpgroups" else "17 tokens, heads of 48"
    config, request = SIZES["51 tokens, norms in parts" if "wrong part" in name else size]
    case = Case(tiny(**config), **request)
    schedule = plan(case.shape, replace(DEVICES[variant], workers=5))
    packed = pack(case.folded, schedule)
    want = case.twin(schedule, torch.bfloat16).run()
    run = Emulator(variant, tmp_path, kernels)
    try:
        error = max(case.error(run(schedule, packed, *case.given(), seed=s).actions, want) for s in range(2))
    except RuntimeError:
        return
    assert not error < 2**-5
