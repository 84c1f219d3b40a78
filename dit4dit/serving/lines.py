"""Lines of the log that peers cause: no stranger fills the disk with them."""

from __future__ import annotations

import logging
import time

AT_ONCE = 200
"""Lines of one kind that may come at once."""
PER_SECOND = 1.0
"""And in the long run."""


class Lines:
    """Lines of each kind, a text with places for its values: the first `AT_ONCE`, then `PER_SECOND` of them, which say how many
    were left out."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._kinds: dict[str, _Kind] = {}

    def add(self, level: int, text: str, *values: object) -> None:
        kind = self._kinds.setdefault(text, _Kind())
        unsaid = kind.left_out()
        if unsaid is not None:
            self._log.log(level, text + "%s", *values, f" ({unsaid} more like this before)" if unsaid else "")


class _Kind:
    def __init__(self) -> None:
        self._room, self._at, self._unsaid = float(AT_ONCE), time.monotonic(), 0

    def left_out(self) -> int | None:
        """How many lines were left out before this one; None where this one is."""
        now = time.monotonic()
        self._room, self._at = min(AT_ONCE, self._room + (now - self._at) * PER_SECOND), now
        if self._room < 1:
            self._unsaid += 1
            return None
        self._room -= 1
        unsaid, self._unsaid = self._unsaid, 0
        return unsaid
