"""Mixtures as data: the published ones ship in mixtures.yaml; users add theirs in a file, with robots (`robots.descriptions`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit4dit.config import build
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import read_plain_yaml
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.descriptions import Robot, published_robots, robot_of_entry


@dataclass(frozen=True)
class Entry:
    """One data set of a mixture; mixtures.yaml explains the keys."""

    dataset: str
    robot: str
    weight: float = 1.0
    fps: float | None = None
    modality: str | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"data set {shown(self.dataset)}: weight: expected more than 0, got {self.weight}")


@dataclass(frozen=True)
class Catalogue:
    """All robots and mixtures that are known: the package's, and those of a user's file."""

    robots: Mapping[str, Robot]
    mixtures: Mapping[str, tuple[Entry, ...]]
    unpublished: frozenset[str] = frozenset()

    def robot(self, name: str) -> Robot:
        """ConfigError with a suggestion when there is none of that name."""
        if name in self.unpublished and name not in self.robots:
            raise ConfigError(
                f"robot {shown(name)}: never published, so not available; define it in a file of your own (--robots)"
            )
        if name not in self.robots:
            known = list(self.robots)
            raise ConfigError(f"robot {shown(name)}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}")
        return self.robots[name]

    def mixture(self, name: str) -> tuple[Entry, ...]:
        """ConfigError with a suggestion when there is none of that name, or when one of its robots is not available."""
        if name not in self.mixtures:
            known = list(self.mixtures)
            raise ConfigError(f"mixture {shown(name)}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}")
        for entry in self.mixtures[name]:
            self.robot(entry.robot)
        return self.mixtures[name]


def catalogue(extra: Path | None = None) -> Catalogue:
    """The package's robots and mixtures, and those of the YAML file `extra` (`robots:` and `mixtures:`, same keys).

    Raises:
        ConfigError: the file is missing or no YAML mapping, has an unknown key, or names something that the package has.
    """
    return _published() if extra is None else _extend(_published(), extra)


@functools.cache
def _published() -> Catalogue:
    robots, unpublished = published_robots()
    mixtures = read_plain_yaml(Path(__file__).with_name("mixtures.yaml"))["mixtures"]
    return Catalogue(
        robots, {name: _entries(name, data, "mixtures.yaml") for name, data in mixtures.items()}, unpublished
    )


def _extend(known: Catalogue, path: Path) -> Catalogue:
    data = read_plain_yaml(path)
    for key in data:
        if key not in ("robots", "mixtures"):
            raise ConfigError(f"{path}: unknown key {shown(key)}{did_you_mean(key, ['robots', 'mixtures'])}")
    parts: dict[str, dict[str, Any]] = {}
    for part, names in (("robots", known.robots), ("mixtures", known.mixtures)):
        parts[part] = data.get(part) or {}
        if not isinstance(parts[part], dict):
            raise ConfigError(f"{path}: {part}: expected a mapping from names, got {type(parts[part]).__name__}")
        for name in parts[part]:
            if name in names:
                raise ConfigError(f"{path}: {part}: {shown(name)} is the package's own; choose another name")
        if part == "robots" and (taken := EMBODIMENTS.keys() & parts[part].keys()):
            raise ConfigError(
                f"{path}: robots: {shown(min(taken))} is an embodiment of the package; choose another name"
            )
    robots = {**known.robots, **{n: robot_of_entry(n, d, str(path)) for n, d in parts["robots"].items()}}
    mixtures = {**known.mixtures, **{n: _entries(n, d, str(path)) for n, d in parts["mixtures"].items()}}
    return replace(known, robots=robots, mixtures=mixtures)


def _entries(name: str, data: Any, where: str) -> tuple[Entry, ...]:
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{where}: mixtures.{name}: expected a list of data sets, got {shown(data)}")
    return tuple(build(Entry, item, f"{where}: mixtures.{name}[{i}]") for i, item in enumerate(data))
