"""Normalisation statistics: dataset_statistics.json, keyed by embodiment tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import CheckpointError, ConfigError, did_you_mean
from dit4dit.model.keys import read_json

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
    data = read_json(path, "a checkpoint folder has its statistics beside its config")
    if not data:
        raise CheckpointError(f"{path}: expected statistics keyed by embodiment tag, got none")
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


def _vector(entry: Any, where: str) -> VectorStats:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected an object with mean, std, min, max, q01 and q99, got {entry!r:.60}")
    arrays: dict[str, Any] = {}
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        if name not in entry:
            raise ConfigError(f"{where}: missing {name!r}")
        try:
            arrays[name] = np.asarray(entry[name], dtype=np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"{where}.{name}: expected a list of numbers, got {entry[name]!r:.80}") from None
        if arrays[name].ndim != 1:
            raise ConfigError(f"{where}.{name}: expected a list of numbers, got {entry[name]!r:.60}")
        if arrays[name].shape != arrays["mean"].shape:
            want, got = arrays["mean"].shape[0], arrays[name].shape[0]
            raise ConfigError(f"{where}.{name}: expected {want} numbers as in mean, got {got}")
        if not np.isfinite(arrays[name]).all():
            raise ConfigError(f"{where}.{name}: has NaN or infinite values")
    for low, high in (("min", "max"), ("q01", "q99")):
        if (arrays[low] > arrays[high]).any():
            raise ConfigError(
                f"{where}: {low} is above {high} in dimension {int((arrays[low] > arrays[high]).argmax())}"
            )
    mask = entry.get("mask", [True] * len(arrays["mean"]))
    if not isinstance(mask, list) or any(not isinstance(x, bool) for x in mask) or len(mask) != len(arrays["mean"]):
        raise ConfigError(f"{where}.mask: expected {len(arrays['mean'])} values true or false, got {mask!r:.60}")
    arrays["mask"] = np.asarray(mask, dtype=bool)
    return VectorStats(**arrays)
