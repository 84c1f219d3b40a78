"""The one-launch action head without its kernel: the twin against the model's head, and what has no plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from head_case import A100, H200, SMALL, Case, tiny

from dit4dit import presets
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, HeadShape, head_shape, plan
from dit4dit.engine.action_ode.schedule import NONE, Space
from dit4dit.engine.action_ode.validate import validate
from dit4dit.engine.action_ode.weights import from_slots, to_slots
from dit4dit.errors import ConfigError
from dit4dit.model.flow import GuidanceTensors, prefix_weights


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("horizon", [8, 16, 50])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_the_twin_is_the_head(horizon: int, batch: int, steps: int) -> None:
    """9, 17 and 51 tokens; the features take more than one range of keys."""
    case = Case(tiny(horizon), batch, context=150, steps=steps)
    schedule = plan(case.shape, SMALL)
    validate(schedule)
    got = case.twin(schedule).run(torch.Generator().manual_seed(3))
    assert case.error(got, case.want()) < 1e-5


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
    schedule = plan(case.shape, SMALL)
    validate(schedule)
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


@pytest.mark.parametrize("horizon", [9, 16])
def test_a_request_without_state(horizon: int) -> None:
    case = Case(tiny(horizon), batch=3, prefix=False)
    assert case.shape.tokens == horizon
    schedule = plan(case.shape, SMALL)
    validate(schedule)
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device", [A100, H200], ids=["a100", "h200"])
@pytest.mark.parametrize("size", ["dit_b", "dit_l"])
def test_true_sizes(size: str, device: Device) -> None:
    """True widths; DiT-B in its full depth on one device."""
    make = HeadConfig.dit_b if size == "dit_b" else HeadConfig.dit_l
    deep = size == "dit_b" and device is H200
    config = make(action_horizon=16, **({} if deep else {"num_layers": 2}))
    case = Case(config, batch=1, context=588, steps=4 if deep else 1)
    schedule = plan(case.shape, device)
    validate(schedule)
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


CHIPS = {
    "sm_80": A100,
    "sm_89": Device(142, 99 << 10, 89),
    "sm_90": H200,
    "sm_100": Device(148, 227 << 10, 100),
    "sm_120": Device(170, 99 << 10, 120),
}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", ["dit_b", "dit_l"])
def test_every_supported_schedule_is_sound(size: str, chip: str) -> None:
    """9, 17 and 51 tokens, batch 1 to 4, bf16 and fp8; three blocks at two steps, which meet each other as all of them do."""
    make = HeadConfig.dit_b if size == "dit_b" else HeadConfig.dit_l
    for horizon, context in ((8, 784), (16, 588), (50, 392)):
        config = make(action_horizon=horizon, num_layers=3)
        for batch in (1, 2, 3, 4):
            shape = head_shape(config, batch=batch, context=context, prefix=True, steps=2, fp8=batch % 2 == 0)
            schedule = plan(shape, CHIPS[chip])
            validate(schedule)
            assert 1536 + schedule.slots * 8192 + schedule.staging <= CHIPS[chip].shared_memory


def test_stages_of_a_step() -> None:
    """A stage is a round trip between all multiprocessors: two products before the blocks and two after, five stages a block."""
    config = presets.robocasa_gr1().model.head
    for steps in (1, 4):
        schedule = plan(head_shape(config, batch=1, context=588, prefix=True, steps=steps), H200)
        assert schedule.stages == 1 + steps * (2 + 16 * 5 + 2)


def test_the_plan_is_a_function_of_its_arguments() -> None:
    shape = head_shape(tiny(), batch=2, context=40, prefix=True, steps=2)
    a, b = plan(shape, SMALL), plan(shape, SMALL)
    assert np.array_equal(a.tiles, b.tiles)
    assert np.array_equal(a.segments, b.segments)


def test_the_order_of_the_workers_does_not_matter() -> None:
    case = Case(tiny(), batch=2, context=150)
    schedule = plan(case.shape, SMALL)
    runs = [case.twin(schedule).run(torch.Generator().manual_seed(seed)) for seed in range(4)]
    runs.append(case.twin(schedule).run())
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_the_twin_stops_after_any_tile() -> None:
    case = Case(tiny(), steps=1)
    schedule = plan(case.shape, SMALL)
    whole = case.twin(schedule)
    actions = whole.run()
    assert not actions.isnan().any()
    for count in (0, 1, 5, 40, len(schedule.tiles) - 1):
        part = case.twin(schedule)
        assert part.run(stop_after=count).isnan().all()
        assert sum(part.cursor) - int(schedule.first_tile[:-1].sum()) in (count, count + 1)
    early = case.twin(schedule)
    early.run(stop_after=60)
    stream = early.buffers[Space.STREAM]
    assert stream[~stream.isnan()].numel() > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_guidance(steps: int) -> None:
    case = Case(tiny(), batch=2, steps=steps)
    guidance = GuidanceTensors(torch.randn_like(case.noise), prefix_weights("exp", 2, 6, 8), 5.0)
    got = case.twin(plan(case.shape, SMALL), guidance=guidance).run()
    want = case.want(guidance)
    assert case.error(got, want) < 1e-5
    assert case.error(case.want(), want) > 1e-2


@pytest.mark.parametrize("rows,columns", [(7, 96), (64, 64), (80, 272), (300, 528)])
@pytest.mark.parametrize("fp8", [False, True])
def test_slots_are_a_permutation(rows: int, columns: int, fp8: bool) -> None:
    shape = head_shape(tiny(), batch=1, context=40, prefix=True, steps=1)
    some = next(iter(plan(shape, SMALL).matrices.values()))
    for tile_rows in (16, 32, 64):
        matrix = replace(some, rows=rows, columns=columns, tile_rows=tile_rows, fp8=fp8)
        weight = torch.arange(1, rows * columns + 1, dtype=torch.float32).view(rows, columns)
        slots = to_slots(weight, matrix)
        assert torch.equal(slots[slots > 0].sort().values, weight.flatten())
        back = torch.cat([from_slots(row, matrix) for row in slots])
        assert torch.equal(back[:rows, :columns], weight)


def test_fp8_weights_are_near() -> None:
    case = Case(tiny(), batch=2)
    case.shape = replace(case.shape, fp8=True)
    schedule = plan(case.shape, SMALL)
    validate(schedule)
    assert case.error(case.twin(schedule).run(), case.want()) < 0.15
    exact = replace(case.shape, fp8=False)
    assert schedule.weight_bytes < 0.75 * plan(exact, SMALL).weight_bytes


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_heads": 3, "head_dim": 20}, r"width: expected a multiple of 16, got 60"),
        ({"num_heads": 2, "head_dim": 24}, r"head_dim: expected 16, 32, 48 or 64, got 48 / 2 heads"),
        ({"num_heads": 2, "head_dim": 128}, r"head_dim: expected 16, 32, 48 or 64"),
        ({"num_heads": 34, "head_dim": 64}, r"width: expected at most 2048, got 2176"),
        ({"hidden_size": 90}, r"decoder: expected a multiple of 16, got 90"),
        ({"action_horizon": 64}, r"tokens: expected 1 to 64 a sample, the state token included, got 65"),
    ],
)
def test_odd_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head_shape(tiny(**change), batch=1, context=40, prefix=True, steps=1)


def test_a_device_too_small_is_refused() -> None:
    shape = head_shape(HeadConfig.dit_b(), batch=1, context=40, prefix=True, steps=1)
    with pytest.raises(ConfigError, match="shared_memory: expected at least"):
        plan(shape, Device(16, 48 << 10, 80))
    with pytest.raises(ConfigError, match="workers: expected at least 1"):
        plan(shape, Device(0, 99 << 10, 80))


def test_a_broken_wait_gives_nan_in_the_twin() -> None:
    """The twin is not blind: without waits, in a random order, tiles meet buffers that nobody has written."""
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    tiles = schedule.tiles.copy()
    tiles[:, 1] = NONE
    got = case.twin(replace(schedule, tiles=tiles)).run(torch.Generator().manual_seed(0))
    assert got.isnan().any()


def test_shapes_of_configurations() -> None:
    config = HeadConfig.dit_l(action_horizon=50, action_dim=36)
    shape = head_shape(config, batch=4, context=392, prefix=True, steps=8)
    assert isinstance(shape, HeadShape)
    assert (shape.width, shape.head_dim, shape.tokens, shape.rows, shape.padded_actions) == (1536, 48, 51, 204, 48)
