"""Typed, dotted access to files that others wrote: each getter says where, wanted and got, and remembers what was read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit4dit.errors import CheckpointError, ConfigError, Dit4DitError, did_you_mean, said, shown
from dit4dit.files.expansion import check_aliases, check_interpolations
from dit4dit.files.folders import fault

NEEDED = object()
"""Default of a key that a file must have."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """A ConfigError of what is made here names the file `where` that the values came from."""
    try:
        yield
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None


class Unset:
    """A value that could not be resolved, `${oc.env:...}` of a variable that is not set: no matter where nobody reads it."""

    def __init__(self, text: str, reason: str) -> None:
        self.text, self.reason = text, reason

    def __repr__(self) -> str:
        return self.text


def find_unset(value: Any, key: str) -> tuple[str, Unset] | None:
    """The first such value in `value`, which stands under `key`, with its own key."""
    if isinstance(value, Unset):
        return key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if found := find_unset(item, str(name)):  # put together on the way back: keys can be long, and values many
            return (f"{key}.{found[0]}" if key else found[0]), found[1]
    return None


def refuse_unset(value: Any, key: str, where: str) -> None:
    """ConfigError where `value`, which stands under `key`, holds an `Unset`."""
    if found := find_unset(value, key):
        name, unset = found
        raise ConfigError(
            f"{where}: {name}: {shown(unset.text)} has no value ({said(unset.reason)}); set it, or write the value"
        )


def is_finite(value: Any) -> bool:
    """Whether it is a number, not a flag, that a float can hold and that is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class KeyReader:
    """A nested mapping. Every getter takes a dotted key; without a default the key must be there."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.read_keys: set[str] = set()
        """Dotted keys that somebody asked for."""

    def raw(self, key: str, default: Any = NEEDED) -> Any:
        """The value as it is."""
        self.read_keys.add(key)
        node: Any = self.data
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                if default is NEEDED:
                    raise ConfigError(f"{self.where}: missing key {shown(key)}; add it, or copy the file again")
                return default
            node = node[part]
            if isinstance(node, Unset):
                break
        refuse_unset(node, key, self.where)
        return node

    def has(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return self.raw(key, None) is not None

    def integer(self, key: str, default: Any = NEEDED, *, least: int = 1) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, f"an integer of at least {least}", value)
        return value

    def number(self, key: str, default: Any = NEEDED) -> float:
        value = self.raw(key, default)
        if not is_finite(value):
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def text(self, key: str, default: Any = NEEDED) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a word", value)
        return value

    def flag(self, key: str, default: Any = NEEDED) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def numbers(self, key: str, default: Any = NEEDED, *, count: int | None = None) -> tuple[float, ...]:
        """A list of numbers, of `count` where that is fixed."""
        value = self.raw(key, default)
        good = isinstance(value, (list, tuple)) and bool(value)
        good = good and all(is_finite(x) for x in value)
        if not good or count not in (None, len(value)):
            wanted = f"a list of {count if count is not None else ''} finite numbers".replace("  ", " ")
            raise self._wrong(key, wanted, value)
        return tuple(value)

    def integers(self, key: str, default: Any = NEEDED, *, count: int | None = None) -> tuple[int, ...]:
        """A list of integers (true and false count as none), of `count` where that is fixed."""
        values = self.numbers(key, default, count=count)
        if any(not isinstance(x, int) for x in values):
            raise self._wrong(key, "a list of integers", list(values))
        return tuple(int(x) for x in values)

    def flags(self, key: str, default: Any = NEEDED) -> tuple[bool, ...]:
        value = self.raw(key, default)
        if not isinstance(value, (list, tuple)) or any(not isinstance(x, bool) for x in value):
            raise self._wrong(key, "a list of true and false", value)
        return tuple(value)

    def one_of(self, key: str, known: list[str], default: Any = NEEDED) -> str:
        """One of the known words."""
        value = self.raw(key, default)
        if not isinstance(value, str) or value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            raise ConfigError(f"{self.where}: {key}: expected {' or '.join(known)}, got {shown(value)}{hint}")
        return value

    def only(self, key: str, value: Any) -> None:
        """Refuse a key that is there with another value than the one that is known."""
        got = self.raw(key, value)
        if got != value:
            raise ConfigError(f"{self.where}: {key}: only {shown(value)} is known, got {shown(got)}")

    def unread(self) -> tuple[str, ...]:
        """Dotted keys of all leaves that nobody asked for, in file order."""
        return tuple(
            key for key in _leaves(self.data) if not any(key == r or key.startswith(r + ".") for r in self.read_keys)
        )

    def _wrong(self, key: str, wanted: str, got: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: expected {wanted}, got {shown(got)}")


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node or len(prefix) > 1000:  # which is put before every key inside
        return [prefix]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def read_text(
    path: Path, hint: str, *, error: type[Dit4DitError] = CheckpointError, again: str = "copy the file again"
) -> str:
    """A text file; `error` with `hint` when it is missing, and with the reason and `again` when it is not readable."""
    if reason := fault(path):
        raise error(f"{path}: {reason}")
    try:
        return path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise error(f"{path}: is a folder; expected a file: give it, or {again}") from None
    except FileNotFoundError:
        raise error(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{path}: cannot be read as text ({reason}); {again}") from None


def read_json(
    path: Path,
    hint: str = "the folder is incomplete",
    *,
    error: type[Dit4DitError] = CheckpointError,
    again: str = "copy the file again",
) -> dict[str, Any]:
    """A JSON object from a file; `error` when it is missing, unreadable or something else, as `read_text` does.

    NaN and Infinity, which are no JSON, are read as Python writes them: diffusers saves schedulers with -Infinity in keys that
    nobody reads here. Who reads a number says whether it must be finite.
    """
    text = read_text(path, hint, error=error, again=again)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as problem:  # beside bad syntax: too long a number, too deep a nesting
        raise error(f"{path}: not valid JSON ({problem}); {again}") from None
    if not isinstance(data, dict):
        raise error(f"{path}: expected a JSON object, got {type(data).__name__}; {again}")
    return data


def read_yaml(path: Path, *, keep_unset: bool = False) -> dict[str, Any]:
    """A YAML mapping from a file, OmegaConf interpolations resolved; CheckpointError when it is missing or not one.

    With `keep_unset`, an interpolation that cannot be resolved stays in it as `Unset`, for a `KeyReader` to refuse where the
    key is read; otherwise it is an error.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = read_text(path, "a published run folder has one beside checkpoints/")
    try:
        node = OmegaConf.create(text)
        check_interpolations(OmegaConf.to_container(node, resolve=False))
        data = _resolved(node)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:  # also: too long a number
        raise CheckpointError(f"{path}: not readable YAML ({said(error, 300)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(data).__name__}")
    data = {str(key): value for key, value in data.items()}
    if not keep_unset:
        refuse_unset(data, "", str(path))
    return data


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a user's file, in which `${...}` is text; ConfigError when missing, not one, or with a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """One of two entries of the same key would be lost without a word: a bound of a robot, say."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {shown(key.value)} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return node

    text = read_text(path, "give another file", error=ConfigError, again="save it as UTF-8")
    try:
        data = yaml.load(text, Loader)
        check_aliases(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also: too long a number
        raise ConfigError(f"{path}: not readable YAML ({said(error, 300)})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(data).__name__}")
    return data


def _resolved(node: Any) -> Any:
    """An OmegaConf node as plain data, each interpolation by itself."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def value(key: Any) -> Any:
        try:
            return "???" if OmegaConf.is_missing(node, key) else _resolved(node[key])
        except OmegaConfBaseException as error:
            if not OmegaConf.is_interpolation(node, key):
                raise
            text = OmegaConf.to_container(node, resolve=False)[key]
            return Unset(str(text), str(error).splitlines()[0])

    if isinstance(node, DictConfig):
        return {key: value(key) for key in node}
    if isinstance(node, ListConfig):
        return [value(i) for i in range(len(node))]
    return node
