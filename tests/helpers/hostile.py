"""Bytes that no honest client sends."""

from __future__ import annotations

import msgpack
from serving_stand import REQUEST_BYTES, hand


def array(dtype: object, shape: object, data: object, **more: object) -> bytes:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more})


HOSTILE = {
    "empty": b"",
    "cut short": hand(REQUEST_BYTES)[:-3],
    "more after the end": hand(REQUEST_BYTES) + b"\x00",
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\xc6\xff\xff\xff\xff",
    "text of four billion": b"\xdb\xff\xff\xff\xff",
    "a length cut short": b"\xdc\x01",
    "lists in lists": b"\x91" * 100_000,
    "maps in maps": b"\x81\xa1a" * 100_000,
    "many empty lists": b"\xdd\x00\x01\x00\x00" + b"\x90" * 65536,
    "large lists in large lists": b"\xdc\x4e\x00" * 1000,
    "extension": b"\xc7\x04\x01abcd",
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "never used": b"\xc1",
    "bad UTF-8": b"\xa2\xff\xfe",
    "a list as key": b"\x81\x90\x01",
    "a number as key": b"\x81\x01\x01",
    "object dtype": array("|O", [1], bytes(8)),
    "object dtype in words": array("O8", [1], bytes(8)),
    "void dtype": array("|V8", [1], bytes(8)),
    "structure": array("f4,f4", [1], bytes(8)),
    "complex dtype": array("<c8", [1], bytes(8)),
    "text with pointers": array("T16", [1], bytes(16)),
    "code": array("__import__('os')", [1], bytes(8)),
    "dtype is no text": array([["a", "f4"]], [1], bytes(4)),
    "no such size": array("<f5", [1], bytes(5)),
    "no dtype": msgpack.packb({b"__ndarray__": True, b"data": b"", b"shape": [0]}),
    "fewer bytes than the shape": array("<f4", [1000, 1000], bytes(4)),
    "negative size": array("<f4", [-1, -1], bytes(4)),
    "huge and empty": array("<f4", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], b""),
    "size over 2^31": array("<f4", [0, 2**40], b""),
    "size is a float": array("<f4", [1.0], bytes(4)),
    "size is true": array("<f4", [True], bytes(4)),
    "too many sizes": array("<f4", [1] * 33, bytes(4)),
    "shape is text": array("<f4", "1", bytes(4)),
    "data is text": array("|u1", [1], "a"),
    "scalar of a long text dtype": msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "<U9999999"}),
    "scalar from bytes": msgpack.packb({b"__npgeneric__": True, b"data": b"1", b"dtype": "<f4"}),
    "scalar out of range": msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|i1"}),
}
