"""What the columns of a data set mean: GR00T's meta/modality.json, or, without one, the keys of info.json taken whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dit4dit.data.files import read_json
from dit4dit.errors import DataError, did_you_mean, listed, shown
from dit4dit.robots.rotations import source_size

IMAGES = "observation.images."
T = TypeVar("T")


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
    """Annotation -> column of task numbers, or of texts."""

    def part(self, name: str) -> Mapping[str, Any]:
        """The keys of "state", "action", "video" or "annotation"."""
        found: Mapping[str, Any] = getattr(self, name)
        return found

    def find(self, part: str, key: str) -> Any:
        """Where `key` is stored; DataError with a suggestion when the data set does not have it."""
        known = self.part(part)
        if key not in known:
            raise DataError(
                f"{self.where}: no {part} {shown(key)}{did_you_mean(key, list(known))}; it has: {listed(known)}"
            )
        return known[key]


def read_modality(path: Path, features: Mapping[str, Any]) -> Modality:
    """A modality.json; DataError when it is unreadable or names columns or values that `features` does not have."""
    return parse(read_json(path), features, str(path))


def parse(data: Any, features: Mapping[str, Any], where: str) -> Modality:
    """The content of a modality.json. Keys that nothing here needs (range, dtype) are let pass: other tools write them."""
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: expected an object with state, action, video and annotation")
    parts: dict[str, Mapping[str, Any]] = {}
    for part in ("state", "action", "video", "annotation"):
        parts[part] = data.get(part) or {}
        if not isinstance(parts[part], Mapping) or not all(isinstance(x, Mapping) for x in parts[part].values()):
            raise DataError(f"{where}: {part}: expected an object of objects, got {shown(parts[part])}")
    state = {k: _slice(v, "observation.state", features, f"{where}: state.{k}") for k, v in parts["state"].items()}
    action = {k: _slice(v, "action", features, f"{where}: action.{k}") for k, v in parts["action"].items()}
    video = {k: _camera(v.get("original_key") or k, features, f"{where}: video.{k}") for k, v in parts["video"].items()}
    annotation = {
        k: _annotation(v.get("original_key") or f"annotation.{k}", features, f"{where}: annotation.{k}")
        for k, v in parts["annotation"].items()
    }
    return Modality(where, state, action, video, annotation)


def from_features(features: Mapping[str, Any], where: str) -> Modality:
    """Keys taken whole from info.json's features.

    "observation.state" is the state key "state", "observation.<key>" is <key>; "action" is the action key "action"; names that
    info.json gives to single values are keys too; "observation.images.<view>" is <view>; the task is `task_index`. A key that two
    features would have is neither's, but for a column's own, which goes before the name of a value.
    """
    columns: dict[str, list[tuple[str, Slice]]] = {"state": [], "action": []}
    values: dict[str, list[tuple[str, Slice]]] = {"state": [], "action": []}
    video: list[tuple[str, str]] = []
    annotation = {"human.action.task_description": "task_index"} if "task_index" in features else {}
    for name, feature in features.items():
        if is_picture(feature):
            video.append((name.removeprefix(IMAGES), name))
        elif name.startswith("annotation."):
            if is_language(name, feature):
                annotation[name.removeprefix("annotation.")] = name
        elif is_numeric(feature) and width(feature) > 0:
            part = "state" if name.startswith("observation.") else "action"
            if part == "state" or name == "action" or name.startswith("action."):
                key = name.removeprefix("observation." if part == "state" else "action.")
                columns[part].append((key, Slice(name, 0, width(feature))))
                values[part] += _values(name, feature)
    parts = {}
    for part in columns:
        taken = {key for key, _ in columns[part]}
        parts[part] = _alone(columns[part]) | _alone([item for item in values[part] if item[0] not in taken])
    return Modality(where, parts["state"], parts["action"], _alone(video), annotation)


def _alone(found: list[tuple[str, T]]) -> dict[str, T]:
    count = Counter(key for key, _ in found)
    return {key: where for key, where in found if count[key] == 1}


def check_features(features: Any, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The features of info.json; DataError where one is no object, or has a shape that is none."""
    if not isinstance(features, Mapping):
        raise DataError(f"{where}: expected dict, got {shown(features)}")
    for name, feature in features.items():
        if not isinstance(feature, Mapping):
            raise DataError(f"{where}: {shown(name)}: expected an object with dtype and shape, got {shown(feature)}")
        shape = feature.get("shape")
        if shape is not None and not (isinstance(shape, list) and all(type(x) is int and x >= 0 for x in shape)):
            raise DataError(f"{where}: {shown(name)}: shape: expected a list of whole numbers, got {shown(shape)}")
    return features


def is_picture(feature: Any) -> bool:
    """Whether a feature of info.json is a camera's."""
    return isinstance(feature, Mapping) and feature.get("dtype") in ("video", "image")


def is_numeric(feature: Mapping[str, Any]) -> bool:
    """Whether info.json says that a feature holds numbers (or true and false)."""
    return str(feature.get("dtype", "")).startswith(("float", "int", "uint", "bool"))


def is_language(name: str, feature: Mapping[str, Any]) -> bool:
    """Whether a column holds instructions, texts or task numbers, going by info.json; a modality.json may name others."""
    measured = str(feature.get("dtype", "")).startswith(("float", "bool"))
    return name == "task_index" or (name.startswith("annotation.") and width(feature) == 1 and not measured)


def depth_map(feature: Mapping[str, Any]) -> str | None:
    """Why the images of a camera are no colour images: what info.json says of them, never what they look like."""
    flags = ("is_depth_map", "video.is_depth_map")
    for facts in (feature, feature.get("info"), feature.get("video_info")):
        if isinstance(facts, Mapping) and any(facts.get(flag) is True for flag in flags):
            return "is a depth map (is_depth_map is true)"
    shape, names = list(feature.get("shape") or []), feature.get("names")
    if len(shape) == 2:
        return f"has one channel (its shape is {shape})"
    axis = [name in ("channel", "channels", "depth") for name in names] if isinstance(names, list) else []
    if len(shape) == 3 and len(axis) == 3 and any(axis):
        channels = shape[axis.index(True)]
    else:  # channels are first or last, and the fewest
        channels = min(shape[0], shape[-1]) if len(shape) == 3 else 3
    return f"has one channel (its shape is {shape})" if channels == 1 else None


def width(feature: Mapping[str, Any]) -> int:
    """Values of a flat feature of info.json: shape [d], or [] and [1] for single ones; -1 for what is not flat."""
    shape = list(feature.get("shape") or [1])
    return int(shape[0]) if len(shape) == 1 else -1


def _values(column: str, feature: Mapping[str, Any]) -> list[tuple[str, Slice]]:
    """The single values of a column that info.json gives a name each."""
    size = width(feature)
    names = feature.get("names")
    if isinstance(names, Mapping):  # {"motors": [...]}, as older recorders wrote them
        names = next(iter(names.values()), None) if len(names) == 1 else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == size > 1:
        return [(name, Slice(column, i, i + 1)) for i, name in enumerate(names)]
    return []


def _column(name: Any, features: Mapping[str, Any], where: str) -> str:
    if not isinstance(name, str) or name not in features:
        raise DataError(
            f"{where}: original_key: no feature {shown(name)} in info.json{did_you_mean(name, list(features))}; "
            f"it has: {listed(features)}"
        )
    return name


def _camera(name: Any, features: Mapping[str, Any], where: str) -> str:
    column = _column(name, features, where)
    if not is_picture(features[column]):
        raise DataError(
            f"{where}: {shown(column)} is no camera: its dtype in info.json is {shown(features[column].get('dtype'))}"
        )
    return column


def _annotation(name: Any, features: Mapping[str, Any], where: str) -> str:
    column = _column(name, features, where)
    if is_picture(features[column]) or width(features[column]) != 1:
        raise DataError(
            f"{where}: {shown(column)} has dtype {shown(features[column].get('dtype'))} and shape "
            f"{shown(features[column].get('shape'))} in info.json; expected one text or task number a frame"
        )
    return column


def _slice(entry: Mapping[str, Any], default: str, features: Mapping[str, Any], where: str) -> Slice:
    column = _column(entry.get("original_key") or default, features, where)
    start, end = entry.get("start"), entry.get("end")
    size = width(features[column])
    if size < 0 or not is_numeric(features[column]):
        shape, dtype = features[column].get("shape"), features[column].get("dtype")
        raise DataError(
            f"{where}: {shown(column)} has dtype {shown(dtype)} and shape {shown(shape)} in info.json; expected flat numbers"
        )
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, end))
    if not whole or not 0 <= start < end <= size:  # type: ignore[operator]
        raise DataError(
            f"{where}: expected 0 <= start < end <= {size} (the width of {shown(column)}), got {start} and {end}"
        )
    absolute = entry.get("absolute")
    if not isinstance(absolute, bool) and "absolute" in entry:
        raise DataError(f"{where}: absolute: expected true or false, got {shown(absolute)}")
    found = Slice(column, int(start), int(end), absolute, entry.get("rotation_type"))  # type: ignore[arg-type]
    if found.rotation is not None and source_size(str(found.rotation), where) != found.size:
        size = source_size(str(found.rotation), where)
        raise DataError(f"{where}: rotation_type {shown(found.rotation)} has {size} values, the slice {found.size}")
    return found
