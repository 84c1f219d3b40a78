"""Faults planted in what no tile of the one-launch action head has for itself, sizes and tables: the validator catches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from counting import lines_run, peak_bytes
from head_case import H200, SMALL, tiny
from head_faults import (
    DEVICE,
    a_tile,
    faults_case,
    least_inbox,
    least_staging,
    moved,
    planned,
    planner,
    sound_schedule,
)
from rank_order import Order

from dit4dit import presets
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Schedule, head_shape, plan
from dit4dit.engine.action_ode.chain import chain
from dit4dit.engine.action_ode.cuts import AttendCut
from dit4dit.engine.action_ode.schedule import SETS, Epilogue, Product, Tile
from dit4dit.engine.action_ode.sizes import attend_inbox
from dit4dit.engine.action_ode.validate import ScheduleError, validate


@pytest.fixture(scope="module")
def sound() -> Schedule:
    return sound_schedule()


def of_matrix(which: str, **fields: Any) -> Callable[[Schedule], dict[str, Any]]:
    return lambda s: {"matrices": {**s.matrices, which: replace(s.matrices[which], **fields)}}


def of_buffer(name: str, **fields: int) -> Callable[[Schedule], dict[str, Any]]:
    """Fields that are more by so much."""

    def change(s: Schedule) -> dict[str, Any]:
        buffer = s.buffers[name]
        more = {field: getattr(buffer, field) + by for field, by in fields.items()}
        return {"buffers": {**s.buffers, name: replace(buffer, **more)}}

    return change


def of_table(name: str, offset: int = 0, length: int = 0) -> Callable[[Schedule], dict[str, Any]]:
    def change(s: Schedule) -> dict[str, Any]:
        first, count = s.constants[name]
        return {"constants": {**s.constants, name: (first + offset, count + length)}}

    return change


SCHEDULES: dict[str, tuple[Callable[[Schedule], dict[str, Any]], str]] = {
    "ranks that are no cluster": (lambda s: {"ranks": 3}, "^ranks: expected one of"),
    "ranks of another plan": (lambda s: {"ranks": 2}, "^matrix 'encode': expected 2 ranks"),
    "more teams than can run at once": (lambda s: {"teams": 7}, "^teams: expected 1 to 6, which can run at once"),
    "no clusters": (lambda s: {"device": replace(s.device, clusters=())}, "^teams: expected 1 to 0"),
    "tokens without code": (lambda s: {"padded_tokens": 64}, "^padded_tokens: expected one of"),
    "fewer padded tokens": (lambda s: {"padded_tokens": 40}, r"^tile \d+ .*: tokens: more than 40"),
    "a part of a step": (lambda s: {"part": s.part - 16}, "^part: expected a multiple of 32"),
    "no part": (lambda s: {"part": 0}, "^part: expected a multiple of 32"),
    "less than a panel": (lambda s: {"part": 96}, "^part, of matrix '0.mlp_out': expected 128 or more, got 96"),
    "a larger part": (lambda s: {"part": s.part + 32}, "^staging, of matrix '.*': expected at least"),
    "too few slots": (lambda s: {"slots": 2}, "^slots: expected 3 to 16"),
    "too many slots": (lambda s: {"slots": 17}, "^slots: expected 3 to 16"),
    "more slots than memory": (lambda s: {"slots": 16}, "^shared_bytes: expected at most"),
    "less shared memory": (
        lambda s: {"device": replace(s.device, shared_memory=s.shared_bytes - 1)},
        "^shared_bytes: expected at most",
    ),
    "staging that is too small": (lambda s: {"staging": least_staging(s) - 16}, "staging.*: expected at least"),
    "staging that is not aligned": (lambda s: {"staging": s.staging + 8}, "^staging: expected a multiple of 16"),
    "an inbox that is too small": (lambda s: {"inbox": least_inbox(s) - 16}, "^inbox, of matrix '.*': expected"),
    "attention that is part of no product": (lambda s: {"fused": True}, "^buffers: expected"),
    "an inbox that is not aligned": (lambda s: {"inbox": s.inbox + 8}, "^inbox: expected a multiple of 16"),
    "more words than numbers": (lambda s: {"set_words": (1 << 31) // SETS + 4}, "^words, .*: expected less than 2"),
    "a buffer that is missing": (
        lambda s: {"buffers": {k: v for k, v in s.buffers.items() if k != "decoded"}},
        "^buffers: expected",
    ),
    "a buffer over another": (of_buffer("0.out", offset=-32), "^buffer '0.out': expected an offset from"),
    "a buffer before all": (of_buffer("noisy", offset=-4), "^buffer 'noisy': expected an offset from 0"),
    "a buffer that is not aligned": (of_buffer("decoded", offset=-2), "^buffer 'decoded': .* a multiple of 4"),
    "fewer rows": (of_buffer("0.out", rows=-1), "^buffer '0.out': expected .* rows and columns"),
    "more columns": (of_buffer("0.out", columns=16), "^buffer '0.out': expected .* rows and columns"),
    "a set that is too small": (lambda s: {"set_words": s.set_words - 32}, "^buffer 'decoded': expected an end up to"),
    "private memory that is too small": (
        lambda s: {"private_floats": s.private_floats - 1},
        r"^tile \d+ .*: stream: outside the",
    ),
    "a matrix that is missing": (
        lambda s: {"matrices": {k: v for k, v in s.matrices.items() if k != "0.out"}},
        "^matrices: expected",
    ),
    "another matrix": (of_matrix("0.out", name="1.out"), "^matrix '0.out': expected .*, got '1.out'"),
    "rows of a matrix": (of_matrix("0.out", rows=112), "^matrix '0.out': expected .* rows and columns"),
    "columns of a matrix": (of_matrix("0.out", columns=112), "^matrix '0.out': expected .* rows and columns"),
    "a split of a rank": (of_matrix("0.out", split=3), "^matrix '0.out': expected a split that divides 4"),
    "no split": (of_matrix("0.out", split=0), "^matrix '0.out': expected a split that divides 4"),
    "parts of a warp": (of_matrix("0.out", parts=3), "^matrix '0.out': expected 1, 2, 4 or 8 parts"),
    "rows of half a fragment": (
        of_matrix("0.out", tile_rows=72),
        "^matrix '0.out': expected tile_rows a multiple of 16",
    ),
    "more rows than warps": (of_matrix("0.out", tile_rows=144), "^matrix '0.out': expected at most 8 row groups"),
    "more parts than warps": (of_matrix("0.out", parts=4), "^matrix '0.out': expected at most 2 row groups"),
    "matrices over each other": (
        lambda s: of_matrix("0.out", offset=s.matrices["0.out"].offset - 1)(s),
        "^matrix '0.out': expected an offset from",
    ),
    "a matrix before all": (of_matrix("encode", offset=-1), "^matrix 'encode': expected an offset"),
    "a matrix behind all": (
        lambda s: of_matrix("decode_out", offset=s.matrices["decode_out"].offset + 1)(s),
        "^matrix 'decode_out': expected an end up to",
    ),
    "a table that is missing": (
        lambda s: {"constants": {k: v for k, v in s.constants.items() if k != "modulation"}},
        "^constants: expected",
    ),
    "times of more steps": (of_table("times", length=-1), "^constants 'times': expected"),
    "a bias that is too short": (of_table("0.out.bias", length=-1), "^constants '0.out.bias': expected"),
    "a bias of tokens that is too short": (of_table("encode_out.bias", length=-1), "^constants 'encode_out.bias': exp"),
    "steps of another length": (of_table("encode.bias", length=4), "^constants 'encode.bias': expected"),
    "sums unlike the bias": (of_table("decode_in.sums", length=8), "^constants 'decode_in.sums': .* like the bias"),
    "a modulation that is too short": (of_table("1.modulation", length=-8), "^constants '1.modulation': expected"),
    "tables over each other": (
        of_table("1.modulation", offset=-4),
        "^constants '1.modulation': expected an offset from",
    ),
    "a table that is not aligned": (of_table("decode_out.bias", offset=1), "^constants 'decode_out.bias': .* of 4"),
    "fewer constants": (
        lambda s: {"constant_floats": s.constant_floats - 1},
        "^constants 'decode_out.bias': .* end up",
    ),
    "teams of another number": (lambda s: {"first_tile": s.first_tile[:-1]}, "^first_tile: expected 7 rising numbers"),
    "teams that do not rise": (
        lambda s: {"first_tile": s.first_tile[[0, 2, 1, 3, 4, 5, 6]]},
        "^first_tile: expected 7 rising numbers",
    ),
    "tiles of no team": (lambda s: {"tiles": np.concatenate([s.tiles, s.tiles[-1:]])}, "^first_tile: expected"),
    "records too short": (lambda s: {"tiles": s.tiles[:, :-1]}, r"^tiles and first_tile: expected int32, \[tiles, 32"),
    "records of longs": (lambda s: {"tiles": s.tiles.astype(np.int64)}, "^tiles and first_tile: expected int32"),
}


@pytest.mark.parametrize("fault", SCHEDULES)
def test_a_wrong_table_is_caught(sound: Schedule, fault: str) -> None:
    change, message = SCHEDULES[fault]
    with pytest.raises(ScheduleError, match=message):
        validate(replace(sound, **change(sound)))


def test_the_least_memory_is_enough(sound: Schedule) -> None:
    """The limits of the faults above are the exact ones."""
    least = replace(sound, staging=least_staging(sound), inbox=least_inbox(sound), slots=3)
    validate(replace(least, device=replace(sound.device, shared_memory=least.shared_bytes)))


def test_one_rank_has_no_inbox() -> None:
    shape = head_shape(tiny(), batch=1, context=40, prefix=True, steps=1)
    schedule = plan(shape, SMALL)
    validate(schedule)
    with pytest.raises(ScheduleError, match=r"^inbox: expected 0 with one rank, got 16"):
        validate(replace(schedule, inbox=16))


@pytest.mark.parametrize("heads,dim", [(8, 8), (1, 80), (3, 48)])
def test_heads_that_the_kernel_cannot_have_are_caught(sound: Schedule, heads: int, dim: int) -> None:
    shape = replace(sound.shape, heads=heads, width=heads * dim if dim != 48 else 128)
    with pytest.raises(ScheduleError, match=r"^head_dim: expected a multiple of 16 up to 64"):
        validate(replace(sound, shape=shape))


@pytest.mark.parametrize(
    "fused,message",
    [
        (False, "tile .* Attend.*: tokens: more than 64 rows of queries"),
        (True, "tile .* Product.*: attend: more than 64 tokens of a sample"),
    ],
)
def test_more_tokens_than_rows_of_queries_are_caught(fused: bool, message: str) -> None:
    """Of one sample: attention has at most 64."""
    shape = head_shape(tiny(63), batch=1, context=40, prefix=True, steps=1)
    validate(plan(shape, DEVICE, fused=fused))
    longer = replace(shape, horizon=64)
    assert longer.tokens == 65
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "check", lambda shape: None)
        schedule = plan(longer, DEVICE, fused=fused)
    with pytest.raises(ScheduleError, match=message):
        validate(schedule)


def test_columns_of_half_a_fragment_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "check", lambda shape: None)
    with pytest.raises(ScheduleError, match=r"^buffer 'decoded': expected a multiple of 16 columns, got 88"):
        validate(planned(replace(faults_case().shape, decoder=88)))


@pytest.mark.parametrize("horizon, context", [(16, r"\d+"), (8, "-1")])
def test_staging_too_small_for_attention_alone_is_caught(horizon: int, context: str) -> None:
    """What warps have found takes most of it; where a warp has few queries, the keys and values of the tokens themselves."""
    schedule = planned(replace(faults_case().shape, batch=1, horizon=horizon))
    validate(schedule)
    with pytest.raises(
        ScheduleError, match=rf"^tile \d+ Attend.*context={context}.*: staging: expected at least {schedule.staging}"
    ):
        validate(replace(schedule, staging=schedule.staging - 16))


def test_staging_too_small_for_attention_inside_a_product_is_caught() -> None:
    schedule = sound_schedule(fused=True)
    validate(schedule)
    with pytest.raises(
        ScheduleError, match=rf"^tile \d+ Product.*: attend: expected a staging of at least {schedule.staging}"
    ):
        validate(replace(schedule, staging=schedule.staging - 16))


def test_an_inbox_too_small_for_attention_alone_is_caught() -> None:
    """Wide heads of many tokens, and products without exchange but where there are few rows."""
    shape = replace(faults_case().shape, batch=1, heads=2, horizon=50)
    whole = dict.fromkeys(("encode", "encode_out", "0.project", "1.project", "out", "mlp_in", "mlp_out"), (64, 1, 1))
    schedule = planned(shape, cuts=whole, attention=(AttendCut(2, 26), AttendCut(4, 38)))
    validate(schedule)
    assert schedule.inbox == attend_inbox(51, 4, 64)
    with pytest.raises(
        ScheduleError, match=rf"^tile \d+ Attend.*share=4.*: share: expected an inbox of at least {schedule.inbox}"
    ):
        validate(replace(schedule, inbox=schedule.inbox - 16))
    # which one rank for each head does not need
    alone = planned(shape, cuts=whole, attention=(AttendCut(1, 51), AttendCut(1, 150)))
    assert alone.inbox < schedule.inbox
    validate(alone)


def test_attention_inside_products_before_hopper_is_caught() -> None:
    shape = head_shape(tiny(), batch=1, context=40, prefix=True, steps=1)
    hopper = replace(SMALL, capability=90)
    schedule = plan(shape, hopper, fused=True)
    validate(schedule)
    with pytest.raises(ScheduleError, match=r"^fused: expected False before Hopper, got True"):
        validate(replace(schedule, device=replace(hopper, capability=89)))


def test_attention_that_is_not_staged_at_once_is_caught() -> None:
    """A product without a split may stage its columns in several parts, but not where they are attention's results."""
    config = HeadConfig.dit_b(num_layers=2, action_horizon=16)
    shape = head_shape(config, batch=1, context=40, prefix=True, steps=1)
    schedule = plan(shape, replace(H200, clusters=()), fused=True)
    validate(schedule)
    i = next(i for i, t in enumerate(schedule.decoded) if isinstance(t.work, Product) and t.work.attend)
    assert schedule.part >= schedule.decoded[i].work.slice == shape.width
    least = max(32 * m.panel_steps for m in schedule.matrices.values())
    assert least < shape.width
    with pytest.raises(ScheduleError, match=rf"^tile {i} Product.*: attend: its columns are not staged at once"):
        validate(replace(schedule, part=least))


def test_groups_of_parts_of_samples_are_caught(sound: Schedule) -> None:
    """All products agree, and attention has no group."""
    tiles = sound.tiles.copy()
    for i, tile in enumerate(sound.decoded):
        w = tile.work
        if isinstance(w, Product):
            less = 4 if w.token else 0
            w = w._replace(
                token=w.token - less,
                tokens=w.tokens + (less or -4),
                source=w.source - less * w.source_stride,
                out=w.out - less * w.out_stride,
            )
            tiles[i] = Tile(tile.opcode, w).record()
    with pytest.raises(
        ScheduleError, match=r"^tokens of products: expected whole samples up to 102, each once, got \[\[0"
    ):
        validate(replace(sound, tiles=tiles))


def test_residuals_of_other_heights_are_caught() -> None:
    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: tile_rows: expected 64 as encode_out's tiles have"):
        validate(planned(faults_case().shape, cuts={"1.mlp_out": (32, 4, 2)}))


def test_ranks_without_words_are_caught() -> None:
    """All rows of a part lie past the matrix, and its team has nothing else to do that would tell when its ranks have read."""
    shape = replace(faults_case().shape, batch=1)
    many = replace(DEVICE, sms=128, clusters=(60, 30, 5))
    wrong = planned(shape, many, cuts={"0.mlp_in": (160, 2, 1)})  # 512 = 3 x 160 + 32
    idle = next(team for team in range(wrong.teams) if wrong.first_tile[team] == wrong.first_tile[team + 1])
    wrong = moved(wrong, a_tile(wrong, Product, epilogue=Epilogue.GELU, row=480), idle, 0)
    assert "rank 2 may still read" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: rows: none for the last part of its ranks"):
        validate(wrong)


@pytest.mark.parametrize("split", [1, 2])
def test_parts_of_activations_that_the_kernel_cannot_stage_are_caught(split: int) -> None:
    """Where ranks share the columns all of a slice is staged at once, else a whole panel."""
    stream = dict.fromkeys(("encode_out", "out"), (128, 4, 1))
    schedule = planned(replace(faults_case().shape, fp8=False), cuts={**stream, "mlp_out": (128, split, 2)})
    validate(schedule)
    matrix = schedule.matrices["0.mlp_out"]
    least = matrix.slice if split > 1 else 32 * matrix.panel_steps
    fits = replace(schedule, part=max(least, *(m.slice for m in schedule.matrices.values() if m.columns < 512)))
    validate(fits)
    assert (fits.part < matrix.slice) == (split == 1)
    with pytest.raises(ScheduleError, match=rf"^part, of matrix '.*': expected \d+ or more, got {fits.part - 32}"):
        validate(replace(fits, part=fits.part - 32))


@pytest.mark.parametrize("fused", [False, True])
def test_the_chain_is_what_buffers_are_for(fused: bool) -> None:
    """Each buffer is written by one stage and read by the next, the first by the first."""
    sound = sound_schedule(fused)
    stages = chain(sound.shape, fused)
    assert [stage.out for stage in stages[:-1]] == [stage.source for stage in stages[1:]]
    assert sorted(stage.out for stage in stages) == sorted(sound.buffers)
    assert stages[-1].out == stages[0].source
    assert ("1.attended" in sound.buffers) == (not fused)
    assert "0.attended" in sound.buffers, "the features are not in a buffer"
    assert [stage.name for stage in stages if stage.attend] == (["1.out"] if fused else [])


def test_validating_is_fast() -> None:
    """It is part of a policy's warm-up: its work does not grow with the square of the tiles."""
    shape = head_shape(presets.robocasa_gr1().model.head, batch=1, context=588, prefix=True, steps=4)
    schedule = plan(shape, H200)
    validate(schedule)
    assert lines_run(lambda: validate(schedule)) < 60_000, "33 000 when this was written: 30 ms"
    assert peak_bytes(lambda: validate(schedule)) < 5_000_000
