"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`DIT4DIT_CACHE`, else ~/.cache/dit4dit. Nothing in it is worth a backup."""
    return Path(os.environ.get("DIT4DIT_CACHE") or Path.home() / ".cache" / "dit4dit")
