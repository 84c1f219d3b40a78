"""Robot types as data: the published ones ship in robots.yaml, users add theirs in a file alike (`data.catalogue`).

A robot type says which keys of a data set make up state, action and pictures. It becomes an `Embodiment`, the object that the
policy uses, once a data set tells how many values each key has; where the policy has the embodiment already, that one is taken.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dit4dit.config import build
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import read_plain_yaml
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.channels import bounds_of_entry, check_entry, groups_of_entry
from dit4dit.robots.embodiment import KINDS, Array, Embodiment, Key, Kind, field_of, join_action, split_action
from dit4dit.robots.rotations import TARGETS, zero_is_no_turn
from dit4dit.robots.transforms import Mode
from dit4dit.types import Observation

MODES = typing.get_args(Mode)
OF_EMBODIMENT = (
    "tag",
    "video",
    "state",
    "action",
    "normalization",
    "kinds",
    "sin_cos_state",
    "target_rotations",
    "limits",
    "groups",
)
"""Keys of an entry that its `embodiment` decides, where it has one."""


@dataclass(frozen=True)
class Robot:
    """One entry of `robots:`; robots.yaml explains the keys."""

    name: str
    language: str
    action_steps: int
    embodiment: str | None = None
    """Name of the policy's embodiment; views, keys, normalisation, encoding and tag are then its own."""
    tag: str = "new_embodiment"
    video: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    normalization: dict = field(default_factory=dict)
    kinds: dict = field(default_factory=dict)
    sin_cos_state: bool = False
    target_rotations: dict = field(default_factory=dict)
    modality: dict = field(default_factory=dict)
    limits: dict = field(default_factory=dict)
    groups: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"robot {self.name!r}"
        if not self.language.startswith("annotation."):
            raise ConfigError(f"{where}: language: expected 'annotation.<key>', got {shown(self.language)}")
        keys = [f"state.{key}" for key in self.state] + [f"action.{key}" for key in self.action]
        for option in ("normalization", "kinds", "target_rotations"):
            known = keys if option != "kinds" else [f"action.{key}" for key in self.action]
            for key in getattr(self, option):
                if key not in known:
                    raise ConfigError(f"{where}: {option}: unknown key {shown(key)}{did_you_mean(key, known)}")
        for key, mode in self.normalization.items():
            if mode not in MODES:
                raise ConfigError(
                    f"{where}: normalization of {key}: expected one of {', '.join(MODES)}, got {shown(mode)}"
                )
        for key, kind in self.kinds.items():
            if kind not in KINDS:
                raise ConfigError(f"{where}: kind of {key}: expected one of {', '.join(KINDS)}, got {shown(kind)}")
            if kind == "relative" and not zero_is_no_turn(self.target_rotations.get(key)):
                turn = self.target_rotations[key]
                raise ConfigError(
                    f"{where}: kind of {key}: zeros as {turn} are no rotation; make its target axis_angle"
                )
        for key, target in self.target_rotations.items():
            if target not in TARGETS:
                raise ConfigError(
                    f"{where}: rotation of {key}: expected one of {', '.join(TARGETS)}, got {shown(target)}"
                )
        check_entry(where, self.limits, self.groups, self.action)
        if self.action_steps < 1:
            raise ConfigError(f"{where}: action_steps: expected at least 1, got {self.action_steps}")
        for part in ("video", "action"):
            if not getattr(self, part):
                raise ConfigError(f"{where}: {part}: expected at least one key; list them, or name an embodiment")

    @property
    def annotation(self) -> str:
        """Key of the task's annotation in modality.json."""
        return self.language.removeprefix("annotation.")

    def to_embodiment(
        self,
        sizes: Mapping[str, int],
        control_hz: float,
        where: str,
        absolute: Mapping[str, bool] | None = None,
        rotations: Mapping[str, str] | None = None,
    ) -> Embodiment:
        """What the policy calls this robot.

        Args:
            sizes: values of each key as a sample holds it, by "state.<key>" and "action.<key>".
            control_hz: frames per second of the data, for a robot that the policy does not know yet.
            where: the data set, for the message.
            absolute: action key -> what the data set says of it: True a target, False a displacement.
            rotations: action key -> how its values represent a rotation, as the data set says it.

        Raises:
            ConfigError: the policy knows the robot, with other sizes; or the data's displacements are targets for this robot.
        """
        absolute = absolute or {}
        if self.embodiment is not None:
            known = EMBODIMENTS[self.embodiment]
            for part, listed in (("state", known.state), ("action", known.action)):
                for key in listed:
                    got = sizes[f"{part}.{key.name}"]
                    if got != key.dim:
                        raise ConfigError(
                            f"{where}: {part}.{key.name}: robot {self.name!r} has {key.dim} values there, the data set {got}; "
                            "choose another robot, or correct the key's start and end in modality.json"
                        )
            for key in known.action:
                self._check_displacements(key.name, key.kind, absolute, where)
            return known
        return Embodiment(
            name=self.name,
            tag=self.tag,
            views=self.video,
            state=self._keys("state", self.state, sizes),
            action=tuple(
                self._action(key, absolute, rotations or {}, where) for key in self._keys("action", self.action, sizes)
            ),
            state_encoding="sin_cos" if self.sin_cos_state else "normalized",
            control_hz=control_hz,
            observe=_Observe(self),
            command=_Command(tuple((key, sizes[f"action.{key}"]) for key in self.action)),
            record=_Record(tuple((key, sizes[f"action.{key}"]) for key in self.action)),
            resize="bilinear",
            kind_hint=(
                f'give action.KEY "absolute": true (a target) or false (a displacement) in meta/modality.json of its data '
                f"({where} does not say it), or `kinds: {{action.KEY: position}}` (or relative) to the robot in the file of "
                "robots; a turn by a quaternion, a matrix or rotation_6d needs a target_rotations: axis_angle"
            ),
            groups=groups_of_entry(f"robot {self.name!r}", self.groups),
        )

    def _action(self, key: Key, absolute: Mapping[str, bool], rotations: Mapping[str, str], where: str) -> Key:
        """An action key with what this robot's entry and the data say of it."""
        name = f"action.{key.name}"
        rotation = self.target_rotations.get(name, rotations.get(key.name))
        limits = bounds_of_entry(f"robot {self.name!r}: limits of {name}", self.limits.get(name, {}), key.dim)
        return replace(
            key,
            kind=self._kind(key.name, absolute, where),
            limits=limits,
            rotation=rotation if rotation in TARGETS else None,
        )

    def _kind(self, key: str, absolute: Mapping[str, bool], where: str) -> Kind | None:
        """What an action asks for: as this robot's entry says it, else as the data do; None where neither does."""
        kind: Kind | None = self.kinds.get(f"action.{key}")
        if kind is None and self.normalization.get(f"action.{key}") == "binary":
            kind = "binary"
        self._check_displacements(key, kind, absolute, where)
        if kind is None and key in absolute:
            kind = "position" if absolute[key] else "relative"
        return kind

    def _check_displacements(self, key: str, kind: Kind | None, absolute: Mapping[str, bool], where: str) -> None:
        # the reverse is let pass: "absolute": true is the format's default, which tools write without a look at the data
        if kind in ("position", "angle") and absolute.get(key) is False:
            raise ConfigError(
                f'{where}: action.{key}: "absolute" is false there, and robot {self.name!r} takes a target ({kind}): what is '
                "trained on displacements would be sent as places; choose another robot, or correct modality.json"
            )

    def _keys(self, part: str, names: Sequence[str], sizes: Mapping[str, int]) -> tuple[Key, ...]:
        return tuple(
            Key(name, sizes[f"{part}.{name}"], self.normalization.get(f"{part}.{name}", "none")) for name in names
        )


@dataclass(frozen=True)
class _Observe:
    """{"video.<view>": picture, "state.<key>": [d]} -> named data. A class, so that an embodiment can be pickled."""

    robot: Robot

    def __call__(self, raw: Mapping[str, Any]) -> Observation:
        name = self.robot.name
        images = {view: field_of(raw, f"video.{view}", name) for view in self.robot.video}
        return Observation(images=images, state={key: field_of(raw, f"state.{key}", name) for key in self.robot.state})


def own_robot(embodiment: Embodiment) -> Robot | None:
    """The entry of a user's file that an embodiment was made of; None for one that the policy knows."""
    return embodiment.observe.robot if isinstance(embodiment.observe, _Observe) else None


def described(embodiment: Embodiment) -> str | dict[str, Any]:
    """What a checkpoint says of its robot: the name of one that the policy knows, all of another; `restored` is the inverse."""
    robot = own_robot(embodiment)
    if robot is None:
        return embodiment.name
    parts = {"state": embodiment.state, "action": embodiment.action}
    kinds = {f"action.{key.name}": key.kind for key in embodiment.action if key.kind is not None}
    return {
        "robot": asdict(replace(robot, kinds=kinds)),
        "sizes": {f"{part}.{key.name}": key.dim for part, keys in parts.items() for key in keys},
        "rotations": {key.name: key.rotation for key in embodiment.action if key.rotation is not None},
        "control_hz": embodiment.control_hz,
    }


def restored(data: Mapping[str, Any], where: str) -> Embodiment:
    """The robot that `described` wrote; ConfigError names `where` and the key that is wrong."""
    if "rate_hz" in data:  # one key for one fact: a reader of both would have to choose where a file has both
        raise ConfigError(f"{where}: 'rate_hz' is called 'control_hz'; rename the key in its config.json")
    stored = build(_Described, dict(data), where)
    for part, keys in (("state", stored.robot.state), ("action", stored.robot.action)):
        for key in keys:
            if f"{part}.{key}" not in stored.sizes:
                raise ConfigError(f"{where}.sizes: missing key '{part}.{key}'; add it")
    made = stored.robot.to_embodiment(stored.sizes, stored.control_hz, where, rotations=stored.rotations)
    return replace(
        made, kind_hint=f'add "action.KEY": "position" or "relative" to robot.kinds of {where} in its config.json'
    )


@dataclass(frozen=True)
class _Described:
    robot: Robot
    sizes: dict
    control_hz: float
    rotations: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Command:
    parts: tuple[tuple[str, int], ...]

    def __call__(self, action: Array) -> dict[str, Array]:
        return split_action(action, self.parts)


@dataclass(frozen=True)
class _Record:
    parts: tuple[tuple[str, int], ...]

    def __call__(self, sent: Mapping[str, Any]) -> Array:
        return join_action(sent, self.parts)


def published_robots() -> tuple[dict[str, Robot], frozenset[str]]:
    """The robots of robots.yaml by name, and the names of those that were never published."""
    data = read_plain_yaml(Path(__file__).with_name("robots.yaml"))
    robots = {name: robot_of_entry(name, entry, "robots.yaml") for name, entry in data["robots"].items()}
    return robots, frozenset(data["unpublished"])


def robot_of_entry(name: str, data: Any, where: str) -> Robot:
    """A robot of its entry in a file; ConfigError names `where` and the key that is wrong."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: robots.{name}: expected a mapping, got {type(data).__name__}")
    data = dict(data)
    chosen = data.get("embodiment")
    if chosen is not None:
        if chosen not in EMBODIMENTS:
            known = ", ".join(EMBODIMENTS)
            near = did_you_mean(chosen, list(EMBODIMENTS))
            raise ConfigError(f"{where}: robots.{name}.embodiment: unknown {shown(chosen)}{near}; known: {known}")
        for key in OF_EMBODIMENT:
            if key in data:
                raise ConfigError(f"{where}: robots.{name}.{key}: embodiment {shown(chosen)} decides it; leave it out")
        data |= _of_embodiment(EMBODIMENTS[chosen])
    return build(Robot, {"name": name, **data}, f"{where}: robots.{name}")


def _of_embodiment(known: Embodiment) -> dict[str, Any]:
    keys = {"state": known.state, "action": known.action}
    # a sin/cos state is not normalised, whatever its keys say
    modes = {f"{part}.{key.name}": key.normalization for part, listed in keys.items() for key in listed}
    shown = {k: m for k, m in modes.items() if m != "none" and not (known.state_encoding == "sin_cos" and k[0] == "s")}
    return {
        "tag": known.tag,
        "video": known.views,
        **{part: tuple(key.name for key in listed) for part, listed in keys.items()},
        "normalization": shown,
        "sin_cos_state": known.state_encoding == "sin_cos",
    }
