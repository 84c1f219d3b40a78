"""Normalisation statistics: dataset_statistics.json, keyed by embodiment tag."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import CheckpointError, ConfigError, did_you_mean

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class VectorStats:
    """Statistics of one flat vector (all state keys, or all action keys, in order); each field [d], robot units."""

    mean: Vector
    std: Vector
    min: Vector
    max: Vector
    q01: Vector
    q99: Vector
    mask: NDArray[np.bool_]
    """False where values are passed through unscaled (grippers)."""

    @property
    def size(self) -> int:
        return int(self.min.shape[0])


@dataclass(frozen=True)
class Statistics:
    """Statistics of one embodiment tag."""

    tag: str
    action: VectorStats
    state: VectorStats | None


def read_statistics(path: Path) -> dict[str, Any]:
    """The raw file; CheckpointError when it is missing or not a JSON object."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; a checkpoint folder has its statistics beside its config"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path}: expected statistics keyed by embodiment tag, got {type(data).__name__}")
    return data


def choose_tag(data: Mapping[str, Any], wanted: str | None, where: str) -> str:
    """The tag to use: the wanted one, or the only one there is.

    Raises:
        ConfigError: several tags and none chosen, or a wanted tag that the file does not have.
    """
    if wanted is not None and wanted in data:
        return wanted
    if len(data) == 1:
        return next(iter(data))
    tags = ", ".join(sorted(data))
    if wanted is None:
        raise ConfigError(f"{where}: {len(data)} embodiment tags and none chosen; choose one with --embodiment: {tags}")
    raise ConfigError(f"{where}: no statistics for {wanted!r}{did_you_mean(wanted, list(data))}; tags: {tags}")


def parse(data: Mapping[str, Any], tag: str, where: str) -> Statistics:
    """Typed statistics of one tag; ConfigError names what is missing, not numeric, or of unequal length."""
    entry = data[tag]
    if not isinstance(entry, Mapping) or "action" not in entry:
        raise ConfigError(f"{where}: tag {tag!r}: expected an object with 'action' (and 'state')")
    state = entry.get("state")
    return Statistics(
        tag=tag,
        action=_vector(entry["action"], f"{where}: {tag}.action"),
        state=None if state is None else _vector(state, f"{where}: {tag}.state"),
    )


def _vector(entry: Mapping[str, Any], where: str) -> VectorStats:
    arrays: dict[str, Any] = {}
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        if name not in entry:
            raise ConfigError(f"{where}: missing {name!r}")
        try:
            arrays[name] = np.asarray(entry[name], dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}.{name}: expected a list of numbers, got {entry[name]!r:.80}") from None
        if arrays[name].ndim != 1 or arrays[name].shape != arrays["mean"].shape:
            raise ConfigError(f"{where}.{name}: expected {arrays['mean'].shape[0]} numbers, got {arrays[name].shape}")
        if not np.isfinite(arrays[name]).all():
            raise ConfigError(f"{where}.{name}: has NaN or infinite values")
    arrays["mask"] = np.asarray(entry.get("mask", [True] * len(arrays["mean"])), dtype=bool)
    if arrays["mask"].shape != arrays["mean"].shape:
        raise ConfigError(f"{where}.mask: expected {len(arrays['mean'])} values, got {arrays['mask'].shape[0]}")
    return VectorStats(**arrays)
