"""Block sizes, warps and stages of the Triton kernels: tables that are looked up, never tuned while running.

The committed table is `tiles.json` beside this file. A machine's own (`dit4dit tune --tiles` writes one) is named by
DIT4DIT_TILES; each of its columns replaces the committed column of the same op and architecture. Both are read once, at the
first use.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import read_json

TABLE = Path(__file__).with_name("tiles.json")
VARIABLE = "DIT4DIT_TILES"

Row = dict[str, dict[str, int]]  # {"upto": {"rows": 64}, "tile": {"ROWS": 1, "num_warps": 4, "num_stages": 1}}
Columns = dict[str, list[Row]]  # architecture -> rows, of which the first that fits is taken


def own_file() -> Path | None:
    """The file that DIT4DIT_TILES names."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


@functools.cache
def committed() -> dict[str, Columns]:
    """op -> columns of the table that came with the package."""
    read: dict[str, Columns] = json.loads(TABLE.read_text())["tiles"]
    return read


@functools.cache
def own() -> dict[str, Columns]:
    """The same of the machine's own table; {} where there is none. ConfigError: see `read_own`."""
    path = own_file()
    return {} if path is None else read_own(path)


@functools.cache
def table() -> dict[str, Columns]:
    """op -> columns, own ones over the committed ones."""
    return {op: {**columns, **own().get(op, {})} for op, columns in committed().items()}


def forget() -> None:
    """Read the tables again at the next use."""
    for kept in (committed, own, table, _row):
        kept.cache_clear()


def read_own(path: Path) -> dict[str, Columns]:
    """A machine's own table, checked. ConfigError: it cannot be read, or says something that no kernel takes."""
    where = f"{path} (own tiles)"
    again = "make it again with dit4dit tune --tiles"
    data = read_json(path, f"make it with dit4dit tune --tiles, or unset {VARIABLE}", error=ConfigError, again=again)
    tables = data.get("tiles")
    if not isinstance(tables, dict):
        raise ConfigError(f"{where}: expected an object with 'tiles'; {again}")
    for op, columns in tables.items():
        if op not in committed():
            known = list(committed())
            raise ConfigError(
                f"{where}: {shown(op)}: no op with tiles{did_you_mean(op, known)}; known: {', '.join(known)}"
            )
        if not isinstance(columns, dict):
            raise ConfigError(f"{where}: {op}: expected an object, architecture -> rows, got {shown(columns)}")
        for architecture, rows in columns.items():
            _check_column(f"{where}: {op} {architecture}", op, architecture, rows)
    return tables


def _check_column(where: str, op: str, architecture: str, rows: Any) -> None:
    if not _is_chip(architecture) and architecture != "interpreter":
        raise ConfigError(
            f"{where}: expected a compute capability without its dot, such as '90', got {shown(architecture)}"
        )
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where}: expected a list of rows, got {shown(rows)}")
    entries = set(next(iter(committed()[op].values()))[0]["tile"])
    limits = {name for column in committed()[op].values() for row in column for name in row["upto"]}
    for i, row in enumerate(rows):
        here = f"{where} row {i + 1}"
        if not isinstance(row, dict) or set(row) != {"upto", "tile"}:
            raise ConfigError(f"{here}: expected 'upto' and 'tile', got {shown(row)}")
        upto, tile = row["upto"], row["tile"]
        if not isinstance(upto, dict) or not set(upto) <= limits or not all(type(n) is int for n in upto.values()):
            known = ", ".join(sorted(limits)) or "none"
            raise ConfigError(f"{here}: upto: expected whole numbers by the names ({known}), got {shown(upto)}")
        if bool(upto) == (i == len(rows) - 1):
            raise ConfigError(f"{here}: expected limits in every row but the last, got {shown(upto)}")
        if not isinstance(tile, dict) or set(tile) != entries:
            raise ConfigError(f"{here}: tile: expected {', '.join(sorted(entries))}, got {shown(tile, 140)}")
        for name, value in tile.items():
            if not _fits(name, value):
                raise ConfigError(f"{here}: {name}: expected {_WANTED.get(name, 'a power of two')}, got {shown(value)}")


_WANTED = {"num_stages": "1 or more", "SPAN": "0 or more", "FUSED": "0 or 1", "WIDER": "0 or 1"}


def _fits(name: str, value: Any) -> bool:
    if type(value) is not int:
        return False
    if name in ("FUSED", "WIDER"):
        return value in (0, 1)
    if name in _WANTED:
        return value >= (0 if name == "SPAN" else 1)
    return value >= 1 and value & (value - 1) == 0


def source(op: str, architecture: str) -> str:
    """Which table and column serves an op on an architecture, in words."""
    column = nearest(op, architecture)
    if column in own().get(op, {}):
        return f"{own_file()} ({VARIABLE}), column {column}"
    return f"{TABLE.name} of dit4dit, column {column}"


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


@functools.lru_cache(maxsize=4096)  # sizes come from requests
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


def _is_chip(column: str) -> bool:
    """Whether a column is a compute capability, "90"."""
    return column.isascii() and column.isdigit()


def nearest(op: str, architecture: str) -> str:
    """The column that serves an architecture."""
    columns = table()[op]
    if architecture in columns:
        return architecture
    if not _is_chip(architecture):
        architecture = "90"
    chips = sorted(int(name) for name in columns if _is_chip(name))
    return str(max((chip for chip in chips if chip <= int(architecture)), default=chips[0]))
