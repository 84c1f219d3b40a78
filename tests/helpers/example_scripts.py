"""The scripts of examples/ as modules: they are no part of the package, so tests load them by path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def path(name: str) -> Path:
    """The file of the script `name` of examples/tabletop."""
    return ROOT / "examples" / "tabletop" / f"{name}.py"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path(name))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module
