"""Messages changed at random: in their bytes, and in their structure (dtypes, shapes, lengths, kinds of values, depth)."""

from __future__ import annotations

import copy
import random
from typing import Any

from hostile import marked
from msgpack import packb, unpackb

# fmt: off
DTYPES = ["|u1", "<f4", "<f8", "<i8", ">f2", "|b1", "|S0", "|S1", "<U0", "<U1", "<U9999999", "|S9999999", "<M8[ns]", "<m8[0s]",
          "|O", "|V4", "<c8", "<f16", "<f5", "f4,f4", "u1", "=u1", "<u1" * 99, "<f8\n", "", None, 7, [], b"|u1"]
SIZES = [0, 1, 2, 3, 5, 7, 16, 48, 255, 2**31 - 1, 2**31, 2**40, 2**63, -1, 1.0, True, None, "3"]
VALUES = [None, True, 0, -1, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), 1e300, "", "go", "x" * 300, "x" * 70_000,
          b"", b"\x00" * 300, [], {}, [[]], [0] * 9, ["a"] * 9, {"a": {}}, "type", "reset", "ping", "\u00e9" * 99]
KEYS = ["type", "seed", "chunk", "request_id", "examples", "observation", "instruction", "image", "images", "lang", "state", "x",
        "primary_image", "k" * 256, "k" * 257, "", b"data", b"dtype", b"shape", b"__ndarray__", b"__npgeneric__"]
# fmt: on
MOST = 60_000
"""Bytes that one value is multiplied to: what is slow is slow in small frames too."""
WORDS = bytes([0x00, 0x80, 0x81, 0x8F, 0x90, 0x91, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF])
"""First bytes of all kinds of values."""


class Mutator:
    """Frames made of the seeds, the same ones for the same number."""

    def __init__(self, seeds: dict[str, bytes], number: int) -> None:
        self._draw = random.Random(number)
        self._frames = list(seeds.values())
        self._trees = [unpackb(frame) for frame in self._frames]

    def frame(self) -> bytes:
        """The next one."""
        way = self._draw.random()
        if way < 0.45:
            frame = self._draw.choice(self._frames)
        else:
            tree = copy.deepcopy(self._draw.choice(self._trees))
            for _ in range(self._draw.choice((1, 1, 1, 2, 5))):
                tree = self._changed(tree)
            try:
                frame = packb(tree)
            except (ValueError, OverflowError, TypeError):  # too deep for the packer, or a list as a key
                return self.frame()
        return self._spoilt(frame) if way < 0.6 else frame

    def _spoilt(self, frame: bytes) -> bytes:
        draw, out = self._draw, bytearray(frame)
        for _ in range(draw.choice((1, 1, 2, 4))):
            # most of a frame is an image; what tells lengths is at its two ends
            first, last = draw.randrange(120), len(out) - 1 - draw.randrange(400)
            place = min(len(out), max(0, draw.choice((draw.randrange(len(out) + 1), first, last))))
            way = draw.randrange(5)
            if way == 0:
                out[place : place + 1] = bytes([draw.choice(WORDS)])
            elif way == 1:
                out[place : place + 1] = bytes([draw.randrange(256)])
            elif way == 2:
                del out[place : place + draw.choice((1, 1, 2, 4, 4000))]
            elif way == 3:
                out[place:place] = bytes([draw.choice(WORDS)]) * draw.choice((1, 1, 4, 40, 20_000))
            else:
                start = draw.randrange(len(out) + 1)
                out[place:place] = out[start : start + draw.choice((1, 4, 40, 400))]
        return bytes(out)

    def _changed(self, tree: Any) -> Any:
        """The tree with one value changed; it goes down at random."""
        draw = self._draw
        if isinstance(tree, dict) and tree and draw.random() < 0.8:
            if b"__ndarray__" in tree and draw.random() < 0.7:
                return self._array(tree)
            key = draw.choice(list(tree))
            way = draw.random()
            if way < 0.08:
                del tree[key]
            elif way < 0.16:
                tree[draw.choice(KEYS)] = tree.pop(key)
            elif way < 0.22:
                tree[draw.choice(KEYS)] = self._value()
            elif way < 0.24:
                tree.update((f"{i}", 0) for i in range(draw.choice((1, 20, 3000))))
            else:
                tree[key] = self._changed(tree[key])
            return tree
        if isinstance(tree, list) and tree and draw.random() < 0.7:
            i = draw.randrange(len(tree))
            tree[i] = self._changed(tree[i])
            return tree
        way = draw.random()
        if way < 0.2:
            return [tree] * min(draw.choice((0, 1, 2, 70, 3000)), MOST // len(packb(tree)))
        if way < 0.3:
            for _ in range(draw.choice((1, 2, 5, 31, 40))):
                tree = [tree] if draw.random() < 0.5 else {draw.choice(KEYS): tree}
            return tree
        if way < 0.4:
            return marked(draw.choice(DTYPES), self._shape(), bytes(draw.choice((0, 1, 4, 8, 96, 4096))))
        if way < 0.5:
            return {b"__npgeneric__": True, b"data": self._value(), b"dtype": draw.choice(DTYPES)}
        return self._value()

    def _value(self) -> Any:
        return copy.deepcopy(self._draw.choice(VALUES))  # which is changed in its turn

    def _shape(self) -> list[Any]:
        return [
            self._draw.choice(SIZES[: self._draw.choice((8, len(SIZES)))])
            for _ in range(self._draw.choice((0, 1, 2, 3, 5, 6, 33)))
        ]

    def _array(self, tree: dict[Any, Any]) -> dict[Any, Any]:
        """An array of which one fact is another; half of the time the data still fit."""
        draw = self._draw
        way = draw.randrange(5)
        if way == 0:
            tree[b"dtype"] = draw.choice(DTYPES)
        elif way == 1:
            tree[b"shape"] = self._shape()
        elif way == 2 and isinstance(tree.get(b"shape"), list):
            draw.shuffle(tree[b"shape"])
        elif way == 3:
            size = draw.choice((0, 1, 3, 48, 4096))
            tree.update(
                {
                    b"dtype": "|u1",
                    b"shape": draw.choice(([size], [1, size], [size, 1, 1], [1] * 4 + [size])),
                    b"data": bytes(size),
                }
            )
        else:
            tree[b"data"] = self._value()
        return tree
