"""The planner of the one-launch head: what every schedule must keep, what it predicts, and what has no plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from head_case import SIZES, tiny
from head_plans import DEVICES, H200, PRESETS, SHAPES, products, released, small, stages

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, HeadShape, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import Costs, head_us, stage_us, staged_columns
from dit4dit.engine.action_ode.schedule import (
    NONE,
    RANKS,
    SLOT_BYTES,
    STEP_COLUMNS,
    WARPS,
    WEIGHT_UNIT,
    Attend,
    Epilogue,
)
from dit4dit.engine.action_ode.sizes import (
    attend_bytes,
    attend_inbox,
    own_attention_bytes,
    product_staging,
    sums_bytes,
    warp_tiles,
)
from dit4dit.engine.action_ode.validate import validate
from dit4dit.errors import ConfigError

# -- what every schedule keeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_schedule_can_run(shape: HeadShape, device: Device) -> None:
    schedule = plan(shape, device)
    validate(schedule)
    fits(schedule)
    tables_are_apart(schedule)
    every_row_once(schedule)
    work_is_equal(schedule)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["robocasa_gr1", *SIZES])
def test_teams_of_every_size(name: str, ranks: int) -> None:
    schedule = plan(SHAPES[name], H200, ranks=ranks)
    assert (schedule.ranks, schedule.teams) == (ranks, H200.teams(ranks))
    validate(schedule)
    fits(schedule)
    every_row_once(schedule)
    work_is_equal(schedule)


def fits(schedule: Schedule) -> None:
    """The kernel's limits, and shared memory."""
    shape, ranks, padded = schedule.shape, schedule.ranks, schedule.padded_tokens
    assert schedule.teams == schedule.device.teams(ranks) > 0
    assert schedule.shared_bytes <= schedule.device.shared_memory
    assert 3 <= schedule.slots <= 16
    assert schedule.part % STEP_COLUMNS == 0
    assert schedule.staging % 16 == schedule.inbox % 16 == 0
    for m in schedule.matrices.values():
        assert m.ranks == ranks
        assert ranks % m.split == 0
        assert m.parts in (1, 2, 4, 8)
        assert m.rank_rows % 16 == m.own_rows % 2 == 0
        assert m.groups <= warp_tiles(padded) * (WARPS // m.parts)
        assert 0 < m.panel_steps * m.step_units * WEIGHT_UNIT <= SLOT_BYTES
        assert m.split * m.slice >= m.columns
        assert m.slice % STEP_COLUMNS == 0
        assert staged_columns(m, schedule.part) > 0
        assert product_staging(padded, schedule.part, m) <= schedule.staging
        if ranks > 1:
            assert sums_bytes(padded, m) <= schedule.inbox
    for works in stages(schedule).values():
        for _, work in works:
            if isinstance(work, Attend):
                assert work.share * work.slice >= work.keys
                assert 1 <= work.pairs * work.share <= ranks
                assert shape.head_dim // work.share % 2 == 0
                features = work.context != NONE
                assert attend_bytes(work.tokens, work.slice, shape.head_dim, features) <= schedule.staging
                assert attend_inbox(shape.tokens, work.share, shape.head_dim) <= schedule.inbox
    for m, _, w in products(schedule):
        if w.attend:
            behind = w.attend * own_attention_bytes(shape.tokens, shape.head_dim)
            assert product_staging(padded, schedule.part, m, behind) <= schedule.staging
            assert w.slice <= schedule.part
    assert ranks > 1 or schedule.inbox == 0


def tables_are_apart(schedule: Schedule) -> None:
    """Buffers, constants, matrices and private memory, each in its own place and aligned."""
    ranges = {
        "buffers": ([(b.offset, b.words) for b in schedule.buffers.values()], schedule.set_words, 4),
        "constants": (list(schedule.constants.values()), schedule.constant_floats, 4),
        "weights": ([(m.offset, m.units) for m in schedule.matrices.values()], schedule.weight_bytes // WEIGHT_UNIT, 1),
        "private": (
            sorted(
                {(w.stream, w.tile_rows * schedule.padded_tokens) for *_, w in products(schedule) if w.stream != NONE}
            ),
            schedule.private_floats,
            2,
        ),
    }
    for name, (places, end, unit) in ranges.items():
        begin = 0
        for offset, length in sorted(places):
            assert offset >= begin, name
            assert offset % unit == 0 < length, name
            begin = offset + length
        assert begin <= end, name
    for name, m in schedule.matrices.items():
        for suffix in ("sums", "bias", "row_scale"):
            if f"{name}.{suffix}" in schedule.constants and name != "encode_out":
                assert schedule.constants[f"{name}.{suffix}"][1] % (m.row_tiles * m.tile_rows) == 0


def every_row_once(schedule: Schedule) -> None:
    """Each group of samples takes each row tile of each matrix once, and each head of each sample attends once a block."""
    shape = schedule.shape
    taken: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    for m, _, w in products(schedule):
        assert (w.weight - m.offset) % m.tile_units == 0
        assert w.row == (w.weight - m.offset) // m.tile_units * m.tile_rows
        assert w.rows == min(m.tile_rows, m.rows - w.row) > 0
        taken[m.name] |= Counter()
        taken[m.name][w.row, w.token] += 1
    assert set(taken) == set(schedule.matrices)
    groups = {token for _, token in taken["encode"]}
    for name, tiles in taken.items():
        m = schedule.matrices[name]
        assert tiles == Counter({(row, token): 1 for row in range(0, m.rows, m.tile_rows) for token in groups})
    for name, works in stages(schedule).items():
        if name.endswith("attended"):
            pairs = Counter(pair for _, w in works if isinstance(w, Attend) for pair in range(w.pair, w.pair + w.pairs))
            assert pairs == Counter(range(shape.batch * shape.heads))
    inside = {m.name for m, _, w in products(schedule) if w.attend}
    own = {i for i, cross in enumerate(shape.blocks) if not cross}
    assert inside == ({f"{i}.out" for i in own} if schedule.fused else set())
    assert {f"{i}.attended" for i in own if not schedule.fused} == {f"{i}.attended" for i in own} & set(
        stages(schedule)
    )


def work_is_equal(schedule: Schedule) -> None:
    """No team has a tile more than it must, heads go to the last teams first, stages follow each other, and the owners of the
    residual stream stay.
    """
    found = stages(schedule)
    assert set(found) == set(schedule.buffers)
    for works in found.values():
        assert max(Counter(team for team, _ in works).values()) == -(-len(works) // schedule.teams)
        heads = sorted((work.pair, team) for team, work in works if isinstance(work, Attend))
        assert [team for _, team in heads] == [schedule.teams - 1 - i % schedule.teams for i in range(len(heads))]
    order = {name: i for i, name in enumerate(sorted(found, key=lambda n: (n == "noisy", schedule.buffers[n].offset)))}
    place = {id(work): order[name] for name, works in found.items() for _, work in works}
    for team in range(schedule.teams):
        mine = [place[id(t.work)] for t in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]]
        assert mine == sorted(mine)
    owners: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for _, team, w in products(schedule):
        assert (w.stream != NONE) == (w.epilogue in (Epilogue.TOKENS, Epilogue.RESIDUAL, Epilogue.EULER))
        if w.stream != NONE:
            owners[w.stream].add((team, w.row, w.tile_rows, w.token, w.tokens))
    assert all(len(who) == 1 for who in owners.values())


@pytest.mark.parametrize("name", PRESETS)
def test_stages_of_a_step(name: str) -> None:
    """Two products before the blocks and two after; of blocks five stages, four where the tokens attend inside a product."""
    for fused, stages_of_self in ((True, 4), (False, 5)):
        schedule = plan(released(name), H200, fused=fused)
        assert schedule.stages == len(stage_us(schedule)) == 2 + 8 * 5 + 8 * stages_of_self + 2
    assert plan(released(name), H200).stages == 76
    assert len(schedule.tiles) < 84 * schedule.teams


@pytest.mark.parametrize("batch, group", [(1, 1), (3, 1), (3, 2), (4, 4)])
def test_heads_fill_the_ranks_of_a_team(batch: int, group: int) -> None:
    """As many heads of a group in a tile as there are ranks for them; the last tile of a group leaves some without one."""
    costs = Costs(exchange=50.0)  # so that heads are not shared
    schedule = plan(released("robocasa_gr1", batch), H200, costs, ranks=8, group=group, fused=False)
    for context in (NONE, 0):
        works = [t.work for t in schedule.decoded if isinstance(t.work, Attend) and t.work.context == context]
        assert {(w.share, w.slice) for w in works} == {(1, works[0].keys)}
        of_block = sorted((w.pair, w.pairs) for w in works)[:: 1 if context == 0 else 8]
        wanted = []
        for first in range(0, batch, group):
            end = min(first + group, batch) * 12
            wanted += [(pair, min(8, end - pair)) for pair in range(first * 12, end, 8)]
        assert of_block == wanted
        assert (min(pairs for _, pairs in wanted) < 8) == (batch != 4)


def test_an_inbox_that_attention_alone_needs() -> None:
    """Wide heads of many tokens, and few rows."""
    head = tiny(50, num_layers=2, num_heads=2, head_dim=64)
    shape = head_shape(head, batch=1, context=600, prefix=True, steps=1)
    schedule = plan(shape, H200, ranks=8)
    (share,) = {t.work.share for t in schedule.decoded if isinstance(t.work, Attend)}
    sums = max(sums_bytes(schedule.padded_tokens, m) for m in schedule.matrices.values())
    assert sums < attend_inbox(shape.tokens, share, shape.head_dim) <= schedule.inbox


def groups(schedule: Schedule) -> set[tuple[int, int]]:
    return {(w.token, w.tokens) for *_, w in products(schedule)}


def test_samples_share_products_evenly() -> None:
    gr1 = released("robocasa_gr1", batch=4)
    assert groups(plan(gr1, H200, group=4)) == {(0, 68)}
    assert plan(gr1, H200, group=4).padded_tokens == 72
    assert groups(plan(gr1, H200, group=2)) == {(0, 34), (34, 34)}
    assert groups(plan(gr1, H200, group=1)) == {(17 * b, 17) for b in range(4)}
    with pytest.raises(ConfigError, match=r"group: expected one of \[4, 2, 1\] here, got 3"):
        plan(gr1, H200, group=3)
    # three would fit, but two and two are even; of three samples the last is alone
    config = tiny(horizon=19)
    for batch in (3, 4):
        shape = head_shape(config, batch=batch, context=8, prefix=True, steps=1)
        last = 40 if batch == 4 else 20
        if batch == 4:
            with pytest.raises(ConfigError, match=r"group: expected one of \[2, 1\] here"):
                plan(shape, H200, group=3)
        assert groups(plan(shape, H200, group=2)) == {(0, 40), (40, last)}
    assert groups(plan(released("unitree_g1", batch=2), H200)) == {(0, 51), (51, 51)}


def test_weights_decide_how_many_samples_share_a_product() -> None:
    gr1 = released("robocasa_gr1", batch=4)
    assert groups(plan(gr1, H200)) == {(0, 34), (34, 34)}
    assert groups(plan(gr1, H200, Costs(sm_stream=0.003))) == {(0, 68)}
    assert groups(plan(gr1, H200, Costs(sm_stream=1e6, memory=1e6))) == {(17 * b, 17) for b in range(4)}
    least = head_us(plan(gr1, H200))["total"]
    assert all(least <= head_us(plan(gr1, H200, group=group))["total"] for group in (1, 2, 4))


def test_weights_of_the_blocks_alone_are_fp8() -> None:
    schedule = plan(released("robocasa_gr1", fp8=True), H200)
    assert all(m.fp8 == name[0].isdigit() for name, m in schedule.matrices.items())
    for m, _, w in products(schedule):
        assert (w.scale != NONE) == bool(w.fp8) == m.fp8
        assert w.rank_units == m.rank_units == m.steps * m.groups * (1 if m.fp8 else 2)


@pytest.mark.parametrize("device", [DEVICES["h200"], DEVICES["3 SMs"]], ids=["h200", "3 SMs"])
def test_the_plan_is_a_function_of_its_arguments(device: Device) -> None:
    a, b = (plan(released("libero", batch=2), device) for _ in range(2))
    assert np.array_equal(a.tiles, b.tiles)
    assert np.array_equal(a.first_tile, b.first_tile)
    for field in fields(Schedule):
        if field.name not in ("tiles", "first_tile"):
            assert getattr(a, field.name) == getattr(b, field.name)


# -- what has no plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 40, "heads": 4}, "width: expected a multiple of 16, got 40"),
        ({"mlp": 100}, "mlp: expected a multiple of 16, got 100"),
        ({"decoder": 8}, "decoder: expected a multiple of 16, got 8"),
        ({"width": 4096, "heads": 64}, "width: expected at most 2048, got 4096"),
        ({"heads": 8}, "head_dim: expected 16, 32, 48 or 64, got 64 / 8 heads"),
        ({"width": 96, "heads": 1}, "head_dim: expected 16, 32, 48 or 64, got 96 / 1 heads"),
        ({"horizon": 64}, "tokens: expected 1 to 64 a sample, the state token included, got 65"),
        ({"actions": 0}, "actions: expected at least 1, got 0"),
        ({"context": 0}, "context: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"blocks": ()}, "blocks: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_shapes_without_tiles(change: dict[str, Any], message: str) -> None:
    shape = replace(head_shape(tiny(), batch=1, context=40, prefix=True, steps=2), **change)
    with pytest.raises(ConfigError, match=f"action_ode: {message}; use head='library'"):
        plan(shape, H200)


def test_sizes_at_the_limit() -> None:
    shape = head_shape(tiny(), batch=1, context=40, prefix=True, steps=2)
    for change in ({"horizon": 63}, {"width": 2048, "heads": 32, "mlp": 8192}, {"mlp": 80}, {"decoder": 16}):
        schedule = plan(replace(shape, **change), H200)
        validate(schedule)
        fits(schedule)
    assert plan(shape, replace(H200, shared_memory=512 << 10)).slots == 16


@pytest.mark.parametrize("name", ["robocasa_gr1", "51 tokens", "dit_b, 50 x 4, fp8"])
def test_too_little_shared_memory(name: str) -> None:
    """The least that the message names, to a KB, is the least."""
    device = Device(16, 48 << 10, 80)
    with pytest.raises(ConfigError, match=r"shared_memory: expected at least (\d+) bytes a block, got 49152") as error:
        plan(SHAPES[name], device)
    least = int(str(error.value).split("at least ")[1].split()[0])
    fits(plan(SHAPES[name], replace(device, shared_memory=least)))
    with pytest.raises(ConfigError, match=f"at least {least} bytes"):
        plan(SHAPES[name], replace(device, shared_memory=least - 1024))


def test_devices_without_what_was_asked_for() -> None:
    shape = small("9 tokens")
    with pytest.raises(ConfigError, match="sms: expected at least 1 SM, got 0"):
        plan(shape, Device(0, 99 << 10, 80))
    with pytest.raises(ConfigError, match=r"ranks: expected one of \[1\] here, got 2"):
        plan(shape, DEVICES["a100"], ranks=2)
    # attention inside products: from Hopper on, where some block attends to its own tokens
    for head, device in ((shape, DEVICES["a100"]), (replace(shape, blocks=(True, True)), H200)):
        with pytest.raises(ConfigError, match=r"fused: expected one of \[False\] here, got True"):
            plan(head, device, fused=True)
    # clusters need the architecture as well
    with pytest.raises(ConfigError, match=r"ranks: expected one of \[1\]"):
        plan(shape, replace(H200, capability=80), ranks=8)


def test_the_shape_of_a_configuration() -> None:
    config = HeadConfig.dit_l(num_layers=3, action_horizon=50, action_dim=36)
    shape = head_shape(config, batch=2, context=392, prefix=True, steps=8, fp8=True)
    assert shape == HeadShape(1536, 32, (True, False, True), 6144, 2560, 50, 36, True, 392, 2, 8, True)
    assert (shape.tokens, shape.rows, shape.padded_actions, shape.head_dim, shape.contexts) == (51, 102, 48, 48, 2)
    every = replace(config, interleave_self_attention=False)
    assert head_shape(every, batch=1, context=1, prefix=False, steps=1).blocks == (True, True, True)
