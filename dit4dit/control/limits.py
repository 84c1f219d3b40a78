"""What a stream may send, channel by channel: the robot's own bounds, and a file or mapping that overrides them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import naming, read_plain_yaml
from dit4dit.robots.channels import Bounds, bounds_of_entry, check_key
from dit4dit.robots.embodiment import Embodiment


@dataclass(frozen=True)
class Limits:
    """Bounds of what is sent to one robot. Make one with `of`.

    Units are those of the robot's actions and seconds: `low` and `high` in rad, m or what the channel has, `velocity` in that per
    second, `acceleration` per second squared, `jerk` per second cubed. Of a velocity channel `low` and `high` bound the velocity
    itself (m/s, rad/s), `acceleration` and `jerk` its changes; of a displacement `velocity` bounds what adds up in a second.

    Attributes:
        robot: whose action channels they are of.
        bounds: one per action channel [A], in the order of `robot.action_names`.
    """

    robot: Embodiment = field(repr=False)
    bounds: tuple[Bounds, ...]

    def __post_init__(self) -> None:
        check_robot(self.robot)
        if len(self.bounds) != self.robot.action_dim:
            raise ConfigError(
                f"limits of robot {self.robot.name!r}: expected {self.robot.action_dim} bounds, one per action channel, got "
                f"{len(self.bounds)}; make them with Limits.of(embodiment)"
            )

    @classmethod
    def of(cls, embodiment: Embodiment) -> Limits:
        """What is known of the robot; a channel of which nothing is known is unlimited."""
        check_robot(embodiment)
        return cls(embodiment, embodiment.bounds)

    def __getitem__(self, channel: str) -> Bounds:
        """Of the channel called so in `robot.action_names`."""
        names = self.robot.action_names
        if channel not in names:
            raise KeyError(
                f"channel {shown(channel)}: unknown{did_you_mean(channel, names)}; known: {', '.join(names)}"
            )
        return self.bounds[names.index(channel)]

    @property
    def limited(self) -> bool:
        """Whether any channel has a bound."""
        return any(bounds.limited for bounds in self.bounds)

    def override(self, source: str | os.PathLike[str] | Mapping[str, Any]) -> Limits:
        """These limits with others in the place of some of them.

        Args:
            source: a mapping, or a YAML file that has it under `limits:`. It maps a key of the robot's action (all its values),
                or a channel (`left_arm.3`: one of them), to some of low, high, velocity, acceleration, jerk; null takes a bound
                away. A key's bound may be a list of one per value. Where both name a channel, the channel's own entry counts.

        Raises:
            ConfigError: an unknown key, a value that is no bound, or a bound that a channel of this kind cannot have.
        """
        if isinstance(source, Mapping):
            return self._overridden(source)
        path = Path(source)
        with naming(str(path)):
            data = read_plain_yaml(path)
            for key in data:
                if key != "limits":
                    raise ConfigError(f"unknown key {shown(key)}{did_you_mean(key, ['limits'])}; expected limits")
            if not isinstance(data.get("limits"), dict):
                raise ConfigError("expected limits: {KEY or CHANNEL: {velocity: ..., ...}, ...}")
            return self._overridden(data["limits"])

    def _overridden(self, entries: Mapping[str, Any]) -> Limits:
        keys, names = {key.name: key for key in self.robot.action}, self.robot.action_names
        bounds = list(self.bounds)
        # a key is several channels: its entry goes first, wherever it stands
        for name in sorted(entries, key=lambda name: name not in keys):
            if name in keys:
                place = range(*self.robot.places[name].indices(len(names)))
            elif name in names:
                place = range(names.index(name), names.index(name) + 1)
            else:
                word = name.removeprefix("action.") if isinstance(name, str) else name  # as a file of robots has it
                near = did_you_mean(word, [*keys, *names])
                raise ConfigError(f"limits: unknown key {shown(name)}{near}; keys: {', '.join(keys)}")
            given = bounds_of_entry(f"limits: {name}", entries[name], len(place))
            each = given if isinstance(given, tuple) else (given,) * len(place)
            for i, own in zip(place, each, strict=True):
                new = {bound: value for bound, value in asdict(own).items() if bound in entries[name]}
                with naming(f"limits: {name}"):
                    bounds[i] = replace(bounds[i], **new)
        for key in self.robot.action:
            check_key(
                f"robot {self.robot.name!r}", replace(key, clip=None, limits=tuple(bounds[self.robot.places[key.name]]))
            )
        return Limits(self.robot, tuple(bounds))


def check_robot(given: object) -> None:
    """ConfigError unless it is an Embodiment: a policy, a robot's name or a checkpoint's folder comes easily in its place."""
    if not isinstance(given, Embodiment):
        raise ConfigError(
            f"embodiment: expected an Embodiment, such as policy.embodiment or dit4dit.robots.G1, got {shown(given)}"
        )
