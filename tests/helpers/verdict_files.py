"""Verdict files of one small call on this CPU, and what a plan makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit4dit import ops
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import Choices
from dit4dit.ops.verdicts import Verdict, Verdicts, call_text

CPU = torch.device("cpu")
VIEW = torch.arange(2 * 6 * 6 * 3, dtype=torch.uint8).view(2, 6, 6, 3)
ARGS = ([VIEW], (3, 3), "bilinear", torch.float32)
CALL = call_text((*ARGS, None, None))
"""As the op gives its arguments on: no `channels`, no `out`."""
DEFAULT, OTHER = "cpp", "torch"


def verdict(**changes: Any) -> Verdict:
    """That OTHER, which is not the default, is the fastest for `ARGS` here."""
    found = Verdict(
        "preprocess",
        CALL,
        verdicts.place(CPU),
        DEFAULT,
        OTHER,
        {OTHER: 1.0, DEFAULT: 2.0},
        made="2026-01-01",
    )
    return replace(found, **changes)


def ran(device_verdicts: Verdicts | None = None) -> str:
    """What a plan runs `ARGS` by; right whatever it is."""
    with Choices(device_verdicts or Verdicts(CPU)) as choices:
        out = ops.preprocess(*ARGS)
    torch.testing.assert_close(out, ops.preprocess(*ARGS, backend="torch"))
    (name,) = choices.ran["preprocess"]
    return name


def put(cache: Path, content: str | bytes | None = None, **changes: Any) -> Path:
    """A file at the place of the call's verdict: this content, or a verdict with changes in its JSON."""
    path = cache / verdict().file
    cache.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = json.dumps({**verdict().data(), **changes})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
