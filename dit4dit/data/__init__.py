"""Training data: LeRobot data sets in, samples out. Reading order: catalogue, modality, meta, columns, video, lerobot,
samples, statistics, mixture, sampler; writer makes data sets, check looks for damage.

Importing this package imports nothing heavy; the names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit4dit.data.lerobot import LeRobot
    from dit4dit.data.mixture import Mixture
    from dit4dit.data.samples import Window
    from dit4dit.data.writer import VideoCodec, Writer

__all__ = ["LeRobot", "Mixture", "VideoCodec", "Window", "Writer"]

_HOME = {
    "LeRobot": "dit4dit.data.lerobot",
    "Mixture": "dit4dit.data.mixture",
    "VideoCodec": "dit4dit.data.writer",
    "Window": "dit4dit.data.samples",
    "Writer": "dit4dit.data.writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dit4dit.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
