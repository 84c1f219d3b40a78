"""What the compiled module's Driver and Kernel refuse: no image, argument or empty object ends the process."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from elf import elf

from dit4dit import _C


def load(driver: _C.Driver, **change: Any) -> Any:
    given = dict(image=elf(), entry="adaln", device=0, threads=32, shared=0, arguments=[("n", "i32")], scratch=2)
    return driver.load(**given | change)


def test_an_object_that_holds_nothing_says_so(fake):
    """Memory that no constructor has seen would be read, and freed."""
    driver, kernel = _C.Driver.__new__(_C.Driver), _C.Kernel.__new__(_C.Kernel)
    for use in (
        lambda: driver.version,
        lambda: load(driver),
        lambda: kernel.entry,
        lambda: kernel.launch([1], 0, [1]),
    ):
        with pytest.raises(TypeError, match=r"self: expected a .*, got one made by __new__ alone, which holds nothing"):
            use()
    with pytest.raises(TypeError, match="No constructor defined"):
        kernel.__init__()
    for failing in ("/none", None):
        with pytest.raises((RuntimeError, TypeError)):
            driver.__init__(failing)
        with pytest.raises(TypeError, match="holds nothing"):
            load(driver)
    driver.__init__(str(fake.library))
    assert driver.version == 13000
    driver.__init__("/none")  # pybind11 leaves out a second one
    assert load(driver).entry == "adaln"


def test_neither_made_nor_copied_nor_taken_for_another(fake):
    kernel = load(fake.open())
    for use, message in (
        (lambda: _C.Kernel(), "No constructor defined"),
        (lambda: object.__new__(_C.Kernel), "is not safe"),
        (lambda: type("Mine", (_C.Kernel,), {}), "not an acceptable base type"),
        (lambda: type("Mine", (_C.Driver,), {}), "not an acceptable base type"),
        (lambda: copy.copy(kernel), "cannot pickle"),
        (lambda: copy.deepcopy(fake.open()), "cannot pickle"),
        (lambda: pickle.dumps(kernel), "cannot pickle"),
        (
            lambda: _C.Kernel.launch(fake.open(), [1], 0, [1]),
            "self: expected a Kernel, .*, got an object of type .*Driver$",
        ),
        (lambda: _C.Driver.version.__get__(kernel), "self: expected a Driver, .*, got an object of type .*Kernel$"),
        (lambda: _C.Driver.__init__(kernel, "x"), "invalid or missing `self`"),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def test_a_kernel_outlives_its_driver(fake):
    kernel = load(fake.open())
    gc.collect()  # of the driver there was no other reference
    kernel.launch([1], 0, [7])
    assert fake.calls("cuLaunchKernel")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(image="text"), TypeError, "image: expected bytes, got 'text'"),
        (dict(entry="a\0b"), ValueError, r"entry: expected text without a NUL, got 'a\\x00b'"),
        (dict(entry="a" * 10**6), ValueError, "entry: expected at most 4096 bytes of text, got 1000000"),
        (dict(device=-1), ValueError, "device: expected a whole number from 0 to 2147483647, got -1"),
        (dict(threads=-32), ValueError, "threads: expected a whole number from 0 to 4294967295, got -32"),
        (dict(threads=2**32 + 32), ValueError, "threads: expected a whole number"),
        (dict(shared=2**31), ValueError, "shared: expected a whole number from 0 to 2147483647, got 2147483648"),
        (dict(shared=2**31 - 1), RuntimeError, "needs 2147484671 bytes of shared memory, this device has 232448"),
        (dict(scratch=2**31), ValueError, "scratch: expected a whole number from 0 to 4096, got 2147483648"),
        (dict(scratch=-1), ValueError, "scratch: expected a whole number from 0 to 4096, got -1"),
        (dict(arguments=[("x",)]), ValueError, r"arguments\[0\]: expected \(name, kind\), got 1 elements"),
        (dict(arguments=[("x", "i32", 1)]), ValueError, r"arguments\[0\]: expected at most 2 elements, got 3"),
        (dict(arguments=[("x", "i32")] * 5000), ValueError, "arguments: expected at most 4096 elements, got 5000"),
        (dict(arguments=["ab"]), TypeError, r"arguments\[0\]: expected a sequence, got 'ab'"),
    ],
)
def test_what_no_kernel_is_loaded_from(fake, change, error, message):
    with pytest.raises(error, match=message):
        load(fake.open(), **change)


def test_no_truncated_image_reaches_the_driver(fake):
    """It is given no length and reads as far as the headers say."""
    image = elf()
    for end in range(len(image)):
        with pytest.raises(ValueError, match="image: expected"):
            load(fake.open(), image=image[:end])
    assert not fake.calls("cuModuleLoadData")
    for at, value in itertools.product(range(4, len(image)), (0, 0x7F, 0xFF)):
        changed = image[:at] + bytes([value]) + image[at + 1 :]
        try:
            load(fake.open(), image=changed)
        except ValueError as error:
            assert str(error).startswith("image: expected")  # noqa: PT017


@pytest.mark.parametrize(
    ("grid", "stream", "arguments", "error", "message"),
    [
        ([], 0, [1], ValueError, "grid: expected 1 to 3 numbers"),
        ([1] * 4, 0, [1], ValueError, "grid: expected 1 to 3 numbers"),
        ([1] * 10**6, 0, [1], ValueError, "grid: expected at most 64 elements, got 1000000"),
        ([-1], 0, [1], ValueError, r"grid\[0\]: expected 1 to 2147483647, got -1"),
        ([2**31], 0, [1], ValueError, r"grid\[0\]: expected 1 to 2147483647, got 2147483648"),
        ([1], -1, [1], ValueError, "stream: expected a whole number from 0 to"),
        ([1], 0, [2**64], ValueError, r"arguments\[0\]: expected a number of 64 bits, got an int of more than 64 bits"),
        ([1], 0, [np.int64(1)], TypeError, r"arguments\[0\]: expected an int or a float, got an object of type numpy"),
        ([1], 0, [1, 1], ValueError, "arguments: expected 1 values, got 2"),
        ([1], 0, range(2**33), ValueError, "arguments: expected at most 4096 elements"),
        ([1], 0, None, TypeError, "arguments: expected a sequence, got None"),
    ],
)
def test_what_no_kernel_is_launched_with(fake, grid, stream, arguments, error, message):
    with pytest.raises(error, match=message):
        load(fake.open()).launch(grid, stream, arguments)
    assert not fake.calls("cuLaunchKernel")


def test_a_real_number_that_float32_lacks_is_refused(fake):
    kernel = load(fake.open(), arguments=[("eps", "fp32")])
    for value in (1e39, -1e300, 10**18 * 10**18 * 10**3 % 2**63):
        if abs(value) > 3.5e38:
            with pytest.raises(ValueError, match="adaln: eps: expected a number that a float holds"):
                kernel.launch([1], 0, [value])
    for value in (3.4e38, float("inf"), float("nan"), 2**62):
        kernel.launch([1], 0, [value])


def test_libraries_that_are_none():
    for library, error, message in [
        ("/etc/passwd", RuntimeError, "no CUDA driver: /etc/passwd: "),
        ("", RuntimeError, "has no cuInit"),
        ("libm.so.6\0x", ValueError, r"library: expected text without a NUL, got 'libm\.so\.6\\x00x'"),
        ("x" * 10**6, ValueError, "library: expected at most 4096 bytes of text, got 1000000"),
        (None, TypeError, "library: expected a str, got None"),
    ]:
        with pytest.raises(error, match=message):
            _C.Driver(library)
