"""What the emulation of action_ode's kernel is worth: changes of the kernel that it must see.

It cannot see another order of planes or of ranks in a sum, which is within what rounding allows, a missing fence of loads, or a
first barrier of the team that is missing, as pushes come long after it. Faults of attention: test_action_ode_attention.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator import Emulator, State, changed_kernels, needs_compiler
from head_case import DEAR, DEVICES, PARTS, SIZES, Case, planned, tiny

from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.weights import pack

LIMIT = 4_000_000  # ns, of the emulation's clock
MUTANTS = {
    # weights
    "bulk: weights before they are there": (
        "weights",
        "ring_.parity, tile_, kWeights",
        "ring_.parity ^ 1, tile_, kWeights",
    ),
    "copies: weights before they are there": (
        "weights",
        "ring_.parity, tile_, kWeights",
        "ring_.parity ^ 1, tile_, kWeights",
    ),
    "bulk: a slot is filled while it is read": (
        "weights",
        "ring.parity ^ 1, index, kRoomForWeights",
        "ring.parity, index, kRoomForWeights",
    ),
    "copies: the slot next to it": (
        "weights",
        "at_ = ring_.slot * kSlotBytes + origin_",
        "at_ = (ring_.slot ^ 1) * kSlotBytes + origin_",
    ),
    "bulk: the weights of another rank": ("weights", "(block.rank) * w.rank_units", "(block.rank ^ 1) * w.rank_units"),
    # words
    "copies: words that are not there": ("stage", "if (!any_lane(missing != kNone) ||", "if (true ||"),
    "copies: keys that are not there": ("scores", "if (!any_lane(missing != kNone) ||", "if (true ||"),
    "copies: words of another set": ("stage", "source = block.words(now.set);", "source = block.words(now.before());"),
    "copies: words stay": ("product", "    write(block, w, item, now.before(), kEmpty);\n", ""),
    "copies: words of attention stay": ("attention", "    store_word(block.words(now.before()) + at, kEmpty);\n", ""),
    "copies: noisy words stay": (
        "sampler",
        "    write(block, w, item, now.set, kEmpty);  // all have read this step's\n",
        "",
    ),
    "bulk: no fence in a step": ("worker", "        fence();  // what was made", "        // what was made"),
    # other ranks
    "bulk: sums before they have come": (
        "block",
        "block_.wait<true>(sums_barrier(), now_.lap(),",
        "block_.wait<true>(sums_barrier(), now_.lap() ^ 1,",
    ),
    "bulk: sums for another rank": ("block", "+ offset, rank), x, at_rank", "+ offset, rank ^ 1), x, at_rank"),
    "bulk: both addresses of another rank": (
        "block",
        "target::push(at_rank(block_.inbox(now_.inbox()) + offset, rank), x, at_rank(sums_barrier(), rank));",
        "target::push(at_rank(block_.inbox(now_.inbox()) + offset, rank ^ 1), x, at_rank(sums_barrier(), rank ^ 1));",
    ),
    "bulk: the moments of the first rank alone": (
        "product",
        "planes.moments(rank, item.token)",
        "planes.moments(0, item.token)",
    ),
    "bulk: no credit": ("block", "now_.lap() ^ 1, now_.tile, kRoom", "now_.lap(), now_.tile, kRoom"),
    "bulk: the end without the team": (
        "worker",
        "    if (ranks_of(launch) > 1) sync_cluster();  // nobody reaches",
        "    // nobody reaches",
    ),
    # barriers of a block
    "copies: products before all is staged": (
        "product",
        "        sync_computing();\n        multiply_part(",
        "        multiply_part(",
    ),
    "copies: sums before all have multiplied": ("product", "    sync_computing();\n}\n\n", "}\n\n"),
    "copies: a part is staged too early": (
        "product",
        "        if (begin > 0) sync_computing();  // all have multiplied the part before\n",
        "",
    ),
    # numbers
    "copies: the state token is left out": ("product", "launch.prefix != nullptr", "false"),
    "copies: an address off by a row": (
        "product",
        "tokens + (first + j) * 8 * 16)",
        "tokens + (first + j) * 8 * 16 + 16)",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_sees_faults_in_the_kernel(name: str, tmp_path: Path) -> None:
    """What it is worth: each of these changes of the kernel gives an error or wrong actions."""
    variant = name.partition(":")[0]
    device = DEVICES[variant]
    if "part is" in name:
        config, request = SIZES[PARTS]
        case = Case(tiny(**config), **request)
        schedule = planned(PARTS, case.shape, device)
        assert any(m.slice > schedule.part for m in schedule.matrices.values())
    else:
        case = Case(tiny(num_layers=2), context=150, steps=4)
        schedule = plan(case.shape, device, DEAR, ranks=4 if device.clusters else 1)
    packed = pack(case.folded, schedule)
    want = case.twin(schedule, torch.bfloat16).run()
    run, state = Emulator(variant, tmp_path, changed_kernels(tmp_path, *MUTANTS[name])), State(schedule)
    try:
        for seed in range(4):
            result = run(schedule, packed, *case.given(), seed=seed, state=state, limit_ns=LIMIT)
            if not case.error(result.actions, want) < 2**-5:
                return
    except RuntimeError:
        return
    pytest.fail("nothing is wrong")
