"""The one-launch action head without its kernel: the twin against the model's head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from head_case import A100, CLUSTERS, DEAR, DEVICES, H200, SIZES, SMALL, Case, planned, tiles_of, tiny
from head_faults import changed
from head_ways import all_ways, sound
from torch import Tensor

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, Schedule, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.schedule import (
    NONE,
    PADDED_TOKENS,
    RANKS,
    WARPS,
    Attend,
    Epilogue,
    Product,
)
from dit4dit.engine.action_ode.sizes import query_rows, warp_keys
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.weights import pack
from dit4dit.model.flow import GuidanceTensors, prefix_weights

HORIZONS, BATCHES, STEPS = (8, 16, 50), (1, 2, 3, 4), (1, 2, 4, 8)


def request(horizon: int, batch: int, steps: int) -> tuple[Case, int]:
    """(one rank takes the features' keys in more than one go, of several ranks some have none; blocks of a team)"""
    return Case(tiny(horizon), batch, context=150, steps=steps), RANKS[(batch + STEPS.index(steps)) % len(RANKS)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_twin_is_the_head(horizon: int, batch: int, steps: int) -> None:
    """9, 17 and 51 tokens."""
    case, ranks = request(horizon, batch, steps)
    want = case.want()
    for schedule in all_ways(case, ranks):
        got = case.twin(schedule).run(torch.Generator().manual_seed(3))
        assert case.error(got, want) < 1e-5


def test_the_requests_reach_every_way_of_attention() -> None:
    """Of each number of tokens, in several groups of samples."""
    for horizon in HORIZONS:
        found = [all_ways(*request(horizon, batch, steps)) for batch in BATCHES for steps in STEPS]
        before, inside = ([schedules[which] for schedules in found] for which in (1, 2))
        for schedules, fused, contexts in ((before, False, (0, NONE)), (inside, True, (0,))):
            assert {(s.ranks, s.fused) for s in schedules} == {(ranks, fused) for ranks in RANKS}
            works = [t.work for s in schedules for t in s.decoded]
            for context in contexts:
                attends = [w for w in works if isinstance(w, Attend) and w.context == context]
                assert {w.share for w in attends} == set(RANKS[: 4 if fused or context == NONE else 3])
                assert any(w.keys <= w.slice * (w.share - 1) for w in attends), "a rank without keys"
            products = [w for w in works if isinstance(w, Product) and (w.attend or not fused)]
            assert {w.split for w in products} >= {1, 2}
            assert any(w.token for w in products)


@pytest.mark.parametrize("costs", [Costs(), DEAR], ids=["usual", "dear"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", SIZES)
def test_teams_of_every_size(size: str, ranks: int, costs: Costs) -> None:
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    want = case.want()
    for fused in sorted({False, not all(case.shape.blocks)}):
        schedule = sound(case, CLUSTERS, ranks, costs, fused)
        assert (schedule.ranks, schedule.teams, schedule.fused) == (ranks, CLUSTERS.teams(ranks), fused)
        assert case.error(case.twin(schedule).run(), want) < 1e-5


def test_the_sizes_reach_every_way_of_cutting() -> None:
    schedules = {
        name: [
            planned(size, Case(tiny(**config), **request).shape, device) for size, (config, request) in SIZES.items()
        ]
        for name, device in DEVICES.items()
    }
    for name, found in schedules.items():
        matrices = [matrix for schedule in found for matrix in schedule.matrices.values()]
        assert {schedule.padded_tokens for schedule in found} == {*PADDED_TOKENS}
        ranks = RANKS if name == "bulk" else (1,)
        assert {matrix.ranks for matrix in matrices} == {*ranks}
        assert {matrix.split for matrix in matrices} == {*ranks}
        assert {matrix.parts for matrix in matrices} >= {1, 2, 4}
        assert any(1 < matrix.split < matrix.ranks for matrix in matrices) == (name == "bulk")
        works = [tile.work for schedule in found for tile in schedule.decoded]
        products = [work for work in works if isinstance(work, Product)]
        assert {work.epilogue for work in products} == {*Epilogue}
        assert any(work.token for work in products)
        in_parts = [t for s in found for t in s.decoded if isinstance(t.work, Product) and t.work.slice > s.part]
        assert any(tile.work.norm for tile in in_parts)
        assert any(work.rows < work.tile_rows for work in products)
        assert {s.fused for s in found} == {False, name == "bulk"}
        inside = [(s, work) for s in found for t in s.decoded if isinstance(work := t.work, Product) and work.attend]
        assert {work.split for _, work in inside} == ({2, 4} if name == "bulk" else set())
        heads = [work for work in works if isinstance(work, Attend)]
        assert {work.share for work in heads} >= ({1, 2, 4} if name == "bulk" else {1})
        assert {work.context == NONE for work in heads if work.share > 1} == (
            {True, False} if name == "bulk" else set()
        )
        assert any(work.pairs > 1 for work in heads) == (name == "bulk")
        # the features come in panels; where a block has all of them a warp takes several
        several = any(rounds_of(s, t.work) > 1 for s in found for t in s.decoded if isinstance(t.work, Attend))
        assert several or name == "bulk"


def rounds_of(schedule: Schedule, w: Attend) -> int:
    """How often a warp takes keys."""
    panel = warp_keys(w.tokens, w.slice, schedule.shape.head_dim, w.context != NONE)
    return -(-w.slice // (panel * WARPS * 16 // query_rows(w.tokens)))


@pytest.mark.parametrize(
    "change",
    [
        {"interleave_self_attention": False},
        {"add_pos_embed": False},
        {"state_dim": None},
        {"num_layers": 1, "action_dim": 1, "action_horizon": 1},
        {"head_dim": 48, "num_heads": 2, "action_dim": 36},
        {"head_dim": 64, "num_heads": 1, "action_horizon": 63},
    ],
    ids=str,
)
def test_other_heads(change: dict[str, Any]) -> None:
    case = Case(tiny(**change), batch=2)
    want = case.want()
    for schedule in all_ways(case):
        assert case.error(case.twin(schedule).run(), want) < 1e-5


@pytest.mark.parametrize("horizon", [9, 16])
def test_a_request_without_state(horizon: int) -> None:
    case = Case(tiny(horizon), batch=3, prefix=False)
    assert case.shape.tokens == horizon
    want = case.want()
    for schedule in all_ways(case):
        assert case.error(case.twin(schedule).run(), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device, fused", [(A100, False), (H200, False), (H200, True)], ids=["a100", "h200", "fused"])
@pytest.mark.parametrize("size", ["dit_b", "dit_l"])
def test_true_sizes(size: str, device: Device, fused: bool) -> None:
    """True widths and the usual prices; DiT-B in its full depth where attention is part of products."""
    make = HeadConfig.dit_b if size == "dit_b" else HeadConfig.dit_l
    deep = size == "dit_b" and fused
    config = make(action_horizon=16, **({} if deep else {"num_layers": 2}))
    case = Case(config, batch=1, context=588, steps=4 if deep else 1)
    schedule = sound(case, device, costs=Costs(), fused=fused)
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, horizon, batch", [("dit_b", 50, 2), ("dit_b", 8, 4), ("dit_l", 50, 1), ("dit_l", 16, 3)]
)
def test_true_sizes_with_guidance(size: str, horizon: int, batch: int) -> None:
    make = HeadConfig.dit_b if size == "dit_b" else HeadConfig.dit_l
    case = Case(make(action_horizon=horizon, num_layers=2), batch, context=70, steps=2)
    guidance = guided(case)
    want = case.want(guidance)
    for fused in (False, True):
        schedule = sound(case, H200, costs=Costs(), fused=fused)
        assert case.error(case.twin(schedule, guidance=guidance).run(), want) < 1e-5


def guided(case: Case) -> GuidanceTensors:
    return GuidanceTensors(torch.randn_like(case.noise), prefix_weights("exp", 2, 6, case.config.action_horizon), 5.0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_guidance(horizon: int, steps: int) -> None:
    case = Case(tiny(horizon), batch=2, steps=steps)
    guidance = guided(case)
    want = case.want(guidance)
    for schedule in all_ways(case):
        got = case.twin(schedule, guidance=guidance).run(torch.Generator().manual_seed(steps))
        assert case.error(got, want) < 1e-5
    assert case.error(case.want(), want) > 1e-2


@pytest.mark.parametrize("ranks", RANKS)
def test_the_twin_in_bfloat16_is_as_near_as_pytorch(ranks: int) -> None:
    case = Case(tiny(16), batch=2, context=150, steps=4)
    want = case.want()
    most = 2 * case.error(case.want_in_bf16(), want)
    for schedule in all_ways(case, ranks):
        assert 1e-4 < case.error(case.twin(schedule, torch.bfloat16).run(), want) < most


def test_bfloat16_rounds_where_the_kernel_does() -> None:
    """Scaled activations before they are multiplied, attention's exponentials, and results: each number, not the whole alone."""
    case = Case(tiny(16), batch=2, context=150, steps=1)
    twin = case.twin(sound(case, CLUSTERS, 1), torch.bfloat16)
    twin.run()
    block = case.folded.blocks[0]

    def same(buffer: str, wanted: Tensor) -> float:
        return (twin.buffer(buffer, 0) == wanted.bfloat16()).float().mean().item()

    def projected(rounded: bool) -> Tensor:
        x, weight = twin.buffer("tokens", 0).float(), block.project.weight.bfloat16().float()
        scale, shift = 1 + block.norms[0].scale, block.norms[0].shift
        scaled = (x * scale).bfloat16().float() if rounded else x * scale
        centred = scaled @ weight.T - x.mean(1, keepdim=True) * (scale @ weight.T)
        inverse = (x.var(1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
        return centred * inverse + block.project.bias + shift @ weight.T

    def attended(rounded: bool) -> Tensor:
        heads = (2, -1, case.config.num_heads, case.config.head_dim)
        q = twin.buffer("0.project", 0).float().view(*heads).transpose(1, 2)
        k, v = case.given()[1].bfloat16().float()[..., : 2 * case.config.width].chunk(2, -1)
        k, v = (part.view(*heads).transpose(1, 2) for part in (k, v))
        scores = q @ k.transpose(2, 3) / case.config.head_dim**0.5
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        y = (p.bfloat16().float() if rounded else p) @ v / p.sum(-1, keepdim=True)
        return y.transpose(1, 2).reshape(-1, case.config.width)

    for buffer, wanted in (("0.project", projected), ("0.attended", attended)):
        assert same(buffer, wanted(True)) > 0.99
        assert same(buffer, wanted(False)) < 0.9


def test_attention_inside_a_product_rounds_like_attention_before_it() -> None:
    """Queries, keys and values are the same: so are the words that follow, but for the order of sums."""
    case = Case(tiny(16), batch=2, context=150, steps=1)
    twins = [case.twin(sound(case, CLUSTERS, 1, fused=fused), torch.bfloat16) for fused in (False, True)]
    for twin in twins:
        twin.run()
    for buffer in ("1.project", "1.out"):
        before, inside = (twin.buffer(buffer, 0) for twin in twins)
        assert (before == inside).float().mean() > 0.99, buffer


@pytest.mark.parametrize("device", [SMALL, CLUSTERS], ids=["blocks", "clusters"])
def test_fp8_weights_are_near(device: Device) -> None:
    case = Case(tiny(), batch=2)
    exact = plan(case.shape, device)
    case.shape = replace(case.shape, fp8=True)
    schedule = sound(case, device)
    assert case.error(case.twin(schedule).run(), case.want()) < 0.15
    assert schedule.weight_bytes < 0.75 * exact.weight_bytes


WRONG = {
    "another rank's weights": lambda w: {"weight": w.weight + w.rank_units},
    "slices too far apart": lambda w: {"rank_units": 0},
    "half of the columns": lambda w: {"columns": w.columns // 2},
    "no norm": lambda w: {"norm": 0},
    "no modulation": lambda w: {"modulation": NONE},
    "the first step's modulation": lambda w: {"modulation_step": 0},
    "the first step's constants": lambda w: {"constant_step": 0},
    "another row's sums": lambda w: {"sums": w.sums + 1},
    "another row's bias": lambda w: {"bias": w.bias + 1},
    "no activation": lambda w: {"epilogue": Epilogue.GELU},
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_record_shows(change: str) -> None:
    """The comparison with the model sees one tile of many that is wrong."""
    case = Case(tiny(), steps=2)
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=4)
    i = tiles_of(schedule, "1.project")[0]
    work = schedule.decoded[i].work
    assert isinstance(work, Product)
    got = case.twin(changed(schedule, i, **WRONG[change](work))).run()
    assert not case.error(got, case.want()) < 1e-4


def test_a_slice_that_a_rank_does_not_have_shows() -> None:
    """Of two ranks that share K the second takes the first's columns."""
    case = Case(tiny())
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=8)
    name = next(name for name, m in schedule.matrices.items() if m.columns > m.slice)
    packed = pack(case.folded, schedule, torch.float32)
    packed.matrices[name][0, 1] = packed.matrices[name][0, 0]
    got = Twin(schedule, packed, *case.given()).run()
    assert not case.error(got, case.want()) < 1e-4
