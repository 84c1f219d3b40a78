"""Rows of a parquet file as arrays: numbers as they are, instructions as numbers of texts. A row that is none is never a zero."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import DataError, require

Array = NDArray[Any]


@dataclass(frozen=True)
class Wrong:
    """Why rows cannot be read."""

    row: int | None
    """The first that is none, from 0; None: all, because of what the column is."""
    why: str


def in_one_piece(column: Any) -> Any:
    """A column of an Arrow table as one array, slices of which cost nothing."""
    pa = require("pyarrow", "train")
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows at all, or more bytes than one array holds
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column


def numbers(column: Any, size: int, kind: type) -> Array | Wrong:
    """An Arrow array as `kind` [rows, size]."""
    inner, listed = _inner(column)
    types = require("pyarrow", "train").types
    if not (types.is_floating(inner) or types.is_integer(inner) or types.is_boolean(inner)):
        return Wrong(None, f"expected numbers, got {column.type}")
    if not listed and size != 1:
        return Wrong(None, f"expected lists of {size} values, got single ones")
    flat = _flat(column, size, listed, "no value")
    return flat if isinstance(flat, Wrong) else _as(flat.to_numpy(zero_copy_only=False).reshape(-1, size), kind)


def language(column: Any, tasks: Collection[int], texts: dict[str, int]) -> Array | Wrong:
    """An Arrow array of task numbers, or of texts, as int64 [rows, 1].

    A task number of the meta folder is itself; a text is -1 - n, with n its number in `texts`, which takes in new ones.
    """
    inner, listed = _inner(column)
    types = require("pyarrow", "train").types
    if types.is_string(inner) or types.is_large_string(inner):
        flat = _flat(column, 1, listed, "no text")
        if isinstance(flat, Wrong):
            return flat
        encoded = flat.dictionary_encode()
        try:
            known = encoded.dictionary.to_pylist()
        except UnicodeDecodeError:
            return Wrong(None, "holds text that is not UTF-8")
        places = np.array([texts.setdefault(text, len(texts)) for text in known], dtype=np.int64)
        return (-1 - places[encoded.indices.to_numpy(zero_copy_only=False)]).reshape(-1, 1)
    found = numbers(column, 1, np.int64)
    if isinstance(found, Wrong):
        return found
    unknown = ~np.isin(found[:, 0], np.array(list(tasks), dtype=np.int64))
    if unknown.any():
        row = int(unknown.argmax())
        return Wrong(row, f"unknown task index {int(found[row, 0])}; meta has {len(tasks)} tasks")
    return found


def not_finite(values: Array) -> Wrong | None:
    """The first of the rows [n, d] with a value that is not finite."""
    finite = np.isfinite(values).all(axis=1)
    if finite.all():
        return None
    row = int(finite.argmin())
    return Wrong(row, f"NaN or infinite value at position {int(np.isfinite(values[row]).argmin())}")


def owners(column: Any) -> Array:
    """The episode number of each row of a file; DataError where one has none."""
    found = numbers(in_one_piece(column), 1, np.int64)
    if isinstance(found, Wrong):
        row = "" if found.row is None else f"row {found.row}: "
        raise DataError(f"{row}column 'episode_index': {found.why}")
    return found[:, 0]


def _inner(column: Any) -> tuple[Any, bool]:
    """The type of an array's values, and whether they lie in lists."""
    types = require("pyarrow", "train").types
    kind = column.type
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return (kind.value_type if listed else kind), listed


def _flat(column: Any, size: int, listed: bool, missing: str) -> Any:
    """The rows x size values of an array, or what is wrong with it."""
    compute = require("pyarrow.compute", "train")
    if column.null_count:
        return Wrong(_first(column.is_null()), missing)
    if not listed:
        return column
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    other = lengths != size
    if other.any():
        row = int(other.argmax())
        return Wrong(row, f"expected {size} values, got {int(lengths[row])}")
    flat = column.flatten()
    return Wrong(_first(flat.is_null()) // size, missing) if flat.null_count else flat


def _first(mask: Any) -> int:
    return int(mask.to_numpy(zero_copy_only=False).argmax())


def _as(values: Array, kind: type) -> Array | Wrong:
    """`values` as `kind`, where that leaves them what they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        made: Array = values.astype(kind)
    if kind is np.int64 and values.dtype.kind in "fu":
        other = (made != values) | (np.abs(values) >= 2.0**63)
        if other.any():
            row = int(other.any(axis=1).argmax())
            return Wrong(row, f"expected a whole number of 64 bits, got {values[row, 0]}")
    elif kind is np.float32:
        other = np.isinf(made) & np.isfinite(values)
        if other.any():
            row = int(other.any(axis=1).argmax())
            position = int(other[row].argmax())
            return Wrong(row, f"{values[row, position]} at position {position} is beyond float32")
    return made
