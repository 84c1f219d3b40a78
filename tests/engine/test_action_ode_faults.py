"""Faults planted in single numbers of the one-launch action head's tiles: the validator catches each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from head_case import Case
from head_faults import (
    a_tile,
    changed,
    sound_schedule,
)
from rank_order import Order

from dit4dit.engine.action_ode import Schedule
from dit4dit.engine.action_ode.schedule import NONE, SETS, Attend, Epilogue, Opcode, Product
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.validate import ScheduleError, validate
from dit4dit.engine.action_ode.weights import pack


def word_of(schedule: Schedule, name: str) -> int:
    return schedule.buffers[name].offset


PLAIN, GELU, TOKENS, RESIDUAL, EULER = (
    {"epilogue": Epilogue[name]} for name in ("PLAIN", "GELU", "TOKENS", "RESIDUAL", "EULER")
)
PRODUCTS: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    # which product, what of it is more by how much or is what, what the message says
    "source of the next token": (GELU, {"source": +64}, "source: expected"),
    "source a word on": (GELU, {"source": +1}, "source: expected"),
    "source in another buffer": (GELU, {"source": lambda s: word_of(s, "tokens")}, "source: expected"),
    "source of the step before": (PLAIN, {"source": lambda s: s.set_words * (SETS - 1)}, "source: expected"),
    "tokens closer than they lie": (GELU, {"source_stride": -8}, "source_stride: expected"),
    "fewer columns": (RESIDUAL, {"columns": -16}, "columns: expected"),
    "another split": (GELU, {"split": +2}, "split: expected"),
    "a slice too small": (RESIDUAL, {"slice": -32}, "slice: expected"),
    "a slice too large": (RESIDUAL, {"slice": +32}, "slice: expected"),
    "the next row": (GELU, {"row": +16}, "row: expected"),
    "fewer rows": (GELU, {"rows": -16}, "rows: expected"),
    "more rows": (EULER, {"rows": +16}, "rows: expected"),
    "other heights": (GELU, {"tile_rows": +16}, "tile_rows: expected"),
    "other parts": (GELU, {"parts": +1}, "parts: expected"),
    "a weight within a tile": (GELU, {"weight": +1}, "weight: no row tile of a matrix begins there"),
    "a weight before all": (GELU, {"weight": lambda s: -s.weight_bytes}, "weight: no matrix begins before it"),
    "a weight behind all": (
        EULER,
        {"weight": lambda s: s.matrices["decode_out"].units},
        "weight: no row tile of a matrix begins there",
    ),
    "weights of the next tile": (GELU, {"weight": lambda s: s.matrices["0.mlp_in"].tile_units}, "row: expected"),
    "other units of a rank": (GELU, {"rank_units": +1}, "rank_units: expected"),
    "panels larger than a slot": (GELU, {"panel_steps": +100}, "panel_steps: expected"),
    "fp8 as bf16": (GELU, {"fp8": -1}, "fp8: expected"),
    "the next sample's tokens": (GELU, {"token": +17}, "token: expected"),
    "a token less": (GELU, {"tokens": -1}, "tokens: expected"),
    "no norm": (GELU, {"norm": lambda s: -s.decoded[a_tile(s, Product, **GELU)].work.norm}, "norm: expected"),
    "modulation that is not aligned": (PLAIN, {"modulation": +1}, "modulation: expected"),
    "modulation out of range": (PLAIN, {"modulation": lambda s: s.constant_floats}, "modulation: expected"),
    "modulation of the wrong steps": (PLAIN, {"modulation_step": +4}, "modulation_step: expected"),
    "modulation without norm": (RESIDUAL, {"modulation": +1}, "modulation: expected"),
    "sums out of range": (PLAIN, {"sums": lambda s: s.constant_floats}, "sums: expected"),
    "sums without norm": (RESIDUAL, {"sums": +1}, "sums: expected"),
    "bias of the next row": (GELU, {"bias": +1}, "bias: expected"),
    "bias out of range": (EULER, {"bias": lambda s: s.constant_floats}, "bias: expected"),
    "steps without other biases": (PLAIN, {"constant_step": lambda s: -s.matrices["0.project"].rows}, "constant_step"),
    "biases past the table": (GELU, {"constant_step": +16}, "constant_step: expected"),
    "no scale": (GELU, {"scale": lambda s: -(1 << 30)}, "scale: expected"),
    "scale without fp8": (EULER, {"scale": +1}, "scale: expected"),
    "another epilogue": (GELU, {"epilogue": +1}, "epilogue: expected"),
    "a result a word on": (GELU, {"out": +1}, "out: expected"),
    "a result of the next token": (GELU, {"out": +256}, "out: expected"),
    "a result behind the set": (GELU, {"out": lambda s: s.set_words}, "out: expected"),
    "results closer than they lie": (GELU, {"out_stride": -1}, "out_stride: expected"),
    "a stream that is none": (GELU, {"stream": +1}, "stream: expected"),
    "attention where there is none": (RESIDUAL, {"attend": +1}, "attend: not as its stage is"),
    "heads less than none": (GELU, {"attend": -1}, "attend: not as its stage is"),
    "the stream of another tile": (RESIDUAL, {"stream": +64 * 56}, "stream: expected"),
    "a stream an element on": (RESIDUAL, {"stream": +1}, "stream: expected"),
    "actions over others": (EULER, {"stream": -1}, "stream: private memory of two owners overlaps"),
    "actions outside": (EULER, {"stream": lambda s: s.private_floats}, "stream: outside the"),
    "actions before all": (EULER, {"stream": lambda s: -s.private_floats}, "stream: outside the"),
}
ATTENDS: dict[str, tuple[int, dict[str, Any], str]] = {
    # of attention to itself or to the features, as above
    "another head's queries": (NONE, {"query": +8}, "query: expected"),
    "the next token's queries": (0, {"query": +64}, "query: expected"),
    "values as keys": (NONE, {"key": +64}, "key: expected"),
    "keys as values": (NONE, {"value": -64}, "value: expected"),
    "keys where the features are": (0, {"key": +1}, "key: expected"),
    "another stride": (NONE, {"stride": -64}, "stride: expected"),
    "other features": (0, {"context": +1}, "context: expected"),
    "the features instead of itself": (NONE, {"context": +1}, "context: expected"),
    "the next head": (NONE, {"pair": +1}, "writes the same words as"),
    "no head": (NONE, {"pair": lambda s: s.shape.heads * s.shape.batch}, "pair: not all of 48 heads of samples"),
    "a head before all": (0, {"pair": -48}, "pair: not all of 48 heads of samples"),
    "a head more": (NONE, {"pairs": +1}, "pairs: not 1 to the ranks by the share"),
    "no pairs": (NONE, {"pairs": -2}, "pairs: not 1 to the ranks by the share"),
    "more pairs than any": (0, {"pairs": lambda s: 1 << 30}, "pairs: not 1 to the ranks by the share"),
    "half of the ranks": (0, {"share": -2}, "slice: ranks do not cover the keys"),
    "more ranks for each head": (NONE, {"share": +2}, "pairs: not 1 to the ranks by the share"),
    "ranks that do not divide the team": (NONE, {"share": +1}, "share: not one of .* up to the ranks"),
    "no ranks": (NONE, {"share": -2}, "share: not one of .* up to the ranks"),
    "more ranks than the team has": (0, {"share": +4}, "share: not one of .* up to the ranks"),
    "fewer tokens": (0, {"tokens": -1}, "tokens: expected"),
    "fewer keys": (0, {"keys": -1}, "keys: expected"),
    "keys of another sample": (NONE, {"keys": +1}, "keys: expected"),
    "keys that no rank has": (0, {"slice": -1}, "slice: ranks do not cover the keys"),
    "no keys": (0, {"slice": lambda s: -38}, "slice: ranks do not cover the keys"),
    "keys that are not there": (NONE, {"slice": +100}, "slice: more than the keys"),
    "a result a word on": (0, {"out": +1}, "out: expected"),
    "a result before all": (0, {"out": lambda s: -s.set_words}, "out: before all buffers"),
    "results closer than they lie": (NONE, {"out_stride": -1}, "out_stride: expected"),
}


def planted(schedule: Schedule, i: int, change: dict[str, Any]) -> Schedule:
    """Tile i with numbers that are more by so much."""
    work = schedule.decoded[i].work
    more = {name: by if isinstance(by, int) else by(schedule) for name, by in change.items()}
    return changed(schedule, i, **{name: getattr(work, name) + by for name, by in more.items()})


@pytest.mark.parametrize("fault", PRODUCTS)
def test_a_wrong_number_of_a_product_is_caught(sound: Schedule, fault: str) -> None:
    which, change, message = PRODUCTS[fault]
    i = a_tile(sound, Product, **which)
    with pytest.raises(ScheduleError, match=rf"^tile {i} Product.*: {message}"):
        validate(planted(sound, i, change))


@pytest.mark.parametrize("fault", ATTENDS)
def test_a_wrong_number_of_attention_is_caught(sound: Schedule, fault: str) -> None:
    context, change, message = ATTENDS[fault]
    i = a_tile(sound, Attend, context=context)
    which = r"\d+" if message.startswith("writes") else i  # of two tiles the later one is named
    with pytest.raises(ScheduleError, match=rf"^tile {which} Attend.*: {message}"):
        validate(planted(sound, i, change))


INSIDE: dict[str, tuple[int, str]] = {
    # what is more by how much of a product that attends
    "no attention": (-4, "attend: not as its stage is"),
    "less than no attention": (-5, "attend: not as its stage is"),
    "a head more than there is room for": (+1, r"attend: expected a staging of at least \d+"),
    "all heads": (1 << 30, r"attend: expected a staging of at least \d+"),
}


@pytest.mark.parametrize("fault", INSIDE)
def test_wrong_attention_inside_a_product_is_caught(fused: Schedule, fault: str) -> None:
    more, message = INSIDE[fault]
    i = next(i for i, t in enumerate(fused.decoded) if isinstance(t.work, Product) and t.work.attend)
    assert fused.decoded[i].work.attend == 4
    with pytest.raises(ScheduleError, match=rf"^tile {i} Product.*: {message}"):
        validate(planted(fused, i, {"attend": more}))


def test_fewer_heads_at_a_time_are_fine(case: Case, fused: Schedule) -> None:
    """It is only how they are staged."""
    want = case.twin(fused).run()
    for i in [i for i, t in enumerate(fused.decoded) if isinstance(t.work, Product) and t.work.attend]:
        fused = changed(fused, i, attend=1)
    validate(fused)
    assert torch.equal(case.twin(fused).run(), want)


def test_every_number_has_a_planted_fault() -> None:
    for kind, faults in ((Product, PRODUCTS), (Attend, ATTENDS)):
        assert {name for _, change, _ in faults.values() for name in change} == set(kind._fields)


def test_an_unknown_opcode_is_caught(sound: Schedule) -> None:
    tiles = sound.tiles.copy()
    tiles[7, 0] = max(Opcode) + 1
    with pytest.raises(ScheduleError, match=r"^tile 7 \[2, .*\]: no such opcode"):
        validate(replace(sound, tiles=tiles))


VALUES: list[Callable[[int, np.random.Generator], int]] = [
    lambda x, r: x + int(r.choice([-64, -32, -17, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 17, 32, 64])),
    lambda x, r: 0,
    lambda x, r: NONE,
    lambda x, r: 2 * x,
    lambda x, r: int(r.integers(-(2**31), 2**31)),
]


@pytest.mark.parametrize("inside", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("seed", range(2))
def test_one_wrong_number_is_caught_or_harmless(case: Case, seed: int, inside: bool) -> None:
    """Harmless: words and their order by trying, and actions as before. That can only be other ranges of keys, and how many heads
    are staged at a time.
    """
    rng, messages, sound = np.random.default_rng(seed), [], sound_schedule(inside)
    packed = pack(case.folded, sound, torch.float32)
    want, known = Twin(sound, packed, *case.given()).run(), set()
    for _ in range(400):
        i = int(rng.integers(len(sound.tiles)))
        name = str(rng.choice(sound.decoded[i].work._fields))
        number = getattr(sound.decoded[i].work, name)
        other = VALUES[rng.integers(len(VALUES))](number, rng)
        if other == number or not -(2**31) <= other < 2**31:
            continue
        wrong = changed(sound, i, **{name: other})
        try:
            validate(wrong)
        except ScheduleError as error:
            messages.append(str(error))
        else:
            assert name in ("slice", "attend")
            if (number, other) not in known:
                assert Order(wrong).fault() is None
                assert case.error(Twin(wrong, packed, *case.given()).run(), want) < 1e-5
            known.add((number, other))
    assert len(messages) > 250
    named = (
        r"tile \d+ (Product|Attend)\(.*\): (\w+: |writes the same words as tile)|no tile has head \d of sample \d of"
    )
    assert [m for m in messages if not re.match(named, m)] == []
