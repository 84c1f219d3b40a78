"""What the emulation of action_ode's kernel is worth: changes of the kernel that it must see.

It cannot see another order of planes or of ranks in a sum, which is within what rounding allows, a missing fence of loads, or a
first barrier of the team that is missing, as pushes come long after it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator import FORGET, Emulator, State, changed_kernels, needs_compiler
from head_case import DEAR, DEVICES, SIZES, Case, attention_case, attention_schedule, planned, tiny

from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.weights import pack

LIMIT = 4_000_000  # ns, of the emulation's clock
PARTS = "51 tokens, norms in parts"
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

INSIDE, SLOTS = "columns end inside heads of 64", "four samples, few slots"
OVER_END, ROUNDS = "slices past the end, two samples", "all columns in several rounds"
IDLE, PANELS, FEW_KEYS = "ranks without a head", "panels of 48 keys", "columns inside heads of 48"
ATTENTION_MUTANTS = {
    # inside a product
    "bulk: queries where sums or other heads lie": (
        ROUNDS,
        "attended",
        "        sync_computing();  // all have read what lay there: sums of the tile before, or other heads\n",
        "",
    ),
    "bulk: scores before all of a product's heads are there": (
        ROUNDS,
        "attended",
        "        sync_computing();\n        for (int task",
        "        for (int task",
    ),
    "bulk: values for keys": (
        INSIDE,
        "attended",
        "rows(pair, 1), rows(pair, 2), done",
        "rows(pair, 2), rows(pair, 1), done",
    ),
    "bulk: another head of a product": (
        INSIDE,
        "attended",
        "head = all.head + done + pair - sample",
        "head = done + pair - sample",
    ),
    "bulk: another sample of a product": (
        OVER_END,
        "attended",
        "w.source + sample * all.tokens * w.source_stride + column",
        "w.source + column",
    ),
    "bulk: one sample's rows for another's": (OVER_END, "attended", "sample * all.tokens + row)", "row)"),
    "bulk: a head's columns where it begins": (INSIDE, "attended", "* d - all.begin;", "* d - all.begin / d * d;"),
    "bulk: columns before the first": (SLOTS, "attended", "column < 0 || ", ""),
    "bulk: columns behind the last": (INSIDE, "attended", " || all.begin + column >= all.end", ""),
    "bulk: keys that only pad": (
        INSIDE,
        "attended",
        "found.soften(0, all.rows(), all.tokens,",
        "found.soften(0, all.rows(), all.rows(),",
    ),
    # panels of keys and values
    "copies: keys before they are there": (PANELS, "attention", "ring.parity, now.tile", "ring.parity ^ 1, now.tile"),
    "bulk: keys before they are there": (PANELS, "attention", "ring.parity, now.tile", "ring.parity ^ 1, now.tile"),
    "bulk: a warp keeps panels of others": (
        PANELS,
        "attention",
        "        leave_panel(block, ring);\n",
        "        if (turn == mine.groups() - 1) leave_panel(block, ring);\n"
        "        else ring.advance(block.launch.slots);\n",
    ),
    "bulk: the panel of another warp": (
        PANELS,
        "attention",
        "int turn = mine.group(block.warp);",
        "int turn = mine.group(block.warp) + 1;",
    ),
    "bulk: a warp's panels too far apart": (PANELS, "attention", "turn = mine.groups() - 1;", "turn = mine.groups();"),
    "copies: keys behind the last": (PANELS, "weights", "here < mine.keys ? here : mine.keys - 1", "here"),
    "bulk: keys behind the last": (PANELS, "weights", "here < mine.keys ? here : mine.keys - 1", "here"),
    "bulk: a panel too many is fetched": (
        PANELS,
        "weights",
        "for (int done = 0; done < mine.keys; done",
        "for (int done = 0; done < mine.keys + mine.per_warp; done",
    ),
    "bulk: a panel too few is used": (
        PANELS,
        "attention",
        "for (int done = 0; done < mine.keys; done",
        "for (int done = 0; done < mine.keys - mine.per_warp; done",
    ),
    "bulk: keys that pad a panel": (PANELS, "attention", "mine.per_warp, mine.keys - done,", "mine.per_warp, mine.per_warp,"),
    "bulk: keys for values": (PANELS, "weights", "+ value * launch.width", ""),
    "bulk: panels that have no room": (PANELS, "shares", "> kSlotBytes) per_warp -= 16", "> kSlotBytes) per_warp -= 0"),
    "copies: scores before all queries are there": (
        PANELS,
        "attention",
        "    sync_computing();\n    Warp found;\n    int turn",
        "    Warp found;\n    int turn",
    ),
    # of the tokens
    "copies: scores before all keys are there": (
        IDLE,
        "attention",
        "    sync_computing();\n    const int lane",
        "    const int lane",
    ),
    "bulk: tokens that only pad": (IDLE, "attention", "mine.per_warp, mine.keys, inverse", "mine.per_warp, 64, inverse"),
    # ranks
    "bulk: values for the first ranks": (
        IDLE,
        "attention",
        "exchange.push(mine.base + rank, inbox.value",
        "exchange.push(rank, inbox.value",
    ),
    "bulk: scores for the first ranks": (
        IDLE,
        "attention",
        "exchange.push(mine.base + rank, inbox.stats",
        "exchange.push(rank, inbox.stats",
    ),
    "bulk: sums for ranks without a head": (IDLE, "attention", "expect(alone ? 0 : inbox", "expect(inbox"),
    "bulk: every rank the first head": (IDLE, "shares", "pair = w.pair + which;", "pair = w.pair;"),
    "bulk: heads for ranks without one": (IDLE, "shares", "busy = which < w.pairs", "busy = which >= 0"),
    "bulk: the keys of another rank": (FEW_KEYS, "shares", "first(index * w.slice)", "first((index ^ 1) * w.slice)"),
    "bulk: ranks without keys give sums": (
        FEW_KEYS,
        "shares",
        "ranks((w.keys + w.slice - 1) / w.slice)",
        "ranks(share_of(w))",
    ),
    "bulk: no credit in attention": (
        IDLE,
        "attention",
        "    exchange.wait_for_room();\n    if (alone)",
        "    if (alone)",
    ),
    "bulk: no credit from attention": (IDLE, "attention", "    exchange.release();\n", ""),
    # barriers of a block
    "copies: tokens where warps left sums": (
        IDLE,
        "attention",
        "    sync_computing();  // the next tile's tokens come where the warps left this\n",
        "",
    ),
    "copies: sums where queries lie": (
        IDLE,
        "attention",
        "DEVICE void leave(const Block& block, const Warp& found) {\n    sync_computing();\n",
        "DEVICE void leave(const Block& block, const Warp& found) {\n",
    ),
    "copies: sums before all warps have left theirs": (
        IDLE,
        "attention",
        "d, block.lane);\n    sync_computing();\n",
        "d, block.lane);\n",
    ),
    "copies: keys where a product's sums lie": (
        IDLE,
        "attention",
        "    sync_computing();  // a product's sums may still be read where keys will lie\n",
        "",
    ),
    # whatever the tile before has left
    "bulk after FORGET: attention past the last column": (
        OVER_END,
        "attended",
        "    clear_past_end(block, w, all, span, to);\n",
        "",
    ),
    "bulk after FORGET: columns past the last": (
        OVER_END,
        "stage",
        "if (offset(p) >= span_ || token",
        "if (!inside(p) || token",
    ),
}
"""Where it shows, one of ATTENTION; then as MUTANTS. After FORGET: of a kernel that has been changed so already."""


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


@needs_compiler
@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_the_emulation_sees_faults_in_attention(name: str, tmp_path: Path) -> None:
    """In words or actions, of launches that follow each other."""
    variant, (where, *change) = name.partition(":")[0].split()[0], ATTENTION_MUTANTS[name]
    case = attention_case(where)
    schedule = attention_schedule(where, case.shape, DEVICES[variant])
    packed, twin = pack(case.folded, schedule), case.twin(schedule, torch.bfloat16)
    want = twin.run()
    if "FORGET" in name:
        changed_kernels(tmp_path, *FORGET)
    run, state = Emulator(variant, tmp_path, changed_kernels(tmp_path, *change)), State(schedule)
    try:
        for seed in range(8):
            result = run(schedule, packed, *case.given(), seed=seed, state=state, limit_ns=LIMIT)
            if not case.error(result.actions, want) < 2**-5 or not state.error(twin, seed % 3) < (2**-6,):
                return
    except RuntimeError:
        return
    pytest.fail("nothing is wrong")
