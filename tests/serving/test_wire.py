"""The codec on both ends, against bytes written by hand, and against what an adversary sends."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from counting import lines_run, peak_bytes
from hostile import HOSTILE
from serving_stand import REQUEST, REQUEST_BYTES, RESPONSE, RESPONSE_BYTES, SCALAR, SCALAR_BYTES, hand

from dit4dit.errors import InputError
from dit4dit.serving import client, wire


def same(a, b) -> bool:
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("codec", [wire, client], ids=["server", "client"])
@pytest.mark.parametrize(
    "message, text", [(REQUEST, REQUEST_BYTES), (RESPONSE, RESPONSE_BYTES), (SCALAR, SCALAR_BYTES)]
)
def test_golden_bytes(codec, message, text: str) -> None:
    assert codec.pack(message).hex(" ") == hand(text).hex(" ")
    assert same(codec.unpack(hand(text)), message)


@pytest.mark.parametrize("codec", [wire, client], ids=["server", "client"])
@pytest.mark.parametrize(
    "value",
    [
        np.zeros((0, 3), np.int64),
        np.array(3.0),
        np.array([[1, 2], [3, 4]], ">i2").T,
        np.array(["a", "bc"]),
        np.array([True, False]),
        np.int8(-3),
        np.bool_(True),
        np.uint64(2**64 - 1),
    ],
    ids=str,
)
def test_there_and_back(codec, value) -> None:
    back = codec.unpack(codec.pack(value))
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert np.array_equal(back, value)


@pytest.mark.parametrize("codec", [wire, client], ids=["server", "client"])
@pytest.mark.parametrize(
    "value", [np.array([None]), np.zeros(1, "c8"), np.zeros(1, [("a", "f4")]), np.complex64(1), object(), {1, 2}]
)
def test_what_has_no_form_on_the_wire_is_refused(codec, value) -> None:
    with pytest.raises((TypeError, ValueError), match="cannot be sent"):
        codec.pack({"x": value})


REASONS = {
    "cut short": ("empty", "cut short", "bytes of four billion", "text of four billion", "a length cut short"),
    "1 bytes after its end": ("more after the end",),
    "more than 20000 values": ("a list of four billion", "a map of four billion", "many empty lists"),
    "nested more than 32 deep": ("lists in lists", "maps in maps", "large lists in large lists"),
    "is not part of the protocol": ("extension", "timestamp", "never used"),
    "not readable msgpack": ("bad UTF-8", "a list as key", "a number as key"),
    "dtype: expected one like": (
        "object dtype",
        "object dtype in words",
        "void dtype",
        "structure",
        "complex dtype",
        "text with pointers",
        "code",
        "dtype is no text",
        "no dtype",
    ),
    "dtype: '<f5' is none": ("no such size",),
    "4 bytes are not a float32 array": ("fewer bytes than the shape",),
    "array is too big": ("huge and empty",),
    "expected data as bytes and shape as a list of sizes": (
        "negative size",
        "size over 2^31",
        "size is a float",
        "size is true",
        "too many sizes",
        "shape is text",
        "data is text",
    ),
    "scalar: expected a number and its dtype": ("scalar of a long text dtype", "scalar from bytes"),
    "scalar: not a int8": ("scalar out of range",),
}
WHY = {name: reason for reason, names in REASONS.items() for name in names}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_cost_nothing(name: str) -> None:
    def refused() -> None:
        with pytest.raises(InputError, match=WHY[name]):
            wire.unpack(HOSTILE[name])

    assert peak_bytes(refused) < 8 * 2**20
    assert lines_run(refused) < 10_000, "the most so far: 1034"


def test_the_bounds_let_real_requests_through() -> None:
    example = {"image": np.zeros((224, 448, 3), np.uint8), "lang": "a" * 200, "state": [[0.5] * 64]}
    assert len(wire.unpack(wire.pack({"examples": [example] * 64, "nested": [[[[[[1]]]]]]}))["examples"]) == 64
    longest = wire.pack([0] * (wire.MAX_OBJECTS - 1))
    assert len(wire.unpack(longest)) == wire.MAX_OBJECTS - 1
    with pytest.raises(InputError, match="more than 20000 values"):
        wire.unpack(wire.pack([0] * wire.MAX_OBJECTS))
    deepest = b"\x91" * (wire.MAX_DEPTH - 1) + b"\xc0"
    assert wire.unpack(deepest) == msgpack.unpackb(deepest)
    with pytest.raises(InputError, match="nested more than 32 deep"):
        wire.unpack(b"\x91" + deepest)


def test_every_kind_of_value_is_read_to_its_end() -> None:
    """Each with something behind it, which a length that is misread would miss."""
    numbers = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1]
    numbers += [-1, -32, -33, -128, -129, -(2**15), -(2**15) - 1, -(2**31), -(2**31) - 1, -(2**63), 0.1]
    sizes = (0, 1, 15, 16, 31, 32, 255, 256)
    texts = [letter * size for letter in ("a", b"a") for size in (*sizes, 65535, 65536)]
    lists, maps = [[0] * size for size in sizes], [{f"{i}": i for i in range(size)} for size in sizes]
    for value in (*numbers, *texts, *lists, *maps, None, True, False):
        assert wire.unpack(wire.pack([value, "end"])) == [value, "end"]
    assert wire.unpack(msgpack.packb([0.5, "end"], use_single_float=True)) == [0.5, "end"]
    # longer forms than the value needs
    for frame in (b"\xdd\0\0\0\2\1\2", b"\xdc\0\2\1\2", b"\xdf\0\0\0\1\xa1a\1", b"\xde\0\1\xa1a\1", b"\xdb\0\0\0\1a"):
        assert wire.unpack(frame) == msgpack.unpackb(frame)


def test_mutated_messages_are_read_or_refused() -> None:
    """Whatever one byte of a good message is changed to, there is a value or an InputError."""
    good = hand(REQUEST_BYTES)
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(len(good)):
        for value in rng.integers(0, 256, 12):
            frame = good[:position] + bytes([value]) + good[position + 1 :]
            try:
                wire.unpack(frame)
            except InputError:
                refused += 1
    assert refused > 100
