"""Faults planted in the schedules of the one-launch action head: the validator catches each of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from counting import lines_run, peak_bytes
from head_case import H200, SMALL, tiny

from dit4dit import presets
from dit4dit.engine.action_ode import Schedule, head_shape, plan
from dit4dit.engine.action_ode.schedule import NONE, Attend, Epilogue, Opcode, Product, Space, Tile
from dit4dit.engine.action_ode.validate import ScheduleError, validate


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
    totals, tried = np.bincount(sound.tiles[sound.tiles[:, 3] != NONE, 3]), 0
    for i in np.random.default_rng(2).choice(waiting(sound), 40, replace=False):
        wait = sound.decoded[i].wait - 3
        if wait >= 0:
            with pytest.raises(ScheduleError, match=r"not written by then|no order between|still be being read"):
                validate(changed(sound, int(i), wait=wait, target=int(totals[wait])))
            tried += 1
    assert tried > 30


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
    assert (other is None) == (epilogue == Epilogue.EULER), "a few actions are one tile's rows"
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
    # a weight that is fetched before its product is known by the table of what is fetched
    with pytest.raises(ScheduleError, match="^segments: " if change.keys() & {"weight", "fp8"} else rf"^tile {i} "):
        validate(changed(sound, i, **change))


def test_rows_that_end_within_the_columns_told_apart_are_caught(sound: Schedule) -> None:
    """By their own check: those that follow look at whole cells."""
    product = next(i for i, t in enumerate(sound.decoded) if t.opcode == Opcode.PRODUCT and t.wait != NONE)
    with pytest.raises(ScheduleError, match=rf"^tile {product} .* ends within 16 columns$"):
        validate(changed(sound, product, row=8))


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
    sound = plan(head_shape(tiny(16), batch=2, context=300, prefix=True, steps=2), SMALL)
    attends = [i for i, t in enumerate(sound.decoded) if isinstance(t.work, Attend)]
    ends = {
        epilogue: [
            i for i, t in enumerate(sound.decoded) if isinstance(t.work, Product) and t.work.epilogue == epilogue
        ]
        for epilogue in (Epilogue.RESIDUAL, Epilogue.GELU)
    }
    wide = [i for i in ends[Epilogue.GELU] if sound.decoded[i].work.rows > 16]
    # of self-attention, which leaves the second range of cross-attention's keys alone
    within = [i for i in attends if sound.decoded[i].work.context == NONE]
    wrong = {
        "attend": lambda: without(sound, attends[-1]),
        "residual": lambda: without(sound, ends[Epilogue.RESIDUAL][-1]),
        "gelu": lambda: without(sound, ends[Epilogue.GELU][-1]),
        "rows": lambda: changed(sound, wide[-1], rows=sound.decoded[wide[-1]].work.rows - 16),
        "plane": lambda: changed(sound, within[-1], plane=sound.decoded[within[-1]].work.plane + 1),
    }[what]()
    with pytest.raises(ScheduleError, match="from different stages: one is left from before"):
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
    """It is part of a policy's warm-up: its work does not grow with the square of the tiles, of which there are 18 233."""
    shape = head_shape(presets.robocasa_gr1().model.head, batch=1, context=588, prefix=True, steps=4)
    schedule = plan(shape, H200)
    assert lines_run(lambda: validate(schedule)) < 1_000_000, "453 000 when this was written: 0.3 s"
    assert peak_bytes(lambda: validate(schedule)) < 20_000_000, "7.2 MB; one byte for each pair of tiles is 332 MB"
