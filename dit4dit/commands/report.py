"""What all commands share at their printing end: tables, JSON files, pictures from disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; columns listed in `right` are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        parts = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])])


def write_json(path: Path, data: Any, *, allow_nan: bool = True) -> None:
    """A JSON file. A regular one is written aside and renamed, so that a reader never sees half of it; anything else that
    is there (a device, a pipe) is written through, and a link keeps pointing at its target.

    Without `allow_nan` ValueError for NaN and infinity, which are no JSON.
    """
    text = json.dumps(data, indent=1, allow_nan=allow_nan) + "\n"
    target = path.resolve()
    if target.is_dir():
        raise InputError(f"{path}: is a folder; give a file to write")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_text(text)
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def strict(data: Any) -> Any:
    """The same for a JSON file that strict readers take: None for every number that is not finite."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: strict(value) for key, value in data.items()}
    return [strict(value) for value in data] if isinstance(data, (list, tuple)) else data


def read_picture(path: Path) -> NDArray[np.uint8]:
    """An 8-bit RGB picture, uint8 [H, W, 3]. Other modes are refused: nothing is guessed about alpha or 16 bits."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode != "RGB":
                raise InputError(f"{path}: expected an 8-bit RGB picture, got mode {picture.mode}; convert it first")
            return np.asarray(picture)
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a user's file; InputError when it is missing or not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Latency percentiles in milliseconds, with the number of samples."""
    ms = np.asarray(seconds) * 1e3
    names = {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    return {**{k: float(np.percentile(ms, q)) for k, q in names.items()}, "max": float(ms.max()), "samples": len(ms)}
