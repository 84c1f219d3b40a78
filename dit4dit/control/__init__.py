"""From chunks of actions to one command per control step.

The names below load on first use: `python -m dit4dit.control` needs nothing but Python.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit4dit.control.limits import Limits
    from dit4dit.control.seams import Blend, Ensemble, Switch
    from dit4dit.control.stream import ActionStream, Command, Status, StreamFeedback

__all__ = ["ActionStream", "Blend", "Command", "Ensemble", "Limits", "Status", "StreamFeedback", "Switch"]

_HOME = {
    **dict.fromkeys(("ActionStream", "Command", "Status", "StreamFeedback"), "dit4dit.control.stream"),
    **dict.fromkeys(("Blend", "Ensemble", "Switch"), "dit4dit.control.seams"),
    "Limits": "dit4dit.control.limits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit4dit.control' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
