"""Faults planted in the schedules of the one-launch action head: the validator catches each of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from counting import lines_run, peak_bytes
from head_case import H200, SMALL, Case, tiny
from rank_order import Order

from dit4dit import presets
from dit4dit.engine.action_ode import Device, Schedule, head_shape, plan
from dit4dit.engine.action_ode.chain import chain
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import Cuts, choose
from dit4dit.engine.action_ode.schedule import (
    NONE,
    RANKS,
    SETS,
    Attend,
    Epilogue,
    Opcode,
    Operands,
    Product,
    Tile,
    attend_bytes,
    attend_inbox,
    product_staging,
    sums_bytes,
)
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.validate import ScheduleError, validate
from dit4dit.engine.action_ode.weights import pack

planner = sys.modules["dit4dit.engine.action_ode.plan"]
DEVICE = Device(64, 227 << 10, 90, (28, 6, 5))
COSTS = Costs(read=0.5, inbox=0.0)
"""By which small heads are cut along their columns, too."""


@pytest.fixture(scope="module")
def case() -> Case:
    case = Case(tiny(16, num_layers=2, num_heads=8, head_dim=16, action_dim=40), batch=6, context=150)
    case.shape = replace(case.shape, fp8=True)
    return case


@pytest.fixture(scope="module")
def sound(case: Case) -> Schedule:
    schedule = plan(case.shape, DEVICE, COSTS, ranks=4)
    validate(schedule)
    products = [t.work for t in schedule.decoded if isinstance(t.work, Product)]
    assert {w.epilogue for w in products} == set(Epilogue)
    assert {w.fp8 for w in products} == {0, 1}
    assert {w.split for w in products} == {2, 4}
    assert {w.parts for w in products} == {1, 2}
    assert len({w.token for w in products}) == 2, "groups"
    assert min(m.row_tiles for m in schedule.matrices.values()) > 1
    assert {t.work.context for t in schedule.decoded if isinstance(t.work, Attend)} == {0, NONE}
    return schedule


def a_tile(schedule: Schedule, kind: type[Operands], nth: int = 0, **fields: int) -> int:
    """The nth of the tiles of this kind whose fields have these values."""
    found = [
        i
        for i, t in enumerate(schedule.decoded)
        if isinstance(t.work, kind) and all(getattr(t.work, k) == v for k, v in fields.items())
    ]
    return found[nth]


def changed(schedule: Schedule, i: int, **fields: int) -> Schedule:
    """The schedule with other numbers in tile i."""
    tiles = schedule.tiles.copy()
    tile = schedule.decoded[i]
    tiles[i] = Tile(tile.opcode, tile.work._replace(**fields)).record()
    return replace(schedule, tiles=tiles)


def team_of(schedule: Schedule, i: int) -> int:
    return int(np.searchsorted(schedule.first_tile, i, side="right")) - 1


def moved(schedule: Schedule, i: int, team: int, place: int) -> Schedule:
    """Tile i at another place, of another team: before the tile that is the place-th of the rest."""
    teams = [list(range(begin, end)) for begin, end in pairwise(schedule.first_tile.tolist())]
    teams[team_of(schedule, i)].remove(i)
    teams[team].insert(place, i)
    return in_teams(schedule, teams)


def in_teams(schedule: Schedule, teams: list[list[int]]) -> Schedule:
    first = np.cumsum([0, *map(len, teams)]).astype(np.int32)
    return replace(schedule, tiles=schedule.tiles[[i for tiles in teams for i in tiles]], first_tile=first)


def without(schedule: Schedule, i: int) -> Schedule:
    first = schedule.first_tile - (schedule.first_tile > i).astype(np.int32)
    return replace(schedule, tiles=np.delete(schedule.tiles, i, 0), first_tile=first)


def swapped(schedule: Schedule, a: int, b: int) -> Schedule:
    tiles = schedule.tiles.copy()
    tiles[[a, b]] = tiles[[b, a]]
    return replace(schedule, tiles=tiles)


def recut(monkeypatch: pytest.MonkeyPatch, case: Case, change: Callable[[Cuts], Cuts]) -> Schedule:
    """What the planner makes of other cuts than those it has chosen."""
    monkeypatch.setattr(planner, "choose", lambda *a, **k: change(choose(*a, **k)))
    return plan(case.shape, DEVICE, COSTS, ranks=4)


# -- single numbers ----------------------------------------------------------------------------------------------------


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
    "a weight before all": (GELU, {"weight": lambda s: -1}, "weight: no matrix begins before it"),
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
    "the stream of another tile": (RESIDUAL, {"stream": +64 * 64}, "stream: expected"),
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
    "another head": (NONE, {"head": +1}, "out: expected"),
    "no head": (NONE, {"head": +8}, "head: not one of 8"),
    "another sample": (0, {"sample": +1}, "out: expected"),
    "no sample": (0, {"sample": -6}, "sample: not one of 6"),
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
    with pytest.raises(ScheduleError, match=rf"^tile {i} Attend.*: {message}"):
        validate(planted(sound, i, change))


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


@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_number_is_caught_or_harmless(case: Case, sound: Schedule, seed: int) -> None:
    """Harmless: words and their order by trying, and actions as before. That can only be other ranges of keys."""
    rng, caught = np.random.default_rng(seed), 0
    packed = pack(case.folded, sound, torch.float32)
    want = Twin(sound, packed, *case.given()).run()
    for _ in range(300):
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
            assert re.match(rf"tile \d+ (Product|Attend)\(.*\): \w+: ", str(error)), error
            caught += 1
        else:
            assert name == "slice"
            assert Order(wrong).fault() is None
            assert case.error(Twin(wrong, packed, *case.given()).run(), want) < 1e-5
    assert caught > 200


# -- tiles and teams ---------------------------------------------------------------------------------------------------


def test_the_sound_one_is_sound_by_trying(sound: Schedule) -> None:
    assert Order(sound).fault() is None


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("costs", [COSTS, Costs()], ids=["split", "whole"])
def test_schedules_are_sound_by_trying(ranks: int, costs: Costs) -> None:
    """What is proved of them, found out without the chain: who reads which words of whom, and is done in time."""
    shape = head_shape(tiny(num_layers=2, action_dim=20), batch=3, context=70, prefix=True, steps=2)
    schedule = plan(shape, Device(8, 227 << 10, 90, (4, 3, 2)), costs, ranks=ranks)
    validate(schedule)
    assert Order(schedule).fault() is None


@pytest.mark.parametrize("which", [*(dict(epilogue=e) for e in Epilogue), dict(context=0), dict(context=NONE)], ids=str)
def test_a_tile_left_out_is_caught(sound: Schedule, which: dict[str, int]) -> None:
    kind: type[Operands] = Product if "epilogue" in which else Attend
    wrong = without(sound, a_tile(sound, kind, **which))
    assert "reads what nobody stores" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^no tile has (row tile \d of matrix|head \d of sample \d of) .*: nobody"):
        validate(wrong)


@pytest.mark.parametrize("which", [*(dict(epilogue=e) for e in Epilogue), dict(context=0), dict(context=NONE)], ids=str)
def test_a_tile_that_two_teams_have_is_caught(sound: Schedule, which: dict[str, int]) -> None:
    kind: type[Operands] = Product if "epilogue" in which else Attend
    i = a_tile(sound, kind, **which)
    teams = [list(range(begin, end)) for begin, end in pairwise(sound.first_tile.tolist())]
    teams[(team_of(sound, i) + 1) % sound.teams].append(i)
    wrong = in_teams(sound, teams)
    assert "stores a word of another" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: writes the same words as tile \d+"):
        validate(wrong)


def test_two_results_swapped_are_caught(sound: Schedule) -> None:
    a, b = a_tile(sound, Product, 0, **GELU), a_tile(sound, Product, 1, **GELU)
    first, second = sound.decoded[a].work.out, sound.decoded[b].work.out
    wrong = changed(changed(sound, a, out=second), b, out=first)
    assert Order(wrong).fault() is None, "the words are all there, only in the wrong places"
    with pytest.raises(ScheduleError, match=rf"^tile {a} .*: out: expected {first} by its weight, got {second}"):
        validate(wrong)


def test_a_residual_of_another_team_is_caught(sound: Schedule) -> None:
    i = a_tile(sound, Product, **RESIDUAL)
    team = (team_of(sound, i) + 1) % sound.teams
    with pytest.raises(ScheduleError, match="adds to the residual stream of another team"):
        validate(moved(sound, i, team, 2))


def test_other_tiles_may_be_of_any_team(case: Case, sound: Schedule) -> None:
    i = a_tile(sound, Product, **GELU)
    team = team_of(sound, i)
    stages = sound.decoded[i].work.source, sound.decoded[i].work.out
    other = (team + 1) % sound.teams
    place = next(
        k
        for k, j in enumerate(range(sound.first_tile[other], sound.first_tile[other + 1]))
        if sound.decoded[j].work.out > stages[1]
    )
    fine = moved(sound, i, other, place)
    validate(fine)
    assert Order(fine).fault() is None
    packed = pack(case.folded, sound, torch.float32)
    a, b = (Twin(s, packed, *case.given()).run() for s in (sound, fine))
    assert torch.equal(a, b)


def test_teams_that_wait_for_each_other_are_caught(sound: Schedule) -> None:
    """Two tiles of one team of different stages, swapped: the later one waits, through others, for the one behind it."""
    for team in range(sound.teams):
        begin, end = sound.first_tile[team : team + 2].tolist()
        a = next(i for i in range(begin, end) if sound.decoded[i].opcode == Opcode.ATTEND)
        b = next(i for i in range(a, end) if getattr(sound.decoded[i].work, "epilogue", NONE) == Epilogue.RELU)
        wrong = swapped(sound, a, b)
        assert Order(wrong).fault() == "circle"
        with pytest.raises(
            ScheduleError,
            match=rf"^tile {a} .*: comes before a tile of its team that '1.mlp_out' depends on: "
            rf"{sound.teams} teams wait for each other and never end",
        ):
            validate(wrong)


def test_groups_that_wait_for_each_other_are_caught(sound: Schedule) -> None:
    """Each team has each group's tiles in order, one of them another group's first."""
    shape, half = sound.shape, sound.shape.rows // 2
    one = [i for i, t in enumerate(sound.decoded) if getattr(t.work, "token", 0) < half]
    assert {sound.decoded[i].opcode for i in one} == set(Opcode)

    def group(i: int) -> int:
        w = sound.decoded[i].work
        return int((w.token if isinstance(w, Product) else w.sample * shape.tokens) >= half)

    teams = [list(range(begin, end)) for begin, end in pairwise(sound.first_tile.tolist())]
    euler = {i for i, t in enumerate(sound.decoded) if getattr(t.work, "epilogue", NONE) == Epilogue.EULER}

    def sorted_by(first: int, team: list[int]) -> list[int]:
        tiles = sorted((i for i in team if i not in euler), key=lambda i: (group(i) != first, i))
        return tiles + [i for i in team if i in euler]

    fine = in_teams(sound, [sorted_by(0, team) for team in teams])
    validate(fine)
    wrong = in_teams(sound, [sorted_by(k % 2, team) for k, team in enumerate(teams)])
    assert Order(wrong).fault() == "circle"
    with pytest.raises(ScheduleError, match="teams wait for each other and never end"):
        validate(wrong)


def test_noise_that_is_not_written_is_caught(sound: Schedule) -> None:
    """By a team that has something else to do after its last actions: the kernel looks for them from the end."""
    team = team_of(sound, a_tile(sound, Product, **EULER))
    i = a_tile(sound, Product, epilogue=Epilogue.RELU, token=sound.shape.rows // 2)
    rest = int(np.diff(sound.first_tile)[team]) - (team == team_of(sound, i))
    with pytest.raises(ScheduleError, match="a tile that is not EULER's follows it in its team: its noise is not"):
        validate(moved(sound, i, team, rest))


@pytest.mark.parametrize("seed", range(3))
def test_tiles_moved_about_are_caught_or_harmless(sound: Schedule, seed: int) -> None:
    rng, results = np.random.default_rng(seed), {True: 0, False: 0}
    for _ in range(15):
        i, team = int(rng.integers(len(sound.tiles))), int(rng.integers(sound.teams))
        rest = int(np.diff(sound.first_tile)[team]) - (team == team_of(sound, i))
        other = moved(sound, i, team, int(rng.integers(rest + 1)))
        try:
            validate(other)
        except ScheduleError as error:
            assert re.search("never end|of another team|follows it in its team", str(error))
            results[False] += 1
        else:
            assert Order(other).fault() is None
            results[True] += 1
    assert results[True] > 0 < results[False]


# -- what no tile has for itself ---------------------------------------------------------------------------------------


def of_matrix(name: str, **fields: Any) -> Callable[[Schedule], dict[str, Any]]:
    return lambda s: {"matrices": {**s.matrices, name: replace(s.matrices[name], **fields)}}


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


def least_staging(s: Schedule) -> int:
    products = (product_staging(s.padded_tokens, s.part, m) for m in s.matrices.values())
    slices = {t.work.slice for t in s.decoded if isinstance(t.work, Attend)}
    return max(*products, *(attend_bytes(s.shape.tokens, n, s.shape.head_dim) for n in slices))


def least_inbox(s: Schedule) -> int:
    sums = (sums_bytes(s.padded_tokens, m) for m in s.matrices.values() if m.split > 1)
    return max(*sums, attend_inbox(s.shape.tokens, s.ranks, s.shape.head_dim))


SCHEDULES: dict[str, tuple[Callable[[Schedule], dict[str, Any]], str]] = {
    "ranks that are no cluster": (lambda s: {"ranks": 3}, "^ranks: expected one of"),
    "ranks of another plan": (lambda s: {"ranks": 2}, "^matrix 'encode': expected 2 ranks"),
    "more teams than can run at once": (lambda s: {"teams": 7}, "^teams: expected 1 to 6, which can run at once"),
    "no clusters": (lambda s: {"device": replace(s.device, clusters=())}, "^teams: expected 1 to 0"),
    "tokens without code": (lambda s: {"padded_tokens": 56}, "^padded_tokens: expected one of"),
    "fewer padded tokens": (lambda s: {"padded_tokens": 48}, r"^tile \d+ .*: tokens: more than 48"),
    "a part of a step": (lambda s: {"part": s.part - 16}, "^part: expected a multiple of 32"),
    "no part": (lambda s: {"part": 0}, "^part: expected a multiple of 32"),
    "less than a panel": (lambda s: {"part": 96}, "^part, of matrix '0.mlp_out': expected 128, a whole panel"),
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
    "an inbox too small for attention": (lambda s: {"inbox": 16}, r"^inbox: expected \d+ for attention"),
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
    staging = -(-least_staging(sound) // 16) * 16
    least = replace(sound, staging=staging, inbox=-(-least_inbox(sound) // 16) * 16, slots=3)
    validate(replace(least, device=replace(sound.device, shared_memory=least.shared_bytes)))


def test_one_rank_has_no_inbox() -> None:
    shape = head_shape(tiny(), batch=1, context=40, prefix=True, steps=1)
    schedule = plan(shape, SMALL)
    validate(schedule)
    with pytest.raises(ScheduleError, match="^inbox: expected 0 for attention, got 16"):
        validate(replace(schedule, inbox=16))


@pytest.mark.parametrize("heads,dim", [(8, 8), (1, 80), (3, 48)])
def test_heads_that_the_kernel_cannot_have_are_caught(sound: Schedule, heads: int, dim: int) -> None:
    shape = replace(sound.shape, heads=heads, width=heads * dim if dim != 48 else 128)
    with pytest.raises(ScheduleError, match="^head_dim: expected a multiple of 16 up to 64"):
        validate(replace(sound, shape=shape))


def test_more_tokens_than_rows_of_queries_are_caught() -> None:
    """Of one sample: attention has at most 64."""
    shape = head_shape(tiny(63), batch=1, context=40, prefix=True, steps=1)
    validate(plan(shape, SMALL))
    longer = replace(shape, horizon=64)
    assert longer.tokens == 65
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "check", lambda shape: None)
        schedule = plan(longer, SMALL)
    with pytest.raises(ScheduleError, match=r"^tile \d+ Attend.*: tokens: more than 64 rows of queries"):
        validate(schedule)


def test_residuals_of_other_heights_are_caught(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    def change(cuts: Cuts) -> Cuts:
        return with_matrix(cuts, "1.mlp_out", tile_rows=32)

    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: tile_rows: expected 64 as encode_out's tiles have"):
        validate(recut(monkeypatch, case, change))


def test_ranks_without_words_are_caught(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """All rows of a part lie past the matrix: nothing would tell the others that its ranks have read."""

    def change(cuts: Cuts) -> Cuts:
        return with_matrix(cuts, "0.mlp_in", split=2, parts=1, tile_rows=160)  # 512 = 3 x 160 + 32

    wrong = recut(monkeypatch, case, change)
    assert "may still read" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: rows: none for the last part of its ranks"):
        validate(wrong)


def with_matrix(cuts: Cuts, name: str, **fields: int) -> Cuts:
    """Cuts with one matrix cut otherwise, and those behind it moved."""
    matrices, offset = {}, 0
    for key, matrix in cuts.matrices.items():
        matrices[key] = replace(matrix, offset=offset, **(fields if key == name else {}))
        offset += matrices[key].units
    return replace(cuts, matrices=matrices)


def test_the_chain_is_what_buffers_are_for(sound: Schedule) -> None:
    """Each buffer is written by one stage and read by the next, the first by the first."""
    stages = chain(sound.shape)
    assert [stage.out for stage in stages[:-1]] == [stage.source for stage in stages[1:]]
    assert sorted(stage.out for stage in stages) == sorted(sound.buffers)
    assert stages[-1].out == stages[0].source


def test_validating_is_fast() -> None:
    """It is part of a policy's warm-up: its work does not grow with the square of the tiles."""
    shape = head_shape(presets.robocasa_gr1().model.head, batch=1, context=588, prefix=True, steps=4)
    schedule = plan(shape, H200)
    validate(schedule)
    assert lines_run(lambda: validate(schedule)) < 60_000, "21 000 when this was written: 10 ms"
    assert peak_bytes(lambda: validate(schedule)) < 5_000_000
