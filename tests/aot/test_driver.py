"""From Python to cuLaunchKernel, with a driver that records: what is packed is what the machine code reads, and nothing that a
kernel was not compiled for gets through.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from elf import elf

from dit4dit import _C
from dit4dit.errors import CudaError, DeviceError

ELF = elf()
ARGUMENTS = [
    ("x", "*bf16:16"),
    ("rows", "i32"),
    ("stride", "i32:16"),
    ("count", "i64"),
    ("eps", "fp32"),
    ("out", "*fp32"),
]
VALUES: list[Any] = [0x7F00_0000_0010, -7, 48, 2**40 + 1, 1e-5, 0x7F00_0000_0003]
SIZES = "8 4 4 8 4 8 8 8"


def load(fake, arguments=ARGUMENTS, shared=16, threads=128, device=0, image=ELF) -> Any:
    return fake.open().load(image, "adaln", device, threads, shared, arguments, 2)


def unpack(kind: str, text: str) -> int | float:
    letter = "Q" if kind.startswith("*") else {"i32": "i", "i64": "q", "fp32": "f"}[kind.removesuffix(":16")]
    return struct.unpack("<" + letter, bytes.fromhex(text))[0]


def test_every_cubin_is_loaded_and_gets_its_arguments(small_build, fake):
    from dit4dit.aot_build.compiler import parameters

    driver = fake.open()
    rows = [row for kernels in small_build.kernels.values() for row in kernels.values()]
    assert {kind for row in rows for _, kind in row.arguments} >= {
        "*bf16:16",
        "*fp32:16",
        "*i64:16",
        "*fp64:16",
        "i32",
        "fp32",
    }
    for n, row in enumerate(rows):
        image = small_build.image(row)
        read = parameters(image, row.entry)
        fake.set("PARAMETERS", " ".join(str(size) for _, size in read))
        given = {
            name: 0.5 + i if kind == "fp32" else 4096 * (n + 1) + 16 * i + (not kind.endswith(":16"))
            for i, (name, kind) in enumerate(row.arguments)
        }
        kernel = driver.load(image, row.entry, 0, row.threads, row.shared, row.arguments, row.scratch)
        kernel.launch((3, 2), 0xABC, list(given.values()))
        call = fake.calls("cuLaunchKernel")[-1]
        assert len(call["parameters"]) == len(row.arguments) + 2
        got = {name: unpack(kind, text) for (name, kind), text in zip(row.arguments, call["parameters"], strict=False)}
        assert got == given
        assert call["parameters"][-2:] == ["00" * 8] * 2
        assert (call["grid"], call["block"], call["stream"]) == ([3, 2, 1], [row.threads, 1, 1], 0xABC)
        assert (call["shared"], call["extra"]) == (row.shared, False)
        assert fake.calls("cuModuleGetFunction")[-1]["name"] == row.entry


def test_bits_of_every_kind_of_argument(fake):
    fake.set("PARAMETERS", SIZES)
    load(fake).launch((1,), 0, VALUES)
    (call,) = fake.calls("cuLaunchKernel")
    got = [unpack(kind, text) for (_, kind), text in zip(ARGUMENTS, call["parameters"], strict=False)]
    assert got == [*VALUES[:4], struct.unpack("f", struct.pack("f", 1e-5))[0], VALUES[5]]
    # a whole number where the kernel takes a real one is that number
    load(fake).launch((1,), 0, [*VALUES[:4], 2, VALUES[5]])
    assert unpack("fp32", fake.calls("cuLaunchKernel")[-1]["parameters"][4]) == 2.0


def test_a_programmatic_launch_is_the_same_but_for_its_attribute(fake):
    """By cuda.h's own types on the driver's side: configuration and attribute lie as they do there."""
    fake.set("PARAMETERS", SIZES)
    kernel = load(fake, shared=48, device=1)
    kernel.launch((3, 2, 5), 0xABC, VALUES)
    kernel.launch((3, 2, 5), 0xABC, VALUES, programmatic=True)
    kernel.launch((3, 2, 5), 0xABC, VALUES, programmatic=False)
    (plain, again), (early,) = fake.calls("cuLaunchKernel"), fake.calls("cuLaunchKernelEx")
    assert (early["attributes"], early["programmatic"]) == (1, 1)
    assert (early["grid"], early["block"], early["shared"], early["stream"]) == ([3, 2, 5], [128, 1, 1], 48, 0xABC)
    changed = {"call": "cuLaunchKernel", "attributes": 0, "programmatic": 0}
    assert early | changed == plain == again
    with pytest.raises(TypeError, match="programmatic: expected True or False, got 1"):
        kernel.launch((1,), 0, VALUES, programmatic=1)
    with pytest.raises(ValueError, match="adaln: x: expected an address, got null"):
        kernel.launch((1,), 0, [0, *VALUES[1:]], programmatic=True)


def test_a_driver_without_such_launches_launches_plainly(fake, old_library):
    assert fake.open().programmatic
    fake.library = old_library
    driver = fake.open()
    assert not driver.programmatic
    load(fake).launch((1,), 0, VALUES, programmatic=True)
    assert len(fake.calls("cuLaunchKernel")) == 1
    assert not fake.calls("cuLaunchKernelEx")


def test_the_devices_own_context_is_current_for_the_call_alone(fake):
    driver = fake.open()
    kernels = [driver.load(ELF, "adaln", device, 32, 0, [], 2) for device in (0, 1, 0)]
    for kernel in kernels:
        kernel.launch((1,), 0, [])
    contexts = [0xC0 + 100, 0xC0 + 101, 0xC0 + 100]
    assert [call["context"] for call in fake.calls("cuModuleLoadData")] == contexts
    assert [call["context"] for call in fake.calls("cuLaunchKernel")] == contexts
    assert all(call["header"] == 64 for call in fake.calls("cuModuleLoadData"))
    assert len(fake.calls("cuDevicePrimaryCtxRetain")) == 2, "a context is retained once"
    assert len(fake.calls("cuCtxPushCurrent")) == len(fake.calls("cuCtxPopCurrent")) == 6


def test_much_shared_memory_is_asked_for(fake):
    load(fake, shared=47 << 10)  # the kernel declares 1024 bytes itself, and 48 KiB need no asking
    assert not fake.calls("cuFuncSetAttribute")
    for shared in ((47 << 10) + 1, 100_000):
        load(fake, shared=shared)
        call = fake.calls("cuFuncSetAttribute")[-1]
        assert (call["dynamic_shared"], call["value"]) == (True, shared)
    assert fake.calls("cuFuncSetCacheConfig")[0]["shared"]
    fake.set("OPTIN", "101023")
    with pytest.raises(RuntimeError, match=r"adaln: needs 101024 bytes of shared memory, this device has 101023"):
        load(fake, shared=100_000)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, 0, ValueError, "adaln: x: expected an address, got null"),
        (0, 0x7F00_0000_0008, ValueError, r"adaln: x: expected an address that is a multiple of 16 \(\*bf16:16\), got"),
        (0, 1.5, TypeError, r"adaln: x: expected an address, got 1\.5"),
        (1, 2**31, ValueError, "adaln: rows: expected a number of 32 bits, got 2147483648"),
        (1, -(2**31) - 1, ValueError, "adaln: rows: expected a number of 32 bits"),
        (1, 7.0, TypeError, "adaln: rows: expected a whole number, got 7"),
        (1, True, TypeError, r"arguments\[1\]: expected an int or a float, got True"),
        (2, 8, ValueError, r"adaln: stride: expected a number that is a multiple of 16 \(i32:16\), got 8"),
        (4, None, TypeError, r"arguments\[4\]: expected an int or a float, got None"),
    ],
)
def test_what_the_kernel_was_not_compiled_for_is_refused(fake, position, value, error, message):
    values = list(VALUES)
    values[position] = value
    with pytest.raises(error, match=message):
        load(fake).launch((1,), 0, values)
    assert not fake.calls("cuLaunchKernel")


def test_wrong_counts_and_grids_are_refused(fake):
    kernel = load(fake)
    with pytest.raises(ValueError, match="adaln: arguments: expected 6 values, got 5"):
        kernel.launch((1,), 0, VALUES[:-1])
    for grid, message in [
        ((), "expected 1 to 3 numbers"),
        ((1, 1, 1, 1), "expected 1 to 3 numbers"),
        ((0,), r"grid\[0\]: expected 1 to 2147483647, got 0"),
        ((1, 65536), r"grid\[1\]: expected 1 to 65535, got 65536"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernel.launch(grid, 0, VALUES)
    for wrong, message in [
        ({"image": b"// ptx"}, r"image: expected machine code \(ELF\)"),
        ({"threads": 48}, "threads: expected a multiple of 32"),
        ({"arguments": [("x", "fp16")]}, "x: expected a kind such as"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(fake, **wrong)
    assert not fake.calls("cuLaunchKernel")


CALLS = [
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuDeviceGetAttribute",
    "cuFuncSetCacheConfig",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
]


@pytest.mark.parametrize("call", CALLS)
def test_no_error_of_the_driver_is_swallowed(fake, call):
    early = call == "cuLaunchKernelEx"
    fake.set("FAIL", f"{call}=1")
    with pytest.raises(CudaError, match=rf"{call}.*: CUDA_ERROR_INVALID_VALUE \(invalid argument\)$") as caught:
        load(fake, shared=100_000).launch((1,), 0, VALUES, early)
    assert not isinstance(caught.value, DeviceError)
    fake.set("FAIL", f"{call}=700")
    with pytest.raises(DeviceError, match=rf"{call}.*: CUDA_ERROR_ILLEGAL_ADDRESS .*must restart"):
        load(fake, shared=100_000).launch((1,), 0, VALUES, early)
    pushed, popped = len(fake.calls("cuCtxPushCurrent")), len(fake.calls("cuCtxPopCurrent"))
    assert popped == (0 if call == "cuCtxPushCurrent" else pushed), "the caller's context is back"


def test_an_error_without_a_name(fake):
    fake.set("FAIL", "cuLaunchKernel=12345")
    with pytest.raises(CudaError, match=r"adaln: cuLaunchKernel: error 12345 \(unknown to this driver\)"):
        load(fake).launch((1,), 0, VALUES)


def test_machines_without_a_driver_or_with_half_a_one():
    with pytest.raises(RuntimeError, match=r"no CUDA driver: .*libnowhere\.so"):
        _C.Driver("libnowhere.so")
    with pytest.raises(RuntimeError, match=r"libm\.so\.6: this CUDA driver has no cuInit; update it"):
        _C.Driver("libm.so.6")


def test_version(fake):
    fake.set("VERSION", "12040")
    assert fake.open().version == 12040


def test_sticky_errors_are_those_that_end_a_process(fake):
    """By cuda.h's own words, where the toolkit is."""
    header = Path("/usr/local/cuda/include/cuda.h")
    if not header.is_file():
        pytest.skip("needs the CUDA toolkit's cuda.h")
    comments = re.findall(r"/\*\*((?:(?!/\*\*).)*?)\*/\s*CUDA_ERROR_\w+\s*=\s*(\d+)", header.read_text(), re.DOTALL)
    ending = {
        int(code)
        for text, code in comments
        if "must be terminated and relaunched" in " ".join(text.split()).replace("* ", "")
    }
    assert len(ending) >= 8
    for code in ending:
        fake.set("FAIL", f"cuLaunchKernel={code}")
        with pytest.raises(DeviceError):
            load(fake).launch((1,), 0, VALUES)
