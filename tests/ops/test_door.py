"""The door to the compiled module: arrays without torch, refusals that name the argument, and a device that has failed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit4dit import _C, Noise
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine
from dit4dit.errors import CudaError, DeviceError
from dit4dit.ops import native, preprocess
from dit4dit.policy.requests import Request
from dit4dit.policy.runner import EngineRunner
from dit4dit.presets import preset


def picture(height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_without_torch(dtype):
    """Any strides, as with addresses: a mirrored picture into a result that is channels last."""
    views = [picture()[:, :, ::-1], picture(10, 9)[:, 1:9]]
    out = np.full((2, 4, 6, 3), np.nan, dtype).transpose(0, 3, 1, 2)
    _C.preprocess(views, [3, 3], out, "cv2_area")
    tensors = [torch.from_numpy(view.copy()) for view in views]
    wanted = preprocess(tensors, (4, 3), "cv2_area", torch.from_numpy(out).dtype, backend="torch")
    assert np.array_equal(out, wanted.numpy())


@pytest.mark.parametrize(
    ("view", "out", "error", "message"),
    [
        (picture().astype(np.float64), None, TypeError, r"views\[0\]: expected uint8.*, got float64"),
        (picture().astype(np.int16), None, TypeError, r"views\[0\]: expected uint8.*, got format h"),
        (picture()[0], None, ValueError, r"views\[0\]: expected shape .*, got \[8, 6, 3\]"),
        (picture(), np.zeros((2, 3, 4, 4), np.float32), ValueError, r"out: expected shape"),
        (picture(), np.zeros((2, 3, 4, 3), np.uint8), TypeError, r"out: expected float32"),
        (
            picture(),
            np.broadcast_to(np.float32(0), (2, 3, 4, 3)),
            ValueError,
            r"out: expected memory that can be written",
        ),
        (
            [1, 2],
            None,
            TypeError,
            r"views\[0\]: expected an array or \(address, shape, strides in elements, dtype, device\)",
        ),
    ],
)
def test_refusals_name_argument_wanted_and_got(view, out, error, message):
    with pytest.raises(error, match=message):
        _C.preprocess([view], [3], np.zeros((2, 3, 4, 3), np.float32) if out is None else out, "cv2_area")


def test_strides_of_half_an_element_are_refused():
    records = np.zeros((2, 3, 4, 3), [("x", np.float32), ("y", np.uint8)])
    with pytest.raises(ValueError, match="out: expected strides of whole elements, got 15 bytes"):
        _C.preprocess([picture()], [3], records["x"], "cv2_area")


def test_a_device_that_has_failed_ends_in_one_clear_error(monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    native.check_device(torch.device("cuda", 0), error)
    assert calls == [torch.device("cuda", 0)], "the device was asked, and answers"

    def fail(device):
        raise torch.AcceleratorError("again")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(
        DeviceError, match=r"cuda:0: CUDA error: an illegal memory access was encountered; nothing .*restart"
    ):
        native.check_device(torch.device("cuda", 0), error)
    assert issubclass(DeviceError, CudaError)


@pytest.mark.parametrize("lost", [True, False])
def test_a_chunk_on_a_failed_device(monkeypatch, lost):
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")

    def fail(*_):
        raise error

    runner = EngineRunner(Engine(random_model(preset("tiny").model, 0, with_text=False)), codec=None)  # type: ignore[arg-type]
    monkeypatch.setattr(runner._plans, "get", lambda key: type("Broken", (), {"run": staticmethod(fail)}))
    monkeypatch.setattr(torch.cuda, "synchronize", fail if lost else lambda device: None)
    request = Request([picture()[0]], None, "go", 9, Noise.from_seed(0), None, "cv2_area", False)
    pack = type("Pack", (), {"length": 9})
    with pytest.raises(DeviceError if lost else torch.AcceleratorError, match="unspecified launch failure"):
        runner.run([request], [pack])  # type: ignore[list-item]
