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
    "cut short": (
        "empty",
        "cut short",
        "bytes of four billion",
        "text of four billion",
        "a length cut short",
        "a length of text cut short",
        "a key cut short",
        "a number cut short",
        "20 000 values cut short",
    ),
    "1 bytes after its end": ("more after the end",),
    "more than 20000 values": (
        "a list of four billion",
        "a map of four billion",
        "many empty lists",
        "many empty maps",
        "many numbers",
        "many keys",
        "a list of lists of 20 000 each",
        "large lists in large lists",
    ),
    "nested more than 32 deep": ("lists in lists", "maps in maps"),
    "is not part of the protocol": (
        "extension",
        "timestamp",
        "never used",
        "20 000 values and then an extension",
    ),
    "not readable msgpack": ("bad UTF-8", "half of a pair in UTF-8"),
    "a key of a map is text or bytes, got": (
        "a list as key",
        "a number as key",
        "a map as key",
        "none as key",
        "an array as key",
        "a number as key behind 9000 keys",
    ),
    "a key of a map has at most 256 bytes, got": ("a long key", "a long key of bytes", "a key of 8 MB"),
    "more than 1048576 bytes of text": (
        "2 MB of text",
        "8 MB of text of which one letter is wide",
        "many long texts",
        "texts of 255 bytes",
    ),
    "dtype: expected one like": (
        "object dtype",
        "object dtype in words",
        "void dtype",
        "structure",
        "complex dtype",
        "text with pointers",
        "code",
        "dtype is no text",
        "dtype is an array",
        "dtype of 900 kB",
        "no dtype",
    ),
    "dtype: '<f5' is none": ("no such size",),
    "has no bytes an item": (
        "empty bytes",
        "empty text",
        "empty text in many zeros",
        "empty bytes in 22 dimensions",
        "scalar of empty bytes",
    ),
    "bytes are not a (float32|uint8) array": ("fewer bytes than the shape", "more bytes than the shape"),
    "array is too big": ("huge and empty",),
    "expected data as bytes and shape as a list of at most 5 sizes": (
        "negative size",
        "size over 2^31",
        "size is a float",
        "size is true",
        "size is a list",
        "too many sizes",
        "20 000 sizes",
        "20 dimensions of two",
        "shape is text",
        "shape is a map",
        "shape is an array",
        "no shape",
        "data is text",
        "data is an array",
        "no data",
    ),
    "more than 1024 arrays and scalars": ("1500 arrays", "2000 scalars"),
    "scalar: expected a number and its dtype": (
        "scalar of a long text dtype",
        "scalar from bytes",
        "scalar from a list",
        "scalar from an array",
        "scalar of a date",
        "scalar without data",
    ),
    "scalar: not a int8": ("scalar out of range",),
}
WHY = {name: reason for reason, names in REASONS.items() for name in names}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_cost_nothing(name: str) -> None:
    def refused() -> None:
        with pytest.raises(InputError, match=WHY[name]):
            wire.unpack(HOSTILE[name])

    assert peak_bytes(refused) < 8 * 2**20
    assert lines_run(refused) < 20 * wire.MAX_OBJECTS, "a few for each value that is walked over"


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


def test_arrays_up_to_their_bounds() -> None:
    clips = np.zeros((1,) * wire.MAX_DIMENSIONS, np.uint8)
    assert wire.unpack(wire.pack(clips)).shape == clips.shape
    assert len(wire.unpack(wire.pack([np.float32(0)] * wire.MAX_ARRAYS))) == wire.MAX_ARRAYS
    with pytest.raises(InputError, match="more than 1024 arrays"):
        wire.unpack(wire.pack([*[clips] * wire.MAX_ARRAYS, np.float32(0)]))


def test_text_and_keys_up_to_their_bounds() -> None:
    longest = {"k" * wire.MAX_KEY_BYTES: 1, b"k" * wire.MAX_KEY_BYTES: 2}
    assert wire.unpack(wire.pack(longest)) == longest
    instructions = ["\N{GRINNING FACE}" * 4096] * 64
    assert wire.unpack(wire.pack(instructions)) == instructions
    with pytest.raises(InputError, match="more than 1048576 bytes of text"):
        wire.unpack(wire.pack([*instructions, "x" * 32]))


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
