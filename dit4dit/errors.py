"""The errors a user can cause. Each message says where, what was wanted, what came, and what to do.

The command line turns any of these into one line and a non-zero exit code; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Collection
from itertools import islice
from typing import Any


class Dit4DitError(Exception):
    """Base of all errors that a user can mend."""


class InputError(Dit4DitError, ValueError):
    """An observation, instruction, noise or file given to the policy does not fit it."""


class ConfigError(Dit4DitError, ValueError):
    """A configuration names something unknown, lacks something needed, or contradicts itself."""


class CheckpointError(Dit4DitError, ValueError):
    """A checkpoint or backbone folder is missing, truncated, or holds other tensors than its configuration says."""


class DataError(Dit4DitError, ValueError):
    """A data set is damaged, or is not what a robot or mixture says of it; names the file, and the row where there is one."""


class BackendError(Dit4DitError, RuntimeError):
    """An implementation or device that was asked for by name cannot run here."""


class CudaError(Dit4DitError, RuntimeError):
    """CUDA refused a call; the message names it."""


class DeviceError(CudaError):
    """A CUDA error after which nothing on the device works in this process: restart it."""


class OutputError(Dit4DitError, ArithmeticError):
    """The model wrote something that must not reach a robot."""


class StreamError(Dit4DitError, RuntimeError):
    """The memory of an action stream cannot be used: there is none, it is not ours, or it has a producer or driver already."""


class TrainingError(Dit4DitError, RuntimeError):
    """A run cannot go on: its loss is no longer a number."""


class SimulatorError(Dit4DitError, RuntimeError):
    """A simulator raised; `traceback` is its own, as text."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class WorkerLost(SimulatorError):
    """A simulator's process ended, or gave no answer in time; `traceback` is the end of its log."""


class MissingExtra(Dit4DitError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


MOST = 80
"""Characters of what `shown` says."""
_ITEMS = 12
"""Items of a list or map that `shown` looks at."""


def shown(value: object, most: int = MOST) -> str:
    """What somebody gave, for a message: one printable line of at most `most` characters, in bounded work.

    Short text, numbers and lists read as Python writes them. Long text is cut, an array is its dtype and shape, a large number
    its bits, a long list its first items and its length, anything else its type. Nothing is formatted and cut afterwards: the
    `repr` of what 72 bytes of a stranger make can be gigabytes.
    """
    return _cut(_shown(value, most - 20, 2), most)


def listed(names: Collection[object], most: int = 30) -> str:
    """Names with commas between, for a message: the first `most`, each cut, and how many more there are; "none" without any."""
    parts = [_plain(name) for name in islice(names, most)]
    while len(parts) > 1 and sum(map(len, parts)) > 800:
        parts.pop()
    more = f", ... {len(names)} in all" if len(parts) < len(names) else ""
    return (", ".join(parts) or "none") + more


def said(error: BaseException | str, most: int = 160) -> str:
    """The words of another library's error, for a message: one printable line, cut."""
    return _cut(_printable(" ".join(str(error)[: 4 * most].split())), most)


def did_you_mean(word: object, known: Collection[str], most: int = 300) -> str:
    """`"; did you mean 'libero'?"` for the nearest of `known`; an empty string when nothing is near, or `word` is no short text.

    Bounded: of many that are known the first `most` are looked at, and the few with the most letters in common are compared,
    which takes the square of their length.
    """
    import difflib

    if not isinstance(word, str) or not 0 < len(word) <= 80:
        return ""
    letters, near = Counter(word), []
    for name in islice(known, most):
        if isinstance(name, str) and len(name) <= min(120, 3 * len(word)):  # a longer one is never half the same
            share = 2 * (letters & Counter(name)).total() / (len(word) + len(name))
            if share >= 0.5:
                near.append((share, name))
    best, found = 0.5, ""
    matcher = difflib.SequenceMatcher(b=word)
    for share, name in sorted(near, key=lambda each: -each[0])[:3]:
        matcher.set_seq1(name)
        if share >= best and (ratio := matcher.ratio()) >= best and (not found or ratio > best):
            best, found = ratio, name
    return f"; did you mean {shown(found, 150)}?" if found else ""


def _shown(value: Any, room: int, depth: int) -> str:
    """`shown` in about `room` characters; `depth`: how far lists in lists are opened."""
    # the methods of the built-in types themselves: a subclass may have others
    if value is None or isinstance(value, (bool, float, complex)):
        return repr(value) if type(value) in (type(None), bool, float, complex) else repr(_builtin(value))
    if isinstance(value, int):
        bits = int.bit_length(value)
        return int.__repr__(value) if bits <= 128 else f"an integer of {bits} bits"
    if isinstance(value, str):
        return _quoted(str.__getitem__(value, slice(room)), str.__len__(value), room, "letters")
    if isinstance(value, bytes):
        return _quoted(bytes.__getitem__(value, slice(room)), bytes.__len__(value), room, "bytes")
    for kind, ends in _CONTAINERS.items():
        if isinstance(value, kind):
            return _items(value, kind, ends, room, depth)
    if isinstance(value, type):
        return f"the class {_plain(value.__name__)}"
    name, dtype, shape = _plain(type(value).__name__), getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and isinstance(shape, tuple):
        if (
            name not in _ARRAYS and shape == () and (plain := _NUMBERS.get(getattr(dtype, "kind", "")))
        ):  # one of NumPy's numbers
            return f"{dtype} {_shown(plain(value), room, 0)}"
        return f"{_dtype(dtype)} {_ARRAYS.get(name, name)} {_items(list(shape[:9]), list, '[]', 40, 1)}"
    if type(value).__module__ == "torch" and name in ("dtype", "device"):
        return str(value)
    if isinstance(value, os.PathLike):
        return _shown(os.fspath(value), room, depth)
    return f"a value of type {name}"


_CONTAINERS = {list: "[]", tuple: "()", dict: "{}", set: "{}", frozenset: "{}"}
# not item(): it is a longdouble itself of a longdouble
_NUMBERS: dict[str, Any] = {"b": bool, "i": int, "u": int, "f": float, "c": complex}
_ARRAYS = {"ndarray": "array", "Tensor": "tensor"}


def _builtin(value: Any) -> Any:
    """A number of a subclass (NumPy's float64 is one of float) as the built-in one."""
    return float(value) if isinstance(value, float) else complex(value)


def _quoted(head: Any, count: int, room: int, unit: str) -> str:
    text = repr(head)
    if count <= len(head) and len(text) <= room:
        return text
    return f"{text[: room - 4]}...{text[-1]} ({count} {unit})"


def _items(value: Any, kind: type, ends: str, room: int, depth: int) -> str:
    count = kind.__len__(value)  # type: ignore[attr-defined]
    if not depth and count:
        return f"{kind.__name__} of {count}"
    pairs = isinstance(value, dict)
    parts: list[str] = []
    left = room
    for item in islice(dict.items(value) if pairs else kind.__iter__(value), _ITEMS):  # type: ignore[attr-defined]
        each = item if pairs else (item,)
        text = ": ".join(_cut(_shown(part, room // 2, depth - 1), room // 2 + 16) for part in each)
        left -= len(text) + 2
        if left < -2 and parts:
            break
        parts.append(text)
    if len(parts) < count:
        parts.append(f"... {count} in all")
    elif kind is tuple and count == 1:
        parts.append("")
    if not count and kind in (set, frozenset):
        return "an empty set"
    return ends[0] + ", ".join(parts).rstrip() + ends[1]


def _dtype(dtype: Any) -> str:
    if getattr(dtype, "names", None) is not None:  # its text has every field
        return "structured"
    return str(dtype).removeprefix("torch.") if type(dtype).__module__.partition(".")[0] in ("numpy", "torch") else ""


def _plain(name: object) -> str:
    """A name without quotes."""
    if not isinstance(name, str):
        return shown(name, 60)
    return _cut(_printable(str.__getitem__(name, slice(61))), 60)


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def require(module: str, extra: str) -> Any:
    """The imported `module` of an optional dependency; MissingExtra, which says how to install it, where it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there and broken: its own traceback says more
        from importlib import metadata

        # dit4dit-cu12 is the same package: an extra of the other's name would bring the other
        name = metadata.packages_distributions().get("dit4dit", ["dit4dit"])[0]
        raise MissingExtra(f"{top} is not installed; pip install '{name}[{extra}]'") from None
