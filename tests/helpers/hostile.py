"""Frames that no honest client sends, by what is wrong with them.

`HOSTILE`: the codec refuses them. `HOSTILE_MESSAGES`: they decode, and what looks at the message refuses them: a policy for
LIBERO that has a state. `WELL_FORMED`: what the codec takes, to be mutated.
"""

from __future__ import annotations

import numpy as np
from msgpack import packb
from serving_stand import REQUEST_BYTES, hand

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")


def marked(dtype: object, shape: object, data: object, **more: object) -> dict[object, object]:
    """An array as it is sent."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more}


def array(dtype: object, shape: object, data: object, **more: object) -> bytes:
    return packb(marked(dtype, shape, data, **more))


def scalar(dtype: object, data: object) -> bytes:
    return packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


def image(height: int, width: int, channels: int = 3) -> dict[object, object]:
    return marked("|u1", [height, width, channels], bytes(height * width * channels))


def well_formed(size: int) -> bytes:
    """A published request of about `size` bytes, the yardstick: one image that fills it."""
    return packb(
        {"type": "infer", "request_id": "a", "examples": [{"image": [image(1, max(1, size // 3))], "lang": "go"}]}
    )


HOSTILE = {
    # not one whole value
    "empty": b"",
    "cut short": hand(REQUEST_BYTES)[:-3],
    "more after the end": hand(REQUEST_BYTES) + b"\x00",
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\xc6\xff\xff\xff\xff",
    "text of four billion": b"\xdb\xff\xff\xff\xff",
    "a length cut short": b"\xdc\x01",
    "a length of text cut short": b"\xda\x01",
    "a key cut short": b"\x81\xd9",
    "a number cut short": b"\xcb\x00\x00",
    "20 000 values cut short": b"\xdc\x4e\x1f" + bytes(19_998),
    # too many values, too deep
    "lists in lists": b"\x91" * 100_000,
    "maps in maps": b"\x81\xa1a" * 100_000,
    "many empty lists": b"\xdd\x00\x01\x00\x00" + b"\x90" * 65536,
    "many empty maps": b"\xdd\x00\x01\x00\x00" + b"\x80" * 65536,
    "many numbers": packb([0] * 100_000),
    "many keys": packb({f"{i}": 0 for i in range(20_000)}),
    "a list of lists of 20 000 each": b"\xdc\x4e\x1f" + (b"\xdc\x4e\x1f" + b"\xc0" * 19_999) * 3,
    "large lists in large lists": b"\xdc\x4e\x00" * 1000,
    # what msgpack has and the protocol has not
    "extension": b"\xc7\x04\x01abcd",
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "never used": b"\xc1",
    "bad UTF-8": b"\xa2\xff\xfe",
    "half of a pair in UTF-8": b"\xa3\xed\xa0\x80",
    "20 000 values and then an extension": b"\xdc\x4e\x1f" + bytes(19_998) + b"\xc7\x04\x01abcd",
    # keys
    "a list as key": b"\x81\x90\x01",
    "a number as key": b"\x81\x01\x01",
    "a map as key": b"\x81\x80\x01",
    "none as key": b"\x81\xc0\x01",
    "an array as key": b"\x81" + array("|u1", [1], b"a") + b"\x01",
    "a long key": packb({"k" * 257: 1}),
    "a long key of bytes": packb({b"k" * 257: 1}),
    "a key of 8 MB": packb({"observation": {"k" * 8_000_000: 1}}),
    "a number as key behind 9000 keys": packb({**{f"{i}": 0 for i in range(9000)}, 1: 0}),
    # text
    "2 MB of text": packb({"type": "x" * 2_000_000}),
    "8 MB of text of which one letter is wide": packb({"type": "x" * 8_000_000 + "\N{GRINNING FACE}"}),
    "many long texts": packb(["\N{LATIN SMALL LETTER E WITH ACUTE}" * 50_000] * 100),
    "texts of 255 bytes": packb(["x" * 255] * 19_000),
    # dtypes
    "object dtype": array("|O", [1], bytes(8)),
    "object dtype in words": array("O8", [1], bytes(8)),
    "void dtype": array("|V8", [1], bytes(8)),
    "structure": array("f4,f4", [1], bytes(8)),
    "complex dtype": array("<c8", [1], bytes(8)),
    "text with pointers": array("T16", [1], bytes(16)),
    "code": array("__import__('os')", [1], bytes(8)),
    "dtype is no text": array([["a", "f4"]], [1], bytes(4)),
    "dtype is an array": array(marked("|u1", [2] * 5, bytes(32)), [1], bytes(4)),
    "dtype of 900 kB": array("<f" + "4" * 900_000, [1], bytes(4)),
    "no such size": array("<f5", [1], bytes(5)),
    "no dtype": packb({b"__ndarray__": True, b"data": b"", b"shape": [0]}),
    "empty bytes": packb({"type": marked("|S0", [7] * 5, b"")}),
    "empty text": packb({"type": marked("<U0", [7] * 5, b"")}),
    "empty text in many zeros": array("<U0000000", [2**20], b""),
    "empty bytes in 22 dimensions": packb({"type": marked("S0", [7] * 22, b"")}),
    # shapes
    "fewer bytes than the shape": array("<f4", [1000, 1000], bytes(4)),
    "more bytes than the shape": array("|u1", [1], bytes(1_000_000)),
    "negative size": array("<f4", [-1, -1], bytes(4)),
    "huge and empty": array("<f4", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], b""),
    "size over 2^31": array("<f4", [0, 2**40], b""),
    "size is a float": array("<f4", [1.0], bytes(4)),
    "size is true": array("<f4", [True], bytes(4)),
    "size is a list": array("<f4", [[1]], bytes(4)),
    "too many sizes": array("<f4", [1] * 6, bytes(4)),
    "20 000 sizes": array("<f4", [1] * 19_000, bytes(4)),
    "20 dimensions of two": packb({"type": marked("|u1", [2] * 20, bytes(2**20))}),
    "shape is text": array("<f4", "1", bytes(4)),
    "shape is a map": array("<f4", {"a": 1}, bytes(4)),
    "shape is an array": array("<f4", marked("<i8", [1], bytes(8)), bytes(4)),
    "no shape": packb({b"__ndarray__": True, b"data": b"", b"dtype": "|u1"}),
    "data is text": array("|u1", [1], "a"),
    "data is an array": array("|u1", [1], marked("|u1", [1], b"a")),
    "no data": packb({b"__ndarray__": True, b"shape": [0], b"dtype": "|u1"}),
    "1500 arrays": packb([marked("|u1", [1], b"a")] * 1500),
    # scalars
    "scalar of a long text dtype": scalar("<U9999999", 1),
    "scalar of empty bytes": scalar("|S0", b""),
    "scalar from bytes": scalar("<f4", b"1"),
    "scalar from a list": scalar("<f4", [1] * 10_000),
    "scalar from an array": scalar("<f4", marked("<f4", [1], bytes(4))),
    "scalar out of range": scalar("|i1", 300),
    "scalar of a date": scalar("<M8[ns]", 1),
    "scalar without data": packb({b"__npgeneric__": True, b"dtype": "<f4"}),
    "2000 scalars": packb([{b"__npgeneric__": True, b"data": 1, b"dtype": "<f4"}] * 2000),
}


def _published(**changed: object) -> bytes:
    example = {"image": [image(32, 64)], "lang": "go", "state": marked("<f4", [1, 16], bytes(64))}
    return packb({"type": "infer", "examples": [{**example, **changed}]})


def _raw(*, images: object = None, state: object = None, **changed: object) -> bytes:
    views = {"primary_image": image(48, 48), "wrist_image": image(48, 48)}
    values = {name: marked("<f4", [1], bytes(4)) for name in NAMES}
    given = {
        "images": {**views, **images} if isinstance(images, dict) else views if images is None else images,
        "state": {**values, **state} if isinstance(state, dict) else values if state is None else state,
    }
    return packb({"type": "infer", "observation": given, "instruction": "go", **changed})


def _request(**fields: object) -> bytes:
    return packb(fields)


LONG = "abcdefgh" * 30_000
TEXTS = ["1"] * 9_000 + [LONG]
"""What NumPy would make 9001 texts of 240 000 letters of: 8 GB."""
NAN = np.array([np.nan], "<f4").tobytes()

HOSTILE_MESSAGES = {
    # no request
    "a list": packb([1, 2]),
    "no value": packb(None),
    "a text": packb(LONG),
    "an array alone": array("|u1", [2] * 5, bytes(32)),
    "20 000 keys of nothing": packb({f"{i}": 0 for i in range(9_990)}),
    "type is an array": _request(type=marked("|u1", [10] * 5, bytes(100_000))),
    "type is text in an array": _request(type=marked("<U60000", [4], bytes(960_000))),
    "type is a long text": _request(type=LONG),
    "type is one letter 80 times": _request(type="a" * 80),
    "type is a list": _request(type=["infer"] * 15_000),
    "type is a list in lists": _request(type=[[[[[["infer"] * 9]] * 9]] * 9]),
    "type is a map": _request(type={f"{i}": i for i in range(9_000)}),
    "type is bytes": _request(type=bytes(1_000_000)),
    "type is a number": _request(type=2**63),
    # reset
    "seed is an array": _request(type="reset", seed=marked("<i8", [1], bytes(8))),
    "seed is a large array": _request(type="reset", seed=marked("<i8", [10] * 5, bytes(800_000))),
    "seed is a scalar": _request(type="reset", seed={b"__npgeneric__": True, b"data": 1, b"dtype": "<i8"}),
    "seed is a text": _request(type="reset", seed=LONG),
    "seed is negative": _request(type="reset", seed=-1),
    "seed is true": _request(type="reset", seed=True),
    "seed is a list": _request(type="reset", seed=[0] * 15_000),
    "chunk is none": _request(type="reset", seed=1, chunk=None),
    "chunk is an array": _request(type="reset", seed=1, chunk=marked("<i8", [], bytes(8))),
    # a request id of any kind does not help
    "request id is an array": _request(type="kill", request_id=marked("|u1", [10] * 5, bytes(100_000))),
    "request id is a long text": _request(type="kill", request_id=LONG),
    "request id is a map": _request(type="kill", request_id={f"{i}": i for i in range(9_000)}),
    # published examples
    "no examples": _request(type="infer"),
    "examples and observation": _request(examples=[], observation={}),
    "examples is an array": _request(examples=marked("|u1", [10] * 5, bytes(100_000))),
    "15 000 examples": _request(examples=[0] * 15_000),
    "64 empty examples": _request(examples=[{}] * 64),
    "lang is an array": _published(lang=marked("<U60000", [4], bytes(960_000))),
    "lang is long": _published(lang=LONG),
    "lang is spaces": _published(lang=" " * 4096),
    "lang is 15 000 texts": _published(lang=["go"] * 15_000),
    "no image": _published(image=None),
    "image is a list of nothing": _published(image=[[]]),
    "image is 15 000 numbers": _published(image=[[0] * 15_000]),
    "image is texts of which one is long": _published(image=[TEXTS]),
    "image is a text": _published(image=LONG),
    "image is text in an array": _published(image=[marked("<U60000", [4], bytes(960_000))]),
    "image is floats": _published(image=marked("<f8", [64, 64, 3], bytes(64 * 64 * 3 * 8))),
    "image is empty": _published(image=image(0, 64)),
    "image has one channel": _published(image=image(512, 512, 1)),
    "image of 1 x 32769": _published(image=image(1, 32_769)),
    "image of 16 x 65536": _published(image=image(16, 65_536)),
    "image is larger than the model takes": _published(image=image(1600, 3200)),
    "state is 15 000 numbers": _published(state=[0.5] * 15_000),
    "state is numbers in lists": _published(state=[[[[[0.5] * 16]]]]),
    "state is texts of which one is long": _published(state=TEXTS),
    "state is numbers and a long text": _published(state=[0.5] * 9_000 + [LONG]),
    "state is text in arrays": _published(state=[marked("<U60000", [1], bytes(240_000)), [LONG] * 2]),
    "state is a large array": _published(state=marked("<f8", [1_000_000], bytes(8_000_000))),
    "state is NaN": _published(state=marked("<f4", [1, 16], NAN * 16)),
    "state is beyond float32": _published(state=[1e300] * 16),
    "state is dates": _published(state=marked("<M8[ns]", [1, 16], bytes(128))),
    # raw observations
    "observation is an array": _request(observation=marked("|u1", [10] * 5, bytes(100_000)), instruction="go"),
    "observation of 9000 keys": _request(observation={f"{i}": 0 for i in range(9_000)}, instruction="go"),
    "observation of a key of bytes": _request(observation={b"k" * 256: 0}, instruction="go"),
    "images is a list": _raw(images=[0] * 15_000),
    "images of 5000 keys": _raw(images={f"{i}": 0 for i in range(5_000)}),
    "images of a key near a view's": _raw(images={"primary_imag" * 6: 0}),
    "view is a text": _raw(images={"wrist_image": LONG}),
    "view is numbers": _raw(images={"wrist_image": [[0] * 15_000]}),
    "view is texts of which one is long": _raw(images={"wrist_image": TEXTS}),
    "view is a map": _raw(images={"wrist_image": {f"{i}": 0 for i in range(9_000)}}),
    "view is empty": _raw(images={"wrist_image": image(48, 0)}),
    "view in five dimensions": _raw(images={"wrist_image": marked("|u1", [10] * 5, bytes(100_000))}),
    "view of 1 x 32769": _raw(images={"wrist_image": image(1, 32_769)}),
    "view of 2161 x 2161": _raw(images={"wrist_image": image(2161, 2161)}),
    "view of 3841 x 3": _raw(images={"wrist_image": image(3841, 3)}),
    "state of 9000 keys": _raw(state={f"{i}": 0 for i in range(9_000)}),
    "state of a key of 256 bytes": _raw(state={"k" * 256: 0}),
    "value is 15 000 numbers": _raw(state={"x": [0.5] * 15_000}),
    "value is 15 000 numbers in lists": _raw(state={"x": [[0.5]] * 7_000}),
    "value is texts of which one is long": _raw(state={"x": TEXTS}),
    "value is a text": _raw(state={"x": LONG}),
    "value is true": _raw(state={"x": True}),
    "value is a large array": _raw(state={"x": marked("<f8", [1_000_000], bytes(8_000_000))}),
    "value is 900 arrays": _raw(state={"x": [marked("<f4", [1], bytes(4))] * 900}),
    "value is NaN": _raw(state={"x": marked("<f4", [1], NAN)}),
    "value is beyond float32": _raw(state={"x": [1e300]}),
    "no state": _raw(state=[]),
    "instruction is an array": _raw(instruction=marked("<U60000", [4], bytes(960_000))),
    "instruction is long": _raw(instruction=LONG),
    "instruction is missing": _raw(instruction=None),
    "instruction is a number": _raw(instruction=2**63),
    "instruction is a list": _raw(instruction=["go"] * 15_000),
}

WELL_FORMED = {
    "published": _published(),
    "published, by hand": hand(REQUEST_BYTES),
    "raw": _raw(),
    "reset": _request(type="reset", seed=7, chunk=1, request_id="a"),
    "ping": _request(type="ping", request_id=1),
    "scalars": _raw(state={"x": {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f8"}}),
}
