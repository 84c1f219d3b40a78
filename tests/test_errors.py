"""What messages quote: bounded in work and in length, on one line, whatever it is."""

from __future__ import annotations

import enum
import random
import re
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import lines_run, peak_bytes

from dit4dit.errors import did_you_mean, listed, said, shown


class Loud:
    """What must not be asked for its words."""

    def __repr__(self) -> str:
        pytest.fail("asked")

    __str__ = __repr__


class LoudText(str):
    __slots__ = ()

    def __repr__(self) -> str:
        pytest.fail("asked")

    __str__ = __len__ = __getitem__ = __repr__


class LoudList(list):
    def __repr__(self) -> str:
        pytest.fail("asked")

    __len__ = __iter__ = __getitem__ = __repr__


class Flag(enum.IntEnum):
    ON = 1


Pair = namedtuple("Pair", "a b")
CYCLE: list[object] = [1]
CYCLE.append(CYCLE)


SHOWN = [
    (None, "None"),
    (True, "True"),
    (-3, "-3"),
    (2**64, "18446744073709551616"),
    (0.5, "0.5"),
    (float("nan"), "nan"),
    (1j, "1j"),
    (Flag.ON, "1"),
    ("go", "'go'"),
    ("it's", '"it\'s"'),
    (b"go", "b'go'"),
    (LoudText("go"), "'go'"),
    ([224, 224], "[224, 224]"),
    ((1,), "(1,)"),
    ((), "()"),
    (Pair(1, "b"), "(1, 'b')"),
    ({"a": {"b": [1]}}, "{'a': {'b': list of 1}}"),
    (OrderedDict(a=None), "{'a': None}"),
    (set(), "an empty set"),
    ({1}, "{1}"),
    (Path("a/b"), "'a/b'"),
    (int, "the class int"),
    (Loud(), "a value of type Loud"),
    ([Loud()], "[a value of type Loud]"),
    (LoudList([1]), "[1]"),
    (np.zeros((2, 3), np.uint8), "uint8 array [2, 3]"),
    (np.array(3.0), "float64 array []"),
    (np.float32(0.5), "float32 0.5"),
    (np.longdouble(2), "float128 2.0" if np.dtype("g").itemsize == 16 else "float64 2.0"),
    (np.str_("go"), "'go'"),
    (np.array(["go"]), "<U2 array [1]"),
    (np.array([None, Loud()]), "object array [2]"),
    (np.zeros(2, [(f"f{i}", "f4") for i in range(900)]), "structured array [2]"),
    (torch.zeros(2, 3), "float32 tensor [2, 3]"),
    (torch.float16, "torch.float16"),
    (CYCLE, "[1, [1, list of 2]]"),
    (list(range(100_000)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... 100000 in all]"),
    ("\n\x1b[2J\u202e", r"'\n\x1b[2J\u202e'"),
    ("\ud800", r"'\ud800'"),
    (10**5000, "an integer of 16610 bits"),
]


@pytest.mark.parametrize("value, text", SHOWN, ids=[text for _, text in SHOWN])
def test_what_is_shown(value: object, text: str) -> None:
    assert shown(value) == text


LARGE = {
    "text": "x" * 10**7,
    "bytes": bytes(10**7),
    "text that is longer when it is written": "\U0010ffff" * 10**6,
    "number": 1 << 10**7,
    "list": [0] * 10**6,
    "lists": [[[["x" * 1000] * 1000]] * 1000] * 1000,
    "map": {f"{i}" * 100: i for i in range(10**4)},
    "array": np.zeros(10**7, np.uint8),
    "texts in an array": np.array(["x" * 10**6]),
    "a name": type("X" * 10**6, (), {})(),
    "a class": type("X\n" * 10**6, (), {}),
    "a path": Path("x" * 1000),
    "a shape": np.ndarray([7] * 22, "S0", b""),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_is_shown_in_bounded_work(name: str) -> None:
    value = LARGE[name]
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
    assert lines_run(lambda: shown(value)) < 1000
    assert peak_bytes(lambda: shown(value)) < 100_000 + 3 * len("X" * 10**6) * (name in ("a name", "a class"))
    assert len(shown(value, 200)) <= 200


def test_names_are_listed() -> None:
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "a, b"
    assert listed({"a": 1, 2: 3, b"c": 0}) == "a, 2, b'c'"
    assert listed([f"k{i}" for i in range(10**5)], 3) == "k0, k1, k2, ... 100000 in all"
    assert listed(["a\nb"]) == r"a\nb"
    long = listed(["x" * 10**6] * 10**5)
    assert len(long) < 1000
    assert long.endswith("... 100000 in all")


def test_what_an_error_said_is_one_line() -> None:
    assert said(ValueError("two\n  lines")) == "two lines"
    assert len(said(ValueError("x" * 10**6))) == 160
    assert said("\x1b[2J") == r"\x1b[2J"


def test_did_you_mean() -> None:
    known = ["observation", "instruction", "state"]
    assert did_you_mean("observaton", known) == "; did you mean 'observation'?"
    assert did_you_mean("sate", tuple(known)) == "; did you mean 'state'?"
    assert did_you_mean("quite something else", known) == ""
    for value in ("", 5, None, b"state", ["state"], np.zeros(3)):
        assert did_you_mean(value, known) == ""


def test_did_you_mean_is_bounded() -> None:
    """The comparison takes the square of the letters, and more where few kinds of them are in another order."""
    draw = random.Random(0)
    few = ["".join(draw.choices("ab", k=80)) for _ in range(10**5)]
    assert lines_run(lambda: did_you_mean("ab" * 40, few)) < 150_000
    assert lines_run(lambda: did_you_mean("ab" * 10**6, few)) < 20
    assert lines_run(lambda: did_you_mean("ab" * 40, ["ab" * 10**6] * 10**5)) < 3000
    assert re.search("did you mean", did_you_mean("ab" * 39, ["ab" * 40]))
