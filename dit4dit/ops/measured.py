"""Which implementation is the best on a chip: a committed table of what was measured there, nothing that is guessed.

A kernel marked `measured_only` runs by itself only where the table names it; an explicit wish runs it anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """`result`: the file in benchmarks/results with every GPU test of the op green and this implementation the fastest."""

    implementation: str
    result: str


# op -> "sm_90" -> what the automatic choice tries first there
CHOICES: Mapping[str, Mapping[str, Choice]] = {
    # a library's product and GELU behind it: 40 us instead of 72 at 588 x 2048 x 8192, 11 instead of 19 at 17 x 768 x 3072
    "linear_gelu": {"sm_90": Choice("torch", "nvidia-h200.json")},
}


def choice(op: str, device: torch.device) -> str | None:
    """The implementation that a measurement on this kind of device chose, or None."""
    table = CHOICES.get(op)
    found = table.get(_place(device)) if table else None
    return found.implementation if found else None


def missing(implementation: str, device: torch.device) -> str:
    """Why `implementation`, which runs by itself only where it was measured, does not on this device."""
    return (
        f"no committed measurement chooses it on {_place(device)} (dit4dit/ops/measured.py); backend={implementation!r} "
        "runs it"
    )


def _place(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
