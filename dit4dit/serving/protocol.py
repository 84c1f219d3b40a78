"""The published dialect: what a request says, and the forms of the answers. What the policy makes of it is in `backend.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.types import ActionChunk

INFER = ("infer", "predict_action")
TYPES = (*INFER, "ping", "reset")
NO_ID = "default"
"""What a request without a request_id is answered with, as published."""


@dataclass(frozen=True)
class Request:
    """One message.

    Attributes:
        kind: "infer", "ping" or "reset".
        identity: its request_id, which goes back as it came.
        message: all of it; keys that nobody reads are ignored, as published.
    """

    kind: str
    identity: str | int
    message: Mapping[str, Any]


def identity_of(message: Any) -> str | int:
    """The request_id of whatever came; `NO_ID` where there is none that could go back."""
    found = message.get("request_id", NO_ID) if isinstance(message, Mapping) else NO_ID
    fits = isinstance(found, str) and len(found) <= 256
    return found if fits or type(found) is int else NO_ID


def read(message: Any) -> Request:
    """The request that a message is; InputError where it is none."""
    if not isinstance(message, Mapping):
        raise InputError(f"message: expected a map, got {type(message).__name__}")
    kind = message.get("type", "infer")
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError(f"type: expected one of {', '.join(TYPES)}, got {shown(kind)}{did_you_mean(kind, TYPES)}")
    return Request("infer" if kind in INFER else kind, identity_of(message), message)


def seed_of(message: Mapping[str, Any]) -> tuple[int | None, int]:
    """Seed and first chunk of a reset; seed None asks for a fresh one."""
    seed, chunk = message.get("seed"), message.get("chunk", 0)
    for name, value in (("seed", seed), ("chunk", chunk)):
        if name == "seed" and value is None:
            continue
        if type(value) is not int or not 0 <= value < 2**64:
            raise InputError(f"{name}: expected an integer in 0..2^64-1, got {shown(value)}")
    return seed, chunk


def data(chunks: Sequence[ActionChunk]) -> dict[str, Any]:
    """What an inference answer holds: the published actions [B, K, A_model], and those in robot units [B, K, A]."""
    return {
        "normalized_actions": np.stack([chunk.normalized for chunk in chunks]),
        "actions": np.stack([chunk.actions for chunk in chunks]),
    }


def ok(kind: str, identity: str | int, **more: Any) -> dict[str, Any]:
    """A good answer."""
    return {"status": "ok", "ok": True, "type": kind, "request_id": identity, **more}


def failed(kind: str, identity: str | int, message: str) -> dict[str, Any]:
    """The published error; kind "inference_result", or "unknown" where it is not known what was asked."""
    return {"status": "error", "ok": False, "type": kind, "request_id": identity, "error": {"message": message}}
