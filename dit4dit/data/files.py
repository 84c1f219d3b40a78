"""A data set's files as other tools wrote them: JSON, JSON lines, parquet tables, and paths made of info.json's templates.

Everything that is not as expected is a DataError with the file, and the line or row where there is one.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit4dit.errors import DataError, listed, require, said, shown

LARGEST = 2**63 - 1
"""Of a whole number: what a parquet file's int64 holds."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. A byte order mark is let pass; a key that is there twice is not: which one is meant?"""
    return _object(_text(path), str(path))


def read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, object) of each line that is not blank.

    Lines end with a line feed alone: U+2028 and its like are characters of the texts in them.
    """
    lines = enumerate(_text(path).split("\n"), start=1)
    return [(f"{path}, line {i}", _object(line, f"{path}, line {i}")) for i, line in lines if line.strip()]


def read_table(path: Path, columns: Iterable[str] | None = None, optional: Iterable[str] = ()) -> Any:
    """A parquet file as an Arrow table; DataError when it is missing, damaged, or lacks one of `columns`.

    Args:
        columns: columns to read; None reads all.
        optional: columns to read as well where the file has them.
    """
    parquet, pa = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            twice = sorted(name for name, times in Counter(known).items() if times > 1)
            if twice:
                raise DataError(
                    f"{path}: column {shown(twice[0])} is there twice; write the file with each column once"
                )
            for name in columns or ():
                if name not in known:
                    raise DataError(f"{path}: no column {shown(name)}; it has: {listed(known)}")
            chosen = None if columns is None else [*columns, *(name for name in optional if name in known)]
            return file.read(chosen)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: unreadable parquet ({said(error)}); copy it again") from None


def read_rows(path: Path, columns: Sequence[str] | None = None, optional: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows of a small parquet file as dicts; see `read_table`."""
    try:
        rows: list[dict[str, Any]] = read_table(path, columns, optional).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: holds text that is not UTF-8 ({error.reason}); write the file again") from None
    return rows


def visible(folder: Path, pattern: str) -> list[Path]:
    """What matches `pattern` below `folder`, sorted. A * matches no name that begins with a dot, as in a shell: those are
    other programs' (`._file-000.parquet`, `.ipynb_checkpoints`). Names that the pattern or the folder spells out may.
    """
    return sorted(folder / found for found in glob.glob(pattern, root_dir=folder, recursive=True))


def whole(data: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    """data[key], a whole number of at least `least` that fits into 64 bits."""
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {key}: expected int, got {shown(value)}")
    if not least <= value <= LARGEST:
        raise DataError(f"{where}: {key}: expected {least} to {LARGEST}, got {_short(value)}")
    return value


def number(data: Mapping[str, Any], key: str, where: str) -> float:
    """data[key], a finite number."""
    value = data.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DataError(f"{where}: {key}: expected a number, got {shown(value)}")
    if not (abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)):
        raise DataError(f"{where}: {key}: expected a finite number, got {_short(value)}")
    return float(value)


def words(data: Mapping[str, Any], key: str, where: str) -> str:
    """data[key], a text that can be written as UTF-8."""
    value = data.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected str, got {shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {key}: holds half of a UTF-16 pair, {shown(value)}; write the text as UTF-8")
    return value


def fill(root: Path, template: str, values: Mapping[str, int | str], where: str) -> Path:
    """The file below `root` that a template of info.json names.

    Fields are those of `values`, numbers optionally with `:0Nd`; a file's content is never given to `str.format`, which would
    look into objects and pad to any width. DataError for another field, and for a path that leaves `root`.
    """

    def field(found: re.Match[str]) -> str:
        value, digits = values.get(found["name"] or ""), found["digits"]
        if value is None or (digits is not None and isinstance(value, str)):
            known = ", ".join("{" + name + "}" for name in values)
            raise DataError(
                f"{where}: {shown(template, 140)}: {shown(found[0])} is no field of it; known: {known}, a number also "
                "with :01d to :09d"
            )
        return value if isinstance(value, str) else f"{value:0{digits or 1}d}"

    text = re.sub(r"\{(?P<name>\w+)(?::0(?P<digits>[1-9])d)?\}|\{[^{}]*\}?|\}", field, template)
    wrong = _outside(text)
    if wrong is not None:
        raise DataError(f"{where}: {shown(text, 140)}: {wrong}; expected a file below the data set's folder")
    return root / text


def _outside(text: str) -> str | None:
    """What is wrong with a path that a file names; links are followed, so only its text is looked at."""
    parts = text.split("/")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "is no text that can be a path"
    if not text.strip("./"):
        return "names no file"
    if text.startswith("/") or "\\" in text or re.match("[A-Za-z]:", text):
        return "is an absolute path, or another system's"
    if ".." in parts:
        return "has a part '..'"
    if "\0" in text or max(sizes) > 255 or sum(sizes) > 2000:
        return "is too long for a path, or holds a zero byte"
    return None


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _object(text: str, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise DataError(f"{where}: the key {shown(key)} is there twice in one object; remove one of them")
            out[key] = value
        return out

    try:
        data = json.loads(text, object_pairs_hook=once)
    except DataError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); copy the data set again") from None
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(data).__name__}")
    return data


def _short(value: float) -> str:
    """A number for a message: Python refuses to print whole numbers of thousands of digits."""
    return f"{value}" if isinstance(value, float) or abs(value) < 10**30 else "a number of more than 30 digits"
