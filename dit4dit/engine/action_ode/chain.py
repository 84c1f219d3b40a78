"""The chain of stages that every step of the head is, and what it demands of a schedule's tables: shared memory, buffers,
matrices and constants. `validate` proves the rest, tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit4dit.engine.action_ode.schedule import (
    MAX_HEAD_DIM,
    NONE,
    PADDED_TOKENS,
    RANKS,
    SETS,
    STEP_COLUMNS,
    WARPS,
    WEIGHT_UNIT,
    Epilogue,
    HeadShape,
    Schedule,
)
from dit4dit.engine.action_ode.sizes import (
    product_staging,
    sums_bytes,
    warp_tiles,
)

SLOTS = range(3, 17)


class ScheduleError(ValueError):
    """A schedule that must not run; the message names the tile."""


class Stage(NamedTuple):
    """One stage of a step.

    Attributes:
        name: of the matrix; of attention, of its buffer. source, out: buffers. rows, columns: of the matrix.
        epilogue: None is attention. eps: of the norm. modulation: its table. stepwise: other sums and bias in each step.
        context: attention to which of the features; NONE: to the tokens themselves. attend: the source has q | k | v, and what is
            multiplied is the tokens' attention to each other.
    """

    name: str
    source: str
    out: str
    rows: int
    columns: int
    epilogue: Epilogue | None = None
    eps: float = 0.0
    modulation: str | None = None
    stepwise: bool = False
    context: int = NONE
    attend: bool = False


def chain(shape: HeadShape, fused: bool) -> list[Stage]:
    """The stages of one step, each of which reads what the one before it writes; the first what the last wrote a step before.

    fused: as of `Schedule`.
    """
    width = shape.width
    found = [
        Stage("encode", "noisy", "embedded", width, shape.padded_actions, Epilogue.SILU, stepwise=True),
        Stage("encode_out", "embedded", "tokens", width, width, Epilogue.TOKENS),
    ]
    for i, cross in enumerate(shape.blocks):
        project, attended, out, hidden, mlp_out = (
            f"{i}.{part}" for part in ("project", "attended", "out", "hidden", "mlp_out")
        )
        rows, context = (width, sum(shape.blocks[:i])) if cross else (3 * width, NONE)
        found += [
            Stage(project, found[-1].out, project, rows, width, Epilogue.PLAIN, 1e-5, f"{i}.modulation", True),
        ]
        inside = fused and not cross
        if not inside:
            found.append(Stage(attended, project, attended, width, width, context=context))
        found += [
            Stage(out, found[-1].out, out, width, width, Epilogue.RESIDUAL, attend=inside),
            Stage(f"{i}.mlp_in", out, hidden, shape.mlp, width, Epilogue.GELU, 1e-5),
            Stage(mlp_out, hidden, mlp_out, width, shape.mlp, Epilogue.RESIDUAL),
        ]
    return [
        *found,
        Stage("decode_in", found[-1].out, "decoded", shape.decoder, width, Epilogue.RELU, 1e-6, "modulation", True),
        Stage("decode_out", "decoded", "noisy", shape.actions, shape.decoder, Epilogue.EULER),
    ]


def need(ok: bool, what: str, wanted: object, got: object) -> None:
    """ScheduleError unless `ok`."""
    if not ok:
        raise ScheduleError(f"{what}: expected {wanted}, got {got}")


def check_sizes(schedule: Schedule) -> None:
    s, shape = schedule, schedule.shape
    need(s.ranks in RANKS, "ranks", f"one of {RANKS}", s.ranks)
    most = s.device.teams(s.ranks)
    need(1 <= s.teams <= most, "teams", f"1 to {most}, which can run at once", s.teams)
    need(s.padded_tokens in PADDED_TOKENS, "padded_tokens", f"one of {PADDED_TOKENS}", s.padded_tokens)
    need(s.part > 0 and s.part % STEP_COLUMNS == 0, "part", f"a multiple of {STEP_COLUMNS}", s.part)
    need(s.device.bulk_copies or not s.fused, "fused", "False before Hopper", s.fused)
    need(s.slots in SLOTS, "slots", f"{SLOTS.start} to {SLOTS.stop - 1}", s.slots)
    dim = shape.head_dim
    right = dim * shape.heads == shape.width and 0 < dim <= MAX_HEAD_DIM and dim % 16 == 0
    need(right, "head_dim", f"a multiple of 16 up to {MAX_HEAD_DIM}", f"{shape.width} / {shape.heads} heads")
    need(s.staging % 16 == 0, "staging", "a multiple of 16", s.staging)
    need(s.inbox % 16 == 0, "inbox", "a multiple of 16", s.inbox)
    need(s.ranks > 1 or s.inbox == 0, "inbox", "0 with one rank", s.inbox)
    free = s.device.shared_memory
    need(s.shared_bytes <= free, "shared_bytes", f"at most {free}", s.shared_bytes)
    numbers = max(SETS * s.set_words, s.private_floats, s.constant_floats)
    need(numbers < 1 << 31, "words, private memory or constants", "less than 2^31", numbers)


def check_buffers(schedule: Schedule, stages: Sequence[Stage]) -> None:
    columns = {stage.out: stage.rows for stage in stages} | {"noisy": schedule.shape.padded_actions}
    need(schedule.buffers.keys() == columns.keys(), "buffers", sorted(columns), sorted(schedule.buffers))
    for name, buffer in schedule.buffers.items():
        size, wanted = (buffer.rows, buffer.columns), (schedule.shape.rows, columns[name])
        need(size == wanted, f"buffer {name!r}", f"{wanted} rows and columns", size)
        need(buffer.columns % 16 == 0, f"buffer {name!r}", "a multiple of 16 columns", buffer.columns)
    ranges = {name: (buffer.offset, buffer.words) for name, buffer in schedule.buffers.items()}
    _check_ranges("buffer", ranges, schedule.set_words, 4)


def _check_ranges(kind: str, ranges: Mapping[str, tuple[int, int]], end: int, unit: int) -> None:
    """(offset, length) of each: from multiples of `unit`, up to `end`, none over another."""
    last, before = 0, "the beginning"
    for name, (offset, length) in sorted(ranges.items(), key=lambda item: item[1]):
        need(offset % unit == 0, f"{kind} {name!r}", f"an offset that is a multiple of {unit}", offset)
        need(offset >= last, f"{kind} {name!r}", f"an offset from {last}, the end of {before!r}, on", offset)
        last, before = offset + length, name
        need(last <= end, f"{kind} {name!r}", f"an end up to {end}", last)


def check_matrices(schedule: Schedule, stages: Sequence[Stage]) -> None:
    wanted = {stage.name: (stage.rows, stage.columns) for stage in stages if stage.epilogue is not None}
    need(schedule.matrices.keys() == wanted.keys(), "matrices", sorted(wanted), sorted(schedule.matrices))
    for name, m in schedule.matrices.items():
        size, what = (m.rows, m.columns), f"matrix {name!r}"
        need(m.name == name and size == wanted[name], what, f"{wanted[name]} rows and columns", f"{m.name!r} {size}")
        need(m.ranks == schedule.ranks, what, f"{schedule.ranks} ranks", m.ranks)
        need(m.split > 0 and m.ranks % m.split == 0, what, f"a split that divides {m.ranks}", m.split)
        need(m.parts in (1, 2, 4, 8), what, "1, 2, 4 or 8 parts", m.parts)
        unit = 16 * m.ranks // m.split
        right = m.tile_rows > 0 and m.tile_rows % unit == 0 and m.own_rows % 2 == 0
        need(right, what, f"tile_rows a multiple of {unit}, an even number of them a rank", m.tile_rows)
        most = warp_tiles(schedule.padded_tokens) * (WARPS // m.parts)
        need(m.groups <= most, what, f"at most {most} row groups a rank", m.groups)
        whole = m.split > 1 or m.slice <= schedule.part  # else a part is whole panels
        columns = m.slice if whole else STEP_COLUMNS * m.panel_steps
        need(schedule.part >= columns, f"part, of {what}", f"{columns} or more", schedule.part)
        staging = product_staging(schedule.padded_tokens, schedule.part, m)
        need(staging <= schedule.staging, f"staging, of {what}", f"at least {staging}", schedule.staging)
        inbox = sums_bytes(schedule.padded_tokens, m) if m.ranks > 1 else 0
        need(inbox <= schedule.inbox, f"inbox, of {what}", f"at least {inbox}", schedule.inbox)
    end = schedule.weight_bytes // WEIGHT_UNIT
    _check_ranges("matrix", {name: (m.offset, m.units) for name, m in schedule.matrices.items()}, end, 1)


def check_constants(schedule: Schedule, stages: Sequence[Stage]) -> None:
    """A table of steps has rows of the same length for each; what a product reads past its rows is in the table too."""
    shape, tables = schedule.shape, schedule.constants
    lengths = {"times": (shape.steps, False)}
    for stage in stages:
        if stage.epilogue is None:
            continue
        matrix = schedule.matrices[stage.name]
        padded = matrix.row_tiles * matrix.tile_rows
        of_tokens = stage.epilogue == Epilogue.TOKENS
        lengths[f"{stage.name}.bias"] = (shape.tokens * shape.width if of_tokens else padded, stage.stepwise)
        if stage.eps:
            lengths[f"{stage.name}.sums"] = (padded, stage.stepwise)
        if stage.modulation is not None:
            lengths[stage.modulation] = (stage.columns, True)
        if matrix.fp8:
            lengths[f"{stage.name}.row_scale"] = (padded, False)
    need(tables.keys() == lengths.keys(), "constants", sorted(lengths), sorted(tables))
    for name, (length, stepwise) in lengths.items():
        got, steps = tables[name][1], shape.steps if stepwise else 1
        right = got >= steps * length and got % (4 * steps if stepwise else 1) == 0
        need(right, f"constants {name!r}", f"{steps} x {length} floats or more, of a step a multiple of 4", got)
        bias = tables.get(name.removesuffix(".sums") + ".bias", (0, got))[1]
        need(not name.endswith(".sums") or got == bias, f"constants {name!r}", f"{bias} floats like the bias", got)
    _check_ranges("constants", tables, schedule.constant_floats, 4)
