"""Faults planted in the tiles of the one-launch action head: the validator catches each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from head_case import Case, tiny
from head_faults import (
    a_tile,
    changed,
    faults_case,
    in_teams,
    least_inbox,
    moved,
    plan_with,
    sound_schedule,
    swapped,
    team_of,
    without,
)
from rank_order import Order

from dit4dit.engine.action_ode import Device, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import AttendCut
from dit4dit.engine.action_ode.schedule import NONE, RANKS, SETS, Attend, Epilogue, Opcode, Product
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.validate import ScheduleError, validate
from dit4dit.engine.action_ode.weights import pack

FEW = Device(8, 227 << 10, 90, (4, 3, 2))
"""SMs for few teams of each size."""


@pytest.fixture(scope="module")
def case() -> Case:
    return faults_case()


@pytest.fixture(scope="module")
def sound() -> Schedule:
    validate(sound_schedule())
    return sound_schedule()


@pytest.fixture(scope="module")
def fused() -> Schedule:
    """With attention to the tokens as part of the products that follow it."""
    validate(sound_schedule(fused=True))
    return sound_schedule(fused=True)


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


# -- tiles and teams ---------------------------------------------------------------------------------------------------


def test_the_sound_one_is_sound_by_trying(sound: Schedule) -> None:
    assert Order(sound).fault() is None


def test_a_fused_one_is_sound_by_trying(fused: Schedule) -> None:
    assert Order(fused).fault() is None


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("costs", [Costs(read=0.5, inbox=0.0), Costs()], ids=["split", "whole"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "fused"])
def test_schedules_are_sound_by_trying(ranks: int, costs: Costs, inside: bool) -> None:
    """What is proved of them, found out without the chain: who reads which words of whom, and is done in time."""
    shape = head_shape(tiny(num_layers=2, action_dim=20), batch=3, context=70, prefix=True, steps=2)
    schedule = plan(shape, FEW, costs, ranks=ranks, fused=inside)
    validate(schedule)
    assert Order(schedule).fault() is None


@pytest.mark.parametrize("inside", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("ranks, share", [(ranks, share) for ranks in RANKS for share in RANKS if share <= ranks])
def test_shares_are_sound_by_trying(ranks: int, share: int, group: int, inside: bool) -> None:
    """Heads of 48 lie across the columns of ranks, three heads leave ranks without one, and some of a head have no keys."""
    heads = dict(num_heads=2, head_dim=48) if share % 4 else dict(num_heads=3, head_dim=16)
    shape = head_shape(tiny(num_layers=2, **heads), batch=3, context=70, prefix=True, steps=2)
    keys, active = (shape.tokens, shape.context), share // 2 + 1
    attention = tuple(AttendCut(share, -(-n // active)) for n in keys)
    costs = Costs(read=0.5, inbox=0.0)
    schedule = plan_with(
        lambda cuts: replace(cuts, attention=attention), shape, FEW, costs, ranks=ranks, group=group, fused=inside
    )
    schedule = replace(schedule, inbox=max(schedule.inbox, least_inbox(schedule)), slots=4)
    attends = [t.work for t in schedule.decoded if isinstance(t.work, Attend)]
    assert {w.share for w in attends} == {share}
    assert {w.context == NONE for w in attends} == {not inside, False}
    assert any(w.attend for w in (t.work for t in schedule.decoded) if isinstance(w, Product)) == inside
    validate(schedule)
    assert Order(schedule).fault() is None


WHICH = [*(dict(epilogue=e) for e in Epilogue), dict(context=0), dict(context=NONE), dict(attend=4)]
"""A tile of each kind, the last of a schedule that is fused."""


def schedule_and_tile(which: dict[str, int]) -> tuple[Schedule, int]:
    schedule = sound_schedule(fused="attend" in which)
    return schedule, a_tile(schedule, Attend if "context" in which else Product, **which)


@pytest.mark.parametrize("which", WHICH, ids=str)
def test_a_tile_left_out_is_caught(which: dict[str, int]) -> None:
    wrong = without(*schedule_and_tile(which))
    assert "reads what nobody stores" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^no tile has (row tile \d of matrix|head \d of sample \d of) .*: nobody"):
        validate(wrong)


@pytest.mark.parametrize("which", WHICH, ids=str)
def test_a_tile_that_two_teams_have_is_caught(which: dict[str, int]) -> None:
    schedule, i = schedule_and_tile(which)
    teams = [list(range(begin, end)) for begin, end in pairwise(schedule.first_tile.tolist())]
    teams[(team_of(schedule, i) + 1) % schedule.teams].append(i)
    wrong = in_teams(schedule, teams)
    assert "stores a word of another" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=r"^tile \d+ .*: writes the same words as tile \d+"):
        validate(wrong)


@pytest.mark.parametrize("pair", [0, 24, 46])
def test_a_head_that_nobody_has_is_caught(sound: Schedule, pair: int) -> None:
    """The second of two heads of a tile."""
    wrong = changed(sound, a_tile(sound, Attend, context=NONE, pair=pair), pairs=1)
    assert "reads what nobody stores" in str(Order(wrong).fault())
    head = f"head {(pair + 1) % 8} of sample {(pair + 1) // 8} of '1.attended'"
    with pytest.raises(ScheduleError, match=f"^no tile has {head}: nobody writes its words"):
        validate(wrong)


def test_a_head_that_two_tiles_have_is_caught(sound: Schedule) -> None:
    i, j = (a_tile(sound, Attend, context=NONE, pair=pair) for pair in (4, 6))
    wrong = changed(sound, i, pair=5)
    assert "stores a word of another" in str(Order(wrong).fault())
    with pytest.raises(ScheduleError, match=rf"^tile {max(i, j)} Attend.*: writes the same words as tile {min(i, j)}$"):
        validate(wrong)


def test_heads_of_two_groups_in_one_tile_are_caught(sound: Schedule) -> None:
    """The last head of one group and the first of the next."""
    i = a_tile(sound, Attend, context=NONE, pair=22)
    with pytest.raises(ScheduleError, match=rf"^tile {i} Attend.*: pairs: of samples of several groups"):
        validate(changed(sound, i, pair=23))


def test_two_results_swapped_are_caught(sound: Schedule) -> None:
    a = a_tile(sound, Product, **GELU)
    b = a_tile(sound, Product, 1, **GELU, source=sound.decoded[a].work.source)
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
        return int((w.token if isinstance(w, Product) else w.pair // shape.heads * shape.tokens) >= half)

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


@pytest.mark.parametrize("seed", range(2))
def test_tiles_moved_about_are_caught_or_harmless(sound: Schedule, seed: int) -> None:
    rng, messages, harmless = np.random.default_rng(seed), [], 0
    for _ in range(15):
        i, team = int(rng.integers(len(sound.tiles))), int(rng.integers(sound.teams))
        rest = int(np.diff(sound.first_tile)[team]) - (team == team_of(sound, i))
        other = moved(sound, i, team, int(rng.integers(rest + 1)))
        try:
            validate(other)
        except ScheduleError as error:
            messages.append(str(error))
        else:
            assert Order(other).fault() is None
            harmless += 1
    assert [m for m in messages if not re.search("never end|of another team|follows it in its team", m)] == []
    assert harmless > 0 < len(messages)
