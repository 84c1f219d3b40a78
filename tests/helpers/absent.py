"""Imports of the packages that DIT4DIT_ABSENT names fail, as where they are not installed.

For processes of their own: `pytest -p absent`, or imported before anything else.
"""

from __future__ import annotations

import os
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

VARIABLE = "DIT4DIT_ABSENT"
_found = PathFinder.find_spec


def _find(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    return None if name.partition(".")[0] in os.environ.get(VARIABLE, "").split() else _found(name, path, target)


PathFinder.find_spec = staticmethod(_find)  # type: ignore[method-assign,assignment]
