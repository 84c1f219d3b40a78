"""The one-launch action head without its kernel: the twin against the model's head, and what the validator catches."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from head_case import A100, H200, SMALL, Case, tiny

from dit4dit import embodiments, presets
from dit4dit.action_ode import Device, HeadShape, Schedule, head_shape, plan
from dit4dit.action_ode.epilogue import Guidance, Units
from dit4dit.action_ode.schedule import NONE, Attend, Epilogue, Opcode, Product, Space, Tile
from dit4dit.action_ode.validate import ScheduleError, validate
from dit4dit.action_ode.weights import from_slots, to_slots
from dit4dit.config import HeadConfig
from dit4dit.errors import ConfigError
from dit4dit.ops.euler_step import prefix_weights
from dit4dit.transforms import Chain, Normalize, Pad, SinCos, Threshold


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
    guidance = Guidance(torch.randn_like(case.noise), prefix_weights("exp", 2, 6, 8), 5.0)
    got = case.twin(plan(case.shape, SMALL), guidance=guidance).run()
    want = case.want(guidance)
    assert case.error(got, want) < 1e-5
    assert case.error(case.want(), want) > 1e-2


def test_units_are_the_inverse_of_the_action_chain() -> None:
    empty, rng = np.nan, np.random.default_rng(0)
    chain = Chain(
        (
            Normalize(
                offset=np.array([0.5, -2.0, 0.0, 3.0, 0.0]),
                scale=np.array([2.0, 0.1, 1.0, 1.0, 1.0]),
                clip=np.zeros(5, bool),
                bounded=np.array([True, False, True, False, True]),
                flat=np.zeros(5, bool),
                constant=np.array([empty, empty, empty, 7.0, empty]),
                binary=np.array([False, False, True, False, False]),
            ),
            Threshold(4, 0.25),
            Pad(5, 8),
        )
    )
    y = np.concatenate([rng.normal(size=(50, 8)), np.full((1, 8), 0.5), np.full((1, 8), 0.25)]).astype(np.float32)
    got = Units.of(chain, 8)(torch.from_numpy(y))
    np.testing.assert_allclose(got[:, :5].numpy(), chain.inverse(y), rtol=1e-6, atol=1e-7)
    assert torch.equal(got[:, 5:], torch.from_numpy(y[:, 5:]))
    with pytest.raises(ConfigError, match="got SinCos"):
        Units.of(Chain((SinCos((1,)),)), 2)
    assert set(embodiments.EMBODIMENTS) == {"libero", "gr1", "g1", "tabletop"}, "a new one: does Units know its chain?"


def test_units_come_last() -> None:
    case = Case(tiny(), batch=2)
    units = Units.of(Chain((Threshold(1, 0.0), Pad(7, 7))), 7)
    got = case.twin(plan(case.shape, SMALL), units=units).run()
    torch.testing.assert_close(got, units(case.want()), rtol=1e-5, atol=1e-5)
    assert set(got[..., 1].unique().tolist()) <= {0.0, 1.0}


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


# -- what is refused ---------------------------------------------------------------------------------------------------


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


# -- planted faults ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> Schedule:
    wide = {"num_layers": 2, "num_heads": 16, "hidden_size": 1024}
    shape = head_shape(tiny(16, **wide), batch=4, context=300, prefix=True, steps=2)
    schedule = plan(shape, replace(SMALL, workers=24))
    validate(schedule)
    assert len({t.opcode for t in schedule.decoded}) == len(Opcode), "every opcode is in it"
    products = [t.work for t in schedule.decoded if isinstance(t.work, Product)]
    assert {w.epilogue for w in products} == set(Epilogue)
    assert max(w.planes for w in products) > 1
    assert len({w.token for w in products}) > 1, "several groups"
    return schedule


def changed(schedule: Schedule, i: int, **change: int) -> Schedule:
    """The schedule with other numbers in tile i."""
    tile = schedule.decoded[i]
    work = tile.work._replace(**{k: v for k, v in change.items() if k in tile.work._fields})
    tile = tile._replace(work=work, **{k: v for k, v in change.items() if k in Tile._fields})
    tiles = schedule.tiles.copy()
    tiles[i] = tile.record()
    return replace(schedule, tiles=tiles)


def waiting(schedule: Schedule) -> list[int]:
    return [i for i, tile in enumerate(schedule.decoded) if tile.wait != NONE]


def a_tile(schedule: Schedule, kind: type, **fields: int) -> int:
    """The first tile of this kind whose fields have these values."""
    return next(
        i
        for i, t in enumerate(schedule.decoded)
        if isinstance(t.work, kind) and all(getattr(t.work, k) == v for k, v in fields.items())
    )


def test_any_removed_wait_is_caught(sound: Schedule) -> None:
    for i in np.random.default_rng(0).choice(waiting(sound), 40, replace=False):
        with pytest.raises(ScheduleError, match=r"not written by then|no order between|still be being read"):
            validate(changed(sound, int(i), wait=NONE, target=0))


def test_any_wait_for_another_stage_is_caught(sound: Schedule) -> None:
    """For the one before the right one, which does less than is needed."""
    totals = np.bincount(sound.tiles[sound.tiles[:, 3] != NONE, 3])
    for i in np.random.default_rng(2).choice(waiting(sound), 40, replace=False):
        wait = sound.decoded[i].wait - 3
        if wait >= 0:
            with pytest.raises(ScheduleError, match=r"not written by then|no order between|still be being read"):
                validate(changed(sound, int(i), wait=wait, target=int(totals[wait])))


def test_any_wrong_target_is_caught(sound: Schedule) -> None:
    for i in np.random.default_rng(1).choice(waiting(sound), 20, replace=False):
        target = sound.decoded[i].target
        with pytest.raises(ScheduleError, match="is never reached"):
            validate(changed(sound, int(i), target=target + 1))
        with pytest.raises(ScheduleError, match="does not say which tiles are done"):
            validate(changed(sound, int(i), target=target - 1))


def test_a_missing_signal_is_caught(sound: Schedule) -> None:
    with pytest.raises(ScheduleError, match="is never reached"):
        validate(changed(sound, a_tile(sound, Attend), signal=NONE))


def test_swapped_tiles_are_caught(sound: Schedule) -> None:
    """Two tiles of one worker that depend on each other through the others, swapped: all wait for all."""
    for worker in range(sound.device.workers):
        own = range(int(sound.first_tile[worker]), int(sound.first_tile[worker + 1]))
        attends = [i for i in own if sound.decoded[i].opcode == Opcode.ATTEND]
        if len({sound.decoded[i].wait for i in attends}) > 1:
            break
    a, b = attends[0], attends[-1]
    tiles = sound.tiles.copy()
    tiles[[a, b]] = tiles[[b, a]]
    with pytest.raises(ScheduleError, match=r"comes before .* wait for each other and never end"):
        validate(replace(sound, tiles=tiles))


def test_a_circle_of_waits_is_caught(sound: Schedule) -> None:
    totals = np.bincount(sound.tiles[sound.tiles[:, 3] != NONE, 3])
    i = a_tile(sound, Attend)
    after = sound.decoded[i].signal + 4  # of the same group, two stages later
    with pytest.raises(ScheduleError, match=r"\d+ tiles wait for each other and never end"):
        validate(changed(sound, i, wait=after, target=int(totals[after])))


def test_swapped_products_are_caught(sound: Schedule) -> None:
    """Their weights would come in the other's order."""
    mine = range(int(sound.first_tile[1]), int(sound.first_tile[2]))
    a, b = [i for i in mine if sound.decoded[i].opcode == Opcode.PRODUCT][:2]
    tiles = sound.tiles.copy()
    tiles[[a, b]] = tiles[[b, a]]
    with pytest.raises(ScheduleError, match="not fetched in the order"):
        validate(replace(sound, tiles=tiles))


@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda e: e.name)
def test_two_tiles_on_one_element_are_caught(sound: Schedule, epilogue: Epilogue) -> None:
    first = a_tile(sound, Product, epilogue=epilogue)
    row, wait = sound.decoded[first].work.row, sound.decoded[first].wait
    others = (i for i, t in enumerate(sound.decoded) if t.wait == wait and i != first and t.work.row != row)
    other = next(others, None)
    if other is not None:  # of the same stage: the rows of another
        with pytest.raises(ScheduleError, match="no order between the two"):
            validate(changed(sound, other, row=row, rows=sound.decoded[first].work.rows))
    # the tokens of another group
    token = next(
        t.work.token
        for t in sound.decoded
        if isinstance(t.work, Product) and t.work.token != sound.decoded[first].work.token
    )
    with pytest.raises(ScheduleError, match=r"no order between the two|still be being read"):
        validate(changed(sound, first, token=token, tokens=sound.shape.tokens))


def test_two_heads_on_one_plane_are_caught(sound: Schedule) -> None:
    cross = a_tile(sound, Attend, plane=1)
    with pytest.raises(ScheduleError, match="no order between the two"):
        validate(changed(sound, cross, plane=0))


@pytest.mark.parametrize(
    "opcode,change",
    [
        (Opcode.PRODUCT, {"token": 60}),
        (Opcode.PRODUCT, {"token": 17 * 4}),
        (Opcode.PRODUCT, {"columns": 4096}),
        (Opcode.PRODUCT, {"weight": 1 << 20}),
        (Opcode.PRODUCT, {"bias": 1 << 28}),
        (Opcode.PRODUCT, {"bias": NONE}),
        (Opcode.PRODUCT, {"tile_rows": 48}),
        (Opcode.PRODUCT, {"tokens": 66}),
        (Opcode.PRODUCT, {"planes": 2}),
        (Opcode.PRODUCT, {"norm": 1, "columns": 16}),
        (Opcode.PRODUCT, {"modulation": 1 << 28}),
        (Opcode.PRODUCT, {"modulation": 0}),
        (Opcode.PRODUCT, {"out": int(Space.OUT)}),
        (Opcode.PRODUCT, {"source": int(Space.STREAM)}),
        (Opcode.PRODUCT, {"row": 8}),
        (Opcode.PRODUCT, {"step": 2}),
        (Opcode.PRODUCT, {"fp8": 1}),
        (Opcode.PRODUCT, {"opcode": 7}),
        (Opcode.ATTEND, {"keys": 999}),
        (Opcode.ATTEND, {"key": 299}),
        (Opcode.ATTEND, {"head": 16}),
        (Opcode.ATTEND, {"plane": 9}),
        (Opcode.ATTEND, {"sample": 3}),
        (Opcode.START, {"sample": 4}),
        (Opcode.START, {"prefix": 0}),
        (Opcode.ATTEND, {"wait": 1 << 20}),
        (Opcode.ATTEND, {"signal": -2}),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_caught(sound: Schedule, opcode: Opcode, change: dict[str, int]) -> None:
    i = next(i for i, t in enumerate(sound.decoded) if t.opcode == opcode and (t.wait != NONE or opcode == 0))
    with pytest.raises(ScheduleError):
        validate(changed(sound, i, **change))


def test_actions_that_nobody_writes_are_caught(sound: Schedule) -> None:
    last = a_tile(sound, Product, epilogue=Epilogue.EULER, step=1)
    with pytest.raises(ScheduleError, match="never written"):
        validate(changed(sound, last, step=0))


def without(s: Schedule, i: int) -> Schedule:
    """The schedule without a tile, and nobody waits for it."""
    tiles, first_tile = s.tiles.copy(), s.first_tile - (s.first_tile > i)
    tiles[tiles[:, 1] == tiles[i, 3], 2] -= 1
    tiles = np.delete(tiles, i, 0)
    products = [t.work for t in map(Tile.of, tiles) if isinstance(t.work, Product)]
    begin = np.concatenate([[0], np.cumsum(tiles[:, 0] == Opcode.PRODUCT)])[first_tile]
    segments = np.array([(w.weight, w.slots, 2 - w.fp8) for w in products], np.int32)
    return replace(s, tiles=tiles, first_tile=first_tile, first_segment=begin.astype(np.int32), segments=segments)


@pytest.mark.parametrize("what", ["attend", "residual", "gelu", "rows", "plane"])
def test_what_an_earlier_block_or_step_left_is_not_read(what: str) -> None:
    """A tile of the last step that is missing, or writes less: every cell has been written before, and in order."""
    sound = plan(head_shape(tiny(16), batch=2, context=150, prefix=True, steps=2), SMALL)
    attends = [i for i, t in enumerate(sound.decoded) if isinstance(t.work, Attend)]
    ends = {
        epilogue: [
            i for i, t in enumerate(sound.decoded) if isinstance(t.work, Product) and t.work.epilogue == epilogue
        ]
        for epilogue in (Epilogue.RESIDUAL, Epilogue.GELU)
    }
    wide = [i for i in ends[Epilogue.GELU] if sound.decoded[i].work.rows > 16]
    wrong = {
        "attend": lambda: without(sound, attends[-1]),
        "residual": lambda: without(sound, ends[Epilogue.RESIDUAL][-1]),
        "gelu": lambda: without(sound, ends[Epilogue.GELU][-1]),
        "rows": lambda: changed(sound, wide[-1], rows=sound.decoded[wide[-1]].work.rows - 16),
        "plane": lambda: changed(sound, attends[0], plane=sound.decoded[attends[0]].work.plane + 1),
    }[what]()
    with pytest.raises(ScheduleError):
        validate(wrong)


@pytest.mark.parametrize("change", [{"weight": 1}, {"slots": 1}, {"modulation": 1}], ids=str)
def test_weights_and_constants_lie_as_the_kernel_loads_them(change: dict[str, int]) -> None:
    sound = plan(head_shape(tiny(16), batch=2, context=150, prefix=True, steps=2), SMALL)
    i = next(i for i, t in enumerate(sound.decoded) if isinstance(t.work, Product) and t.work.modulation != NONE)
    ((name, more),) = change.items()
    wrong = changed(sound, i, **{name: getattr(sound.decoded[i].work, name) + more})
    products = [t.work for t in map(Tile.of, wrong.tiles) if isinstance(t.work, Product)]
    segments = np.array([(w.weight, w.slots, 2 - w.fp8) for w in products], np.int32)
    with pytest.raises(ScheduleError, match=r"not a row tile of the matrix|four at a time"):
        validate(replace(wrong, segments=segments))
    constants = {**sound.constants, "times": (sound.constant_floats - 1, 2)}
    with pytest.raises(ScheduleError, match="times: 2 from"):
        validate(replace(sound, constants=constants))


def test_validating_is_fast(sound: Schedule) -> None:
    """It is part of a policy's warm-up. The limit is far above what it takes, for a machine that does other things too."""
    shape = head_shape(presets.robocasa_gr1().model.head, batch=1, context=588, prefix=True, steps=4)
    schedule = plan(shape, H200)
    begin = time.process_time()
    validate(schedule)
    assert time.process_time() - begin < 1.5


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
