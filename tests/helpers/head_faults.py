"""A small schedule of the one-launch head that has everything in it, and ways to plant faults in schedules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from head_case import Case, tiny

from dit4dit.engine.action_ode import Device, HeadShape, Schedule, plan
from dit4dit.engine.action_ode.cuts import AttendCut, Cuts, choose
from dit4dit.engine.action_ode.schedule import (
    NONE,
    Attend,
    Epilogue,
    Operands,
    Product,
    Tile,
)
from dit4dit.engine.action_ode.sizes import (
    attend_bytes,
    attend_inbox,
    own_attention_bytes,
    product_staging,
    sums_bytes,
)

DEVICE = Device(64, 227 << 10, 90, (28, 6, 5))
RANKS_OF_TEAM, GROUP = 4, 3
TILES = {
    "encode": (64, 2, 1),
    "0.project": (48, 4, 1),
    "1.project": (128, 4, 1),
    "mlp_in": (192, 2, 1),
    "mlp_out": (64, 4, 2),
    "decode_in": (32, 4, 1),
    "decode_out": (16, 4, 1),
}
"""tile_rows, split and parts of matrices; (64, 4, 1) of the rest. Not the planner's choice, so that it stays as it is."""
ATTENTION = (AttendCut(2, 9), AttendCut(4, 38))
"""Of the tokens two heads a tile, each by two ranks; of the features one, by all. Some ranks have fewer keys than others."""
FUSED = (AttendCut(1, 17), AttendCut(2, 75))
"""Where attention to the tokens is part of a product, and two heads a tile attend to the features."""
planner = sys.modules["dit4dit.engine.action_ode.plan"]


@cache
def faults_case() -> Case:
    case = Case(tiny(16, num_layers=2, num_heads=8, head_dim=16, action_dim=40), batch=6, context=150)
    case.shape = replace(case.shape, fp8=True)
    return case


@cache
def sound_schedule(fused: bool = False) -> Schedule:
    schedule = planned(faults_case().shape, fused=fused)
    products = [t.work for t in schedule.decoded if isinstance(t.work, Product)]
    assert {w.epilogue for w in products} == set(Epilogue)
    assert {w.fp8 for w in products} == {0, 1}
    assert {w.split for w in products} == {2, 4}
    assert {w.parts for w in products} == {1, 2}
    assert len({w.token for w in products}) == 2, "groups"
    assert min(m.row_tiles for m in schedule.matrices.values()) > 1
    assert {bool(w.attend) for w in products} == {False, fused}
    attends = [t.work for t in schedule.decoded if isinstance(t.work, Attend)]
    wanted = {(0, 2, 2)} if fused else {(NONE, 2, 2), (0, 4, 1)}
    assert {(w.context, w.share, w.pairs) for w in attends} == wanted
    return schedule


def planned(
    shape: HeadShape,
    device: Device = DEVICE,
    cuts: Mapping[str, tuple[int, int, int]] | None = None,
    fused: bool = False,
    attention: tuple[AttendCut, AttendCut] | None = None,
) -> Schedule:
    """With TILES, or with `cuts` for some of them, ATTENTION or FUSED or what is given, and just as much memory as that needs."""
    tiles = TILES | (cuts or {})

    def change(found: Cuts) -> Cuts:
        matrices, offset = {}, 0
        for name, matrix in found.matrices.items():
            tile_rows, split, parts = tiles.get(name) or tiles.get(name.split(".")[-1]) or (64, 4, 1)
            matrices[name] = replace(matrix, tile_rows=tile_rows, split=split, parts=parts, offset=offset)
            offset += matrices[name].units
        return replace(found, matrices=matrices, attention=attention or (FUSED if fused else ATTENTION))

    schedule = plan_with(change, shape, device, ranks=RANKS_OF_TEAM, group=min(GROUP, shape.batch), fused=fused)
    schedule = replace(schedule, part=max(m.slice for m in schedule.matrices.values()), slots=4)
    return replace(schedule, staging=least_staging(schedule), inbox=least_inbox(schedule))


def plan_with(change: Callable[[Cuts], Cuts], *arguments: Any, **ways: Any) -> Schedule:
    """`plan` with other cuts than those that are predicted to be best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", lambda *given: change(choose(*given)))
        return plan(*arguments, **ways)


def least_staging(schedule: Schedule) -> int:
    """Bytes of staging that its tiles need."""
    shape, padded = schedule.shape, schedule.padded_tokens
    each = own_attention_bytes(shape.tokens, shape.head_dim)
    works = [t.work for t in schedule.decoded]
    at_once = {(w.weight, w.attend * each) for w in works if isinstance(w, Product)}
    by_offset = sorted(schedule.matrices.values(), key=lambda m: m.offset)
    products = {
        product_staging(padded, schedule.part, [m for m in by_offset if m.offset <= weight][-1], behind)
        for weight, behind in at_once
    }
    slices = {(w.slice, w.context != NONE) for w in works if isinstance(w, Attend)}
    attends = (attend_bytes(shape.tokens, n, shape.head_dim, features) for n, features in slices)
    return -(-max(*products, *attends) // 16) * 16


def least_inbox(schedule: Schedule) -> int:
    shape = schedule.shape
    sums = [sums_bytes(schedule.padded_tokens, m) for m in schedule.matrices.values() if m.ranks > 1]
    shares = {t.work.share for t in schedule.decoded if isinstance(t.work, Attend)}
    attends = [attend_inbox(shape.tokens, share, shape.head_dim) for share in shares]
    return -(-max(sums + attends, default=0) // 16) * 16


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
