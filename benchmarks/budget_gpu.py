"""The GPU of a budget: constants with their sources (`gpus.json`), and files of the same form for others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.files.keys import is_finite, read_json
from dit4dit.ops.stand_in import StandIn

BUILT_IN = Path(__file__).with_name("gpus.json")
HINT = "benchmarks/gpus.json of dit4dit shows the form"
LIMITS = {
    "architecture": (80, 129),
    "sms": (1, 1024),
    "clusters": (1, 1024),
    "shared_memory": (49152, 1 << 24),
    "shared_memory_sm": (49152, 1 << 24),
}
"""Least and most of the constants that kernels are planned with."""
LEAST, MOST = 1e-9, 1e15
"""Of any other constant that must be above 0."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by what a prediction takes of it; `gpus.json` says the unit and the source of each constant."""

    name: str
    constants: Mapping[str, Any]
    guesses: tuple[str, ...] = ()
    """Constants whose source says that they were not measured."""

    def __getitem__(self, constant: str) -> Any:
        return self.constants[constant]

    @property
    def stand_in(self) -> StandIn:
        """What tensors without data stand for."""
        sizes = zip((2, 4, 8), self["clusters"], strict=True)
        clusters = tuple(min(count, self["sms"] // blocks) for blocks, count in sizes)
        return StandIn(str(self["architecture"]), self["sms"], self["shared_memory"], clusters=clusters)

    @property
    def capability(self) -> str:
        """ "9.0"."""
        return f"{self['architecture'] // 10}.{self['architecture'] % 10}"

    def tensor_rate(self, dtype: str) -> float:
        """FLOP a microsecond of one SM's tensor cores; float32 runs without them."""
        name = (
            "plain_32_bit"
            if dtype in ("float32", "float64")
            else "tensor_8_bit"
            if "float8" in dtype
            else "tensor_16_bit"
        )
        return float(self[name] * self["clock"] * 1e3)


@dataclass(frozen=True)
class Noting(Gpu):
    """A GPU that notes which of its constants a prediction takes."""

    taken: set[str] = field(default_factory=set)

    def __getitem__(self, constant: str) -> Any:
        self.taken.add(constant)
        return super().__getitem__(constant)

    def guessed(self) -> list[str]:
        """Which of those are guesses."""
        return [name for name in self.guesses if name in self.taken]


def read(named: str) -> Gpu:
    """A GPU by name ("h200", "h100"), or of a JSON file: "name", "like" (a GPU by name, may be left out), and "constants", each
    with "value", "unit" and "source".

    "auto" is the GPU that is here, an H200 where there is none.

    InputError: no such GPU or file, or the file says something else.
    """
    known = json.loads(BUILT_IN.read_text(encoding="utf-8"))["gpus"]
    if named == "auto":
        named = _here(known)
    if named in known:
        return _made(known[named], known, "gpus.json")
    path = Path(named)
    if not named or (not path.suffix and not _there(path)):
        names = ", ".join(known)
        raise InputError(
            f"--gpu {shown(named)}: no such GPU{did_you_mean(named, list(known))}; known: {names}, or a JSON file"
        )
    return _made(read_json(path, HINT, error=InputError), known, str(path))


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no path at all
        return False


def _here(known: Mapping[str, Any]) -> str:
    if not torch.cuda.is_available():
        return next(iter(known))
    name = torch.cuda.get_device_name()
    for short, data in known.items():
        if data["name"] == name:
            return short
    raise InputError(f"--gpu auto: {name} has no constants; give one of {', '.join(known)}, or a JSON file of its own")


def _made(data: Any, known: Mapping[str, Any], where: str) -> Gpu:
    full: dict[str, Any] = {name: one["value"] for name, one in known["h200"]["constants"].items()}
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("constants"), dict)
        or not isinstance(data.get("name"), str)
    ):
        raise InputError(f"{where}: expected an object with 'name' and 'constants'; {HINT}")
    if not data["name"].strip() or not data["name"].isprintable():
        raise InputError(f"{where}: name: expected the GPU's name in printable characters, got {shown(data['name'])}")
    if other := sorted(set(data) - {"name", "like", "constants", "note"}):
        raise InputError(f"{where}: {shown(other[0])}: no such key; {HINT}")
    base: dict[str, Any] = {}
    guesses: set[str] = set()
    if "like" in data:
        if not isinstance(data["like"], str) or data["like"] not in known:
            raise InputError(f"{where}: like: expected one of {', '.join(known)}, got {shown(data['like'])}")
        other_gpu = _made(known[data["like"]], known, where)
        base, guesses = dict(other_gpu.constants), set(other_gpu.guesses)
    for name, one in data["constants"].items():
        if name not in full:
            raise InputError(f"{where}: {shown(name)}: no such constant{did_you_mean(name, list(full))}; {HINT}")
        base[name] = _value(f"{where}: {name}", one, full[name], *LIMITS.get(name, (LEAST, MOST)))
        (guesses.add if "guess" in one["source"] else guesses.discard)(name)
    if missing := [name for name in full if name not in base]:
        raise InputError(f"{where}: {missing[0]} is missing; give all constants, or 'like' a GPU of {', '.join(known)}")
    return Gpu(data["name"], base, tuple(name for name in full if name in guesses))


def _value(where: str, one: Any, like: Any, least: float, most: float) -> Any:
    if not isinstance(one, dict) or set(one) != {"value", "unit", "source"}:
        raise InputError(f"{where}: expected an object with value, unit and source, got {shown(one)}")
    if not all(isinstance(one[key], str) for key in ("unit", "source")):
        raise InputError(f"{where}: expected unit and source in words, got {shown(one)}")
    value = one["value"]
    if isinstance(like, list):
        if not isinstance(value, list) or len(value) != len(like) or not all(is_finite(x) and x > 0 for x in value):
            raise InputError(f"{where}: expected {len(like)} numbers above 0, got {shown(value)}")
        if isinstance(like[0], int) and not all(isinstance(x, int) for x in value):
            raise InputError(f"{where}: expected {len(like)} whole numbers, got {shown(value)}")
    elif not is_finite(value) or value < 0 or (value == 0 and like > 0):
        raise InputError(f"{where}: expected a number above 0, got {shown(value)}")
    elif isinstance(like, int) and not isinstance(value, int):
        raise InputError(f"{where}: expected a whole number, got {shown(value)}")
    for number in value if isinstance(value, list) else [value]:
        if number != 0 and not least <= number <= most:  # whether it may be 0 is known by now
            raise InputError(f"{where}: expected {least:,.10g} to {most:,.10g}, got {shown(value)}")
    return value
