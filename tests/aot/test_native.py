"""What the compiled module refuses: no object, however it is made, ends the process or lets a launcher leave its memory."""

from __future__ import annotations

import array
import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dit4dit import _C

IMAGE = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)


def empty() -> np.ndarray:
    return np.zeros((2, 3, 4, 4), np.float32)


def described(x: np.ndarray, **change: Any) -> tuple:
    """An array as (address, shape, strides in elements, dtype, device); change: other facts."""
    strides = tuple(s // x.itemsize for s in x.strides)
    facts = dict(address=x.ctypes.data, shape=x.shape, strides=strides, dtype=x.dtype.name, device="cpu")
    return tuple((facts | change).values())


def preprocess(views: Any = None, widths: Any = (4,), out: Any = None, filter: Any = "cv2_area") -> np.ndarray:
    out = empty() if out is None else out
    _C.preprocess([IMAGE] if views is None else views, widths, out, filter)
    return out


def refused(error: type[Exception], message: str, **given: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        preprocess(**given)
    assert len(str(caught.value)) < 1000


# -- memory that Python lends ------------------------------------------------------------------------------------------------


def test_ctypes_and_memoryviews_lend_memory():
    """ctypes gives no strides, a cast memoryview no more than its own format."""
    want = preprocess()
    held = (ctypes.c_ubyte * IMAGE.nbytes).from_buffer_copy(IMAGE)
    cast = memoryview(held).cast("B").cast("B", IMAGE.shape)
    assert np.array_equal(preprocess([cast]), want)
    assert np.array_equal(preprocess([memoryview(bytearray(IMAGE)).cast("B", IMAGE.shape)]), want)
    assert np.array_equal(preprocess([(ctypes.c_ubyte * 3 * 8 * 8 * 2).from_buffer_copy(IMAGE)]), want)
    out = (ctypes.c_float * 4 * 4 * 3 * 2)()
    assert np.array_equal(preprocess(out=out), want)


@pytest.mark.parametrize(
    ("view", "error", "message"),
    [
        (np.zeros((2, 8, 8, 3), "V0"), ValueError, r"views\[0\]: expected elements of at least one byte, got 0"),
        (np.zeros((2, 8, 8, 3), "S0"), (ValueError, TypeError), r"views\[0\]: expected"),
        (b"image", ValueError, r"views\[0\]: expected shape .*, got \[5\]"),
        (array.array("B", b"image"), ValueError, r"views\[0\]: expected shape .*, got \[5\]"),
        (memoryview(b"x").cast("B", []), ValueError, r"views\[0\]: expected shape .*, got \[\]"),
        (ctypes.c_ubyte(1), ValueError, r"views\[0\]: expected shape .*, got \[\]"),
        (np.zeros((2, 8, 8, 3), ">f4"), TypeError, r"views\[0\]: expected uint8 in 0\.\.255, got format >f"),
        (np.zeros((2, 8, 8, 3), "M8[s]"), ValueError, r"views\[0\]: expected memory with strides, which"),
        (np.zeros((2, 8, 8, 3), [("x" * 5000, "u1")]), TypeError, r"views\[0\]: .*, got format T\{.*bytes\)$"),
    ],
)
def test_buffers_of_every_kind_are_refused_by_name(view, error, message):
    refused(error, message, views=[view])


def test_arrays_of_pointers_are_refused():
    testbuffer = pytest.importorskip("_testbuffer", reason="CPython's own test module")
    pointers = testbuffer.ndarray([1] * 384, shape=[2, 8, 8, 3], format="B", flags=testbuffer.ND_PIL)
    message = r"views\[0\]: expected memory with strides, which an object of type .*ndarray does"
    refused(ValueError, message, views=[pointers])


def test_a_flags_attribute_is_not_asked():
    class Evil(np.ndarray):
        @property
        def flags(self):
            raise SystemExit

    assert np.array_equal(preprocess(out=empty().view(Evil)), preprocess())
    refused(ValueError, "out: expected memory that can be written", out=np.broadcast_to(np.float32(0), (2, 3, 4, 4)))
    refused(ValueError, "out: expected memory that can be written", out=bytes(384))


def test_memory_is_held_while_it_is_used():
    """A method of another argument, as another thread might, tries to free what a view has lent."""
    memory = bytearray(IMAGE.tobytes())
    view = memoryview(memory).cast("B", IMAGE.shape)
    tried = []

    class Views(list):
        def __getitem__(self, i):
            if i == 1:
                try:
                    view.release()
                    memory.clear()
                except BufferError as error:
                    tried.append(str(error))
            return list.__getitem__(self, i)

        def __len__(self):
            return 2

    class Widths:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            Views([view, view])[1]
            return 4

    out = np.zeros((2, 3, 4, 8), np.float32)
    preprocess([view, view], Widths(), out)
    assert len(tried) == 2
    assert "exported buffer" in tried[0]
    assert np.array_equal(out[..., :4], preprocess())
    view.release()  # given back after the call


# -- tensors by address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shape=(2, -8, 8, 3)), r"extents of at least 0, got \[2, -8, 8, 3\]"),
        (dict(shape=(2**62, 2**62, 8, 3)), r"sizes below 2\^63"),
        (dict(shape=(2, 8, 9, 3), strides=(2**62, 24, 2**60, 1)), r"sizes below 2\^63"),
        (dict(strides=(-(2**62), 24, 3, 1)), r"addresses of 64 bits"),
        (dict(strides=(-(2**63), 24, 3, 1)), r"sizes below 2\^63|addresses of 64 bits"),
        (dict(address=2**64 - 8), "addresses of 64 bits"),
        (dict(address=2**64), "address: expected a whole number from 0 to 18446744073709551615, got an int of"),
        (dict(address=-1), "address: expected a whole number from 0 to 18446744073709551615, got -1"),
        (dict(shape=(1,) * 65, strides=(1,) * 65), "shape: expected at most 64 elements, got 65"),
        (dict(strides=(192, 24, 3)), r"expected 4 strides, got \[192, 24, 3\]"),
        (dict(strides=(192, 24, 2**63, 1)), r"strides\[2\]: expected a whole number from -9223372036854775808"),
        (dict(shape=range(2**40)), "shape: expected at most 64 elements, got 1099511627776"),
        (dict(shape=range(2**70)), r"shape: expected at most 64 elements, got more than 2\^63"),
        (dict(dtype="uint8\0"), r"dtype: expected text without a NUL, got 'uint8\\x00'"),
        (dict(dtype="u" * 10**6), "dtype: expected at most 128 bytes of text, got 1000000"),
        (dict(device="\ud800"), "device: expected text that UTF-8 can hold, got a lone surrogate"),
    ],
)
def test_facts_that_no_memory_can_have(change, message):
    refused(ValueError, r"views\[0\].*" + message, views=[described(IMAGE, **change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(address=1.5), "address: expected a whole number, got 1.5"),
        (dict(shape="2883"), "shape: expected a sequence, got '2883'"),
        (dict(shape=None), "shape: expected a sequence, got None"),
        (dict(shape=(2, 8, "\n" * 500, 3)), r"shape\[2\]: .* whole number, got '(\\x0a){80}\.\.\. \(500 bytes\)'"),
        (dict(dtype=b"uint8"), "dtype: expected a str, got an object of type bytes"),
        (dict(device=IMAGE), "device: expected a str, got an object of type numpy.ndarray"),
    ],
)
def test_facts_of_another_type(change, message):
    refused(TypeError, r"views\[0\]: " + message, views=[described(IMAGE, **change)])


@pytest.mark.parametrize("lend", [lambda x: x, described], ids=["array", "address"])
def test_outputs_that_alias_are_refused(lend):
    """Any two elements in one place, whatever the strides; slices, permutations and mirrors of dense memory are not."""
    memory = np.zeros(4096, np.float32)

    def strided(*strides: int, start: int = 2000) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(memory[start:], (2, 3, 4, 4), [4 * s for s in strides])

    for strides in [(48, 16, 4, 0), (48, 16, 3, 1), (47, 16, 4, 1), (48, 16, 4, 4), (-47, -16, 4, 1), (1, 16, 4, 1)]:
        refused(ValueError, r"out: expected elements that do not overlap, got strides", out=lend(strided(*strides)))
    want = preprocess()
    for strides in [(48, 16, 4, 1), (-48, 16, -4, 1), (1, 2, 6, 24), (100, 33, 8, -2), (16, 32, 1, 4)]:
        out = strided(*strides)
        preprocess(out=lend(out))
        assert np.array_equal(out, want)


def test_an_output_in_an_inputs_memory_is_refused():
    memory = np.zeros(2000, np.uint8)
    view = memory[100:484].reshape(2, 8, 8, 3)
    for start in (0, 100, 200, 480):
        out = memory[start : start + 384].view(np.float32).reshape(2, 3, 4, 4)
        for given in (out, described(out)):
            refused(ValueError, r"out: .* memory of its own, got some that views\[0\] lies in", views=[view], out=given)
    out = memory[484 : 484 + 384].view(np.float32).reshape(2, 3, 4, 4)
    assert np.array_equal(preprocess([view], out=out), preprocess([view]))


def test_unaligned_outputs_are_refused():
    out = np.zeros(385, np.uint8)[1:].view(np.float32).reshape(2, 3, 4, 4)
    for given in (out, described(out)):
        refused(ValueError, r"out: expected an address that is a multiple of 4 \(float32\), got", out=given)


def test_widths_that_overflow_are_refused():
    for widths in ([2**62, 2**62], [2**63 - 1, 1], [40000, 4], [-4, 8]):
        refused(ValueError, "widths: expected positive numbers up to 32768, got", views=[IMAGE] * 2, widths=widths)
    refused(ValueError, r"widths\[0\]: expected a whole number from", widths=[2**63])
    refused(ValueError, "views: expected at most 32768 elements, got 40000", views=[IMAGE] * 40000, widths=[1] * 40000)
    refused(ValueError, r"widths: .*got \[1, 1.*\.\.\.\] \(30000 numbers\)", widths=[1] * 30000)
    refused(ValueError, "out: expected extents up to 32768", views=[IMAGE[:1]] * 2, widths=[32768] * 2,
            out=described(empty(), shape=(1, 3, 1, 65536), strides=(1 << 20, 1 << 17, 1 << 16, 1)))  # fmt: skip


# -- objects that are not what they seem -------------------------------------------------------------------------------------


class Loud:
    """Its repr must not be called."""

    def __repr__(self) -> str:
        raise AssertionError("a repr was asked for")


@pytest.mark.parametrize("argument", ["views", "widths", "out", "filter"])
def test_no_repr_is_built(argument):
    huge = [Loud()] * 10**6
    for wrong in (Loud(), huge, tuple(huge), {"a": huge}):
        with pytest.raises((TypeError, ValueError)) as caught:
            preprocess(**{argument: wrong})
        assert len(str(caught.value)) < 300
        assert str(caught.value).startswith(argument)


def test_an_exception_of_an_arguments_method_arrives():
    class Raises:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise KeyError("mine")

        def __index__(self):
            raise KeyError("mine")

    for given in (dict(views=Raises()), dict(widths=Raises()), dict(widths=[Raises()])):
        with pytest.raises(KeyError, match="mine"):
            preprocess(**given)


# -- the GPU's launchers: what they are given is checked before they touch one -------------------------------------------------


@pytest.mark.cuda_build
@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "cuda:99999999999999999999", "cuda:1 "])
def test_devices_that_are_none(device):
    view = 4096, (2, 8, 8, 3), (192, 24, 3, 1), "uint8", device
    out = 1 << 20, (2, 3, 4, 4), (48, 16, 4, 1), "float32", device
    with pytest.raises(ValueError, match=r"out: expected a cuda device such as cuda:0, got cuda:"):
        _C.preprocess_cuda([view], [4], out, "cv2_area", 0)


# -- ends of a process ---------------------------------------------------------------------------------------------------------


def test_a_process_ends_while_a_daemon_thread_is_in_a_launcher(tmp_path):
    """The thread has given up the GIL and cannot have it again: CPython unwinds it, and C++ would abort."""
    script = """
import threading
import numpy as np
from dit4dit import _C

image, started = np.zeros((1, 256, 256, 3), np.uint8), threading.Semaphore(0)

def work():
    out = np.zeros((1, 3, 100, 100), np.float32)
    started.release()
    while True:
        _C.preprocess([image], [100], out, "cv2_area")

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
    started.acquire()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
