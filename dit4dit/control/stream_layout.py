"""What a stream is made of: the options of `ActionStream`, checked, as the compiled module takes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np

from dit4dit.control.limits import Limits
from dit4dit.control.seams import Blend, Ensemble, Seam, Switch
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.robots.channels import WHEN, Bounds, check_rule
from dit4dit.robots.embodiment import Embodiment

Interpolation = Literal["hold", "linear", "cubic"]
log = logging.getLogger("dit4dit.control")
LONGEST_MS = 1e9  # eleven days: every time that is given in ms fits into ns of 64 bits
LEAST_HZ, MOST_HZ = 1.0, 20_000.0
_TELLING = Lock()
_told: set[str] = set()


class Groups:
    """A robot's channels and groups as the compiled module takes them."""

    def __init__(self, robot: Embodiment) -> None:
        self.robot, self.groups = robot, robot.channel_groups
        self.names = [group.name for group in self.groups]

    def channels(self, limits: Limits) -> list[tuple[str, str, int, tuple[float, ...]]]:
        """(name, kind, group, limits) of each channel; ConfigError where a key has no kind."""
        of_key = {key: i for i, group in enumerate(self.groups) for key in group.keys}
        indices = [of_key[key.name] for key in self.robot.action for _ in range(key.dim)]
        each = zip(self.robot.action_names, self.robot.kinds, indices, map(_infinite, limits.bounds), strict=True)
        return list(each)

    def rules(self, rules: Mapping[str, Any], times: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """(name, on_dry, on_stale, on_dead, max_age_ns, decay_ns) of each group."""
        chosen = {when: self._by_group(when, given) for when, given in rules.items()}
        for when, given in chosen.items():
            for name, rule in given.items():
                check_rule(f"group {name!r}", when, rule)
        ms = {what: self._by_group(what, given) for what, given in times.items()}
        return [
            (
                group.name,
                *(chosen[when].get(group.name, getattr(group, when)) for when in WHEN),
                *(ns_of(what, given.get(group.name)) for what, given in ms.items()),
            )
            for group in self.groups
        ]

    def _by_group(self, what: str, given: Any) -> dict[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.names, given)
        for name in given:
            if name not in self.names:
                near = did_you_mean(name, self.names)
                raise ConfigError(
                    f"{what}: unknown group {shown(name)}{near}; groups of {self.robot.name!r}: {', '.join(self.names)}"
                )
        return dict(given)


def _infinite(bounds: Bounds) -> tuple[float, ...]:
    low, high = (-math.inf if bounds.low is None else bounds.low), (math.inf if bounds.high is None else bounds.high)
    rates = (bounds.velocity, bounds.acceleration, bounds.jerk)
    return low, high, *(math.inf if rate is None else rate for rate in rates)


def seam_of(seam: Seam) -> tuple[str, int, float, float]:
    """(kind, history, alpha, rows)."""
    if isinstance(seam, Ensemble):
        return "ensemble", seam.history, seam.alpha, 0.0
    if isinstance(seam, Blend):
        return "blend", 0, 0.0, float(seam.rows)
    if isinstance(seam, Switch):
        return "newest", 0, 0.0, 0.0
    raise ConfigError(f"seam: expected Switch(), Ensemble(alpha, history) or Blend(rows), got {shown(seam)}")


def positive(what: str, value: Any, most: float, least: float = 0.0) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 < value <= most or value < least:
        wanted = f"a number from {least:g} to {most:g}" if least else f"a number above 0, {most:g} at most"
        raise ConfigError(f"{what}: expected {wanted}, got {shown(value)}")
    return float(value)


def ns_of(what: str, ms: Any) -> int:
    """Milliseconds as nanoseconds; 0, which is no limit, for None."""
    return 0 if ms is None else max(1, round(positive(what, ms, LONGEST_MS) * 1e6))


def check_mixing(robot: Embodiment, interpolation: str, seam: Seam) -> None:
    """The numbers of a rotation are none by themselves: halfway between two quaternions, number by number, is no rotation."""
    if interpolation not in get_args(Interpolation):
        near = did_you_mean(interpolation, get_args(Interpolation))
        raise ConfigError(
            f"interpolation: expected one of {', '.join(get_args(Interpolation))}, got {shown(interpolation)}{near}"
        )
    for key in robot.action:
        if key.rotation is None or key.kind == "relative":  # displacements are small turns, which add up
            continue
        if interpolation != "hold" or not isinstance(seam, Switch):
            asked = f"interpolation={interpolation!r}, seam={seam!r}"
            raise ConfigError(
                f"robot {robot.name!r}: action {key.name!r} is a rotation ({key.rotation}), whose numbers cannot be mixed one by "
                f"one: expected interpolation='hold' and seam=Switch(), got {asked}; or train on displacements or Euler angles"
            )


def check_limits(robot: Embodiment, limits: Limits) -> None:
    """ConfigError where they are another robot's; a warning, once for each robot, where there are none."""
    if not isinstance(limits, Limits):
        raise ConfigError(
            f"limits: expected Limits.of(embodiment), or what its override(FILE) returns, got {shown(limits)}"
        )
    if limits.robot.action_names != robot.action_names:
        raise ConfigError(f"limits: expected those of {robot.name!r}, got those of {limits.robot.name!r}")
    with _TELLING:
        if limits.limited or robot.name in _told:
            return
        _told.add(robot.name)
    log.warning(
        "robot %r: no limits are known: commands go out as the policy wrote them, whatever their speed. Give "
        "limits=Limits.of(embodiment).override('limits.yaml'), or a Key's limits in the robot's file. Said once",
        robot.name,
    )
