"""A robot as data: its cameras, its state and action keys in order, how they are encoded, what each action asks for, its gripper.

The same object serves training and inference. `observe` and `command` translate between the robot's (or simulator's) own
dictionaries and named data; everything below works on named data only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError, InputError, did_you_mean, listed, shown
from dit4dit.robots.channels import UNLIMITED, Bounds, ChannelGroup, bounds_of, check_groups, check_key
from dit4dit.robots.statistics import Statistics
from dit4dit.robots.transforms import Chain, Mode, Normalize, Pad, SinCos, Threshold, Transform
from dit4dit.types import Observation

Array = NDArray[np.float32]
StateEncoding = Literal["sin_cos", "normalized"]
Resize = Literal["cv2_area", "bilinear"]
Kind = Literal["position", "angle", "velocity", "relative", "binary"]
"""What an action asks for: an absolute target (an `angle` wraps at pi), a speed, a displacement, or one of two commands."""
KINDS: tuple[Kind, ...] = get_args(Kind)
KEPT = frozenset({"position", "angle", "binary"})
"""Kinds whose last value, sent again, moves nothing; of the others it is zero that moves nothing."""


@dataclass(frozen=True)
class Key:
    """One named part of the state or action vector.

    Attributes:
        kind: of an action; None where nobody has said it, and then the robot cannot be told to stand still.
        moves: of an action, the state key of the same size that it moves, value for value; a position is a target for it.
        clip: of an action, the largest magnitude that the robot or simulator takes; what is beyond it clips.
        unit: of a state, "m" or "rad" where it is one of them.
        limits: of an action, what each of its values is bounded by, or one per value.
        rotation: of an action whose values together are one rotation, as what (`rotations.TARGETS`): no value of it means a thing
            by itself, so none is interpolated. None of roll, pitch and yaw.
    """

    name: str
    dim: int = 1
    normalization: Mode = "min_max"
    kind: Kind | None = None
    moves: str | None = None
    clip: float | None = None
    unit: Literal["m", "rad"] | None = None
    limits: Bounds | tuple[Bounds, ...] = UNLIMITED
    rotation: str | None = None


@dataclass(frozen=True)
class Gripper:
    """One action dimension that the model decides: below `threshold` it becomes 0, else 1, before un-normalisation.

    Attributes:
        open: which of the two opens the fingers; the other closes them.
        fingers: state keys and factors whose sum tells how far they are open, in a unit of the robot's own.
    """

    index: int
    threshold: float
    open: Literal[0, 1]
    fingers: tuple[tuple[str, float], ...]

    @property
    def close(self) -> int:
        """The value that closes the fingers."""
        return 1 - self.open

    @property
    def meaning(self) -> str:
        """The rule in words."""
        return f"model value < {self.threshold:g} -> 0 ({self.word(0)}), else 1 ({self.word(1)})"

    def word(self, value: int) -> str:
        """What the decided value does: "open" or "close"."""
        return "open" if value == self.open else "close"

    def opening(self, state: Mapping[str, Any]) -> float:
        """How far the fingers are open in a named state, in a unit of the robot's own."""
        return sum(factor * float(np.asarray(state[key]).reshape(-1)[0]) for key, factor in self.fingers)


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
    control_hz: float
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
    kind_hint: str = "give its Key a kind"
    """What to do about an action key that has no kind, for the message; KEY in it becomes the key's name."""
    groups: tuple[ChannelGroup, ...] = ()
    """Which action keys share their rules; see `channel_groups`."""

    def __post_init__(self) -> None:
        sizes = {key.name: key.dim for key in self.state}
        check_groups(f"embodiment {self.name!r}", self.channel_groups, self.action)
        for key in self.action:
            check_key(f"embodiment {self.name!r}", key)
            if key.moves is not None and sizes.get(key.moves) != key.dim:
                raise ConfigError(
                    f"embodiment {self.name!r}: action {key.name!r} moves {key.moves!r}: expected a state key of {key.dim} "
                    f"values, got {sizes.get(key.moves, 'none')}"
                )
        if self.gripper is not None and not 0 <= self.gripper.index < self.action_dim:
            raise ConfigError(f"embodiment {self.name!r}: gripper: no action {self.gripper.index} of {self.action_dim}")

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

    @property
    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """`groups`; one, "all", where none are given."""
        return self.groups or (ChannelGroup("all", tuple(key.name for key in self.action)),)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """What each action dimension is bounded by [A]: its key's limits, and no more than the robot takes (`clip`)."""
        return tuple(bounds for key in self.action for bounds in bounds_of(key, self.control_hz))

    @property
    def places(self) -> dict[str, slice]:
        """Action key -> its place in a row of actions."""
        ends = np.cumsum([key.dim for key in self.action]).tolist()
        return {key.name: slice(end - key.dim, end) for key, end in zip(self.action, ends, strict=True)}

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What each action dimension asks for [A]; ConfigError where a key has no kind."""
        kinds: list[Kind] = []
        for key in self.action:
            if key.kind is None:
                raise ConfigError(
                    f"embodiment {self.name!r}: action {key.name!r}: nothing says whether it is an absolute target or a "
                    f"displacement, so how the robot stands still is unknown; {self.kind_hint.replace('KEY', key.name)}"
                )
            kinds += [key.kind] * key.dim
        return tuple(kinds)

    def hold(self, last: Array) -> Array:
        """The row that keeps the robot where it is, for steps without a chunk: an absolute target stays what was commanded last,
        a displacement and a velocity become 0, a gripper keeps its command.

        Args:
            last: the row that was executed last, in robot units [A].

        Raises:
            ConfigError: an action key has no kind.
        """
        if np.shape(last) != (self.action_dim,):
            raise InputError(
                f"embodiment {self.name!r}: hold: expected a row of {self.action_dim} actions, got shape {list(np.shape(last))}"
            )
        return np.where([kind in KEPT for kind in self.kinds], last, 0).astype(np.float32)

    def still(self, state: Mapping[str, Any], rest: Array | None = None) -> Array:
        """The row that keeps a robot that has not been commanded yet where its named `state` says that it is: `hold` of a row
        whose targets are the measured state. The gripper opens.

        Args:
            rest: row [A] for targets whose place the state does not tell; zeros where None.
        """
        row = np.zeros(self.action_dim, np.float32) if rest is None else np.array(rest, dtype=np.float32)
        for key in self.action:
            if key.moves is not None:
                row[self.places[key.name]] = np.asarray(state[key.moves]).reshape(-1)
        if self.gripper is not None:
            row[self.gripper.index] = self.gripper.open
        return self.hold(row)

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

    def never_moved(self, statistics: Statistics) -> str:
        """Which action dimensions never moved in the data of `statistics` (mode q99: hardly ever), in words; empty where all did,
        or their mode (binary, none) does not scale by them.
        """
        known, value = statistics.action, Normalize.from_stats(statistics.action, self._modes(self.action)).constant
        at = np.flatnonzero(~np.isnan(value))
        if not len(at):
            return ""
        moved = [f" (of {known.min[i]:g} to {known.max[i]:g})" * bool(known.min[i] < known.max[i]) for i in at[:8]]
        listed = ", ".join(
            f"{self.action_names[i]} = {value[i]:g}{more}" for i, more in zip(at[:8], moved, strict=True)
        )
        never = "hardly ever, or never," if (known.min < known.max)[at].any() else "never"
        return (
            f"statistics {statistics.tag!r}: {len(at)} of {self.action_dim} action dimensions {never} moved in the data, and are "
            f"always sent as the one value that they had: {listed}" + ", ..." * (len(at) > 8)
        )

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
                raise InputError(
                    f"state {shown(name)}: unknown key{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
        parts = []
        for key in self.state:
            if key.name not in state:
                raise InputError(f"state {key.name!r}: missing; expected keys: {', '.join(known)}")
            value = numbers(state[key.name])
            if value is None:
                raise InputError(f"state {key.name!r}: expected {key.dim} numbers, got {shown(state[key.name])}")
            value = value.reshape(-1)
            if value.shape[0] != key.dim:
                raise InputError(
                    f"state {key.name!r}: expected {key.dim} value{'s' * (key.dim != 1)}, got {value.shape[0]}; "
                    f"known keys: {', '.join(known)}"
                )
            value = narrowed(value)
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
                    f"image {shown(name)}: unknown view{did_you_mean(name, self.views)}; known: {', '.join(self.views)}"
                )
        out = []
        for name in self.views:
            if name not in images:
                raise InputError(f"image {shown(name)}: missing; expected views: {', '.join(self.views)}")
            out.append(check_picture(images[name], name))
        return out


def numbers(given: Any) -> NDArray[Any] | None:
    """The array of numbers that `given` is, of any shape; None where it is none.

    A list is looked through before NumPy sees it: with one long text in it, NumPy would make texts of that length of all items.
    """
    if isinstance(given, (list, tuple)) and not _holds_numbers(given, 4):
        return None
    if isinstance(given, (str, bytes, Mapping)):
        return None
    try:
        array = np.asarray(given)
    except ValueError:  # lists of unequal lengths
        return None
    return array if array.dtype.kind in "fiu" else None


def _holds_numbers(given: Any, depth: int) -> bool:
    if type(given) is float or type(given) is int:
        return True
    if isinstance(given, (list, tuple)):
        return depth > 0 and all(_holds_numbers(item, depth - 1) for item in given)
    return (
        not isinstance(given, (str, bytes, Mapping)) and getattr(getattr(given, "dtype", None), "kind", "f") in "fiub"
    )


def narrowed(values: NDArray[Any]) -> Array:
    """The numbers in float32; infinite where they are beyond it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def check_picture(picture: Any, name: str) -> NDArray[np.uint8]:
    """`picture` itself when it is uint8 [H, W, 3]; InputError otherwise. Values are never guessed from."""
    if isinstance(picture, (list, tuple, str, bytes, Mapping)):  # which NumPy would copy first
        raise InputError(f"image {shown(name)}: expected a uint8 array [H, W, 3], got {shown(picture)}")
    array = np.asarray(picture)
    if array.dtype.kind not in "fiub":
        raise InputError(f"image {shown(name)}: expected a uint8 array [H, W, 3], got {shown(picture)}")
    if array.dtype != np.uint8:
        raise InputError(
            f"image {shown(name)}: expected uint8 in 0..255, got {array.dtype}; a float picture in 0..1 is (255 * "
            "x).astype('uint8')"
        )
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"image {shown(name)}: expected shape [H, W, 3] (RGB), got {list(array.shape)}")
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
        raise InputError(f"{robot} observation: missing {shown(key)}; got {listed(raw)}")
    return raw[key]
