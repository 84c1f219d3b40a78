"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from dit4dit.errors import InputError


def cache_root() -> Path:
    """`DIT4DIT_CACHE`, else ~/.cache/dit4dit. Nothing in it is worth a backup.

    InputError: the user has no home folder, as in a container whose user is a mere number.
    """
    named = os.environ.get("DIT4DIT_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "dit4dit"
    except RuntimeError:
        raise InputError("cache: this user has no home folder; set DIT4DIT_CACHE to a folder") from None
