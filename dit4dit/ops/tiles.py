"""Block sizes, warps and stages of the Triton kernels: a committed table, looked up, never tuned while running."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")

Row = dict[str, dict[str, int]]  # {"upto": {"rows": 64}, "tile": {"ROWS": 1, "num_warps": 4, "num_stages": 1}}


@functools.cache
def table(path: Path = TABLE) -> dict[str, dict[str, list[Row]]]:
    """op -> architecture -> rows, of which the first that fits is taken."""
    read: dict[str, dict[str, list[Row]]] = json.loads(path.read_text())["tiles"]
    return read


def lookup(op: str, architecture: str, **sizes: int) -> dict[str, int]:
    """The tile of `op` for a problem of these sizes: the first row all of whose limits hold; the last row has none.

    An architecture without a column takes that of the latest one before it ("86" takes "80"), the oldest where there is
    none; the interpreter, where it has none of its own, takes "90".
    """
    trial = _trials.get(op)
    if trial is not None:
        trial.sizes.append(sizes)
        if trial.tile is not None:
            return dict(trial.tile)
    return dict(table()[op][nearest(op, architecture)][_row(op, architecture, tuple(sizes.items()))]["tile"])


@functools.cache
def _row(op: str, architecture: str, sizes: tuple[tuple[str, int], ...]) -> int:
    known = dict(sizes)
    for i, row in enumerate(table()[op][nearest(op, architecture)]):
        if all(known[name] <= most for name, most in row["upto"].items()):
            return i
    raise LookupError(f"{TABLE.name}: {op}: no row for {known} on {architecture}; the last row must have no limits")


def row(op: str, architecture: str, sizes: dict[str, int]) -> int:
    """Which row of its column a problem of these sizes takes."""
    return _row(op, architecture, tuple(sizes.items()))


@dataclass
class Trial:
    """What `trying` has seen: the sizes of every lookup of its op."""

    tile: dict[str, int] | None
    sizes: list[dict[str, int]] = field(default_factory=list)


_trials: dict[str, Trial] = {}


@contextmanager
def trying(op: str, tile: dict[str, int] | None) -> Iterator[Trial]:
    """Inside, `op` takes `tile` whatever its sizes (None: the table's), in all threads: for measuring, not for use."""
    _trials[op] = Trial(tile)
    try:
        yield _trials[op]
    finally:
        del _trials[op]


def nearest(op: str, architecture: str) -> str:
    """The column that serves an architecture."""
    columns = table()[op]
    if architecture in columns:
        return architecture
    if not architecture.isdigit():
        architecture = "90"
    chips = sorted(int(name) for name in columns if name.isdigit())
    return str(max((chip for chip in chips if chip <= int(architecture)), default=chips[0]))
