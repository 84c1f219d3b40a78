"""JSON files that commands and reports write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dit4dit.files.atomic import write_text


def write_json(path: Path, data: Any, *, allow_nan: bool = True) -> None:
    """A JSON file, written as `write_text` does.

    Without `allow_nan` ValueError for NaN and infinity, which are no JSON.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=allow_nan) + "\n")


def strict(data: Any) -> Any:
    """The same for a JSON file that strict readers take: None for every number that is not finite."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: strict(value) for key, value in data.items()}
    return [strict(value) for value in data] if isinstance(data, (list, tuple)) else data
