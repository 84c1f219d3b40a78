"""Waiting for something that another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT = 120.0
"""Seconds after which a test that waits has failed: many more than anything takes where other work has the cores."""


def eventually(true: Callable[[], object]) -> None:
    """Returns once `true()` is."""
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
