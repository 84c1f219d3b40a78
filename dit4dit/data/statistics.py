"""Exact statistics of data sets, and what a mixture makes of them: the content of dataset_statistics.json.

Every value of every frame counts; one column at a time is in memory. Results are cached under a hash of the values themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.columns import ELSEWHERE, cache_dir
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.samples import KeySource, Recording
from dit4dit.errors import ConfigError, DataError, shown
from dit4dit.files.atomic import whole_file
from dit4dit.robots.embodiment import Embodiment

NAMES = ("mean", "std", "min", "max", "q01", "q99")
FORMAT = 2
Vectors = dict[str, NDArray[np.float64]]


def flat_statistics(data: LeRobot, column: str, without: Collection[int] = ()) -> Vectors:
    """NAMES -> float64 [d] of one flat column over all frames; episodes at the positions `without` are left out."""
    return _cached(data, column, without, "", lambda x: x)


def key_statistics(data: LeRobot, source: KeySource, without: Collection[int] = ()) -> Vectors:
    """NAMES -> float64 [size] of one key as the robot calls it."""
    where = source.where
    if not source.converted:
        flat = flat_statistics(data, where.column, without)
        return {name: values[where.start : where.end] for name, values in flat.items()}
    how = f"{where.start}:{where.end} {where.rotation} {source.target}"
    return _cached(data, where.column, without, how, lambda x: source.read(x[:, where.start : where.end]))


def _cached(data: LeRobot, column: str, without: Collection[int], how: str, read: Any) -> Vectors:
    kept = [i for i in range(len(data.meta.episodes)) if i not in without and data.meta.episodes[i].length > 0]
    if not kept:
        raise DataError(f"{data.name}: no episode to make statistics of")
    left_out = sorted(data.meta.episodes[i].index for i in without)
    key = f"{FORMAT} {data.columns.digests[column]} {left_out} {how}"
    path = cache_dir() / "statistics" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    if path.is_file():
        return {name: np.asarray(values) for name, values in json.loads(path.read_text()).items()}
    found = _exact(read(data.columns.gather(column, kept)))
    for name, vector in found.items():
        if not np.isfinite(vector).all():
            at = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise DataError(
                f"{data.name}: column {shown(column)}: {name} of position {at} is {vector[at]:g}; a value is NaN or "
                "infinite, or a "
                "rotation has none: `dit4dit data check` names file and row"
            )
    text = json.dumps({name: list(map(float, vector)) for name, vector in found.items()}, allow_nan=False)
    with whole_file(path, DataError, ELSEWHERE) as partial:
        partial.write_text(text)
    return found


def _exact(values: NDArray[Any]) -> Vectors:
    """[rows, d] -> NAMES -> [d]. Quantiles are interpolated linearly between the two nearest values."""
    out: Vectors = {name: np.empty(values.shape[1]) for name in NAMES}
    for d in range(values.shape[1]):
        x = np.asarray(values[:, d], dtype=np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99])
        for name, value in zip(NAMES, (x.mean(), x.std(), x.min(), x.max(), q01, q99), strict=True):
            out[name][d] = value
    return out


def merge(each: Sequence[Vectors], weights: Sequence[float]) -> Vectors:
    """Statistics of a mixture as the published code merges them: means by weight, spread by the pooled formula, and the
    outermost minimum, maximum and quantiles. Weights are normalised here.
    """
    if len(each) == 1:
        return dict(each[0])
    w = np.asarray(weights, dtype=np.float64)[:, None] / np.sum(weights)
    of = {name: np.stack([vectors[name] for vectors in each]) for name in NAMES}
    mean = (w * of["mean"]).sum(axis=0)
    second = (w * (of["std"] ** 2 + of["mean"] ** 2)).sum(axis=0)
    return {
        "mean": mean,
        "std": np.sqrt(np.maximum(0.0, second - mean**2)),
        "min": of["min"].min(axis=0),
        "max": of["max"].max(axis=0),
        "q01": of["q01"].min(axis=0),
        "q99": of["q99"].max(axis=0),
    }


def mixture_statistics(
    recordings: Sequence[Recording], weights: Sequence[float], without: Sequence[Collection[int]]
) -> dict[str, Any]:
    """Content of dataset_statistics.json: embodiment tag -> action, state, num_transitions, num_trajectories.

    Args:
        weights: sampling weight of each recording.
        without: positions of the episodes of each recording that are left out.

    Raises:
        ConfigError: recordings of one tag have other keys.
    """
    by_tag: dict[str, list[int]] = {}
    for i, recording in enumerate(recordings):
        by_tag.setdefault(recording.embodiment.tag, []).append(i)
    out: dict[str, Any] = {}
    for tag, members in by_tag.items():
        first = recordings[members[0]].embodiment
        for i in members[1:]:
            robot = recordings[i].embodiment
            if _layout(robot) != _layout(first):
                raise ConfigError(
                    f"tag {shown(tag)}: robots {first.name!r} and {robot.name!r} have other keys; give them tags of their own"
                )
        parts = {
            part: _merged(part, [(recordings[i], weights[i], without[i]) for i in members])
            for part in ("action", "state")
        }
        modes = [key.normalization for key in first.action for _ in range(key.dim)]
        entry: dict[str, Any] = {"action": _plain(parts["action"]) | {"mask": [mode != "none" for mode in modes]}}
        if first.state:
            entry["state"] = _plain(parts["state"])
        kept = [recordings[i].length(e) for i in members for e in range(_count(recordings[i])) if e not in without[i]]
        out[tag] = {**entry, "num_transitions": sum(kept), "num_trajectories": len(kept)}
    return out


def _layout(robot: Embodiment) -> tuple[object, ...]:
    """What robots of one tag have in common."""
    keys = [[(key.name, key.dim, key.normalization) for key in listed] for listed in (robot.state, robot.action)]
    return *keys, robot.state_encoding


def _count(recording: Recording) -> int:
    return len(recording.data.meta.episodes)


def _merged(part: str, members: Sequence[tuple[Recording, float, Collection[int]]]) -> Vectors:
    each = []
    for recording, _, without in members:
        sources = recording.state if part == "state" else recording.action
        keys = [key_statistics(recording.data, source, without) for source in sources]
        each.append({name: np.concatenate([key[name] for key in keys]) if keys else np.zeros(0) for name in NAMES})
    return merge(each, [weight for _, weight, _ in members])


def _plain(vectors: Vectors) -> dict[str, Any]:
    return {name: values.tolist() for name, values in vectors.items()}
