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
        from importlib import metadata

        # dit4dit-cu12 is the same package: an extra of the other's name would bring the other
        name = metadata.packages_distributions().get("dit4dit", ["dit4dit"])[0]
        raise MissingExtra(f"{top} is not installed; pip install '{name}[{extra}]'") from None
