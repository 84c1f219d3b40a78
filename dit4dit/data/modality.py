"""What the columns of a data set mean: GR00T's meta/modality.json, or, without one, the keys of info.json taken whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit4dit.data.rotations import source_size
from dit4dit.errors import DataError, did_you_mean

IMAGES = "observation.images."


@dataclass(frozen=True)
class Slice:
    """One key of the state or action: values `start` to `end` of a flat column."""

    column: str
    start: int
    end: int
    absolute: bool | None = None
    """Of actions: False for displacements, True for targets, None where the file does not say."""
    rotation: str | None = None
    """How the values represent a rotation, where they do."""

    @property
    def relative(self) -> bool:
        """Whether nothing to do is zero, not the last value; an action of which nothing is said counts as absolute, as the
        published loader has it."""
        return self.absolute is False

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Modality:
    """Keys of a data set -> where they are stored."""

    where: str
    state: Mapping[str, Slice]
    action: Mapping[str, Slice]
    video: Mapping[str, str]
    """View -> feature of info.json."""
    annotation: Mapping[str, str]
    """Annotation -> column of task indices."""

    def part(self, name: str) -> Mapping[str, Any]:
        """The keys of "state", "action", "video" or "annotation"."""
        found: Mapping[str, Any] = getattr(self, name)
        return found

    def find(self, part: str, key: str) -> Any:
        """Where `key` is stored; DataError with a suggestion when the data set does not have it."""
        known = self.part(part)
        if key not in known:
            raise DataError(
                f"{self.where}: no {part} {key!r}{did_you_mean(key, list(known))}; it has: {', '.join(known) or 'none'}"
            )
        return known[key]


def read_modality(path: Path, features: Mapping[str, Any]) -> Modality:
    """A modality.json; DataError when it is unreadable or names columns or values that `features` does not have."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    return parse(data, features, str(path))


def parse(data: Any, features: Mapping[str, Any], where: str) -> Modality:
    """The content of a modality.json. Keys that nothing here needs (range, dtype) are let pass: other tools write them."""
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: expected an object with state, action, video and annotation")
    parts: dict[str, Mapping[str, Any]] = {}
    for part in ("state", "action", "video", "annotation"):
        parts[part] = data.get(part) or {}
        if not isinstance(parts[part], Mapping) or not all(isinstance(x, Mapping) for x in parts[part].values()):
            raise DataError(f"{where}: {part}: expected an object of objects, got {parts[part]!r:.60}")
    state = {k: _slice(v, "observation.state", features, f"{where}: state.{k}") for k, v in parts["state"].items()}
    action = {k: _slice(v, "action", features, f"{where}: action.{k}") for k, v in parts["action"].items()}
    video = {k: _column(v.get("original_key", k), features, f"{where}: video.{k}") for k, v in parts["video"].items()}
    annotation = {
        k: _column(v.get("original_key", f"annotation.{k}"), features, f"{where}: annotation.{k}")
        for k, v in parts["annotation"].items()
    }
    return Modality(where, state, action, video, annotation)


def from_features(features: Mapping[str, Any], where: str) -> Modality:
    """Keys taken whole from info.json's features.

    "observation.state" is the state key "state", "observation.<key>" is <key>; "action" is the action key "action"; names that
    info.json gives to single values are keys too; "observation.images.<view>" is <view>; the task is `task_index`.
    """
    state: dict[str, Slice] = {}
    action: dict[str, Slice] = {}
    video: dict[str, str] = {}
    annotation = {"human.action.task_description": "task_index"} if "task_index" in features else {}
    for name, feature in features.items():
        if is_picture(feature):
            video[name.removeprefix(IMAGES)] = name
        elif name == "action" or name.startswith("action."):
            action |= _whole(name, name.removeprefix("action."), feature)
        elif name.startswith("observation."):
            state |= _whole(name, name.removeprefix("observation."), feature)
        elif name.startswith("annotation."):
            annotation[name.removeprefix("annotation.")] = name
    return Modality(where, state, action, video, annotation)


def is_picture(feature: Any) -> bool:
    """Whether a feature of info.json is a camera's."""
    return isinstance(feature, Mapping) and feature.get("dtype") in ("video", "image")


def width(feature: Mapping[str, Any]) -> int:
    """Values of a flat feature of info.json: shape [d], or [] and [1] for single ones."""
    shape = list(feature.get("shape") or [1])
    return int(shape[0]) if len(shape) == 1 else -1


def _whole(column: str, key: str, feature: Mapping[str, Any]) -> dict[str, Slice]:
    size = width(feature)
    names = feature.get("names")
    if isinstance(names, Mapping):  # {"motors": [...]}, as older recorders wrote them
        names = next(iter(names.values()), None) if len(names) == 1 else None
    found = {key: Slice(column, 0, size)} if size > 0 else {}
    if isinstance(names, list) and len(set(names)) == size > 1 and all(isinstance(name, str) for name in names):
        found |= {name: Slice(column, i, i + 1) for i, name in enumerate(names)}
    return found


def _column(name: Any, features: Mapping[str, Any], where: str) -> str:
    if name not in features:
        raise DataError(
            f"{where}: original_key: no feature {name!r} in info.json{did_you_mean(str(name), list(features))}; "
            f"it has: {', '.join(features)}"
        )
    return str(name)


def _slice(entry: Mapping[str, Any], default: str, features: Mapping[str, Any], where: str) -> Slice:
    column = _column(entry.get("original_key") or default, features, where)
    start, end = entry.get("start"), entry.get("end")
    size = width(features[column])
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, end))
    if not whole or not 0 <= start < end <= size:  # type: ignore[operator]
        raise DataError(
            f"{where}: expected 0 <= start < end <= {size} (the width of {column!r}), got {start} and {end}"
        )
    absolute = entry.get("absolute")
    if not isinstance(absolute, bool) and "absolute" in entry:
        raise DataError(f"{where}: absolute: expected true or false, got {absolute!r:.60}")
    found = Slice(column, int(start), int(end), absolute, entry.get("rotation_type"))  # type: ignore[arg-type]
    if found.rotation is not None and source_size(str(found.rotation), where) != found.size:
        size = source_size(str(found.rotation), where)
        raise DataError(f"{where}: rotation_type {found.rotation!r} has {size} values, the slice {found.size}")
    return found
