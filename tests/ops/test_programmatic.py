"""Programmatic launches: off unless asked for, where the code waits, and never past the block that asks."""

from __future__ import annotations

import contextvars
import threading
from types import SimpleNamespace

import pytest
import torch

from dit4dit.ops import native, programmatic
from dit4dit.ops.dispatch import find

GPU = torch.device("cuda", 0)


def test_off_by_default_and_restored_by_whatever_ends_a_block():
    assert not programmatic.triton_kernels("90")
    with programmatic.launches(True):
        assert programmatic.triton_kernels("90")
        with programmatic.plainly():
            assert not programmatic.triton_kernels("90")
            with programmatic.launches(True):
                assert programmatic.triton_kernels("90")
        assert programmatic.triton_kernels("90")
        with pytest.raises(KeyError), programmatic.plainly():
            raise KeyError
        assert programmatic.triton_kernels("90")
    assert not programmatic.triton_kernels("90")
    seen: list[bool] = []
    failing = programmatic.around(True, lambda: seen.append(programmatic.triton_kernels("90")) or [][0])
    with pytest.raises(IndexError):
        failing()
    assert seen == [True]
    assert not programmatic.triton_kernels("90")


def test_other_threads_launch_as_they_are_asked():
    seen: list[bool] = []
    with programmatic.launches(True):
        other = threading.Thread(target=lambda: seen.append(programmatic.triton_kernels("90")))
        other.start()
        other.join()
        contextvars.Context().run(lambda: seen.append(programmatic.triton_kernels("90")))
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [("80", False), ("89", False), ("90", True), ("100", True), ("120", True), ("interpreter", False)],
)
def test_triton_kernels_from_hopper_on(architecture, wanted):
    with programmatic.launches(True):
        assert programmatic.triton_kernels(architecture) == wanted


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((8, 0), False),
        ((8, 6), False),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),  # by machine code for 10.0
        ((11, 0), False),  # by PTX for 8.0, which waits for nothing
        ((13, 0), False),  # by PTX, which of both is not known
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_cuda_kernels_where_the_code_that_serves_the_gpu_waits(monkeypatch, capability, wanted):
    """The release's architectures: what runs decides, not what it runs on."""
    built = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80", "compute_120")
    monkeypatch.setattr(native, "compiled", lambda: SimpleNamespace(cuda_architectures=built))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    programmatic._code_waits.cache_clear()
    try:
        assert not programmatic.cuda_kernels(GPU)
        with programmatic.launches(True):
            assert programmatic.cuda_kernels(GPU) == wanted
    finally:
        programmatic._code_waits.cache_clear()


@pytest.mark.parametrize("on", [False, True])
def test_both_cuda_ops_tell_their_launcher(monkeypatch, on):
    got: dict[str, bool] = {}
    compiled = SimpleNamespace(
        preprocess_cuda=lambda *args: got.update(preprocess=args[-1]),
        self_attention_cuda=lambda *args: got.update(self_attention=args[-1]),
        cuda_architectures=("sm_90a",),
    )
    monkeypatch.setattr(native, "compiled", lambda: compiled)
    monkeypatch.setattr(native, "stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    programmatic._code_waits.cache_clear()
    view = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    qkv = torch.zeros(1, 5, 3 * 128, dtype=torch.bfloat16)
    try:
        with programmatic.launches(on):
            find("preprocess").implementations["cuda"].run([view], (4, 4), "cv2_area", torch.float32, None, None)
            find("self_attention").implementations["cuda"].run(qkv, None, None, None, 1, 1e-5)
    finally:
        programmatic._code_waits.cache_clear()
    assert got == {"preprocess": on, "self_attention": on}
