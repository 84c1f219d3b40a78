"""Predictions of the one-launch head's time, from counts that are made here from the schedule."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields, replace

import numpy as np
import pytest
from head_plans import H200, SHAPES, products, released, stages

from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.cost import PARTS, Costs, head_us, stage_us, tile_us
from dit4dit.engine.action_ode.schedule import NONE, WARPS, WEIGHT_UNIT, Attend, MatrixPlan


def only(**costs: float) -> Costs:
    return Costs(**{**{field.name: 0.0 for field in fields(Costs)}, "memory": 1e99, "sm_stream": 1e99, **costs})


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


def test_each_cost_is_counted_where_it_arises() -> None:
    """Against counts made here from the schedule's numbers; GR1 has at most one tile a team and stage."""
    schedule = plan(released("robocasa_gr1"), H200)
    matrices, steps = schedule.matrices.values(), 4

    def us(**costs: float) -> dict[str, float]:
        return head_us(schedule, only(**costs))

    exchanges = sum(m.split > 1 for m in matrices) + 16
    assert us(start=2.0)["total"] == 2.0
    assert us(hop=1.0)["synchronisation"] == us(hop=1.0)["total"] == 84 * steps
    assert us(exchange=1.0)["synchronisation"] == exchanges * steps
    assert us(epilogue=1.0)["attention"] == 16 * steps
    # 17 tokens of each column that a rank takes
    staged = sum(min(m.slice, m.columns) * 17 * 2 / 1024 for m in matrices)
    assert us(read=1.0)["staging"] == pytest.approx(steps * staged)
    sums = sum((m.split - 1) * (m.parts * m.own_rows * 18 * 4 + 17 * 8) / 1024 for m in matrices)
    attends = {w.slice: w for works in stages(schedule).values() for _, w in works if isinstance(w, Attend)}
    assert len(attends) == 2
    merged = sum(8 * (-(-w.keys // w.slice)) * 7 / 8 * 17 * (64 / 8 * 4 + 8) / 1024 for w in attends.values())
    assert us(inbox=1.0)["synchronisation"] == pytest.approx(steps * (sums + merged))
    assert us(step=1.0)["products"] == steps * sum(busiest_warp(m) for m in matrices)
    read = sum(w.rank_units for _, team, w in products(schedule) if team == 0) * WEIGHT_UNIT
    assert us(sm_stream=1e-6)["weights"] == steps * read
    every = sum(m.units for m in matrices) * WEIGHT_UNIT
    assert us(memory=1e-6)["weights"] == pytest.approx(steps * every)


def busiest_warp(m: MatrixPlan) -> int:
    """Row groups times steps of the warp that has most of them, by going through all of them."""
    done = Counter(
        {
            (group % (WARPS // m.parts), step % m.panel_steps % m.parts): 0
            for group in range(m.groups)
            for step in range(m.steps)
        }
    )
    for group in range(m.groups):
        for step in range(m.steps):
            done[group % (WARPS // m.parts), step % m.panel_steps % m.parts] += 1
    return max(done.values())


def test_a_stage_takes_what_the_team_with_most_of_it_takes() -> None:
    schedule = plan(released("unitree_g1", batch=4), H200)
    costs = only(exchange=1.0, hop=10.0)
    for name, parts in stage_us(schedule, costs):
        mine: dict[int, float] = defaultdict(float)
        for team, work in stages(schedule)[name]:
            mine[team] += sum(tile_us(schedule, work, costs).values())
        assert sum(parts.values()) == pytest.approx(10 + max(mine.values()))


def test_it_does_not_matter_which_team_has_most() -> None:
    schedule = plan(released("unitree_g1", batch=3), H200)
    teams = np.split(schedule.tiles, schedule.first_tile[1:-1])[::-1]
    ends = np.cumsum([len(tiles) for tiles in teams], dtype=np.int32)
    backwards = replace(schedule, tiles=np.concatenate(teams), first_tile=np.append(np.int32(0), ends))
    assert head_us(backwards) == head_us(schedule)


def test_features_are_fetched_while_the_query_is_on_its_way() -> None:
    schedule = plan(released("libero"), H200)
    works = [w for w in (t.work for t in schedule.decoded) if isinstance(w, Attend)]
    cross = next(w for w in works if w.context != NONE)
    keys = cross.slice * 64 * 2 * 2 / 1024
    query = 9 * 64 * 2 / 1024
    assert tile_us(schedule, cross, only(read=1.0, hop=keys - 2))["attention"] == pytest.approx(query + 2)
    assert tile_us(schedule, cross, only(read=1.0, hop=keys + 2))["attention"] == pytest.approx(query)
    own = next(w for w in works if w.context == NONE)
    more = own.slice * 64 * 2 * 2 / 1024
    assert tile_us(schedule, own, only(read=1.0, hop=100.0))["attention"] == pytest.approx(query + more)


def test_columns_past_the_matrix_are_not_read() -> None:
    """36 actions are 48 columns, of which no rank reads 64."""
    schedule = plan(released("unitree_g1"), H200)
    encode = next(w for m, _, w in products(schedule) if m.name == "encode")
    assert (encode.columns, encode.slice) == (48, 64)
    assert tile_us(schedule, encode, only(read=1.0))["staging"] == 48 * 51 * 2 / 1024
