"""A small schedule of the one-launch head that has everything in it, and ways to plant faults in schedules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from head_case import Case, tiny

from dit4dit.engine.action_ode import Device, HeadShape, Schedule, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import Cuts, choose
from dit4dit.engine.action_ode.schedule import NONE, Attend, Epilogue, Operands, Product, Tile

DEVICE = Device(64, 227 << 10, 90, (28, 6, 5))
COSTS = Costs(read=0.5, inbox=0.0)
"""By which small heads are cut along their columns, too."""
planner = sys.modules["dit4dit.engine.action_ode.plan"]


@cache
def faults_case() -> Case:
    case = Case(tiny(16, num_layers=2, num_heads=8, head_dim=16, action_dim=40), batch=6, context=150)
    case.shape = replace(case.shape, fp8=True)
    return case


@cache
def sound_schedule() -> Schedule:
    schedule = plan(faults_case().shape, DEVICE, COSTS, ranks=4)
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


def recut(
    monkeypatch: pytest.MonkeyPatch, shape: HeadShape, change: Callable[[Cuts], Cuts], device: Device = DEVICE
) -> Schedule:
    """What the planner makes of other cuts than those it has chosen."""
    monkeypatch.setattr(planner, "choose", lambda *a, **k: change(choose(*a, **k)))
    return plan(shape, device, COSTS, ranks=4)


def with_matrix(cuts: Cuts, name: str, **fields: int) -> Cuts:
    """Cuts with one matrix cut otherwise, and those behind it moved."""
    matrices, offset = {}, 0
    for key, matrix in cuts.matrices.items():
        matrices[key] = replace(matrix, offset=offset, **(fields if key == name else {}))
        offset += matrices[key].units
    return replace(cuts, matrices=matrices)
