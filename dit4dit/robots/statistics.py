"""Normalisation statistics: dataset_statistics.json, keyed by embodiment tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import CheckpointError, ConfigError, did_you_mean, listed, shown
from dit4dit.files.keys import read_json

Vector = NDArray[np.float64]
NAMES = ("mean", "std", "min", "max", "q01", "q99")
LARGEST = float(np.finfo(np.float32).max)
"""Actions are float32: what a robot is sent must not lie beyond."""


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
    """False where the published inference passes values through (keys named "gripper"); `transforms.Normalize` says where that
    counts."""

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
    tags = listed(sorted(data))
    if wanted is None:
        raise ConfigError(f"{where}: {len(data)} embodiment tags and none chosen; choose one with --embodiment: {tags}")
    raise ConfigError(f"{where}: no statistics for {shown(wanted)}{did_you_mean(wanted, data)}; tags: {tags}")


def parse(data: Mapping[str, Any], tag: str, where: str) -> Statistics:
    """Typed statistics of one tag.

    Raises:
        ConfigError: a list is missing, of another length, or holds something else than finite numbers within float32; a minimum
            is above its maximum, or a standard deviation negative. It names the list and the position.
    """
    entry = data[tag]
    if not isinstance(entry, Mapping) or "action" not in entry:
        raise ConfigError(f"{where}: tag {shown(tag)}: expected an object with 'action' (and 'state')")
    state = entry.get("state")
    return Statistics(
        tag=tag,
        action=_vector(entry["action"], f"{where}: {tag}.action"),
        state=None if state is None else _vector(state, f"{where}: {tag}.state"),
    )


def _vector(entry: Any, where: str) -> VectorStats:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected an object with mean, std, min, max, q01 and q99, got {shown(entry)}")
    arrays: dict[str, Any] = {}
    for name in NAMES:
        if name not in entry:
            raise ConfigError(f"{where}: missing {shown(name)}")
        arrays[name] = _numbers(entry[name], f"{where}.{name}")
        if arrays[name].shape != arrays["mean"].shape:
            want, got = arrays["mean"].shape[0], arrays[name].shape[0]
            raise ConfigError(f"{where}.{name}: expected {want} numbers as in mean, got {got}")
    for low, high in (("min", "max"), ("q01", "q99")):
        if (crossed := arrays[low] > arrays[high]).any():
            at = int(crossed.argmax())
            raise ConfigError(
                f"{where}: {low} is above {high} in dimension {at}: {arrays[low][at]:g} and {arrays[high][at]:g}; "
                "make the statistics again"
            )
    if (arrays["std"] < 0).any():
        at = int((arrays["std"] < 0).argmax())
        raise ConfigError(f"{where}.std: expected at least 0 in dimension {at}, got {arrays['std'][at]:g}")
    size = len(arrays["mean"])
    mask = entry.get("mask", [True] * size)
    if (
        not isinstance(mask, list)
        or len(mask) != size
        or any(type(x) not in (bool, int) or x not in (0, 1) for x in mask)
    ):
        raise ConfigError(f"{where}.mask: expected {size} values true or false (or 1 and 0), got {shown(mask)}")
    arrays["mask"] = np.asarray(mask, dtype=bool)
    return VectorStats(**arrays)


def _numbers(values: Any, where: str) -> Vector:
    """A flat list of numbers within float32; NumPy would take texts and booleans as numbers, too."""
    if not isinstance(values, (list, tuple)) or any(isinstance(x, bool) or not isinstance(x, Real) for x in values):
        raise ConfigError(f"{where}: expected a list of numbers, got {shown(values)}")
    for i, value in enumerate(values):
        # compared before anything is converted: an integer of JSON can be beyond every float
        if not -LARGEST <= value <= LARGEST:
            raise ConfigError(
                f"{where}: expected a finite number within float32 (+-{LARGEST:.2g}) in dimension {i}, got "
                f"{shown(value)}; make "
                "the statistics again, without what is no measurement"
            )
    return np.asarray(values, dtype=np.float64)
