"""Objects that no caller should send: numbers at every limit, methods that raise or lie, memory of every kind."""

from __future__ import annotations

import array
import ctypes
import math
import random
from typing import Any

import numpy as np

import dit4dit


class Raises:
    def _raise(self, *_: object) -> Any:
        raise KeyError("a method of an argument")

    __index__ = __len__ = __getitem__ = __float__ = __iter__ = __repr__ = __str__ = __hash__ = __eq__ = __getattr__ = (
        _raise  # type: ignore[assignment]
    )


class Lies:
    """A sequence of another length than it says, and a number."""

    def __init__(self, length: int, element: object = 1) -> None:
        self.length, self.element = length, element

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> object:
        if i > 2:
            raise IndexError(i)
        return self.element

    def __index__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return "x" * 10**7


class Clears:
    """A number that empties what it is in when it is asked for."""

    def __init__(self) -> None:
        self.inside: Any = None

    def __index__(self) -> int:
        if isinstance(self.inside, (list, dict, bytearray)):
            self.inside.clear()
        return 1


NUMBERS = [
    sign * (2**power + add) for power in (0, 4, 15, 31, 32, 62, 63, 64, 200) for add in (-1, 0, 1) for sign in (1, -1)
]
NUMBERS += [
    0,
    True,
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    1e300,
    -0.0,
    1.5,
    3 + 4j,
    np.int8(3),
    np.float32(2),
    np.bool_(True),
]
TEXTS = ["", "cpu", "cuda:0", "cuda:9999", "cuda:99999", "cuda:-1", "\0", "a\0b", "\ud800", "é" * 70, "x" * 10**5, "uint8",
         "float64", "bfloat16", "bilinear", "*", ":16", "*:16", "fp32:16", "i64:16", "libm.so.6", "/etc/passwd", "/"]  # fmt: skip


def memory(rng: random.Random) -> Any:
    """What lends memory, or almost."""
    dtype = rng.choice(
        [
            "u1",
            "i1",
            "f4",
            "f2",
            "f8",
            "V0",
            "S0",
            "U3",
            "O",
            "M8[s]",
            ">f4",
            "c8",
            "?",
            "g",
            [("a", "u1"), ("b", "f4")],
        ]
    )
    shape = [rng.choice((0, 1, 2, 3, 3, 4, 8)) for _ in range(rng.choice((0, 1, 3, 4, 4, 4, 5, 32)))]
    if math.prod(n or 1 for n in shape) > 10**5:
        shape = shape[:4]
    x = np.zeros(shape, dtype)
    if shape and rng.random() < 0.3:
        x = x[tuple(slice(None, None, rng.choice((-1, 2))) for _ in shape)]
    released = memoryview(bytearray(8))
    released.release()
    return rng.choice([
        x, x, x, np.broadcast_to(np.uint8(1), (2, 8, 8, 3)), np.zeros(49, "u1")[1:].view("f4").reshape(1, 3, 2, 2),
        np.lib.stride_tricks.as_strided(np.zeros(64, "f4"), (1, 3, 2, 2), (0, 8, 4, 4)), b"", b"\x7fELF", bytearray(9), released,
        memoryview(b"abc")[::-1], memoryview(b"x").cast("B", []), array.array("d", [1]), array.array("f", [1, 2, 3]),
        ctypes.c_int(3), (ctypes.c_ubyte * 3 * 4 * 5 * 1)(), (ctypes.c_float * 0)(), ctypes.create_string_buffer(5),
    ])  # fmt: skip


def wrong(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return memory(rng)
    if kind == 5:
        return Lies(rng.choice((0, 1, 3, 5, 10**6, 2**62, 2**63, -1)), rng.choice((1, None, "x")))
    if kind == 6:
        return rng.choice(
            [Clears(), Raises(), range(2**40), range(4), range(2**70), [], (), {}, {1: 2}, {"x": 1}, set(), (1,) * 5]
        )
    endless: list[Any] = []
    endless.append(endless)
    return rng.choice(
        [
            None,
            ...,
            object(),
            int,
            dit4dit,
            len,
            endless,
            [1] * 10**5,
            ("a",) * 70,
            iter([1]),
            {str(i): i for i in range(300)},
        ]
    )


def spoiled(x: Any, rng: random.Random) -> Any:
    """A copy in which one thing somewhere is another, is missing, or is there twice."""
    if not isinstance(x, (dict, list, tuple)) or not x or rng.random() < 0.15:
        if isinstance(x, int) and rng.random() < 0.5:
            return rng.choice((x - 1, x + 1, -x, 2 * x, x << 31))
        if isinstance(x, bytes) and rng.random() < 0.8:
            return x[: rng.randrange(len(x) + 1)]
        return wrong(rng)
    if isinstance(x, dict):
        key = rng.choice(list(x))
        change = {key: spoiled(x[key], rng)} if rng.random() < 0.9 else {wrong_key(rng): x[key]}
        new: Any = (
            {k: v for k, v in x.items() if k != key} | change
            if rng.random() < 0.95
            else {k: x[k] for k in x if k != key}
        )
        inside = [new]
    else:
        at, parts = rng.randrange(len(x)), list(x)
        parts[at : at + 1] = rng.choice([[], [x[at]] * 2]) if rng.random() < 0.1 else [spoiled(x[at], rng)]
        new = parts if isinstance(x, list) else type(x)(parts)
        inside = parts
    for value in inside if isinstance(new, (list, tuple)) else new.values():
        if isinstance(value, Clears):
            value.inside = new
    return new


def wrong_key(rng: random.Random) -> Any:
    return rng.choice(["x", "out", "\0", "\ud800", "x" * 10**4, 1, None, (1, 2)])
