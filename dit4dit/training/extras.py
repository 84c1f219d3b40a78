"""Optional dependencies of training: imported where they are used, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from dit4dit.errors import MissingExtra


def require(name: str, extra: str = "train") -> ModuleType:
    """The module `name`; MissingExtra when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise MissingExtra(f"{package}: not installed; pip install 'dit4dit[{extra}]'") from None
