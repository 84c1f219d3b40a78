"""Block sizes, warps and stages of the Triton kernels: a committed table, looked up, never tuned while running."""

from __future__ import annotations

import functools
import json
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
    return dict(_lookup(op, architecture, tuple(sorted(sizes.items()))))


@functools.cache
def _lookup(op: str, architecture: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    known = dict(sizes)
    for row in table()[op][nearest(op, architecture)]:
        if all(known[name] <= most for name, most in row["upto"].items()):
            return row["tile"]
    raise LookupError(f"{TABLE.name}: {op}: no row for {known} on {architecture}; the last row must have no limits")


def nearest(op: str, architecture: str) -> str:
    """The column that serves an architecture."""
    columns = table()[op]
    if architecture in columns:
        return architecture
    if not architecture.isdigit():
        architecture = "90"
    chips = sorted(int(name) for name in columns if name.isdigit())
    return str(max((chip for chip in chips if chip <= int(architecture)), default=chips[0]))
