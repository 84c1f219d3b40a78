"""DiT4DiT: a robot policy made of a video diffusion transformer and an action diffusion transformer.

Importing this package imports neither torch nor anything else heavy; the names below load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit4dit.policy.policy import Policy
    from dit4dit.types import ActionChunk, Guidance, Noise, Observation

__version__ = "0.1.0"

__all__ = ["ActionChunk", "Guidance", "Noise", "Observation", "Policy", "__version__"]

_HOME = {
    "ActionChunk": "dit4dit.types",
    "Guidance": "dit4dit.types",
    "Noise": "dit4dit.types",
    "Observation": "dit4dit.types",
    "Policy": "dit4dit.policy.policy",
}


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _compiled()
    if name not in _HOME:
        raise AttributeError(f"module 'dit4dit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def _compiled() -> Any:
    """The compiled module; a copy without one is almost always the source tree taken for the installed package."""
    try:
        return import_module("dit4dit._C")
    except ModuleNotFoundError:
        raise ImportError(
            f"dit4dit._C is not built for {__file__}: this looks like the source tree, which Python takes before the "
            "installed package when it starts there; start elsewhere, or pip install -e ."
        ) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
