"""Messages as bytes: msgpack, with NumPy arrays and scalars as marked maps, as the published clients (and openpi's) send them.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": dtype.str, b"shape": shape}, a scalar {b"__npgeneric__": True,
b"data": item, b"dtype": dtype.str}. What a peer sends is looked through before anything is made of it: ten bytes can claim a list
of four billion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit4dit.errors import InputError, require

MAX_OBJECTS = 20_000
"""Values in one message, arrays not counted by their elements; the published requests have about 20 an example."""
MAX_DEPTH = 32
MAX_DIMENSIONS = 32

_DTYPE = re.compile(r"[<>|=]?(?:[biufSU][0-9]{1,7}|[mM]8\[[0-9]{0,4}[A-Za-z]{1,2}\])")

# msgpack's first byte -> bytes that follow (https://github.com/msgpack/msgpack/blob/master/spec.md)
_FOLLOWED = {
    0xC0: 0,
    0xC2: 0,
    0xC3: 0,
    0xCA: 4,
    0xCB: 8,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xD0: 1,
    0xD1: 2,
    0xD2: 4,
    0xD3: 8,
}
# first byte -> bytes of the length that follows
_RAW = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def pack(message: Any) -> bytes:
    """The message as bytes; TypeError or ValueError where a value has no form on the wire."""
    packed: bytes = require("msgpack", "serve").packb(message, default=_marked)
    return packed


def unpack(frame: bytes) -> Any:
    """The message of one frame; its arrays are read-only views of the frame's bytes.

    Raises:
        InputError: not msgpack, cut short, too many or too deeply nested values, or an array that contradicts itself.
    """
    msgpack = require("msgpack", "serve")
    check_structure(frame)
    try:
        return msgpack.unpackb(frame, object_hook=_restored)
    except InputError:
        raise
    except (ValueError, msgpack.UnpackException) as error:  # bad UTF-8, or a map's key that is neither text nor bytes
        raise InputError(f"message: not readable msgpack ({error!s:.120}); expected one map") from None


def check_structure(frame: bytes) -> None:
    """Walk over the headers, without making anything of them; InputError unless the frame is one whole value within bounds."""
    position, found, expected = 0, 0, [1]  # expected: values still to come in each open list or map
    while expected:
        if expected[-1] == 0:
            expected.pop()
            continue
        expected[-1] -= 1
        found += 1
        position, inside = _step(frame, position)
        if found + inside > MAX_OBJECTS:
            raise InputError(
                f"message: more than {MAX_OBJECTS} values; send pictures and numbers as arrays, not as lists"
            )
        if inside:
            expected.append(inside)
        if len(expected) > MAX_DEPTH:
            raise InputError(f"message: nested more than {MAX_DEPTH} deep; expected one map, as the protocol says")
    if position != len(frame):
        raise InputError(f"message: {len(frame) - position} bytes after its end; send one msgpack map a frame")


def _step(frame: bytes, position: int) -> tuple[int, int]:
    """Where the value at `position` ends (of a list or map: its header), and how many values are inside."""
    if position >= len(frame):
        raise InputError("message: cut short; send one whole msgpack map a frame")
    first, position, inside = frame[position], position + 1, 0
    if first in _FOLLOWED:
        position += _FOLLOWED[first]
    elif 0xA0 <= first <= 0xBF:
        position += first & 0x1F
    elif 0x80 <= first <= 0x8F:
        inside = 2 * (first & 0x0F)
    elif 0x90 <= first <= 0x9F:
        inside = first & 0x0F
    elif first in _RAW or first in _LISTS or first in _MAPS:
        width = _RAW.get(first) or _LISTS.get(first) or _MAPS[first]
        length = int.from_bytes(frame[position : position + width], "big")
        position += width
        if first in _RAW:
            position += length
        else:
            inside = length * (2 if first in _MAPS else 1)
    elif 0x80 <= first < 0xE0:  # what is left: extension types, and 0xC1, which means nothing
        raise InputError(f"message: msgpack type 0x{first:02x} is not part of the protocol")
    if position > len(frame):
        raise InputError("message: cut short; send one whole msgpack map a frame")
    return position, inside


def _marked(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(
            f"message: a {type(value).__name__} cannot be sent; expected arrays, numbers, text, lists and maps"
        )
    if value.dtype.kind in "OVc":
        raise ValueError(f"message: an array of dtype {value.dtype} cannot be sent; no object, void or complex dtypes")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _restored(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(found)
    if b"__npgeneric__" in found:
        return _scalar(found)
    return found


def _array(found: Mapping[Any, Any]) -> np.ndarray[Any, Any]:
    dtype, data = _dtype(found), found.get(b"data")
    shape: Any = found.get(b"shape")
    whole = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    if not isinstance(data, bytes) or not whole or len(shape) > MAX_DIMENSIONS:
        raise InputError("array: expected data as bytes and shape as a list of sizes, as the protocol says")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"array: {len(data)} bytes are not a {dtype} array of shape {shape!s:.60}")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except (ValueError, TypeError, OverflowError) as error:  # an empty array whose other sizes are too large
        raise InputError(f"array: shape {shape!s:.60} ({error!s:.60})") from None


def _scalar(found: Mapping[Any, Any]) -> Any:
    dtype, data = _dtype(found), found.get(b"data")
    # text would come as such; made to a long text dtype here, a few bytes could fill the memory
    if dtype.kind not in "biuf" or not isinstance(data, (bool, int, float)):
        raise InputError(f"scalar: expected a number and its dtype, got a {type(data).__name__} and {dtype}")
    try:
        return np.array(data, dtype)[()]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"scalar: not a {dtype} ({error!s:.60})") from None


def _dtype(found: Mapping[Any, Any]) -> np.dtype[Any]:
    text = found.get(b"dtype")
    # only these forms: np.dtype reads whole structures from text, and pointers
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise InputError(f"dtype: expected one like '|u1' or '<f4' (no object, void or complex), got {text!r:.40}")
    try:
        return np.dtype(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"dtype: {text!r:.40} is none ({error!s:.60})") from None
