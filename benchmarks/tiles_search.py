"""The search for tiles on the GPU at hand (`dit4dit tune --tiles SECONDS`); nothing is ever tuned while a robot runs.

Each row of the table that calls of the released models take is measured with candidates around it, on those calls; the
row keeps its limits. A candidate that does not agree with the reference, or does not launch, is no candidate.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.failures import check_gpu, reason_of
from dit4dit.benchmarks.harness import assert_no_worse, machine, time_cpu, time_gpu
from dit4dit.benchmarks.op_bench import Case, cases, exact, fill, positional, reference_of
from dit4dit.benchmarks.recording import Recording

from dit4dit import ops, progress
from dit4dit.errors import BackendError, InputError, did_you_mean
from dit4dit.files.atomic import write_text
from dit4dit.ops import launch, tiles
from dit4dit.ops.dispatch import find
from dit4dit.tables import quantiles
from dit4dit.tables import table as text_table

Measure = Callable[[Case], float | str]
"""Seconds of a call with the tile that is being tried, or why that tile is no good."""

# what a row may be changed to, beside what it says; tl.dot wants at least 16
CHOICES = {
    "ROWS": (16, 32, 64, 128),
    "COLUMNS": (16, 32, 64, 128, 256),
    "DEPTH": (32, 64, 128),
    "KEYS": (16, 32, 64, 128),
    "FUSED": (0, 1),
    "WIDER": (0, 1),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}
ROW_CHOICES = (1, 2, 4, 8, 16)  # of the ops that multiply nothing


def candidates(op: str, tile: dict[str, int]) -> Iterator[dict[str, int]]:
    """The tile itself, then every tile that differs from it in one or two entries by one step of their choices."""
    yield tile
    choices = {**CHOICES, "ROWS": ROW_CHOICES} if op in ("adaln", "qk_norm_rope") else CHOICES
    steps = []
    for name, value in tile.items():
        known = choices.get(name, ())
        if value in known:
            i = known.index(value)
            steps += [(name, known[j]) for j in (i - 1, i + 1) if 0 <= j < len(known)]
    for count in (1, 2):
        for changes in itertools.combinations(steps, count):
            if len({name for name, _ in changes}) == count:
                yield {**tile, **dict(changes)}


@dataclass
class Search:
    """What has been found so far on one architecture.

    Attributes:
        columns: op -> its column, rows that were measured with their best tile; no op without a measured row.
        timings: one entry per row and tile tried: "op", "row", "upto", "cases", "tile", "ms" per case (None where the tile
            is no good) and "refused" (why).
        best: one entry per measured row: "op", "upto", "before" and "tile", their milliseconds, "tried".
        left: "op row" of rows that no time was left for.
    """

    architecture: str
    columns: dict[str, list[tiles.Row]] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    best: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def search_tiles(
    architecture: str,
    found: Sequence[Case],
    measure: Measure,
    *,
    rounds: int = 3,
    record: Recording,
    write: Callable[[Search], None] = lambda search: None,
) -> Search:
    """From each row that calls take uphill, at most `rounds` times, into `record`; `write` gets the table after each row.

    The record's time is shared out among the rows; what is left at its end keeps the tile it has.
    """
    search = Search(architecture)
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in found:
        groups.setdefault((case[0], row_of(case, architecture)), []).append(case)
    names = {key: f"{key[0]} row {key[1] + 1}" for key in groups}
    search.left += names.values()
    record.result |= {"machine": machine(), **vars(search)}
    record.keep()
    with progress.bar("tiles", len(groups), unit="row") as shown:
        for n, (op, i) in enumerate(record.each(groups, "rows", name=names.__getitem__)):
            shown.say(names[op, i])
            remaining = record.remaining()
            share = None if remaining is None else time.monotonic() + remaining / (len(groups) - n)
            if op not in search.columns:
                column = tiles.table()[op][tiles.nearest(op, architecture)]
                search.columns[op] = [{name: dict(part) for name, part in row.items()} for row in column]
            _uphill(search, op, i, groups[op, i], measure, rounds, share)
            del search.left[0]
            write(search)
            shown.update()
    return search


def row_of(case: Case, architecture: str) -> int:
    """The row of its op's column that a call takes."""
    op, _, args = case
    meta = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
    with tiles.trying(op, None) as trial:
        reference_of(op, "launches")(meta, architecture)
    return tiles.row(op, architecture, trial.sizes[-1])


def _uphill(
    search: Search, op: str, i: int, group: list[Case], measure: Measure, rounds: int, end: float | None
) -> None:
    row = search.columns[op][i]
    seen: dict[str, float] = {}
    before = best = row["tile"]

    def total(tile: dict[str, int]) -> float:
        key = json.dumps(tile, sort_keys=True)
        if key not in seen:
            with tiles.trying(op, tile):
                times = [measure(case) for case in group]
            wrong = [t for t in times if isinstance(t, str)]
            good = [t for t in times if not isinstance(t, str)]
            seen[key] = float("inf") if wrong else sum(good)
            entry = {"op": op, "row": i, "upto": row["upto"], "cases": [case[1] for case in group], "tile": tile}
            ms = None if wrong else [t * 1e3 for t in good]
            search.timings.append({**entry, "ms": ms, "refused": wrong[0] if wrong else None})
        return seen[key]

    for _ in range(rounds):
        start = best
        for candidate in candidates(op, start):
            if end is not None and seen and time.monotonic() >= end:
                break
            if total(candidate) < total(best):
                best = candidate
        if best == start:
            break
    row["tile"] = best
    ms = {name: _ms(total(tile)) for name, tile in (("before_ms", before), ("ms", best))}
    search.best.append({"op": op, "upto": row["upto"], "before": before, "tile": best, **ms, "tried": len(seen)})


def _ms(seconds: float) -> float | None:
    return None if seconds == float("inf") else seconds * 1e3


def measured(case: Case, samples: int) -> float | str:
    """Median seconds of a call by its Triton kernel, or why not: it disagrees with the reference, or cannot be launched."""
    op, _, args = case
    fn = positional(op, "triton")
    timer = time_gpu if args[0].device.type == "cuda" else time_cpu
    try:
        assert_no_worse(fn, exact(reference_of(op)), args, float32_limit=1e-5)
        return float(quantiles(timer(partial(fn, *args), samples=samples, warmup=5))["p50"])
    except AssertionError as error:
        return f"disagrees with the reference: {error}"
    except (
        Exception
    ) as error:  # what Triton and CUDA raise has no common base: too much shared memory, too few registers
        reason = reason_of(error)
        if type(error).__module__.partition(".")[0] == "triton":  # before the launch
            return reason
    check_gpu(f"{op} {case[1]}: {reason}")
    return reason


def check(names: Sequence[str], device: torch.device) -> list[str]:
    """The ops to tune. BackendError: no GPU here, or one that Triton does not run on. InputError: no op with tiles."""
    known = [op for op in tiles.committed() if op in ops.names()]
    for name in names:
        if name not in known:
            raise InputError(f"--ops {name!r}: no op with tiles{did_you_mean(name, known)}; known: {', '.join(known)}")
    if device.type != "cuda":
        sees = "--device is cpu" if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees none"
        raise BackendError(
            f"--tiles: tiles are measured on the GPU that they are for, and {sees}; run it on that machine"
        )
    reason = launch.refuse(products=True, x=torch.zeros(1, dtype=torch.bfloat16, device=device))
    if reason is not None:
        raise BackendError(f"--tiles: Triton's kernels do not run on {device}: {reason}")
    return [op for op in ops.names() if op in (names or known)]


def on_gpu(names: Sequence[str], device: torch.device, batches: Sequence[int], seed: int) -> list[Case]:
    """The calls of these ops that their Triton kernels take, with random bfloat16 arguments."""
    generator = torch.Generator().manual_seed(seed)
    found = [
        (op, f"{case} batch {batch}", fill(args, str(device), torch.bfloat16, generator))
        for batch in batches
        for op, case, args in cases(names, batch=batch)
    ]
    return [(op, case, args) for op, case, args in found if find(op).implementations["triton"].refuse(*args) is None]


@dataclass(frozen=True)
class Files:
    """Where a search goes, row by row: `out` the tiles, and every number into `timings`, which is a Recording's.

    `out` is a machine's own table (what it holds already of other ops and chips stays) or, with `whole`, the committed
    table with the new columns, to replace the package's.
    """

    out: Path
    timings: Path
    whole: bool = False

    def check(self) -> None:
        """ConfigError or InputError where `out` holds something else, before hours are spent."""
        if not self.whole and self.out.exists():
            tiles.read_own(self.out)
        for path in (self.out, self.timings):
            if path.is_dir() or not path.parent.is_dir():
                raise InputError(f"{path}: expected a file in a folder that exists; choose another")

    def write(self, search: Search) -> None:
        """The tiles so far."""
        here = machine()
        own = {} if self.whole or not self.out.exists() else tiles.read_own(self.out)
        table = {op: dict(columns) for op, columns in (tiles.committed() if self.whole else own).items()}
        for op, rows in search.columns.items():
            table.setdefault(op, {})[search.architecture] = rows
        measured_on = f"Column {search.architecture} measured on {here['gpu'] or here['cpu']}, torch {here['torch']}."
        note = f"{json.loads(tiles.TABLE.read_text())['note']} {measured_on}" if self.whole else measured_on
        write(table, note, self.out)


def write(table: dict[str, tiles.Columns], note: str, path: Path) -> None:
    """As the committed table is laid out, one row a line; a reader never sees half of it."""
    text = json.dumps({"note": note, "tiles": {op: dict.fromkeys(columns) for op, columns in table.items()}}, indent=2)
    for op, columns in table.items():
        head, _, tail = text.partition(f'    "{op}": {{')
        for name, rows in columns.items():
            lines = ",\n".join("        " + json.dumps(row) for row in rows)
            tail = tail.replace(f'      "{name}": null', f'      "{name}": [\n{lines}\n      ]', 1)
        text = f'{head}    "{op}": {{{tail}'
    write_text(path, text + "\n")


def show(search: Search) -> str:
    """One line a row: what it was, what is best."""
    rows = []
    for row in search.best:
        before, now = row["before_ms"], row["ms"]
        changed = {name: value for name, value in row["tile"].items() if value != row["before"][name]}
        limits = " ".join(f"{name}<={value}" for name, value in row["upto"].items()) or "any"
        gain = f"{before / now:.2f}" if before and now else "none works" if now is None else "before did not work"
        times = ["" if ms is None else f"{ms:.4f}" for ms in (before, now)]
        rows.append([row["op"], limits, row["tried"], *times, gain, " ".join(f"{k}={v}" for k, v in changed.items())])
    header = ["op", "row", "tiles tried", "before ms", "best ms", "before / best", "changed"]
    left = f"\nno time was left for: {', '.join(search.left)}" if search.left else ""
    return text_table(header, rows, right=range(2, 6)) + left
