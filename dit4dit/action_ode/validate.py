"""The validator: proof that a schedule may run, whatever the order in which its workers come forward.

- It ends: counters only grow and waits only ask for a least number, so if one run of all workers ends, every run does.
- No tile reads what is not written, or what another may be writing; no two tiles write an element, and none writes what
  another may still be reading, without an order between them. An order is the order of one worker, or a wait for a counter:
  its target must be all signals that the counter ever gets, so that every signalling tile comes before the waiting one.
  Vector clocks carry these orders from tile to tile; the proof holds for every run, not for the one that was simulated.
- Every access lies within its buffer, its matrix and its constants, and fits the staging memory; the weights are fetched in
  the order in which they are used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit4dit.action_ode.schedule import (
    MAX_KEYS,
    NONE,
    SLOT_ELEMENTS,
    TILE_ROWS,
    WEIGHT_UNIT,
    Attend,
    Combine,
    Epilogue,
    Euler,
    Norm,
    Product,
    Schedule,
    Space,
    Start,
    Tile,
)

# columns that are told apart: no tile takes less
CELL = {Space.STATS: 2, Space.ACTIONS: 1 << 20, Space.OUT: 1 << 20}


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
    order, clocks = _simulate(schedule)
    _check_accesses(schedule, order, clocks)


def reads(schedule: Schedule, tile: Tile) -> Iterator[Access]:
    """What a tile reads of the workspace."""
    w, shape, buffers = tile.work, schedule.shape, schedule.buffers
    if isinstance(w, Product):
        source = buffers[w.source]
        yield _rows(Space(w.source), w.token, w.tokens, w.column, min(w.column + w.columns, source.columns))
    elif isinstance(w, Norm):
        if w.first != 2:
            yield Access(Space.PARTIAL, (0, w.planes), (w.token, w.token + 1), (0, shape.width))
        if w.first == 0:
            yield _rows(Space.STREAM, w.token, 1, 0, shape.width)
    elif isinstance(w, Attend):
        first, last = _head(schedule, w.head)
        yield _rows(Space.PROJECTED, w.token, w.tokens, first, last)
        if w.context == NONE:
            for part in (1, 2):
                yield _rows(Space.PROJECTED, w.token, w.tokens, first + part * shape.width, last + part * shape.width)
    elif isinstance(w, Combine):
        rows = (w.token, w.token + w.tokens)
        yield Access(Space.HEADS, (0, w.planes), rows, _head(schedule, w.head))
        yield Access(Space.STATS, (0, w.planes), rows, (2 * w.head, 2 * w.head + 2))
    elif isinstance(w, Euler):
        rows = (w.token + w.prefix, w.token + w.tokens)
        yield Access(Space.PARTIAL, (0, w.planes), rows, (0, shape.actions))
        yield Access(Space.ACTIONS, (0, 1), rows, (0, shape.actions))


def writes(schedule: Schedule, tile: Tile) -> Iterator[Access]:
    """What a tile writes."""
    w, shape = tile.work, schedule.shape
    if isinstance(w, Start):
        yield _rows(Space.ACTIONS, w.token, w.tokens, 0, shape.actions)
        yield _rows(Space.NOISY, w.token, w.tokens, 0, shape.padded_actions)
    elif isinstance(w, Product):
        rows, columns = (w.token, w.token + w.tokens), (w.row, w.row + w.rows)
        yield Access(Space(w.out), (w.plane, w.plane + 1), rows, columns)
    elif isinstance(w, Norm):
        yield _rows(Space.STREAM, w.token, 1, 0, shape.width)
        yield _rows(Space.NORMED, w.token, 1, 0, shape.width)
    elif isinstance(w, Attend) and w.plane != NONE:
        plane, rows = (w.plane, w.plane + 1), (w.token, w.token + w.tokens)
        yield Access(Space.HEADS, plane, rows, _head(schedule, w.head))
        yield Access(Space.STATS, plane, rows, (2 * w.head, 2 * w.head + 2))
    elif isinstance(w, (Attend, Combine)):
        yield _rows(Space.ATTENDED, w.token, w.tokens, *_head(schedule, w.head))
    elif isinstance(w, Euler):
        rows = (w.token + w.prefix, w.token + w.tokens)
        yield Access(Space.ACTIONS, (0, 1), rows, (0, shape.actions))
        yield Access(Space.NOISY, (0, 1), rows, (0, shape.padded_actions))
        if w.last:
            yield _rows(Space.OUT, w.sample * shape.horizon, shape.horizon, 0, shape.actions)


def _rows(space: Space, row: int, count: int, first: int, last: int) -> Access:
    return Access(space, (0, 1), (row, row + count), (first, last))


def _head(schedule: Schedule, head: int) -> tuple[int, int]:
    return head * schedule.shape.head_dim, (head + 1) * schedule.shape.head_dim


# -- tables and bounds -------------------------------------------------------------------------------------------------


def _check_tables(schedule: Schedule) -> None:
    workers = schedule.device.workers
    for name, first, count in (
        ("first_tile", schedule.first_tile, len(schedule.tiles)),
        ("first_segment", schedule.first_segment, len(schedule.segments)),
    ):
        if len(first) != workers + 1 or first[0] != 0 or first[-1] != count or (np.diff(first) < 0).any():
            raise ScheduleError(
                f"{name}: expected {workers + 1} rising numbers from 0 to {count}, got {first.tolist()}"
            )
    for worker in range(workers):
        mine = schedule.decoded[schedule.first_tile[worker] : schedule.first_tile[worker + 1]]
        wanted = [(t.work.weight, t.work.slots, 1 if t.work.fp8 else 2) for t in mine if isinstance(t.work, Product)]
        begin, end = schedule.first_segment[worker], schedule.first_segment[worker + 1]
        if [tuple(row) for row in schedule.segments[begin:end].tolist()] != wanted:
            raise ScheduleError(f"worker {worker}: its weights are not fetched in the order of its products")
    for i, tile in enumerate(schedule.decoded):
        _check_bounds(schedule, i, tile)


def _check_bounds(schedule: Schedule, i: int, tile: Tile) -> None:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ScheduleError(f"tile {i} {tile.work}: {what}")

    w, shape = tile.work, schedule.shape
    for name, counter in (("wait", tile.wait), ("signal", tile.signal)):
        need(NONE <= counter < schedule.counters, f"{name}: counter {counter} of {schedule.counters}")
    for access in (*reads(schedule, tile), *writes(schedule, tile)):
        buffer = schedule.buffers[access.space]
        limits = (buffer.planes, buffer.rows, buffer.columns)
        for (first, last), limit in zip(access[1:], limits, strict=True):
            need(0 <= first < last <= limit, f"{access} is outside {limits}")
    constants: list[tuple[int, int]] = []
    if isinstance(w, Product):
        units = 1 if w.fp8 else 2
        need(w.tile_rows in TILE_ROWS and 0 < w.rows <= w.tile_rows, "rows")
        need(w.columns <= w.slots * (SLOT_ELEMENTS // w.tile_rows), "fewer slots than columns")
        need(w.weight >= 0 and WEIGHT_UNIT * (w.weight + w.slots * units) <= schedule.weight_bytes, "weights")
        need(0 < w.tokens <= schedule.padded_tokens, f"at most {schedule.padded_tokens} tokens")
        need(schedule.part // 8 * (16 * schedule.padded_tokens + 16) <= schedule.staging, "staging")
        need(640 * schedule.padded_tokens <= schedule.staging, "staging of the sums")
        wide = schedule.buffers[w.out].wide
        need((w.epilogue == Epilogue.PARTIAL) == wide and (w.bias == NONE) == wide, "epilogue")
        constants = [(w.bias, w.rows), (w.scale, w.rows)]
        need((w.scale == NONE) == (not w.fp8), "fp8 without scale")
    elif isinstance(w, Norm):
        constants = [(w.bias, shape.width), (w.scale, shape.width), (w.shift, shape.width)]
        need(0 <= w.sample < shape.batch and (w.scale == NONE) == (w.shift == NONE), "sample or modulation")
    elif isinstance(w, Attend):
        limit = shape.tokens if w.context == NONE else shape.context
        need(NONE <= w.context < shape.contexts and 0 <= w.sample < shape.batch, "context or sample")
        need(w.key >= 0 and 0 < w.keys <= MAX_KEYS and w.key + w.keys <= limit, f"keys, of {limit}")
    elif isinstance(w, Euler):
        constants = [(w.bias, shape.actions)]
        need(0 <= w.step < shape.steps and 0 <= w.sample < shape.batch, "step or sample")
    elif isinstance(w, Start):
        need(0 <= w.sample < shape.batch, "sample")
    for offset, length in constants:
        need(offset == NONE or 0 <= offset <= schedule.constant_floats - length, f"constants at {offset}")


# -- order -------------------------------------------------------------------------------------------------------------


def _simulate(schedule: Schedule) -> tuple[list[tuple[int, int]], NDArray[np.int32]]:
    """One run: (worker, tile) in order, and for each tile how many tiles of every worker come before it."""
    tiles, first, workers = schedule.decoded, schedule.first_tile.tolist(), schedule.device.workers
    signals = np.bincount([t.signal for t in tiles if t.signal != NONE], minlength=schedule.counters)
    counts = [0] * schedule.counters
    known = np.zeros((schedule.counters, workers), np.int32)  # clock of all that a counter's signals stand for
    clocks = np.zeros((len(tiles), workers), np.int32)
    now = np.zeros((workers, workers), np.int32)
    cursor = first[:-1].copy()
    blocked: dict[int, list[int]] = {}
    ready = deque(range(workers))
    order: list[tuple[int, int]] = []
    while ready:
        worker = ready.popleft()
        while cursor[worker] < first[worker + 1]:
            i = cursor[worker]
            tile = tiles[i]
            if tile.wait != NONE:
                total = int(signals[tile.wait])
                if tile.target != total:
                    fate = "is never reached" if tile.target > total else "does not say which tiles are done"
                    raise ScheduleError(
                        f"tile {i} {tile.work}: target {tile.target} of counter {tile.wait} {fate}: it gets {total} signals"
                    )
                if counts[tile.wait] < tile.target:
                    blocked.setdefault(tile.wait, []).append(worker)
                    break
                np.maximum(now[worker], known[tile.wait], out=now[worker])
            clocks[i] = now[worker]
            order.append((worker, i))
            cursor[worker] += 1
            now[worker, worker] = cursor[worker] - first[worker]
            if tile.signal != NONE:
                counts[tile.signal] += 1
                np.maximum(known[tile.signal], now[worker], out=known[tile.signal])
                if counts[tile.signal] == signals[tile.signal]:
                    ready.extend(blocked.pop(tile.signal, []))
    if len(order) < len(tiles):
        stuck = [cursor[w] for w in range(workers) if cursor[w] < first[w + 1]]
        shown = "; ".join(f"tile {i} for counter {tiles[i].wait}" for i in stuck[:4])
        raise ScheduleError(f"{len(stuck)} workers wait for each other and never end: {shown}")
    return order, clocks


class _History:
    """Who wrote each cell of a buffer last, and how far each worker had come when it last read the cell."""

    def __init__(self, schedule: Schedule, space: Space) -> None:
        buffer = schedule.buffers[space]
        self.cell = min(CELL.get(space, 16), buffer.columns)
        cells = (buffer.planes, buffer.rows, -(-buffer.columns // self.cell))
        self.writer = np.full(cells, NONE, np.int32)
        self.written = np.zeros(cells, np.int32)
        self.readers = np.zeros((*cells, schedule.device.workers), np.int32)

    def part(self, access: Access) -> tuple[slice, slice, slice]:
        first, last = access.columns
        columns = slice(first // self.cell, -(-last // self.cell))
        return slice(*access.planes), slice(*access.rows), columns


def _check_accesses(schedule: Schedule, order: list[tuple[int, int]], clocks: NDArray[np.int32]) -> None:
    history = [_History(schedule, space) for space in Space]
    first = schedule.first_tile
    for worker, i in order:
        tile, clock = schedule.decoded[i], clocks[i]
        read, written = list(reads(schedule, tile)), list(writes(schedule, tile))
        for access in (*read, *written):
            past = history[access.space]
            part = past.part(access)
            writer = past.writer[part]
            fresh = writer == NONE
            if access in read and fresh.any():
                raise ScheduleError(f"tile {i} {tile.work}: reads {access}, of which a part is not written by then")
            # the clock of a cell never written is of no account
            if not (fresh | (clock[writer] > past.written[part])).all():
                raise ScheduleError(f"tile {i} {tile.work}: {access} may be being written: no order between the two")
        for access in written:
            past = history[access.space]
            if (past.readers[past.part(access)] > clock).any():
                raise ScheduleError(f"tile {i} {tile.work}: writes {access}, which may still be being read")
        place = i - first[worker]
        for access in read:
            past = history[access.space]
            past.readers[past.part(access)][..., worker] = place + 1
        for access in written:
            past = history[access.space]
            past.writer[past.part(access)], past.written[past.part(access)] = worker, place
    if (history[Space.OUT].writer == NONE).any():
        raise ScheduleError("some actions are never written")
