"""The robots that the package knows by name, one file each, and what they are made of: `embodiment`, `transforms`, `statistics`.

A robot of your own is another `Embodiment` given to `Policy`.
"""

from __future__ import annotations

from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.robots.channels import Bounds, ChannelGroup
from dit4dit.robots.embodiment import Embodiment, Gripper, Key
from dit4dit.robots.g1 import G1
from dit4dit.robots.gr1 import GR1
from dit4dit.robots.libero import LIBERO
from dit4dit.robots.tabletop import TABLETOP

EMBODIMENTS: dict[str, Embodiment] = {e.name: e for e in (LIBERO, GR1, G1, TABLETOP)}

__all__ = [
    "EMBODIMENTS",
    "G1",
    "GR1",
    "LIBERO",
    "TABLETOP",
    "Bounds",
    "ChannelGroup",
    "Embodiment",
    "Gripper",
    "Key",
    "embodiment",
]


def embodiment(name: str) -> Embodiment:
    """The embodiment called `name`; ConfigError with a suggestion when there is none."""
    if name not in EMBODIMENTS:
        known = list(EMBODIMENTS)
        raise ConfigError(f"embodiment {shown(name)}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}")
    return EMBODIMENTS[name]
