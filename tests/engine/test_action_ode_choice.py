"""What the planner of the one-launch head chooses: nothing else is predicted to take less."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from head_faults import planner
from head_plans import DEVICES, H200, PRESETS, SHAPES, products, released

from dit4dit.engine.action_ode import HeadShape, plan
from dit4dit.engine.action_ode.cost import Costs, head_us, own_attention_us, product_us, stage_us, staged_columns
from dit4dit.engine.action_ode.cuts import AttendCut, choose, group_sizes
from dit4dit.engine.action_ode.schedule import (
    RANKS,
    WARPS,
    MatrixPlan,
)
from dit4dit.engine.action_ode.sizes import (
    own_at_once,
    own_attention_bytes,
    product_staging,
    sums_bytes,
    warp_tiles,
)
from dit4dit.errors import ConfigError


def predictions(shape: HeadShape) -> dict[tuple[int, int, bool], float]:
    """Of all sizes of teams and of groups, and with attention to the tokens inside products or before them."""
    found = {}
    for way in product(RANKS, group_sizes(shape), (False, True)):
        ranks, group, fused = way
        try:
            found[way] = head_us(plan(shape, H200, ranks=ranks, group=group, fused=fused))["total"]
        except ConfigError:  # columns of many tokens' attention have to be staged at once
            assert fused
    assert len(found) > 4
    return found


@pytest.mark.parametrize("name", [*PRESETS, "dit_l, 16 x 3", "51 tokens", "dit_b, 8 x 2, fp8"])
def test_the_way_with_the_least_prediction_is_taken(name: str) -> None:
    shape = SHAPES[name]
    got, found = plan(shape, H200), predictions(shape)
    way = got.ranks, max(w.tokens for *_, w in products(got)) // shape.tokens, got.fused
    assert head_us(got)["total"] == found[way] == min(found.values())


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_more_samples_are_planned_well(name: str, batch: int) -> None:
    """To 0.2 %: where weights take as long as the chain, the planner counts them as if one team had most of all kinds."""
    shape = released(name, batch)
    assert head_us(plan(shape, H200))["total"] <= 1.002 * min(predictions(shape).values())


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_attention_is_inside_products_where_that_is_predicted_to_be_better(batch: int) -> None:
    shape = released("robocasa_gr1", batch)
    ways = {fused: head_us(plan(shape, H200, fused=fused))["total"] for fused in (False, True)}
    assert plan(shape, H200).fused == (ways[True] < ways[False])
    # and nowhere before Hopper, nor where no block attends to its own tokens
    assert not plan(shape, DEVICES["a100"]).fused
    assert not plan(replace(shape, blocks=(True,) * 16), H200).fused


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", [*PRESETS, "9 tokens, batch 4"])
@pytest.mark.parametrize("ranks", RANKS)
def test_no_other_cut_of_a_matrix_is_predicted_to_be_better(name: str, ranks: int, fused: bool) -> None:
    """In the shared memory that was chosen, with the heights of tiles that the residual stream has."""
    shape, costs = SHAPES[name], Costs(memory=1e6, sm_stream=1e6, flat_rate=1e6)  # so that weights never decide
    schedule = plan(shape, H200, costs, ranks=ranks, fused=fused)
    works, padded = [w for *_, w in products(schedule)], schedule.padded_tokens
    attends = {m.name for m, _, w in products(schedule) if w.attend}
    groups, tokens = len({w.token for w in works}), max(w.tokens for w in works)
    samples, dim = tokens // shape.tokens, shape.head_dim

    def price(m: MatrixPlan) -> float:
        tiles = m.row_tiles * groups
        blocks = ranks * min(schedule.teams, tiles)
        us = sum(product_us(m, ranks, tokens, padded, schedule.part, blocks, costs))
        if m.name in attends:
            at_once = own_at_once(m, shape.tokens, samples, dim)
            us += sum(own_attention_us(m, shape.tokens, samples, dim, at_once, blocks, costs))
        return -(-tiles // schedule.teams) * us

    def behind(m: MatrixPlan) -> int:
        if m.name not in attends:
            return 0
        return own_at_once(m, shape.tokens, samples, dim) * own_attention_bytes(shape.tokens, dim)

    def possible(m: MatrixPlan) -> bool:
        return (
            m.groups <= warp_tiles(padded) * (WARPS // m.parts)
            and staged_columns(m, schedule.part) > 0
            and (m.slice <= schedule.part or m.name not in attends)
            and (m.ranks == 1 or sums_bytes(padded, m) <= schedule.inbox)
            and product_staging(padded, schedule.part, m, behind(m)) <= schedule.staging
            # the last tile has rows for all parts of ranks
            and m.rows - (m.row_tiles - 1) * m.tile_rows > m.tile_rows - m.rank_rows
        )

    for m in schedule.matrices.values():
        assert possible(m)
        shared = m.name.split(".")[-1] in ("encode_out", "out", "mlp_out")
        for split in (n for n in RANKS if n <= ranks):
            for tile_rows in [m.tile_rows] if shared else range(16 * ranks // split, 2049, 16 * ranks // split):
                for parts in (1, 2, 4, 8):
                    other = replace(m, split=split, tile_rows=tile_rows, parts=parts)
                    if tile_rows * split % (16 * ranks) == 0 and possible(other):
                        assert price(m) <= price(other) + 1e-9, other


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name, batch", [("robocasa_gr1", 1), ("libero", 3), ("unitree_g1", 2)])
def test_no_other_attention_is_predicted_to_be_better(
    name: str, batch: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of schedules that differ in how many ranks share a head, and in how many of its keys each of them takes."""
    shape = replace(released(name, batch), blocks=(True, False))
    cuts = choose(shape, H200, Costs(), ranks, None, False)

    def attention_us(own: AttendCut, features: AttendCut) -> tuple[float, float]:
        monkeypatch.setattr(planner, "choose", lambda *given: replace(cuts, attention=(own, features)))
        found = {stage: sum(parts.values()) for stage, parts in stage_us(plan(shape, H200, ranks=ranks))}
        return found["1.attended"], found["0.attended"]

    least = attention_us(*cuts.attention)
    seen = set()
    for share in (n for n in RANKS if n <= ranks):
        for active in range(1, share + 1):
            own, features = (AttendCut(share, -(-keys // active)) for keys in (shape.tokens, shape.context))
            others = attention_us(own, features)
            seen.add(others)
            assert least[0] <= others[0] + 1e-9, own
            assert least[1] <= others[1] + 1e-9, features
    assert len(seen) > 1 or ranks == 1


def test_the_plan_follows_the_costs() -> None:
    shape = released("robocasa_gr1")
    assert plan(shape, H200).ranks == 8
    # no exchange, but where there are too few rows for all ranks
    dear = plan(shape, H200, Costs(exchange=50.0), ranks=8)
    assert all(m.split == 1 for name, m in dear.matrices.items() if name != "decode_out")
    assert plan(shape, H200, Costs(exchange=50.0)).ranks == 1
    # reading is all: every rank takes as few columns as it can
    dear = plan(shape, H200, Costs(read=10.0), ranks=8)
    assert all(m.split == 8 for name, m in dear.matrices.items() if name != "encode")
    # products are all: more parts than where they cost nothing
    slow, fast = (plan(shape, H200, Costs(step=step), ranks=8).matrices.values() for step in (5.0, 0.0))
    assert sum(m.parts for m in slow) > sum(m.parts for m in fast)


def test_weights_that_take_longer_than_the_chain_are_spread_out() -> None:
    shape = released("robocasa_gr1")
    slow = Costs(sm_stream=0.003)
    by_chain, by_weights = (head_us(plan(shape, H200, costs, ranks=8), slow) for costs in (Costs(), slow))
    assert by_chain["total"] == 3 + by_chain["weights"]
    assert by_weights["total"] < 0.97 * by_chain["total"]
