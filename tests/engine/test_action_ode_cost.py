"""Predictions of the one-launch head's time, from counts that are made here from the schedule."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from head_case import DEAR, tiny
from head_plans import H200, SHAPES, products, released, stages

from dit4dit.engine.action_ode import Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import PARTS, Costs, fetched_bytes, head_us, stage_us, tile_us, weights_us
from dit4dit.engine.action_ode.schedule import NONE, SLOT_BYTES, WARPS, WEIGHT_UNIT, Attend, Product

RATES = ("memory", "flat_rate", "sm_stream")


def only(**costs: float) -> Costs:
    return Costs(**{**{field.name: math.inf if field.name in RATES else 0.0 for field in fields(Costs)}, **costs})


def test_predictions_add_up() -> None:
    for name in ("robocasa_gr1", "51 tokens", "dit_b, 50 x 4, fp8"):
        schedule = plan(SHAPES[name], H200)
        found = head_us(schedule)
        assert set(found) == {*PARTS, "chain", "weights", "total"}
        assert found["chain"] == pytest.approx(sum(found[part] for part in PARTS))
        assert found["total"] == pytest.approx(3 + max(found["chain"], found["weights"]))
        assert found["chain"] == pytest.approx(
            schedule.shape.steps * sum(sum(parts.values()) for _, parts in stage_us(schedule))
        )


# -- counts of one tile on the rank with most of it, made from its numbers by going through what the kernel goes through


def padded_queries(tokens: int) -> int:
    return next(n for n in (16, 32, 64) if n >= tokens)


def heads_inside(schedule: Schedule, w: Product) -> int:
    """Heads of all samples whose attention the rank with most of them works out for its columns."""
    of_rank: dict[int, set[int]] = defaultdict(set)
    for column in range(w.columns):
        of_rank[column // w.slice].add(column // schedule.shape.head_dim)
    return max(map(len, of_rank.values())) * (w.tokens // schedule.shape.tokens)


def turns(schedule: Schedule, w: Product) -> list[int]:
    """Heads of samples that are staged together, one turn after the other."""
    left, found = heads_inside(schedule, w), []
    while left:
        found.append(min(left, w.attend))
        left -= found[-1]
    return found


def staged_parts(schedule: Schedule, w: Product) -> int:
    """How often activations are staged: all at once, or as many whole panels as there is room for."""
    if w.slice <= schedule.part:
        return 1
    return -(-w.slice // (schedule.part // (32 * w.panel_steps) * 32 * w.panel_steps))


def exchanges(_: Schedule, w: Product | Attend) -> float:
    return (w.split if isinstance(w, Product) else w.share) > 1


def barriers(schedule: Schedule, w: Product | Attend) -> float:
    if isinstance(w, Attend):
        return 5
    return 2 * staged_parts(schedule, w) + (2 * len(turns(schedule, w)) if w.attend else 0)


def kilobytes_read(schedule: Schedule, w: Product | Attend) -> float:
    """Of what other teams wrote."""
    row = 2 * schedule.shape.head_dim
    if isinstance(w, Attend):
        return (w.tokens + (2 * min(w.slice, w.keys) if w.context == NONE else 0)) * row / 1024
    if w.attend:
        return sum(3 * schedule.shape.tokens * row for _ in range(heads_inside(schedule, w))) / 1024
    columns = Counter(column // w.slice for column in range(w.columns))
    return max(columns.values()) * w.tokens * 2 / 1024


def kilobytes_received(schedule: Schedule, w: Product | Attend) -> float:
    if isinstance(w, Attend):
        with_keys = sum(first < w.keys for first in range(0, w.share * w.slice, w.slice))
        others = (
            with_keys * (w.share - 1) / w.share
        )  # of all ranks in the mean: one without keys hears of all that have some
        return others * w.tokens * (schedule.shape.head_dim / w.share * 4 + 8) / 1024
    own, pairs = w.tile_rows // schedule.ranks, -(-w.tokens // 2)
    return (w.split - 1) * (w.parts * own * pairs * 2 * 4 + w.tokens * 8) / 1024


def multiplications(schedule: Schedule, w: Product | Attend) -> float:
    """Of 16 x 32 weights with 24 tokens, by the warp with most of them: a product's own, without attention."""
    assert isinstance(w, Product)
    done: Counter[tuple[int, int]] = Counter()
    for group in range(w.tile_rows * w.split // schedule.ranks // 16):
        for step in range(w.slice // 32):
            done[group % (WARPS // w.parts), step % w.panel_steps % w.parts] += 1
    return max(done.values()) * schedule.padded_tokens / 24


def scores(schedule: Schedule, w: Product | Attend) -> float:
    """The same of attention: scores and values are two products of 16 queries, some keys and the columns of a head."""
    of_key = 2 * 16 * schedule.shape.head_dim / (16 * 32 * 24)
    if isinstance(w, Product):
        rows = padded_queries(schedule.shape.tokens)
        return sum(most_rows(turn * rows // 16) for turn in turns(schedule, w)) * rows * of_key if w.attend else 0
    keys, taken = panels(schedule, w)
    return keys * taken * of_key


def most_rows(rows: int) -> int:
    """Of the warp with most, of so many rows of queries."""
    return max(Counter(row % WARPS for row in range(rows)).values())


def panels(schedule: Schedule, w: Attend) -> tuple[int, int]:
    """(keys of a panel, panels of the warp with most)."""
    groups = WARPS // (padded_queries(w.tokens) // 16)
    keys = next(n for n in (16, 32, 48, 64) if n == 64 or n * groups >= w.slice)
    if w.context != NONE and 2 * keys * (2 * schedule.shape.head_dim + 16) > SLOT_BYTES:
        keys = 48
    return keys, -(-w.slice // (keys * groups))


def epilogues(schedule: Schedule, w: Product | Attend) -> float:
    """Of 256 threads, two results each; 32 planes of sums cost as much as all else."""
    assert isinstance(w, Product)
    passes = math.ceil(w.tile_rows // schedule.ranks * schedule.padded_tokens / 2 / 256)
    return 1 + passes * w.split * w.parts / 32


def epilogues_of_attention(schedule: Schedule, w: Product | Attend) -> float:
    if isinstance(w, Attend):
        return 1
    rows = padded_queries(schedule.shape.tokens) // 16
    return sum(most_rows(turn * rows) for turn in turns(schedule, w)) if w.attend else 0


def busy_blocks(schedule: Schedule, works: list[tuple[int, Product | Attend]]) -> int:
    """Blocks with a part of the first tile of their team in a stage."""
    found = 0
    for _, w in dict(reversed(works)).items():
        if isinstance(w, Product):
            found += schedule.ranks
        else:
            found += w.pairs * sum(rank * w.slice < w.keys for rank in range(w.share))
    return found


def most(schedule: Schedule, count: Callable[[Schedule, Product | Attend], float], kind: type | None = None) -> float:
    """Of all stages of all steps, in each of the team with most."""
    total = 0.0
    for works in stages(schedule).values():
        of_team: dict[int, float] = defaultdict(float)
        for team, w in works:
            of_team[team] += count(schedule, w) if kind is None or isinstance(w, kind) else 0
        total += max(of_team.values())
    return schedule.shape.steps * total


def heads_of_48() -> Schedule:
    """A rank's 128 columns are of four heads, or of three."""
    shape = head_shape(
        tiny(num_layers=2, num_heads=10, head_dim=48, action_horizon=16), batch=2, context=90, prefix=True, steps=2
    )
    found = plan(shape, H200, DEAR, ranks=4, group=2, fused=True)
    assert found.matrices["1.out"].slice == 128
    return found


COUNTED = {
    "heads of 48": heads_of_48,
    "GR1": lambda: plan(released("robocasa_gr1"), H200),
    "GR1, batch 4": lambda: plan(released("robocasa_gr1", batch=4), H200),
    "G1, 2 ranks": lambda: plan(released("unitree_g1"), H200, ranks=2, fused=True),
    "LIBERO, batch 4, 1 rank": lambda: plan(released("libero", batch=4), H200, ranks=1),
    "LIBERO, batch 4, samples together": lambda: plan(released("libero", batch=4), H200, group=4, fused=True),
}


@pytest.mark.parametrize("name", COUNTED)
def test_each_cost_is_counted_where_it_arises(name: str) -> None:
    """Against counts made here from the schedule's numbers."""
    schedule = COUNTED[name]()
    steps, of_stages = schedule.shape.steps, stages(schedule)

    def us(**costs: float) -> dict[str, float]:
        found = head_us(schedule, only(**costs))
        assert found["chain"] == pytest.approx(sum(found[part] for part in PARTS))
        return found

    assert us(start=2.0)["total"] == 2.0
    assert us(hop=1.0)["synchronisation"] == us(hop=1.0)["total"] == len(of_stages) * steps
    assert us(exchange=1.0)["synchronisation"] == us(exchange=1.0)["chain"] == most(schedule, exchanges)
    assert us(sync=1.0)["synchronisation"] == us(sync=1.0)["chain"] == most(schedule, barriers)
    assert us(inbox=1.0)["synchronisation"] == pytest.approx(most(schedule, kilobytes_received))
    assert us(inbox=1.0)["chain"] == us(inbox=1.0)["synchronisation"]
    assert us(step=1.0)["products"] == pytest.approx(most(schedule, multiplications, Product))
    assert us(step=1.0)["attention"] == pytest.approx(most(schedule, scores))
    assert us(epilogue=1.0)["epilogues"] == pytest.approx(most(schedule, epilogues, Product))
    assert us(epilogue=1.0)["attention"] == most(schedule, epilogues_of_attention)
    assert us(read=1.0)["staging"] == pytest.approx(most(schedule, kilobytes_read, Product))
    assert us(read=1.0)["attention"] == pytest.approx(most(schedule, kilobytes_read, Attend))
    # one KB on each block that works is as many as there are: 5 TB/s are 5e6 bytes a microsecond
    at_once = sum(
        busy_blocks(schedule, works)
        * max(sum(kilobytes_read(schedule, w) for t, w in works if t == team) for team, _ in works)
        for works in of_stages.values()
    )
    assert us(flat_rate=5.0)["chain"] == pytest.approx(steps * at_once * 1024 / 5e6)


@pytest.mark.parametrize("name", COUNTED)
def test_weights_are_counted_by_what_limits_them(name: str) -> None:
    """All of them once from memory; what all blocks read, keys and values of features too, from L2; and what one SM reads."""
    schedule = COUNTED[name]()
    steps = schedule.shape.steps
    of_rank: Counter[tuple[int, int]] = Counter()
    for _, team, w in products(schedule):
        for rank in range(schedule.ranks):
            of_rank[team, rank] += w.rank_units * WEIGHT_UNIT
    for works in stages(schedule).values():
        for team, w in works:
            if not isinstance(w, Attend) or w.context == NONE:
                continue
            keys = panels(schedule, w)[0]
            for rank in range(w.pairs * w.share):
                if rank % w.share * w.slice < w.keys:  # each panel is full, of keys and of values
                    of_rank[team, rank] += -(-w.slice // keys) * keys * 2 * 2 * schedule.shape.head_dim

    def us(**costs: float) -> float:
        return head_us(schedule, only(**costs))["weights"]

    once = WEIGHT_UNIT * sum(m.units for m in schedule.matrices.values())
    assert us(memory=1e-6) == pytest.approx(steps * once)
    assert us(sm_stream=1e-6) == pytest.approx(steps * max(of_rank.values()))
    assert us(flat_rate=1e-6) == pytest.approx(steps * sum(of_rank.values()))
    assert us() == 0


def test_weights_take_as_long_as_what_takes_longest() -> None:
    costs = only(memory=4.0, flat_rate=5.0, sm_stream=0.05)
    assert weights_us(8e6, 8e6, 0, costs) == pytest.approx(2.0)
    assert weights_us(8e6, 15e6, 0, costs) == pytest.approx(3.0)
    assert weights_us(8e6, 15e6, 0.2e6, costs) == pytest.approx(4.0)


def test_few_blocks_read_as_fast_as_their_sms_and_all_as_fast_as_l2() -> None:
    costs = Costs(read=0.02, flat_rate=5.0)
    assert costs.kilobyte(1) == costs.kilobyte(97) == 0.02
    assert costs.kilobyte(100) == pytest.approx(100 * 1024 / 5e6)


@pytest.mark.parametrize("batch", [3, 4])
def test_a_stage_takes_what_the_team_with_most_of_it_takes(batch: int) -> None:
    small = replace(H200, shared_memory=160 << 10)  # where teams have several tiles of a stage
    schedule = plan(released("unitree_g1", batch=batch), small, ranks=4, group=1)
    costs = only(exchange=1.0, hop=10.0, read=0.01, flat_rate=1.0)
    several = 0
    for name, parts in stage_us(schedule, costs):
        works = stages(schedule)[name]
        mine: dict[int, list[float]] = defaultdict(list)
        for team, work in works:
            mine[team].append(sum(tile_us(schedule, work, busy_blocks(schedule, works), costs).values()))
        assert sum(parts.values()) == pytest.approx(10 + max(map(sum, mine.values())))
        several += max(map(len, mine.values())) > 1
    assert several, "or one tile would do as well"


@pytest.mark.parametrize("name", ["unitree_g1", "libero"])
def test_it_does_not_matter_which_team_has_most(name: str) -> None:
    """Of one sample a product each, or of two and one."""
    schedule = plan(released(name, batch=3), H200)
    tokens = {w.tokens for _, _, w in products(schedule)}
    assert tokens == ({51} if name == "unitree_g1" else {9, 18})
    teams = np.split(schedule.tiles, schedule.first_tile[1:-1])[::-1]
    ends = np.cumsum([len(tiles) for tiles in teams], dtype=np.int32)
    backwards = replace(schedule, tiles=np.concatenate(teams), first_tile=np.append(np.int32(0), ends))
    assert head_us(backwards) == head_us(schedule)


def test_keys_and_values_of_features_come_with_the_weights() -> None:
    """By hand: of LIBERO's 784 keys seven of eight ranks have 112, which are seven panels of 16 for a rank's eight warps."""
    schedule = plan(released("libero"), H200)
    cross = next(w for t in schedule.decoded if isinstance(w := t.work, Attend))
    assert (cross.share, cross.slice) == (8, 112)
    # one rank reads the queries of nine tokens, and nothing else that another team writes
    assert tile_us(schedule, cross, 96, only(read=1.0))["attention"] == 9 * 64 * 2 / 1024
    panel = 16 * 2 * 64 * 2
    assert fetched_bytes(schedule, cross) == 7 * panel
    weights = 4 * schedule.weight_bytes
    # four steps, eight blocks of the head, twelve heads, seven ranks
    assert head_us(schedule, only(flat_rate=1e-6))["weights"] == weights + 4 * 8 * 12 * 7 * 7 * panel


def test_attention_inside_a_product_by_hand() -> None:
    """GR1's 96 columns of a rank are of two heads of 64; 17 tokens are two rows of 16 queries, 32 padded keys."""
    schedule = plan(released("robocasa_gr1"), H200)
    inside = next(w for m, _, w in products(schedule) if w.attend)
    assert (inside.split, inside.slice, inside.attend) == (8, 96, 2)
    plain = inside._replace(attend=0)

    def more(part: str, **costs: float) -> float:
        with_it, without = (tile_us(schedule, w, 96, only(**costs))[part] for w in (inside, plain))
        return with_it - without

    assert more("staging", read=1.0) == pytest.approx((2 * 3 * 17 * 64 - 96 * 17) * 2 / 1024)
    assert more("synchronisation", sync=1.0) == 2
    assert more("attention", epilogue=1.0) == 1, "four rows of queries are one round of eight warps"
    assert more("attention", step=1.0) == pytest.approx(2 * 16 * 32 * 64 / (16 * 32 * 24))
    assert more("products", step=1.0) == more("epilogues", epilogue=1.0) == more("synchronisation", inbox=1.0) == 0
    one_at_a_time = inside._replace(attend=1)
    assert tile_us(schedule, one_at_a_time, 96, only(sync=1.0)) == tile_us(schedule, inside, 96, only(sync=1.0)) | {
        "synchronisation": 6
    }


def test_columns_past_the_matrix_are_not_read() -> None:
    """36 actions are 48 columns, of which no rank reads 64."""
    schedule = plan(released("unitree_g1"), H200)
    encode = next(w for m, _, w in products(schedule) if m.name == "encode")
    assert (encode.columns, encode.slice) == (48, 64)
    assert tile_us(schedule, encode, 1, only(read=1.0))["staging"] == 48 * 51 * 2 / 1024
