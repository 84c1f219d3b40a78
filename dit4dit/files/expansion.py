"""How much a YAML document stands for: with aliases or interpolations that name others, twenty lines can be a million values."""

from __future__ import annotations

import re
from typing import Any

from dit4dit.errors import listed

MOST = 100_000
"""Values and letters that a document may stand for."""
_REFERENCE = re.compile(r"\$\{(?:[\w.]+:)?(\.*)([^${}:,]*)")
_NESTED = re.compile(r"\$\{[^:{}]*\$\{")
_TOO_LARGE = f"it stands for more than {MOST} values; write them without aliases and interpolations"


def check_aliases(data: Any) -> None:
    """ValueError where plain data, in which an alias is the same object again, are larger than MOST or hold themselves."""
    known: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, (dict, list)):
            return 1
        if id(node) not in known:
            known[id(node)] = None
            known[id(node)] = 1 + sum(map(size, node.values() if isinstance(node, dict) else node))
        found = known[id(node)]
        if found is None:
            raise ValueError("an alias in it holds itself; write its values out")
        if found > MOST:
            raise ValueError(_TOO_LARGE)
        return found

    size(data)


def check_interpolations(data: Any) -> None:
    """ValueError where plain data are larger than MOST once every `${key}` in it stands for what it names."""
    known: dict[tuple[str, ...], int] = {}

    def size(node: Any, path: tuple[str, ...]) -> int:
        if path in known:
            return known[path]
        known[path] = 0  # of one that names itself; whoever resolves it says so
        if isinstance(node, dict):
            found = 1 + sum(size(value, (*path, str(key))) for key, value in node.items())
        elif isinstance(node, list):
            found = 1 + sum(size(value, (*path, str(i))) for i, value in enumerate(node))
        elif isinstance(node, str) and "${" in node:
            if _NESTED.search(node):
                raise ValueError(
                    f"{listed(['.'.join(path)])}: an interpolation inside another's key is unsupported; write the key"
                )
            found = len(node)
            for dots, name in _REFERENCE.findall(node):
                target = _target(path, dots, name)
                found += size(_at(data, target), target)
        else:
            found = 1
        if found > MOST:
            raise ValueError(_TOO_LARGE)
        known[path] = found
        return found

    size(data, ())


def _target(path: tuple[str, ...], dots: str, name: str) -> tuple[str, ...]:
    """Where an interpolation at `path` points: from the root, or with dots from where it stands."""
    parts = tuple(part for part in re.split(r"[.\[\]]", name.strip()) if part)
    return (*path[: max(0, len(path) - len(dots))], *parts) if dots else parts


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if isinstance(node, dict):
            node = node.get(part, node.get(int(part)) if part.isdecimal() else None)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node
