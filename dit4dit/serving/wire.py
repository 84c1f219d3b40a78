"""Messages as bytes: msgpack, with NumPy arrays and scalars as marked maps, as the published clients (and openpi's) send them.

An array is {b"__ndarray__": True, b"data": bytes, b"dtype": dtype.str, b"shape": shape}, a scalar {b"__npgeneric__": True,
b"data": item, b"dtype": dtype.str}. What a peer sends is looked through before anything is made of it: ten bytes can claim a list
of four billion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from dit4dit.errors import InputError, require, said, shown

MAX_OBJECTS = 20_000
"""Values in one message, arrays not counted by their elements; the published requests have about 20 an example."""
MAX_DEPTH = 32
MAX_DIMENSIONS = 5
"""Of an array: a batch of clips has as many."""
MAX_KEY_BYTES = 256
"""Bytes of one key of a map."""
MAX_TEXT_BYTES = 2**20
"""Bytes of all texts of one message that are longer than 31: 64 instructions of 4096 letters of four bytes. Text is decoded, in
up to four times its memory; images and numbers come as bytes."""
MAX_ARRAYS = 1024
"""Arrays and scalars in one message, each of which is made by Python."""

_DTYPE = re.compile(r"[<>|=]?(?:[biufSU][0-9]{1,7}|[mM]8\[[0-9]{0,4}[A-Za-z]{1,2}\])")


def _whole(first: int) -> int:
    """Bytes of a value whose first byte says them (https://github.com/msgpack/msgpack/blob/master/spec.md); 0 of all others."""
    if first <= 0x7F or first >= 0xE0 or first in (0x80, 0x90):  # numbers, an empty map, an empty list
        return 1
    if 0xA0 <= first <= 0xBF:  # short text
        return 1 + (first & 0x1F)
    following = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}  # none, false, true, floats
    following |= {0xCC + i: 1 << i for i in range(4)} | {0xD0 + i: 1 << i for i in range(4)}  # integers
    return 1 + following[first] if first in following else 0


_WHOLE = bytes(map(_whole, range(256)))
# first byte -> bytes of the length that follows
_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_RAW = bytes(({0xC4: 1, 0xC5: 2, 0xC6: 4} | _TEXT).get(first, 0) for first in range(256))
"""First byte -> bytes of the length that follows, of text and bytes; 0 for the others."""


def pack(message: Any) -> bytes:
    """The message as bytes; TypeError or ValueError where a value has no form on the wire."""
    packed: bytes = require("msgpack", "serve").packb(message, default=_marked)
    return packed


def unpack(frame: bytes) -> Any:
    """The message of one frame; its arrays are read-only views of the frame's bytes.

    Raises:
        InputError: not msgpack, cut short, too many or too deeply nested values, too much text, a key that is no short text, or
            an array that contradicts itself.
    """
    msgpack = require("msgpack", "serve")
    check_structure(frame)
    try:
        return msgpack.unpackb(frame, object_hook=_restorer())
    except InputError:
        raise
    except (ValueError, msgpack.UnpackException) as error:  # bad UTF-8
        raise InputError(f"message: not readable msgpack ({said(error)}); expected one map") from None


def check_structure(frame: bytes) -> None:
    """Walk over the headers, without making anything of them; InputError unless the frame is one whole value within bounds."""
    size, whole, raw = len(frame), _WHOLE, _RAW
    position, found, text = 0, 1, 0
    left, keyed = (
        1,
        False,
    )  # values to come in the innermost list or map; in a map, before each key an even number is left
    outer: list[tuple[int, bool]] = []
    while True:
        while left:
            if position >= size:
                raise InputError("message: cut short; send one whole msgpack map a frame")
            first = frame[position]
            if keyed and not left & 1 and not 0xA0 <= first <= 0xBF:
                _check_key(frame, position)
            left -= 1
            step = whole[first]
            if step:
                position += step
                continue
            width = raw[first]
            if width:  # text or bytes
                start = position + 1 + width
                if start > size:
                    raise InputError("message: cut short; send one whole msgpack map a frame")
                length = frame[position + 1] if width == 1 else int.from_bytes(frame[position + 1 : start], "big")
                position = start + length
                if first in _TEXT:
                    text += length
                continue
            position, inside, is_map = _header(frame, position)
            if inside:
                found += inside
                if found > MAX_OBJECTS:
                    raise InputError(
                        f"message: more than {MAX_OBJECTS} values; send images and numbers as arrays, not as lists"
                    )
                outer.append((left, keyed))
                if len(outer) >= MAX_DEPTH:
                    raise InputError(
                        f"message: nested more than {MAX_DEPTH} deep; expected one map, as the protocol says"
                    )
                left, keyed = inside, is_map
        if not outer:
            break
        left, keyed = outer.pop()
    if position > size:
        raise InputError("message: cut short; send one whole msgpack map a frame")
    if position < size:
        raise InputError(f"message: {size - position} bytes after its end; send one msgpack map a frame")
    if text > MAX_TEXT_BYTES:
        raise InputError(f"message: more than {MAX_TEXT_BYTES} bytes of text; send images and numbers as arrays")


def _header(frame: bytes, position: int) -> tuple[int, int, bool]:
    """Where the header of the list or map at `position` ends, how many values are inside, and whether it is a map."""
    first = frame[position]
    if 0x81 <= first <= 0x8F:
        return position + 1, 2 * (first & 0x0F), True
    if 0x91 <= first <= 0x9F:
        return position + 1, first & 0x0F, False
    if first not in _LISTS and first not in _MAPS:  # what is left: extension types, and 0xC1, which means nothing
        raise InputError(f"message: msgpack type 0x{first:02x} is not part of the protocol")
    is_map = first in _MAPS
    start = position + 1 + (_MAPS[first] if is_map else _LISTS[first])
    if start > len(frame):
        raise InputError("message: cut short; send one whole msgpack map a frame")
    length = int.from_bytes(frame[position + 1 : start], "big")
    return start, 2 * length if is_map else length, is_map


def _check_key(frame: bytes, position: int) -> None:
    """InputError unless the value at `position`, which is no text of at most 31 bytes, may be a key."""
    first = frame[position]
    if not _RAW[first]:
        raise InputError(f"message: a key of a map is text or bytes, got msgpack type 0x{first:02x}")
    length = int.from_bytes(frame[position + 1 : position + 1 + _RAW[first]], "big")
    if length > MAX_KEY_BYTES:
        raise InputError(f"message: a key of a map has at most {MAX_KEY_BYTES} bytes, got one of {length}")


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


def _restorer() -> Callable[[dict[Any, Any]], Any]:
    """What is made of each map of one message."""
    made = 0

    def restored(found: dict[Any, Any]) -> Any:
        nonlocal made
        is_array = b"__ndarray__" in found
        if not is_array and b"__npgeneric__" not in found:
            return found
        made += 1
        if made > MAX_ARRAYS:
            raise InputError(
                f"message: more than {MAX_ARRAYS} arrays and scalars; send numbers that belong together as one"
            )
        return _array(found) if is_array else _scalar(found)

    return restored


def _array(found: Mapping[Any, Any]) -> np.ndarray[Any, Any]:
    dtype, data = _dtype(found), found.get(b"data")
    shape: Any = found.get(b"shape")
    whole = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not isinstance(data, bytes) or not whole or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise InputError(
            f"array: expected data as bytes and shape as a list of at most {MAX_DIMENSIONS} sizes, as the protocol says, got a "
            f"{type(data).__name__} and {shown(shape)}"
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"array: {len(data)} bytes are not a {dtype} array of shape {shown(shape)}")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except (ValueError, TypeError, OverflowError) as error:  # an empty array whose other sizes are too large
        raise InputError(f"array: shape {shown(shape)} ({said(error)})") from None


def _scalar(found: Mapping[Any, Any]) -> Any:
    dtype, data = _dtype(found), found.get(b"data")
    # text would come as such; made to a long text dtype here, a few bytes could fill the memory
    if dtype.kind not in "biuf" or not isinstance(data, (bool, int, float)):
        raise InputError(f"scalar: expected a number and its dtype, got {shown(data)} and {dtype}")
    try:
        with np.errstate(over="ignore"):  # beyond the dtype it is infinite, which whoever takes numbers refuses
            return np.array(data, dtype)[()]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"scalar: not a {dtype} ({said(error)})") from None


def _dtype(found: Mapping[Any, Any]) -> np.dtype[Any]:
    text = found.get(b"dtype")
    # only these forms: np.dtype reads whole structures from text, and pointers
    if not isinstance(text, str) or len(text) > 20 or not _DTYPE.fullmatch(text):
        raise InputError(f"dtype: expected one like '|u1' or '<f4' (no object, void or complex), got {shown(text)}")
    try:
        dtype = _known(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"dtype: {shown(text)} is none ({said(error)})") from None
    if not dtype.itemsize:
        raise InputError(f"dtype: {shown(text)} has no bytes an item; an array of it could have any shape")
    return dtype


_known = lru_cache(64)(np.dtype)
"""The dtype of a text of the form `_DTYPE`."""
