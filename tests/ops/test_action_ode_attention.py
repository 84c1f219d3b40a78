"""Attention of action_ode's kernel, run on a CPU: however heads, keys and columns are cut, and faults that it must see."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from emulator import FORGET, Emulator, State, built, changed_kernels, needs_compiler
from head_case import ATTENTION, DEVICES, SIZES, Case, attention_case, attention_schedule, planned, tiny

from dit4dit import ops
from dit4dit.engine.action_ode import schedule as definition
from dit4dit.engine.action_ode.program import OneLaunchHead, device_of
from dit4dit.engine.action_ode.schedule import NONE, RANKS, Attend
from dit4dit.engine.action_ode.sizes import query_rows, row_bytes, warp_keys
from dit4dit.engine.action_ode.validate import validate
from dit4dit.engine.action_ode.weights import pack
from dit4dit.engine.fold import fold_head

LIMIT = 4_000_000  # ns, of the emulation's clock


@needs_compiler
@pytest.mark.parametrize("variant", DEVICES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_its_twins(name: str, variant: str) -> None:
    """However it is cut, in a step and in the one that follows on the same words."""
    case = attention_case(name)
    schedule = attention_schedule(name, case.shape, DEVICES[variant])
    validate(schedule)
    packed, twin, state = pack(case.folded, schedule), case.twin(schedule, torch.bfloat16), State(schedule)
    want = twin.run()
    for launch in range(2):
        result = built(variant)(schedule, packed, *case.given(), seed=launch, state=state)
        assert result.status == [0, 0, 0, 0]
        assert state.error(twin, launch) < (2**-6,)
        assert case.error(result.actions, want) < 2**-5


@needs_compiler
@pytest.mark.parametrize("word,names", [("FORGET", [*ATTENTION]), ("FIRST_LAST", ["columns end inside heads of 64"])])
def test_what_a_right_kernel_does_not_mind(word: str, names: list[str], tmp_path: Path) -> None:
    """NaN in the staging memory where a tile begins: what a slice has past the last column is made zeros, not found so. And a
    head that comes after others.
    """
    device = DEVICES["bulk"]
    run = Emulator("bulk", tmp_path, changed_kernels(tmp_path, *BEFORE[word]))
    for name in names:
        case = attention_case(name)
        schedule = attention_schedule(name, case.shape, device)
        twin, state = case.twin(schedule, torch.bfloat16), State(schedule)
        twin.run()
        run(schedule, pack(case.folded, schedule), *case.given(), state=state)
        assert state.error(twin) < (2**-6,), name


def test_the_sizes_reach_every_way_of_attention() -> None:
    """Ranks that share a head, or have none, or no keys; columns of a product that end inside a head, or past the last one."""
    device = DEVICES["bulk"]
    schedules = [planned(name, Case(tiny(**c), **r).shape, device) for name, (c, r) in SIZES.items()]
    schedules += [attention_schedule(name, attention_case(name).shape, device) for name in ATTENTION]
    seen: set[tuple[str, object]] = set()
    for s in schedules:
        tokens, dim = s.shape.tokens, s.shape.head_dim
        for w in (tile.work for tile in s.decoded):
            if isinstance(w, Attend):
                cross = w.context != NONE
                each, groups = warp_keys(tokens, w.slice, dim, cross), definition.WARPS * 16 // query_rows(tokens)
                turns = [-(-min(w.slice, w.keys - first) // each) for first in range(0, w.keys, w.slice)]
                kind = "features" if cross else "tokens"
                found: dict[str, object] = {"share": w.share, "keys of a warp": each}
                found |= {
                    "a rank without a head": w.share * w.pairs < s.ranks,
                    "a rank without keys": len(turns) < w.share,
                }
                found["fewer turns than warps"] = min(turns) < groups
                found["more turns than warps"] = max(turns) > groups
                found["some turns fewer"] = min(turns) < max(turns)
                of_panel = definition.SLOT_BYTES // 2 // row_bytes(dim) // each
                found["several turns in one of several panels"] = 1 < of_panel < max(turns)
            elif w.attend:
                kind, samples = "inside", w.tokens // tokens
                ends = [min(first, w.columns) for first in range(0, w.slice * (w.split + 1), w.slice)]
                heads = [-(-end // dim) - first // dim for first, end in pairwise(ends) if first < end]
                found = {"split": w.split, "samples": samples, "rounds": samples * max(heads) > w.attend}
                found["inside a head"] = any(end % dim for end in ends)
                found["a part of one head"] = w.slice < dim
                found["past the last column"] = any(0 < end - first < w.slice for first, end in pairwise(ends))
                found["no column"] = len(set(ends)) < len(ends)
                found["rows of queries"] = query_rows(tokens)
            else:
                continue
            found["head_dim"] = dim
            seen |= {(f"{kind}: {name}", value) for name, value in found.items() if value is not False}
    wanted: dict[str, tuple[object, ...]] = {
        "tokens: share": (1, 2, 4, 8),
        "tokens: a rank without a head": (True,),
        "tokens: a rank without keys": (True,),
        "features: share": (1, 2, 4, 8),
        "features: keys of a warp": (16, 32, 48),
        "features: several turns in one of several panels": (True,),
        "features: a rank without a head": (True,),
        "features: a rank without keys": (True,),
        "features: fewer turns than warps": (True,),
        "features: more turns than warps": (True,),
        "features: some turns fewer": (True,),
        "features: head_dim": (16, 32, 48, 64),
        "inside: split": (1, 2, 4, 8),
        "inside: samples": (1, 2, 4),
        "inside: rounds": (True,),
        "inside: inside a head": (True,),
        "inside: a part of one head": (True,),
        "inside: past the last column": (True,),
        "inside: no column": (True,),
        "inside: rows of queries": (16, 32, 64),
        "inside: head_dim": (16, 32, 48, 64),
    }
    missing = {(name, value) for name, values in wanted.items() for value in values} - seen
    assert not missing


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cuts on tensor cores, and on clusters where the GPU has them and as much shared memory as they take."""
    found = device_of(torch.device("cuda"))
    bulk = DEVICES["bulk"]
    room = found.shared_memory >= bulk.shared_memory and all(found.teams(n) >= bulk.teams(n) for n in RANKS)
    like = bulk if room else DEVICES["copies"]
    case = attention_case(name, steps=4)
    schedule = attention_schedule(name, case.shape, replace(found, sms=like.sms, clusters=like.clusters))
    monkeypatch.setattr(OneLaunchHead, "schedule", lambda *_: schedule)
    half = copy.deepcopy(case.head).cuda().bfloat16()
    head = OneLaunchHead(fold_head(half, case.steps), case.config, case.steps)
    noise, context, prefix = case.given()
    given = noise.cuda(), context.cuda().bfloat16(), None if prefix is None else prefix.cuda().bfloat16()
    with torch.no_grad():
        plain = ops.action_ode(head, *given, backend="torch").cpu()
        got = [ops.action_ode(head, *given, backend="cuda") for _ in range(20)]
        head.check()
    assert case.error(got[0].cpu(), case.want()) <= 2 * case.error(plain, case.want())
    assert all(torch.equal(actions, got[0]) for actions in got)


# -- faults ----------------------------------------------------------------------------------------------------

BEFORE = {
    "FORGET": FORGET,
    "FIRST_LAST": (  # the first head of a product comes when all others are done: what they do to it shows
        "attended",
        "        for (int task = block.warp; task < count * all.query_tiles; task += kWarps) {\n",
        "        for (int turn = 0; turn < 2; ++turn, sync_computing())\n"
        "        for (int task = block.warp; task < count * all.query_tiles; task += kWarps) {\n"
        "            if ((task > 0) == (turn > 0)) continue;\n",
    ),
}
"""Changes that a right kernel does not mind, and a wrong one does."""
INSIDE, SLOTS = "columns end inside heads of 64", "four samples, few slots"
OVER_END, ROUNDS = "slices past the end, two samples", "all columns in several rounds"
SEVERAL = "columns end inside heads of 64"
IDLE, PANELS, FEW_KEYS = "ranks without a head", "panels of 48 keys", "columns inside heads of 48"
MUTANTS = {
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
    "bulk after FIRST_LAST: columns behind the last": (INSIDE, "attended", " || all.begin + column >= all.end", ""),
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
        "        if (next >= mine.padded() - mine.panel) leave_panel(block, ring);\n"
        "        else ring.advance(block.launch.slots);\n",
    ),
    "bulk: the panel of another warp": (
        PANELS,
        "attention",
        "int next = mine.group(block.warp) *",
        "int next = (mine.group(block.warp) + 1) *",
    ),
    "bulk: a warp's panels too far apart": (
        PANELS,
        "attention",
        "next += mine.padded())",
        "next += mine.padded() + mine.per_warp)",
    ),
    "bulk: a warp's place is not carried on": (PANELS, "attention", "        next -= mine.panel;\n", ""),
    "bulk: a warp takes the panel's first keys": (
        SEVERAL,
        "attention",
        "(block.warp), next, mine",
        "(block.warp), 0, mine",
    ),
    "bulk: a warp takes the panel's first values": (SEVERAL, "attention", "gather(v, next,", "gather(v, 0,"),
    "bulk: values behind one warp's keys": (
        SEVERAL,
        "attention",
        "v{k.row(mine.panel, 0)",
        "v{k.row(mine.per_warp, 0)",
    ),
    "bulk: the last keys are not fetched": (SEVERAL, "shares", "done + rows < keys)", "done + rows + per_warp < keys)"),
    "copies: keys behind the last": (PANELS, "weights", "row < last ? row : last", "row < last ? row : row"),
    "bulk: keys behind the last": (PANELS, "weights", "row < last ? row : last", "row < last ? row : row"),
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
    "bulk: keys that pad a panel": (
        PANELS,
        "attention",
        "mine.per_warp, mine.keys - done,",
        "mine.per_warp, next + mine.per_warp,",
    ),
    "bulk: keys for values": (PANELS, "weights", "+ value * launch.width", ""),
    "bulk: panels that have no room": (PANELS, "shares", "> most) per_warp -= 16", "> most) per_warp -= 0"),
    "copies: scores before all queries are there": (
        PANELS,
        "attention",
        "    sync_computing();\n    Warp found;\n    int next",
        "    Warp found;\n    int next",
    ),
    "bulk: features of the first head": (IDLE, "weights", "mine.head * launch.head_dim", "0"),
    "bulk: features of the first sample": (
        IDLE,
        "weights",
        "(mine.sample * static_cast<std::int64_t>(launch.context_tokens) + mine.first)",
        "static_cast<std::int64_t>(mine.first)",
    ),
    # of the tokens
    "bulk: words of the first sample": (
        IDLE,
        "shares",
        "(sample * w.tokens + token)",
        "(sample * 0 * w.tokens + token)",
    ),
    "bulk: words of the first head": (IDLE, "shares", " + head * (block.launch", " + 0 * head * (block.launch"),
    "copies: scores before all keys are there": (
        IDLE,
        "attention",
        "    sync_computing();\n    const int lane",
        "    const int lane",
    ),
    "bulk: tokens that only pad": (
        IDLE,
        "attention",
        "mine.per_warp, mine.keys, inverse",
        "mine.per_warp, 64, inverse",
    ),
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
"""Where it shows, one of ATTENTION; the file; what is there, once; what is there instead. After a word: one of BEFORE as well."""


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_sees_faults_in_attention(name: str, tmp_path: Path) -> None:
    """In words or actions, of launches that follow each other."""
    variant, (where, *change) = name.partition(":")[0].split()[0], MUTANTS[name]
    case = attention_case(where)
    schedule = attention_schedule(where, case.shape, DEVICES[variant])
    packed, twin = pack(case.folded, schedule), case.twin(schedule, torch.bfloat16)
    want = twin.run()
    for before in (change for word, change in BEFORE.items() if f"after {word}:" in name):
        changed_kernels(tmp_path, *before)
    run, state = Emulator(variant, tmp_path, changed_kernels(tmp_path, *change)), State(schedule)
    try:
        for seed in range(16):
            result = run(schedule, packed, *case.given(), seed=seed, state=state, limit_ns=LIMIT)
            if not case.error(result.actions, want) < 2**-5 or not state.error(twin, seed % 3) < (2**-6,):
                return
    except RuntimeError:
        return
    pytest.fail("nothing is wrong")
