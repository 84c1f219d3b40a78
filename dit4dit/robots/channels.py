"""What bounds a robot's action channels, and which of them stand still together without a chunk; in Python and in files.

`dit4dit.control` sends commands within these bounds and by these rules. What is not known of a robot is unlimited.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args

from dit4dit.errors import ConfigError, did_you_mean, listed, shown

Rule = Literal["hold", "decay", "finish"]
"""What a group does without a chunk to follow. hold: it stands still. decay: velocities and displacements fall to 0 linearly, the
rest holds. finish: the rows that are left are executed first; there are none left where the stream is dry."""
RULES: tuple[Rule, ...] = get_args(Rule)
WHEN: dict[str, tuple[Rule, ...]] = {"on_dry": ("hold", "decay"), "on_stale": RULES, "on_dead": RULES}
"""When a rule is asked for -> which there are."""


@dataclass(frozen=True)
class Bounds:
    """Of what one action channel is sent, in its own unit and seconds; None: unlimited.

    Attributes:
        low, high: of the value; of a velocity channel of the velocity. An angle, which wraps, and a displacement have none.
        velocity: largest change of the value per second, above 0; of a velocity channel its magnitude, of a displacement its sum
            over a second.
        acceleration, jerk: largest change of that per second, and of the change, above 0.
    """

    low: float | None = None
    high: float | None = None
    velocity: float | None = None
    acceleration: float | None = None
    jerk: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (field.name not in ("low", "high") and value <= 0):
                wanted = "a number" if field.name in ("low", "high") else "a number above 0"
                raise ConfigError(
                    f"{field.name}: expected {wanted}, got {shown(value)}; leave it out where there is none"
                )
            object.__setattr__(self, field.name, float(value))
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(f"low, high: expected low < high, got {self.low:g} and {self.high:g}")

    @property
    def limited(self) -> bool:
        return self != UNLIMITED

    def narrowed(self, low: float | None = None, high: float | None = None, velocity: float | None = None) -> Bounds:
        """These bounds where they are narrower than the given ones."""
        return Bounds(
            max((x for x in (self.low, low) if x is not None), default=None),
            min((x for x in (self.high, high) if x is not None), default=None),
            min((x for x in (self.velocity, velocity) if x is not None), default=None),
            self.acceleration,
            self.jerk,
        )


UNLIMITED = Bounds()


class BoundedKey(Protocol):
    """What of an action's `embodiment.Key` matters here."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def limits(self) -> Bounds | tuple[Bounds, ...]: ...
    @property
    def rotation(self) -> str | None: ...


BOUNDS = tuple(field.name for field in fields(Bounds))


@dataclass(frozen=True)
class ChannelGroup:
    """Action keys that share their rules, and may have a reader of their own.

    Attributes:
        on_dry: without a row for this moment. on_stale: the observation is too old. on_dead: the producer is.
    """

    name: str
    keys: tuple[str, ...]
    on_dry: Rule = "hold"
    on_stale: Rule = "hold"
    on_dead: Rule = "finish"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"group: expected a name, got {shown(self.name)}")
        for when in WHEN:
            check_rule(f"group {self.name!r}", when, getattr(self, when))


def bounds_of(key: BoundedKey, control_hz: float) -> tuple[Bounds, ...]:
    """What each value of an action key is bounded by: its limits, and no more than the robot takes (`Key.clip`)."""
    each = key.limits if isinstance(key.limits, tuple) else (key.limits,) * key.dim
    if key.clip is None:
        return each
    if key.kind == "relative":  # what it takes of one row
        return tuple(bounds.narrowed(velocity=key.clip * control_hz) for bounds in each)
    return tuple(bounds.narrowed(-key.clip, key.clip) for bounds in each)


def check_rule(where: str, when: str, rule: object) -> None:
    """ConfigError unless it is a rule that there is for `when`."""
    if not isinstance(rule, str) or rule not in WHEN[when]:
        near = did_you_mean(rule, WHEN[when])
        raise ConfigError(f"{where}: {when}: expected one of {', '.join(WHEN[when])}, got {shown(rule)}{near}")


def check_key(where: str, key: BoundedKey) -> None:
    """ConfigError where an action key has bounds that its kind cannot have, or for another number of values."""
    bounds = key.limits if isinstance(key.limits, tuple) else (key.limits,)
    if isinstance(key.limits, tuple) and len(bounds) != key.dim:
        raise ConfigError(f"{where}: limits of {key.name!r}: expected {key.dim}, one per value, got {len(bounds)}")
    if key.kind in ("angle", "relative") and any((b.low, b.high) != (None, None) for b in bounds):
        why = "an angle wraps" if key.kind == "angle" else "a displacement has no place"
        raise ConfigError(f"{where}: limits of {key.name!r}: {why}: leave low and high out")
    if key.kind == "velocity" and any((b.low or 0) > 0 or (b.high or 0) < 0 for b in bounds):
        raise ConfigError(
            f"{where}: limits of {key.name!r}: low and high of a velocity must include 0, at which it stops"
        )
    if key.clip is not None and key.kind in ("angle", "binary"):
        raise ConfigError(f"{where}: action {key.name!r}: expected no clip of a key of kind {key.kind}")
    if any(b.limited for b in bounds) and (key.kind == "binary" or key.rotation is not None):
        what = "is 0 or 1" if key.rotation is None else f"is a rotation ({key.rotation}), not {key.dim} numbers"
        raise ConfigError(f"{where}: limits of {key.name!r}: it {what}; leave them out")


def check_groups(where: str, groups: Sequence[ChannelGroup], keys: Sequence[BoundedKey]) -> None:
    """ConfigError unless each action key is in exactly one group."""
    known, found = [key.name for key in keys], dict[str, str]()
    if len({group.name for group in groups}) != len(groups):
        raise ConfigError(f"{where}: groups: expected names of their own, got {[group.name for group in groups]}")
    for group in groups:
        for key in group.keys:
            if key not in known:
                near = did_you_mean(key, known)
                raise ConfigError(f"{where}: group {group.name!r}: unknown action key {shown(key)}{near}")
            if key in found:
                raise ConfigError(f"{where}: action {key!r} is in groups {found[key]!r} and {group.name!r}; choose one")
            found[key] = group.name
    missing = [key for key in known if key not in found]
    if missing:
        raise ConfigError(f"{where}: groups: action {missing[0]!r} is in none; every action key is in exactly one")


# -- their form in a file of robots --------------------------------------------------------------------------------------------


def check_entry(where: str, limits: Mapping[str, Any], groups: Mapping[str, Any], keys: Iterable[str]) -> None:
    """ConfigError where `limits` or `groups` of a file's entry are wrong, but for lists of a wrong length."""
    known = [f"action.{key}" for key in keys]
    for key, entry in limits.items():
        if key not in known:
            raise ConfigError(
                f"{where}: limits: unknown key {shown(key)}{did_you_mean(key, known)}; known: {listed(known)}"
            )
        bounds_of_entry(f"{where}: limits of {key}", entry, None)
    groups_of_entry(where, groups)


def bounds_of_entry(where: str, entry: Any, dim: int | None) -> Bounds | tuple[Bounds, ...]:
    """{"low": number, "velocity": [number or null, ...], ...} -> bounds; a list has one for each of the key's `dim` values (None:
    not known yet)."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a mapping of {', '.join(BOUNDS)}, got {shown(entry)}")
    for name, value in entry.items():
        if name not in BOUNDS:
            raise ConfigError(
                f"{where}: unknown key {shown(name)}{did_you_mean(name, BOUNDS)}; known: {', '.join(BOUNDS)}"
            )
        if isinstance(value, (list, tuple)) and dim is not None and len(value) != dim:
            raise ConfigError(f"{where}: {name}: expected a number or {dim} of them, got {len(value)}")
    sizes = {len(value) for value in entry.values() if isinstance(value, (list, tuple))}
    if len(sizes) > 1:
        raise ConfigError(f"{where}: expected lists of one length, got {sorted(sizes)}")
    try:
        if not sizes:
            return Bounds(**entry)
        each = [
            {name: value[i] if isinstance(value, (list, tuple)) else value for name, value in entry.items()}
            for i in range(sizes.pop())
        ]
        return tuple(Bounds(**one) for one in each)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def groups_of_entry(where: str, entries: Mapping[str, Any]) -> tuple[ChannelGroup, ...]:
    """{"arms": {"keys": ["action.left_arm"], "on_dry": "hold"}, ...} -> groups."""
    known, groups = ("keys", *WHEN), []
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("keys"), (list, tuple)):
            raise ConfigError(f"{where}: group {shown(name)}: expected a mapping with keys: [action.KEY, ...]")
        for key in entry:
            if key not in known:
                raise ConfigError(f"{where}: group {shown(name)}: unknown key {shown(key)}{did_you_mean(key, known)}")
        for key in entry["keys"]:
            if not isinstance(key, str) or not key.startswith("action."):
                raise ConfigError(f"{where}: group {shown(name)}: keys: expected action.KEY, got {shown(key)}")
        rules = {when: entry[when] for when in WHEN if when in entry}
        try:
            groups.append(ChannelGroup(name, tuple(key.removeprefix("action.") for key in entry["keys"]), **rules))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return tuple(groups)
