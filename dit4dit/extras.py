"""The one door to optional dependencies: imported when used, and their absence names the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any

from dit4dit.errors import MissingExtra


def require(module: str, extra: str) -> Any:
    """The imported `module`; MissingExtra with the install command when its distribution is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there and broken: its own traceback says more
        raise MissingExtra(f"{top} is not installed; pip install 'dit4dit[{extra}]'") from None
