"""A robot as data: its cameras, its state and action keys in order, how they are encoded, and its gripper rule.

The same object serves training and inference. `observe` and `command` translate between the robot's (or simulator's) own
dictionaries and named data; everything below works on named data only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError, InputError, did_you_mean
from dit4dit.stats import Statistics
from dit4dit.transforms import Chain, Mode, Normalize, Pad, SinCos, Threshold, Transform
from dit4dit.types import Observation

Array = NDArray[np.float32]
StateEncoding = Literal["sin_cos", "normalized"]
Resize = Literal["cv2_area", "bilinear"]


@dataclass(frozen=True)
class Key:
    """One named part of the state or action vector."""

    name: str
    dim: int = 1
    normalization: Mode = "min_max"


@dataclass(frozen=True)
class Gripper:
    """One action dimension that the model decides: below `threshold` it becomes 0, else 1, before un-normalisation."""

    index: int
    threshold: float
    meaning: str


@dataclass(frozen=True)
class Embodiment:
    """See the module. `name` is what users type, `tag` is what its statistics are filed under."""

    name: str
    tag: str
    views: tuple[str, ...]
    """Camera names, in the order in which their pictures are joined from left to right."""
    state: tuple[Key, ...]
    action: tuple[Key, ...]
    state_encoding: StateEncoding
    rate_hz: float
    """Actions per second that the robot executes."""
    observe: Callable[[Mapping[str, Any]], Observation]
    """The robot's own observation -> named data."""
    command: Callable[[Array], Any]
    """One row of actions in robot units [A] -> what the robot's or simulator's step takes."""
    record: Callable[[Any], Array]
    """The inverse of `command`: what a step took -> one row of actions [A]."""
    resize: Resize = "cv2_area"
    """Filter that brings each view to the model's size at inference; training uses `bilinear`."""
    gripper: Gripper | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def state_dim(self) -> int:
        """Values of the raw state vector."""
        return sum(key.dim for key in self.state)

    @property
    def encoded_state_dim(self) -> int:
        """Values of the encoded state, before padding."""
        return self.state_dim * (2 if self.state_encoding == "sin_cos" else 1)

    @property
    def action_dim(self) -> int:
        """Values of the robot's action vector."""
        return sum(key.dim for key in self.action)

    @property
    def action_names(self) -> tuple[str, ...]:
        """One name per action dimension: "x", or "left_arm.0" where a key has several."""
        return tuple(key.name if key.dim == 1 else f"{key.name}.{i}" for key in self.action for i in range(key.dim))

    def state_chain(self, statistics: Statistics, width: int) -> Chain:
        """Raw state [..., state_dim] <-> the model's state [..., width]."""
        self.check_state_width(width)
        encode: tuple[Transform, ...]
        if self.state_encoding == "sin_cos":
            encode = (SinCos(tuple(key.dim for key in self.state)),)
        else:
            got = 0 if statistics.state is None else statistics.state.size
            if got != self.state_dim:
                raise ConfigError(
                    f"statistics {statistics.tag!r}: expected {self.state_dim} state values for embodiment "
                    f"{self.name!r}, got {got}; choose another embodiment or tag"
                )
            stats = statistics.state
            encode = () if stats is None else (Normalize.from_stats(stats, self._modes(self.state)),)
        return Chain((*encode, Pad(self.encoded_state_dim, width)))

    def action_chain(self, statistics: Statistics, width: int) -> Chain:
        """Robot actions [..., action_dim] <-> the model's actions [..., width]."""
        if statistics.action.size != self.action_dim:
            raise ConfigError(
                f"statistics {statistics.tag!r}: expected {self.action_dim} action values for embodiment {self.name!r}, got "
                f"{statistics.action.size}; choose another embodiment or tag"
            )
        self.check_action_width(width)
        normalize = Normalize.from_stats(statistics.action, self._modes(self.action))
        threshold = () if self.gripper is None else (Threshold(self.gripper.index, self.gripper.threshold),)
        return Chain((normalize, *threshold, Pad(self.action_dim, width)))

    def check_action_width(self, width: int) -> None:
        """ConfigError where the actions have more values than a model of this width takes."""
        if self.action_dim > width:
            raise ConfigError(self._too_wide("action_dim", "its actions have", self.action_dim, width))

    def check_state_width(self, width: int) -> None:
        """ConfigError where the encoded state has more values than a model of this width takes."""
        if self.encoded_state_dim > width:
            raise ConfigError(self._too_wide("state_dim", "its encoded state has", self.encoded_state_dim, width))

    def _too_wide(self, key: str, what: str, size: int, width: int) -> str:
        return (
            f"embodiment {self.name!r}: {what} {size} values, the model takes at most {width} (head.{key}); train with "
            f"--model.head.{key} {size} (from a checkpoint with --weights.fresh_head true), or for inference choose another "
            "embodiment"
        )

    @staticmethod
    def _modes(keys: tuple[Key, ...]) -> list[Mode]:
        return [key.normalization for key in keys for _ in range(key.dim)]

    def state_vector(self, state: Mapping[str, Any]) -> Array:
        """Named state -> raw vector, float32 [state_dim], keys in order.

        Raises:
            InputError: a key is missing or unknown, has the wrong number of values, or holds NaN or infinity.
        """
        known = [key.name for key in self.state]
        if not isinstance(state, Mapping):
            raise InputError(f"state: expected a mapping, key -> values, got {type(state).__name__}; keys: {known}")
        for name in state:
            if name not in known:
                raise InputError(f"state {name!r}: unknown key{did_you_mean(name, known)}; known: {', '.join(known)}")
        parts = []
        for key in self.state:
            if key.name not in state:
                raise InputError(f"state {key.name!r}: missing; expected keys: {', '.join(known)}")
            try:
                value = np.asarray(state[key.name]).reshape(-1)
            except ValueError:  # lists of unequal lengths
                value = np.array([None])
            if value.dtype.kind not in "fiu":
                raise InputError(f"state {key.name!r}: expected {key.dim} numbers, got {state[key.name]!r:.60}")
            value = value.astype(np.float32)
            if value.shape[0] != key.dim:
                raise InputError(
                    f"state {key.name!r}: expected {key.dim} value{'s' * (key.dim != 1)}, got {value.shape[0]}; "
                    f"known keys: {', '.join(known)}"
                )
            if not np.isfinite(value).all():
                raise InputError(f"state {key.name!r}: has NaN or infinite values; check the sensor")
            parts.append(value)
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def ordered_views(self, images: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
        """The pictures in joining order, checked: uint8 [H, W, 3] each.

        Raises:
            InputError: a view is missing or unknown, has another dtype or shape.
        """
        if not isinstance(images, Mapping):
            raise InputError(f"images: expected a mapping, view -> picture, got {type(images).__name__}")
        for name in images:
            if name not in self.views:
                raise InputError(
                    f"image {name!r}: unknown view{did_you_mean(name, self.views)}; known: {', '.join(self.views)}"
                )
        out = []
        for name in self.views:
            if name not in images:
                raise InputError(f"image {name!r}: missing; expected views: {', '.join(self.views)}")
            out.append(check_picture(images[name], name))
        return out


def check_picture(picture: Any, name: str) -> NDArray[np.uint8]:
    """`picture` itself when it is uint8 [H, W, 3]; InputError otherwise. Values are never guessed from."""
    array = np.asarray(picture)
    if array.dtype.kind not in "fiub":
        raise InputError(f"image {name!r}: expected a uint8 array [H, W, 3], got {type(picture).__name__}")
    if array.dtype != np.uint8:
        raise InputError(
            f"image {name!r}: expected uint8 in 0..255, got {array.dtype}; a float picture in 0..1 is (255 * x).astype('uint8')"
        )
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"image {name!r}: expected shape [H, W, 3] (RGB), got {list(array.shape)}")
    return array


def split_action(action: Array, parts: Sequence[tuple[str, int]]) -> dict[str, Array]:
    """One row of actions -> {"action.<part>": [d], ...}, parts in order."""
    cuts = np.cumsum([dim for _, dim in parts])[:-1]
    pieces = np.split(np.asarray(action, dtype=np.float32), cuts)
    return {f"action.{name}": piece for (name, _), piece in zip(parts, pieces, strict=True)}


def join_action(sent: Mapping[str, Any], parts: Sequence[tuple[str, int]]) -> Array:
    """The inverse of `split_action`."""
    return np.concatenate([np.asarray(sent[f"action.{name}"], dtype=np.float32) for name, _ in parts])


def state_of(raw: Mapping[str, Any], parts: Sequence[tuple[str, int]], robot: str) -> dict[str, Array]:
    """The `state.<part>` entries of a robot's own observation, by part."""
    return {name: np.asarray(field_of(raw, f"state.{name}", robot), dtype=np.float32) for name, _ in parts}


def field_of(raw: Mapping[str, Any], key: str, robot: str) -> Any:
    """raw[key], or an InputError that names the robot and what it sent."""
    if key not in raw:
        raise InputError(f"{robot} observation: missing {key!r}; got {', '.join(map(str, raw))}")
    return raw[key]
