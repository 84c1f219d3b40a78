"""Typed, dotted access to files that others wrote: each getter says where, wanted and got, and remembers what was read."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit4dit.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from yaml import SafeLoader

NEEDED = object()
"""Default of a key that a file must have."""
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


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
                    raise ConfigError(f"{self.where}: missing key {key!r}; add it, or copy the file again")
                return default
            node = node[part]
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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise self._wrong(key, "a number", value)
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
        good = good and all(isinstance(x, (int, float)) and not isinstance(x, bool) and x == x for x in value)
        if not good or count not in (None, len(value)):
            raise self._wrong(key, f"a list of {count if count is not None else ''} numbers".replace("  ", " "), value)
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
            raise ConfigError(f"{self.where}: {key}: expected {' or '.join(known)}, got {value!r}{hint}")
        return value

    def only(self, key: str, value: Any) -> None:
        """Refuse a key that is there with another value than the one that is known."""
        got = self.raw(key, value)
        if got != value:
            raise ConfigError(f"{self.where}: {key}: only {value!r} is known, got {got!r}")

    def unread(self) -> tuple[str, ...]:
        """Dotted keys of all leaves that nobody asked for, in file order."""
        return tuple(
            key for key in _leaves(self.data) if not any(key == r or key.startswith(r + ".") for r in self.read_keys)
        )

    def _wrong(self, key: str, wanted: str, got: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: expected {wanted}, got {got!r:.80}")


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def read_text(path: Path, hint: str) -> str:
    """A text file; CheckpointError with `hint` when it is missing, and with the reason when it is not readable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error}); copy the file again") from None


def read_json(path: Path, hint: str = "the folder is incomplete") -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing, unreadable or something else."""
    try:
        data = json.loads(read_text(path, hint))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, OmegaConf interpolations resolved; CheckpointError when it is missing or not one.

    omegaconf is needed only where a file has interpolations or anchors.
    """
    text = read_text(path, "a published run folder has one beside checkpoints/")
    data = (_read_with_omegaconf if "${" in text or "&" in text else _read_plain)(text, path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: not readable YAML ({' '.join(str(error).split())})")


def _read_with_omegaconf(text: str, path: Path) -> Any:
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError:
        raise CheckpointError(f"{path}: has interpolations or anchors; pip install omegaconf to read it") from None
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(path, error) from None


def _read_plain(text: str, path: Path) -> Any:
    from yaml import YAMLError, load

    try:
        data = load(text, _loader())
    except YAMLError as error:
        raise _unreadable(path, error) from None
    return {} if data is None else data


@functools.cache
def _loader() -> type[SafeLoader]:
    """PyYAML's, with OmegaConf's rules: 1e-4 is a number, 2026-01-01 is text, no key comes twice."""
    from yaml import SafeLoader
    from yaml.constructor import ConstructorError

    class Loader(SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if (key.tag, key.value) in seen:
                    raise ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
                seen.add((key.tag, key.value))
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    return Loader
