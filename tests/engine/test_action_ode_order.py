"""Which tiles the one-launch action head has, and in which order: the validator agrees with what trying it all finds."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from head_case import DEVICES, SIZES, Case, planned, tiny
from head_faults import (
    a_tile,
    changed,
    in_teams,
    least_inbox,
    moved,
    plan_with,
    sound_schedule,
    swapped,
    team_of,
    without,
)
from head_plans import small
from rank_order import Order

from dit4dit.engine.action_ode import Device, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import AttendCut
from dit4dit.engine.action_ode.schedule import NONE, RANKS, Attend, Epilogue, Opcode, Product
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.validate import ScheduleError, validate
from dit4dit.engine.action_ode.weights import pack

FEW = Device(8, 227 << 10, 90, (4, 3, 2))
"""SMs for few teams of each size."""


GELU, RESIDUAL, EULER = ({"epilogue": Epilogue[name]} for name in ("GELU", "RESIDUAL", "EULER"))


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_emulated_is_sound_by_trying(size: str, device: str) -> None:
    schedule = planned(size, small(size), DEVICES[device])
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
