"""The validator: proof that a schedule may run, whatever the order in which its workers come forward.

A stage is all tiles that wait for one counter and signal one counter. Whoever waits must wait for all signals that its counter
ever gets, so that every tile of the stages that signal it comes before: that is the only order the proof builds on.

- It ends: no stage comes before itself, and each worker has its tiles in the order of the stages' depth, the longest chain of
  waits before them. So those of the least depth that are left can always run.
- No tile reads what is not written, or what another may be writing; no two tiles write an element, and none writes what
  another may still be reading, without an order between their stages. Within a stage there is none.
- What a stage reads of a buffer was last written by one stage: none of it is left from an earlier block or step.
- Every access lies within its buffer and its constants, and fits the staging memory; the weights of a product are a row tile
  of one matrix as it lies in memory, and are fetched in the order in which they are used.

Not proved: that matrix, constants, keys and epilogue are the right ones, which the twin shows, and the layout of the
buffers, which the launcher checks.

Stages that do the same on the workspace, as those of other blocks and steps do, are looked at in detail once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit4dit.engine.action_ode.schedule import (
    NONE,
    SLOT_ELEMENTS,
    TILE_ROWS,
    WEIGHT_UNIT,
    Attend,
    Epilogue,
    Opcode,
    Product,
    Schedule,
    Space,
    Start,
    Tile,
    attend_bytes,
    attend_rows,
    product_bytes,
)

Integers = NDArray[np.integer]
CELL = {Space.STATS: 2}
"""Columns that are told apart, else 16: every access begins at a multiple of them and ends at one, or with the buffer."""
WRITES_TO = {
    Epilogue.TOKENS: (Space.STREAM,),
    Epilogue.RESIDUAL: (Space.STREAM,),
    Epilogue.EULER: (Space.ACTIONS,),
}
PLACE = {name: 4 + i for i, name in enumerate(Product._fields)}
"""Column of a product's field in its record."""


class ScheduleError(ValueError):
    """A schedule that must not run; the message names the tile."""


class Access(NamedTuple):
    """Columns of rows in planes of a buffer; all half-open."""

    space: Space
    planes: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]


def validate(schedule: Schedule) -> None:
    """Nothing, if the schedule may run.

    Raises:
        ScheduleError: it may not.
    """
    _check_tables(schedule)
    _check_numbers(schedule)
    stages = _stages(schedule)
    _check_accesses(schedule, stages)
    _check_end(schedule, stages)


def reads(schedule: Schedule, tile: Tile) -> Iterator[Access]:
    """What a tile reads of the workspace."""
    w, shape = tile.work, schedule.shape
    if isinstance(w, Product):
        rows, columns = (w.token, w.token + w.tokens), (w.row, w.row + w.rows)
        yield Access(Space(w.source), (0, w.planes), rows, (0, w.columns))
        if w.planes > 1:
            yield Access(Space.STATS, (0, w.planes), rows, (0, 2 * shape.heads))
        if w.epilogue == Epilogue.RESIDUAL:
            yield Access(Space.STREAM, (0, 1), rows, columns)
        elif w.epilogue == Epilogue.EULER:
            yield from (Access(Space.ACTIONS, (0, 1), each, columns) for _, each in _samples(schedule, w))
    elif isinstance(w, Attend):
        rows, (first, last) = (w.token, w.token + w.tokens), _head(schedule, w.head)
        for part in (0, 1, 2) if w.context == NONE else (0,):
            yield Access(Space.PROJECTED, (0, 1), rows, (first + part * shape.width, last + part * shape.width))


def writes(schedule: Schedule, tile: Tile) -> Iterator[Access]:
    """What a tile writes."""
    w, shape = tile.work, schedule.shape
    rows, one = (w.token, w.token + w.tokens), (0, 1)
    if isinstance(w, Start):
        yield Access(Space.ACTIONS, one, rows, (0, shape.actions))
        yield Access(Space.NOISY, one, rows, (0, shape.padded_actions))
    elif isinstance(w, Attend):
        yield Access(Space.ATTENDED, (w.plane, w.plane + 1), rows, _head(schedule, w.head))
        yield Access(Space.STATS, (w.plane, w.plane + 1), rows, (2 * w.head, 2 * w.head + 2))
    elif w.epilogue == Epilogue.EULER:
        columns = (w.row, w.row + w.rows)
        for sample, each in _samples(schedule, w):
            yield Access(Space.ACTIONS, one, each, columns)
            yield Access(Space.NOISY, one, each, (w.row, min(w.row + w.tile_rows, shape.padded_actions)))
            if w.step == shape.steps - 1:
                yield Access(Space.OUT, one, (sample * shape.horizon, (sample + 1) * shape.horizon), columns)
    else:
        yield Access(Space(w.out), one, rows, (w.row, w.row + w.rows))
        if w.out == Space.STREAM:
            yield Access(Space.ROUNDED, one, rows, (w.row, w.row + w.rows))


def _samples(schedule: Schedule, w: Product) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each sample of a product with its rows, those of the actions alone."""
    shape = schedule.shape
    for first in range(w.token, w.token + w.tokens, shape.tokens):
        yield first // shape.tokens, (first + shape.prefix, first + shape.tokens)


def _head(schedule: Schedule, head: int) -> tuple[int, int]:
    return head * schedule.shape.head_dim, (head + 1) * schedule.shape.head_dim


# -- tables and bounds -------------------------------------------------------------------------------------------------


def _check_tables(schedule: Schedule) -> None:
    workers, tiles = schedule.device.workers, schedule.tiles
    for name, first, count in (
        ("first_tile", schedule.first_tile, len(tiles)),
        ("first_segment", schedule.first_segment, len(schedule.segments)),
    ):
        if len(first) != workers + 1 or first[0] != 0 or first[-1] != count or (np.diff(first) < 0).any():
            raise ScheduleError(
                f"{name}: expected {workers + 1} rising numbers from 0 to {count}, got {first.tolist()}"
            )
    _refuse(schedule, ~np.isin(tiles[:, 0], list(Opcode)), "no such opcode")
    is_product = tiles[:, 0] == Opcode.PRODUCT
    products = tiles[is_product]
    wanted = products[:, [PLACE["weight"], PLACE["slots"], PLACE["fp8"]]].copy()
    wanted[:, 2] = 2 - wanted[:, 2]
    begin = np.concatenate([[0], np.cumsum(is_product)])[schedule.first_tile]
    if not np.array_equal(begin, schedule.first_segment) or not np.array_equal(wanted, schedule.segments):
        raise ScheduleError("segments: the weights of a worker are not fetched in the order of its products")


def _refuse(schedule: Schedule, wrong: NDArray[np.bool_], what: str, among: Integers | None = None) -> None:
    """ScheduleError for the first tile that is `wrong`; `among`: the tiles that it tells of."""
    if wrong.any():
        i = int(np.argmax(wrong)) if among is None else int(among[np.argmax(wrong)])
        raise ScheduleError(f"tile {i} {_name(schedule, i)}: {what}")


def _name(schedule: Schedule, i: int) -> str:
    record = schedule.tiles[i]
    return str(Tile.of(record).work) if record[0] in list(Opcode) else str(record.tolist())


def _check_numbers(schedule: Schedule) -> None:
    """What no two tiles have in common: counters, weights and constants."""
    shape, tiles = schedule.shape, schedule.tiles
    for name, column in (("wait", 1), ("signal", 3)):
        counter = tiles[:, column]
        wrong = (counter < NONE) | (counter >= schedule.counters)
        _refuse(schedule, wrong, f"{name}: not one of the {schedule.counters} counters")
    signals = np.bincount(tiles[tiles[:, 3] != NONE, 3], minlength=schedule.counters)
    target, total = tiles[:, 2], signals[tiles[:, 1]]
    waits = tiles[:, 1] != NONE
    of = "its target is not the number of signals that its counter gets"
    _refuse(schedule, waits & (target > total), f"{of}, and is never reached")
    _refuse(schedule, waits & (target < total), f"{of}, and does not say which tiles are done")

    among = np.flatnonzero(tiles[:, 0] == Opcode.PRODUCT)
    p = {name: tiles[among, place].astype(np.int64) for name, place in PLACE.items()}
    end = WEIGHT_UNIT * (p["weight"] + p["slots"] * (2 - p["fp8"]))
    _refuse(schedule, (p["weight"] < 0) | (end > schedule.weight_bytes), "weights", among)
    _refuse(schedule, (p["fp8"] & ~1) != 0, "fp8", among)
    # the matrix that each begins in
    matrices = sorted(schedule.matrices.values(), key=lambda m: m.offset)
    names = ("offset", "units", "slots", "tile_rows", "columns", "fp8")
    m = {name: np.array([int(getattr(matrix, name)) for matrix in matrices]) for name in names}
    mine = np.searchsorted(m["offset"], p["weight"], side="right") - 1
    into, length = p["weight"] - m["offset"][mine], p["slots"] * (2 - p["fp8"])
    like = np.all([p[name] == m[name][mine] for name in names[2:]], axis=0)
    wrong = ~like | (into % np.maximum(length, 1) != 0) | (into + length > m["units"][mine])
    _refuse(schedule, wrong, "weights: not a row tile of the matrix there", among)
    _refuse(schedule, (p["scale"] == NONE) != (p["fp8"] == 0), "fp8 without scale", among)
    _refuse(schedule, (p["step"] < 0) | (p["step"] >= shape.steps), "step", among)
    tables = np.where(p["epilogue"] == Epilogue.TOKENS, (shape.tokens - 1) * shape.width, 0)
    for name, length, there in (
        ("bias", p["rows"] + tables, True),
        ("scale", p["rows"], p["scale"] != NONE),
        ("modulation", 2 * p["columns"], p["modulation"] != NONE),
    ):
        wrong = there & ((p[name] < 0) | (p[name] + length > schedule.constant_floats))
        _refuse(schedule, wrong, f"{name} outside the {schedule.constant_floats} constants", among)
    _refuse(schedule, (p["modulation"] != NONE) & (p["modulation"] % 4 != 0), "modulation: four at a time", among)
    times = schedule.constants["times"][0]
    if times < 0 or times + shape.steps > schedule.constant_floats:
        raise ScheduleError(f"times: {shape.steps} from {times} are outside the {schedule.constant_floats} constants")


def _check_bounds(schedule: Schedule, i: int, tile: Tile) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ScheduleError(f"tile {i} {tile.work}: {what}")

    w, shape = tile.work, schedule.shape
    if isinstance(w, Product):
        need(w.source in list(Space) and w.out in list(Space) and w.epilogue in list(Epilogue), "space or epilogue")
        need(w.tile_rows in TILE_ROWS and 0 < w.rows <= w.tile_rows, "rows")
        need(0 < w.columns <= w.slots * (SLOT_ELEMENTS // w.tile_rows), "fewer slots than columns")
        need(not schedule.buffers[w.source].wide, "source")
        need(w.columns <= schedule.buffers[w.source].columns, "more columns than the source has")
        need(0 < w.tokens <= schedule.padded_tokens, f"at most {schedule.padded_tokens} tokens")
        need(w.token % shape.tokens == 0 and w.tokens % shape.tokens == 0, "a part of a sample")
        need(product_bytes(schedule.padded_tokens, schedule.part, shape.width) <= schedule.staging, "staging")
        need(w.planes == 1 or (w.source == Space.ATTENDED and w.columns == shape.width), "planes")
        need(not w.norm or (w.columns == shape.width and w.planes == 1), "norm of another width")
        need(bool(w.norm) or w.modulation == NONE, "modulation without norm")
        wanted = WRITES_TO.get(Epilogue(w.epilogue))
        wide = schedule.buffers[w.out].wide
        need(not wide if wanted is None else w.out in wanted, "the epilogue writes elsewhere")
        need(w.rows % 16 == 0 or w.epilogue == Epilogue.EULER, "rows of an odd number")
    elif isinstance(w, Attend):
        limit = shape.tokens if w.context == NONE else shape.context
        need(NONE <= w.context < shape.contexts and 0 <= w.sample < shape.batch, "context or sample")
        need(w.tokens == shape.tokens and w.token == w.sample * shape.tokens, "sample")
        need(w.key >= 0 and w.keys > 0 and w.key + w.keys <= limit, f"keys, of {limit}")
        need(attend_rows(w.tokens, w.keys)[2] <= 64, "more than 64 keys a warp")
        need(attend_bytes(w.tokens, w.keys, shape.head_dim) <= schedule.staging, "staging")
    else:
        need(0 <= w.sample < shape.batch and w.token == w.sample * shape.tokens, "sample")
        need(w.tokens == shape.tokens and w.prefix == int(shape.prefix), "tokens")
    for access in (*reads(schedule, tile), *writes(schedule, tile)):
        buffer = schedule.buffers[access.space]
        limits = (buffer.planes, buffer.rows, buffer.columns)
        # a message is made where it is needed: there are many accesses
        if not all(0 <= first < last <= limit for (first, last), limit in zip(access[1:], limits, strict=True)):
            need(False, f"{access} is outside {limits}")
        first, last = access.columns
        cell = CELL.get(access.space, 16)
        if first % cell or (last % cell and last != buffer.columns):
            need(False, f"{access} ends within {cell} columns")


# -- order -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stages:
    """of: the stage of each tile. depth: stages of the longest chain before each. order: stages, each after those before it.
    before: bool [stages, stages], whether the second comes before the first.
    """

    of: Integers
    depth: Integers
    before: NDArray[np.bool_]
    order: list[int]


def _stages(schedule: Schedule) -> _Stages:
    pairs, of = np.unique(schedule.tiles[:, [1, 3]], axis=0, return_inverse=True)
    of = of.reshape(-1)
    count = len(pairs)
    signalled_by: dict[int, list[int]] = {}
    for stage, (_, signal) in enumerate(pairs.tolist()):
        if signal != NONE:
            signalled_by.setdefault(signal, []).append(stage)
    parents = [signalled_by.get(wait, []) if wait != NONE else [] for wait in pairs[:, 0].tolist()]
    children: list[list[int]] = [[] for _ in range(count)]
    for stage, mine in enumerate(parents):
        for parent in mine:
            children[parent].append(stage)
    left = [len(mine) for mine in parents]
    depth = np.zeros(count, np.int64)
    before = np.zeros((count, count), np.bool_)
    order = [stage for stage in range(count) if not left[stage]]
    for stage in order:  # grows
        for parent in parents[stage]:
            before[stage] |= before[parent]
            before[stage, parent] = True
            depth[stage] = max(depth[stage], depth[parent] + 1)
        for child in children[stage]:
            left[child] -= 1
            if not left[child]:
                order.append(child)
    if len(order) < count:
        stuck = np.isin(of, [stage for stage in range(count) if left[stage]])
        raise ScheduleError(
            f"{int(stuck.sum())} tiles wait for each other and never end, such as {int(np.argmax(stuck))}"
        )
    return _Stages(of, depth, before, order)


def _check_end(schedule: Schedule, stages: _Stages) -> None:
    depth = stages.depth[stages.of]
    worker = np.repeat(np.arange(schedule.device.workers), np.diff(schedule.first_tile))
    falls = (np.diff(depth) < 0) & (np.diff(worker) == 0)
    if falls.any():
        i = int(np.argmax(falls))
        raise ScheduleError(
            f"tile {i} {_name(schedule, i)}: comes before tile {i + 1} of its worker, which it may depend on: workers may wait "
            "for each other and never end"
        )


class _Cells:
    """All buffers as one row of cells."""

    def __init__(self, schedule: Schedule) -> None:
        self.shapes, self.first, count = [], [], 0
        for space, buffer in zip(Space, schedule.buffers, strict=True):
            shape = buffer.planes, buffer.rows, -(-buffer.columns // CELL.get(space, 16))
            self.first.append(count)
            self.shapes.append(shape)
            count += shape[0] * shape[1] * shape[2]
        self.count = count
        self.owner = np.full(count, NONE, np.int64)  # the tile of the stage that is looked at
        self._there = np.zeros(count, np.bool_)

    def of(self, accesses: list[Access]) -> Integers:
        """The cells of all accesses, some perhaps more than once."""
        found = [np.zeros(0, np.int64)]
        for space, planes, rows, (first, last) in accesses:
            _, height, width = self.shapes[space]
            cell = CELL.get(space, 16)
            columns = np.arange(first // cell, -(-last // cell))
            lines = (np.arange(*planes)[:, None] * height + np.arange(*rows)).reshape(-1, 1)
            found.append((self.first[space] + lines * width + columns).ravel())
        return np.concatenate(found)

    def of_stage(self, schedule: Schedule, tiles: Integers) -> tuple[Integers, Integers]:
        """(read, written) by all tiles of a stage, each cell once; ScheduleError where two of them meet."""
        read, written = [], []
        for i in tiles.tolist():
            tile = Tile.of(schedule.tiles[i])
            _check_bounds(schedule, i, tile)
            read.append(self.of(list(reads(schedule, tile))))
            written.append(self.of(list(writes(schedule, tile))))
        try:
            for i, cells in zip(tiles.tolist(), written, strict=True):
                if (self.owner[cells] != NONE).any():
                    raise ScheduleError(
                        f"tile {i} {_name(schedule, i)}: writes what another one does, no order between the two"
                    )
                self.owner[cells] = i
            for i, cells in zip(tiles.tolist(), read, strict=True):
                owner = self.owner[cells]
                if ((owner != NONE) & (owner != i)).any():
                    raise ScheduleError(
                        f"tile {i} {_name(schedule, i)}: reads what another one writes, no order between the two"
                    )
        finally:
            for cells in written:
                self.owner[cells] = NONE
        return self._once(read), self._once(written)

    def _once(self, cells: list[Integers]) -> Integers:
        """Each of them once, in order; a flag for every cell is quicker than sorting or hashing so many."""
        for some in cells:
            self._there[some] = True
        found = np.flatnonzero(self._there)
        self._there[found] = False
        return found


def _patterns(schedule: Schedule) -> NDArray[np.int32]:
    """The records without what is of no account to their accesses, and is checked for all tiles."""
    shown = schedule.tiles.copy()
    shown[:, 1:4] = 0
    products = shown[:, 0] == Opcode.PRODUCT
    last = shown[:, PLACE["step"]] == schedule.shape.steps - 1
    shown[products, PLACE["step"]] = last[products]
    modulated = shown[:, PLACE["modulation"]] != NONE
    shown[products, PLACE["modulation"]] = np.where(modulated[products], 0, NONE)
    for name in ("weight", "bias", "scale"):
        shown[products, PLACE[name]] = 0
    return shown


def _check_accesses(schedule: Schedule, stages: _Stages) -> None:
    cells, shown = _Cells(schedule), _patterns(schedule)
    known: dict[bytes, tuple[Integers, Integers]] = {}
    writer, reader = np.full(cells.count, NONE), np.full(cells.count, NONE)  # the last stages
    # in an order that does not depend on which worker has which
    by_stage = np.split(np.lexsort((*shown.T[::-1], stages.of)), np.cumsum(np.bincount(stages.of))[:-1])
    for stage in stages.order:
        tiles = by_stage[stage]
        key = shown[tiles].tobytes()
        if key not in known:
            known[key] = cells.of_stage(schedule, tiles)
        read, written = known[key]
        before = stages.before[stage]

        def need(ok: NDArray[np.bool_], what: str, which: Integers = tiles) -> None:
            if not ok.all():
                raise ScheduleError(
                    f"tile {int(which[0])} {_name(schedule, int(which[0]))} or another of its stage: {what}"
                )

        need(writer[read] != NONE, "reads what is not written by then")
        need(before[writer[read]], "reads what may be being written: no order between the two")
        need(
            (writer[written] == NONE) | before[writer[written]],
            "writes what another one does: no order between the two",
        )
        need((reader[written] == NONE) | before[reader[written]], "writes what may still be being read")
        # one reader is kept for each cell: the last, after all others
        need((reader[read] == NONE) | before[reader[read]], "reads what others read: no order between the two")
        for space, first, end in zip(Space, cells.first, [*cells.first[1:], cells.count], strict=True):
            # Start's zeros stay in the columns of NOISY that pad the actions, and in the rows of state tokens
            if space != Space.NOISY:
                of = writer[read[(read >= first) & (read < end)]]
                need(of == of[:1], f"reads parts of {space.name} from different stages: one is left from before")
        reader[read] = stage
        writer[written] = stage
    out = cells.first[Space.OUT]
    if (writer[out:] == NONE).any():
        raise ScheduleError("some actions are never written")
