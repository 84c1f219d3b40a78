"""The one-launch head's own table: its counts are the schedule's, its times follow cuts, teams and the GPU's constants."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import budget, budget_gpu, budget_head, budget_report

from dit4dit.engine.action_ode import Device, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import PARTS, Costs, head_us
from dit4dit.engine.action_ode.schedule import NONE, Attend, Opcode, Product
from dit4dit.presets import preset

BF16 = torch.bfloat16
H200 = Device(sms=132, shared_memory=227 << 10, capability=90, clusters=(66, 30, 15))
CONTEXT = {"robocasa_gr1": 588, "libero": 784, "unitree_g1": 392}


@cache
def schedule(
    name: str = "robocasa_gr1",
    clusters: tuple[int, ...] = H200.clusters,
    blocks: int = 16,
    ranks: int | None = None,
    fused: bool | None = None,
    batch: int = 1,
    memory: int = H200.shared_memory,
) -> Schedule:
    config = dataclasses.replace(preset(name).model.head, num_layers=blocks)
    shape = head_shape(config, batch=batch, context=CONTEXT[name], prefix=True, steps=4)
    return plan(shape, dataclasses.replace(H200, clusters=clusters, shared_memory=memory), ranks=ranks, fused=fused)


def table(of: Schedule | None = None, gpu: str = "h200") -> dict[str, Any]:
    return budget_head.table_of(schedule() if of is None else of, budget_gpu.read(gpu))


def gpu_file(path: Path, **constants: tuple[float | list[int], str]) -> str:
    """A GPU like an H200 but for constants: name -> (value, source)."""
    made = {name: {"value": value, "unit": "", "source": source} for name, (value, source) in constants.items()}
    path.write_text(json.dumps({"name": "other", "like": "h200", "constants": made}))
    return str(path)


def test_the_planner_weighs_with_the_constants_of_an_h200() -> None:
    names = {budget_head.constant(field.name) for field in dataclasses.fields(Costs)}
    gpu = budget_gpu.read("h200")
    assert {name for name in gpu.constants if name.startswith("head_")} == names - set(budget_head.SHARED)
    assert names <= set(gpu.constants)
    assert budget_head.costs_of(gpu) == Costs()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Costs)])
def test_each_constant_of_a_gpu_reaches_the_head(field: str, tmp_path: Path) -> None:
    factor = 0.01 if field in budget_head.RATES else 100
    file = gpu_file(tmp_path / "gpu.json", **{budget_head.constant(field): (factor * getattr(Costs(), field), "test")})
    assert table(gpu=file)["us"]["total"] > 1.2 * table()["us"]["total"]


@pytest.mark.parametrize(
    ("fused", "blocks", "stages"), [(True, 16, 76), (True, 15, 72), (False, 16, 84), (False, 15, 79)]
)
def test_a_stage_costs_a_hop(fused: bool, blocks: int, stages: int, tmp_path: Path) -> None:
    """Five stages a block, four where tokens attend inside a product; the last of 16 blocks is one of these."""
    of = schedule(blocks=blocks, fused=fused)
    file = gpu_file(tmp_path / "gpu.json", head_hop=(1.65, "test"))
    assert (of.stages, table(of)["stages"], table(of)["fused"]) == (stages, stages, fused)
    assert table(of, file)["us"]["chain"] - table(of)["us"]["chain"] == pytest.approx(4 * stages)


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_more_is_its_stages_more(fused: bool) -> None:
    more, fewer = (table(schedule(blocks=blocks, fused=fused)) for blocks in (16, 15))
    stages = 4 if fused else 5
    assert more["stages"] == fewer["stages"] + stages
    assert more["us"]["chain"] - fewer["us"]["chain"] > 4 * stages * Costs().hop


def test_attention_inside_a_product_is_said() -> None:
    both = [table(schedule(fused=fused)) for fused in (True, False)]
    inside, apart = ({kind["kind"]: kind for kind in found["kinds"]} for found in both)
    assert set(inside) - set(apart) == {"attend + out, tokens"}
    assert set(apart) - set(inside) == {"attend, tokens"}
    one = inside["attend + out, tokens"]
    assert (one["count"], one["rows"], one["columns"], one["split"]) == (8, 768, 768, 8)
    # 96 columns are of two heads: q, k and v of 17 tokens
    assert one["staged_kb"] == pytest.approx(2 * 3 * 17 * 64 * 2 / 1024)
    assert one["us_of"]["attention"] > 0 == inside["mlp_out"]["us_of"]["attention"]
    said = ["attend + out" in " ".join(budget_head.notes(found)) for found in both]
    assert said == [True, False]


def test_fewer_teams_take_longer() -> None:
    few = schedule(clusters=(0, 0, 5), ranks=8)
    assert few.teams == 5
    kinds, before = ({kind["kind"]: kind for kind in table(of)["kinds"]} for of in (few, schedule()))
    assert kinds["mlp_in"]["teams"] <= 5 < before["mlp_in"]["teams"]
    assert kinds["mlp_in"]["each"] * kinds["mlp_in"]["tile_rows"] > 2 * before["mlp_in"]["tile_rows"]
    # each of twelve heads has a block of its own, where there are teams enough all eight of a team
    mine, other = kinds["attend, features"], before["attend, features"]
    assert (mine["split"], mine["tiles"], mine["each"]) == (1, 2, 1)
    assert (other["split"], other["tiles"], other["each"]) == (8, 12, 1)
    assert mine["us"] > other["us"]
    assert mine["staged_kb"] == other["staged_kb"] == 17 * 64 * 2 / 1024, "queries"
    assert table(few)["us"]["total"] > 1.2 * table()["us"]["total"]


def test_all_tiles_of_a_team_in_a_stage_are_in_its_row() -> None:
    found = table(schedule("unitree_g1", batch=3, ranks=4, memory=160 << 10))
    (row,) = [kind for kind in found["kinds"] if kind["kind"] == "mlp_in"]
    assert (row["tiles"], row["teams"], row["each"], row["split"]) == (48, 30, 2, 1)
    # both tiles are of one sample's 51 tokens, of which a block has all 768 columns
    assert row["staged_kb"] == pytest.approx(2 * 51 * 768 * 2 / 1024)


def test_ranks_change_what_is_staged_and_exchanged() -> None:
    alone = table(schedule(clusters=()))
    assert (alone["ranks"], alone["teams"]) == (1, 132)
    kinds = {kind["kind"]: kind for kind in alone["kinds"]}
    assert {kind["exchanged_kb"] for kind in alone["kinds"]} == {0}
    assert kinds["mlp_out"]["staged_kb"] == pytest.approx(kinds["mlp_out"]["each"] * 17 * 3072 * 2 / 1024)
    assert alone["us"] != table()["us"]


def changed(of: Schedule, matrix: str, **fields: int) -> Schedule:
    """The same with fields of one matrix's tiles set."""
    tiles = of.tiles.copy()
    offset, at = of.buffers[matrix].offset, 1 + Product._fields.index("out")
    written = (
        (tiles[:, 0] == Opcode.PRODUCT) & (tiles[:, at] >= offset) & (tiles[:, at] < offset + of.buffers[matrix].words)
    )
    assert written.any()
    for name, value in fields.items():
        tiles[written, 1 + Product._fields.index(name)] = value
    return dataclasses.replace(of, tiles=tiles)


def test_another_cut_of_one_matrix_is_another_total() -> None:
    of, before = schedule(), table()
    matrix = of.matrices["3.out"]
    assert (matrix.split, matrix.parts, matrix.panels) == (8, 1, 1)
    half = {"split": 4, "slice": 2 * matrix.slice, "panel_steps": 2 * matrix.steps}
    # attention is inside this product: of more heads where a block has more columns
    for fields, parts in ((half, set(PARTS)), ({"parts": 2}, set(PARTS) - {"attention", "staging"})):
        after = table(changed(of, "3.out", **fields))
        assert after["us"]["total"] != pytest.approx(before["us"]["total"], rel=1e-4)
        assert {name for name in PARTS if after["us"][name] != pytest.approx(before["us"][name])} == parts
        assert [kind["count"] for kind in after["kinds"] if kind["kind"] == "out"] == [8]
        assert sorted(kind["count"] for kind in after["kinds"] if kind["kind"] == "attend + out, tokens") == [1, 7]


@pytest.mark.parametrize("name", CONTEXT)
def test_the_table_adds_up(name: str) -> None:
    of = schedule(name)
    found = table(of)
    kinds, us, step = found["kinds"], found["us"], found["per_step_us"]
    assert sum(kind["count"] for kind in kinds) == of.stages == found["stages"]
    assert sum(kind["count"] * kind["tiles"] for kind in kinds) == len(of.tiles)
    assert us["chain"] == pytest.approx(sum(us[part] for part in PARTS))
    assert us["total"] == pytest.approx(3.0 + max(us["chain"], us["weights"]))
    assert us["chain"] == pytest.approx(4 * step["chain"])
    assert us["total"] == pytest.approx(3.0 + 4 * step["total"])
    assert sum(kind["count"] * kind["us"] for kind in kinds) == pytest.approx(step["chain"])
    for part in PARTS:
        assert sum(kind["count"] * kind["us_of"][part] for kind in kinds) == pytest.approx(step[part])
    assert found["weight_mb"] == pytest.approx(4e-6 * of.weight_bytes)
    limits, read = found["weights_us"], found["weight_mb"] + found["features_mb"]
    assert us["weights"] == max(limits.values())
    assert limits["memory"] == pytest.approx(4e-6 * of.weight_bytes / 4.06)
    assert limits["flat_rate"] == pytest.approx(read / 5.5)
    assert limits["sm_stream"] > read / of.blocks / 0.045
    assert all(1 <= kind["teams"] <= of.teams and kind["each"] * kind["teams"] >= kind["tiles"] for kind in kinds)


def test_weights_are_read_for_each_group_of_samples() -> None:
    shape = head_shape(preset("robocasa_gr1").model.head, batch=4, context=588, prefix=True, steps=4)
    for samples in (4, 2, 1):
        of = plan(shape, H200, group=samples)
        assert table(of)["weight_mb"] == pytest.approx(4 // samples * 4e-6 * of.weight_bytes)


def test_counts_of_robocasa() -> None:
    """By hand, of a team of eight blocks: mlp_out's 3072 columns are 384 a block, 17 tokens of 2 bytes."""
    found = table()
    assert found["ranks"] == 8
    kinds = {(kind["kind"], kind["rows"]): kind for kind in found["kinds"]}
    last = kinds["mlp_out", 768]
    assert (last["count"], last["columns"], last["split"]) == (16, 3072, 8)
    assert last["staged_kb"] == pytest.approx(17 * 384 * 2 / 1024)
    own = last["tile_rows"] // 8
    # of each of the seven others: sums of its rows, two tokens at a time, and mean and squares of each token
    assert last["exchanged_kb"] == pytest.approx(7 * (last["parts"] * own * 18 * 4 + 17 * 8) / 1024)
    assert (kinds["project", 768]["count"], kinds["project", 2304]["count"]) == (8, 8)
    features = kinds["attend, features", 17]
    assert (features["count"], features["columns"], features["tiles"]) == (8, 588, 12)
    keys = next(t.work.slice for t in schedule().decoded if isinstance(t.work, Attend) and t.work.context != NONE)
    assert features["staged_kb"] == pytest.approx(17 * 64 * 2 / 1024), "queries alone"
    # keys and values of 12 heads in 8 blocks of the head, panels of 16 filled up
    ranks, panels = -(-588 // keys), -(-keys // 16)
    assert found["features_mb"] == pytest.approx(4 * 8 * 12 * ranks * panels * 16 * 2 * 64 * 2 / 1e6)
    assert found["features_mb"] > 4 * 8 * 12 * 588 * 2 * 64 * 2 / 1e6
    others = -(-588 // keys) - 1  # ranks that have keys, but for one of them
    assert features["exchanged_kb"] == pytest.approx(others * 17 * (8 * 4 + 8) / 1024, rel=1 / others)


@pytest.mark.parametrize(("name", "most"), [("robocasa_gr1", 500), ("libero", 430), ("unitree_g1", 780)])
@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_the_head_is_predicted_to_take_no_longer(name: str, most: float, gpu: str) -> None:
    found = table(schedule(name), gpu)
    assert found["us"]["weights"] < found["us"]["total"] <= most
    assert (found["stages"], found["fused"]) == (76, True)


@pytest.mark.parametrize("name", ["robocasa_gr1", "libero", "unitree_g1"])
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_a_sample_more_is_predicted_to_take_little_longer(name: str, samples: int) -> None:
    alone, together = (table(schedule(name, batch=batch))["us"]["total"] for batch in (1, samples))
    assert 0 < together - alone < 0.15 * alone * (samples - 1)


def test_guesses_are_named_with_what_hangs_on_them(tmp_path: Path) -> None:
    found = table()
    assert set(found["if_twice"]) == {name for name in budget_gpu.read("h200").guesses if name.startswith("head_")}
    assert {"head_inbox", "head_step", "head_epilogue"} <= set(found["if_twice"])
    for name, us in found["if_twice"].items():
        field = name.removeprefix("head_")
        twice = getattr(Costs(), field) * (0.5 if field in budget_head.RATES else 2)
        costs = dataclasses.replace(Costs(), **{field: twice})
        assert us == pytest.approx(head_us(schedule(), costs)["total"] - found["us"]["total"])
        assert f"{name} {us:+,.1f}" in budget_head.show(found)
    bound = table(gpu=gpu_file(tmp_path / "bound.json", head_sm_stream=(0.001, "guess")))
    assert bound["if_twice"]["head_sm_stream"] == pytest.approx(bound["us"]["weights"]), (
        "half of a rate is twice as slow"
    )
    known = table(gpu=gpu_file(tmp_path / "gpu.json", head_step=(0.022, "measured since")))
    assert set(found["if_twice"]) - set(known["if_twice"]) == {"head_step"}
    assert "head_step" not in budget_head.show(known)


def lines_of(text: str) -> Sequence[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_what_is_printed_and_on_the_page_is_the_table() -> None:
    found = table()
    printed = lines_of(budget_head.show(found))
    assert "15 teams x 8 blocks on 132 SMs of NVIDIA H200, 76 stages a step, 4 steps" in printed[0]
    read = (
        f"{found['weight_mb']:,.0f} MB of weights and {found['features_mb']:,.0f} MB of the features' keys and values"
    )
    assert printed[0].endswith(f"it reads {read}")
    for name in (*PARTS, "chain", "weights", "total"):
        assert f"{name} {found['per_step_us'][name]:,.1f} {found['us'][name]:,.1f}" in printed
    page = budget_report.head_tables({"one_launch_head": found})
    for kind in found["kinds"]:
        last = f"{kind['us']:,.2f} {kind['count'] * kind['us']:,.1f}"
        assert any(
            line.startswith(f"{kind['kind']} {kind['count']} {kind['rows']} ") and line.endswith(last)
            for line in printed
        )
        assert f"<td>{kind['kind']}</td><td>{kind['count']}</td><td>{kind['rows']}</td>" in page
    assert f"each once from memory {found['weights_us']['memory']:,.1f}," in budget_head.notes(found)[1]
    for note in budget_head.notes(found):
        assert note in printed
        assert html.escape(note) in page
    assert budget_report.head_tables({"one_launch_head": None}) == ""


def test_the_heads_table_is_there_where_it_runs(tmp_path: Path) -> None:
    slow = gpu_file(tmp_path / "gpu.json", head_hop=(2.5, "test"))
    found = budget.measure(budget.Wanted("tiny", "one_launch", BF16, budget_gpu.read(slow)))
    usual = budget.measure(budget.Wanted("tiny", "one_launch", BF16, budget_gpu.read("h200")))["one_launch_head"]
    assert found["one_launch_head"]["us"]["total"] > usual["us"]["total"] + usual["stages"] * usual["steps"]
    head = found["one_launch_head"]
    (one,) = [row for row in found["launches"]["today"] if row["name"] == "action_ode.cu"]
    assert one["us"] == head["us"]["total"]
    assert budget_head.show(head) in budget.show(found)
    assert budget_report.head_tables(found) in budget_report.page(found)
    for name in head["if_twice"]:
        assert f"{name} {head['us']['total']:,.1f}" in budget.show(found), "among the guesses of all launches"
    without = budget.measure(budget.Wanted("tiny", "library", BF16, budget_gpu.read("h200")))
    assert without["one_launch_head"] is None
    assert "the head in one launch" not in budget.show(without) + budget_report.page(without)


def test_clusters_follow_the_gpu(tmp_path: Path) -> None:
    sms, clusters = ("sms", (60, "test")), ("clusters", ([30, 14, 5], "test"))
    found = []
    for constants in ((sms, clusters), (sms,), (sms, clusters, ("architecture", (80, "test")))):
        gpu = budget_gpu.read(gpu_file(tmp_path / "gpu.json", **dict(constants)))
        result = budget.measure(budget.Wanted("tiny", "one_launch", BF16, gpu))["one_launch_head"]
        found.append((gpu.stand_in.clusters, result["sms"], result["ranks"]))
    assert [clusters for clusters, _, _ in found] == [(30, 14, 5), (30, 15, 7), (30, 14, 5)]
    assert {sms for _, sms, _ in found} == {60}
    assert found[2][2] == 1, "no clusters before architecture 90"


@pytest.mark.slow
def test_what_a_chunk_with_the_head_in_one_launch_is_predicted_to_take() -> None:
    result = budget.measure(budget.Wanted("robocasa_gr1", "one_launch", BF16, budget_gpu.read("h200")))
    assert result["totals"]["as_if_chosen"]["us"] <= 4600
    head = result["one_launch_head"]["us"]["total"]
    assert head == table()["us"]["total"] <= 500, "what the command plans is what the tests above plan"
    # beside the kernel there are the features' k and v, the state's encoder, and copies
    assert head < result["stages"]["as_if_chosen"]["action_head"]["us"] < head + 80
