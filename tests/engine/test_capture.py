"""Recording a plan as CUDA graphs: what reaches the user when it fails, and what is left behind. The GPU's part needs one."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import HIDDEN, FakeCuda

from dit4dit import Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.capture import capture
from dit4dit.errors import BackendError, DeviceError
from dit4dit.ops import device_tables, use_backend
from dit4dit.presets import preset

preprocess: Any = importlib.import_module("dit4dit.ops.preprocess")  # dit4dit.ops.preprocess is the function
TINY = preset("tiny").model
SHAPE = RequestShape(1, ((40, 50), (30, 30)), (32, 32), "bilinear", True, 9)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def engine(cuda: FakeCuda) -> Engine:
    engine = Engine(random_model(TINY, 1, with_text=False))
    engine._stream, engine._branch, engine.branches = cuda.stream, cuda.branch, True
    return engine


def python_error(cuda: FakeCuda) -> None:
    raise ValueError("planted")


def cuda_error(cuda: FakeCuda) -> None:
    cuda.invalid = True
    raise torch.AcceleratorError("CUDA error: planted\nCUDA kernel errors might be reported later")


WHERE = {"on the branch": "add_noise", "beside the branch": "moments", "behind it": "actions_behind"}
"""Part of a step -> a function of the engine that runs there."""


def plant(monkeypatch: pytest.MonkeyPatch, failure: Callable[[], None], function: str = "actions_behind") -> None:
    """Let a function of the engine run `failure` while it is captured."""
    right = getattr(Engine, function)

    def planted(self, *args, **kwargs):
        if torch.cuda.is_current_stream_capturing():
            failure()
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Engine, function, planted)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("failure", [python_error, cuda_error])
def test_the_error_that_came_first_is_raised_and_nothing_stays_in_a_capture(
    cuda: FakeCuda, engine: Engine, monkeypatch: pytest.MonkeyPatch, failure, where: str
) -> None:
    with monkeypatch.context() as planted:
        plant(planted, lambda: failure(cuda), WHERE[where])
        message = r"the step cannot be captured as a CUDA graph: \w+: .*planted; load with engine='off'"
        with pytest.raises(BackendError, match=message) as raised:
            Plan(engine, SHAPE, None)
    assert "planted" in str(raised.value.__cause__)
    assert HIDDEN not in str(raised.value)
    assert cuda.current is None, "the caller's stream is current again"
    assert cuda.capturing is None
    assert failure is cuda_error or cuda.log[:3] == ["begin", "fork", "join"], "the branch has come back"
    assert not cuda.forked
    assert not cuda.allocating, "the allocator holds back what other streams have used for as long as this lasts"
    assert not cuda.generator_captured, "a random number on the GPU would raise"
    assert engine._pool is None
    # one failed capture's share of the first pool, given back once by the graph or here
    assert cuda.released == ([(0, 1)] if failure is cuda_error else [])
    kept = Plan(engine, SHAPE, None)
    assert [pool.handle for pool in kept._pools] == [engine.graph_pool.handle] == [(0, 2)]
    assert not cuda.allocating


def test_a_capture_that_does_not_begin_or_end_says_so(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def invalidate() -> None:
        cuda.invalid = True

    with pytest.raises(BackendError, match=f"x cannot be captured .*{HIDDEN}"):
        capture("x", invalidate, cuda.stream, (0, 7))
    assert not cuda.allocating

    def refuses(self, **_) -> None:
        raise RuntimeError("no capture here")

    with monkeypatch.context() as broken:
        broken.setattr(torch.cuda.CUDAGraph, "capture_begin", refuses)
        with pytest.raises(BackendError, match="no capture here"):
            capture("x", lambda: None, cuda.stream, (0, 7))
    assert not cuda.allocating


def test_each_graph_is_replayed_once_before_the_first_request(cuda: FakeCuda, engine: Engine) -> None:
    """On the engine's stream, and waited for: whatever uploading a graph costs is paid here."""
    streams = []
    replay = torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda self: (streams.append(cuda.current), replay(self))[1]
    Plan(engine, SHAPE, None)
    assert cuda.log == ["begin", "fork", "join", "end", "replay", "synchronize"]
    assert streams == [cuda.stream]


def test_a_first_replay_that_fails_is_a_failed_capture(cuda: FakeCuda, engine: Engine) -> None:
    cuda.broken = True
    with pytest.raises(BackendError, match=r"the step cannot be captured .* unspecified launch failure"):
        Plan(engine, SHAPE, None)
    assert cuda.log[-1] == "reset"
    assert not cuda.allocating
    assert not cuda.released, "the graph itself gives its pool back"


def test_an_interrupt_stays_one_and_a_lost_device_is_said_to_be_lost(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture("x", interrupt, cuda.stream, (0, 7))
    assert cuda.capturing is None

    def lost(device=None) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def access() -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        cuda_error(cuda)

    with pytest.raises(DeviceError, match=r"planted.* must restart"):
        capture("x", access, cuda.stream, (0, 7))


def resize_much(device: torch.device) -> None:
    """As many sizes of each table as the cache keeps, so that no other is left in it."""
    for n in range(100, 101 + device_tables.KEPT):
        preprocess._area_taps(n, 32, device)
        preprocess._bilinear_taps(n, 32, device)
        preprocess._enlarge_taps(n, 200, device)


@pytest.mark.parametrize(
    "resize, sizes, taps",
    [
        ("bilinear", (40, 50), [(preprocess._bilinear_taps, 40), (preprocess._bilinear_taps, 50)]),
        ("cv2_area", (40, 50), [(preprocess._area_taps, 40), (preprocess._area_taps, 50)]),
        ("cv2_area", (20, 25), [(preprocess._enlarge_taps, 20), (preprocess._enlarge_taps, 25)]),
    ],
)
def test_a_plan_keeps_the_tables_that_its_graph_reads(engine: Engine, resize, sizes, taps) -> None:
    """Whatever else has been resized since, and no longer than the plan lives."""
    with use_backend("torch"):  # what a GPU runs where no kernel of ours fits it
        plan = Plan(engine, replace(SHAPE, views=(sizes,), resize=resize), None)
    read = [weakref.ref(tensor) for table, n in taps for tensor in table(n, 32, engine.device)]
    resize_much(engine.device)
    gc.collect()
    assert all(ref() is not None for ref in read)
    assert device_tables._read.get() is None
    del plan
    gc.collect()
    assert all(ref() is None for ref in read), "evicted: it is the plan that kept them"


def test_when_all_graphs_are_gone_the_next_take_another_pool(cuda: FakeCuda) -> None:
    """PyTorch has freed the old one by then, and fails on its handle."""
    engine = Engine(random_model(TINY, 1, with_text=False))
    engine._stream = cuda.stream
    first, second = (Plan(engine, replace(SHAPE, batch=batch), None) for batch in (1, 2))
    pool = engine.graph_pool
    del first
    gc.collect()
    assert engine.graph_pool is pool, "the second's graphs are in it"
    del second
    gc.collect()
    assert engine.graph_pool.handle != pool.handle
    kept = Plan(engine, SHAPE, None)
    assert kept._pools == [engine.graph_pool]


@pytest.mark.gpu
@pytest.mark.capture
def test_a_plan_after_all_others_are_gone_on_a_gpu(small_libero: Path, observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cuda")
    before = policy.infer(observation, "open", seed=0).normalized
    policy._runner._start()  # without a plan
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert np.array_equal(policy.infer(observation, "open", seed=0).normalized, before)


@pytest.mark.gpu
@pytest.mark.capture
def test_a_graph_gives_the_same_bits_after_its_tables_left_the_cache(small_libero: Path, make_observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cuda")
    seen = make_observation(0)
    seen = replace(seen, images={name: np.ascontiguousarray(image[:200, :180]) for name, image in seen.images.items()})
    with use_backend(preprocess="torch"):
        before = policy.infer(seen, "open", seed=0).normalized
    resize_much(torch.device("cuda"))
    gc.collect()
    torch.full((2**20,), 7, device="cuda")  # over what has come free
    for n in range(64, 512):
        torch.full((n,), 7, device="cuda")
    assert np.array_equal(policy.infer(seen, "open", seed=0).normalized, before)


@pytest.mark.gpu
@pytest.mark.capture
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("failure", ["raises", "waits for the GPU"])
def test_after_a_failed_capture_the_process_goes_on(
    small_libero: Path, observation, monkeypatch: pytest.MonkeyPatch, failure, where: str
) -> None:
    """Without the engine, with the same engine, and with random numbers; the allocator takes memory back as before."""

    def fail() -> None:
        if failure == "raises":
            raise ValueError("planted")
        torch.cuda.synchronize()  # CUDA invalidates the capture

    kinds = {"device": "cuda", "dtype": torch.float32}
    policy = Policy.from_pretrained(small_libero, **kinds)
    with monkeypatch.context() as planted:
        plant(planted, fail, WHERE[where])
        first = "ValueError: planted" if failure == "raises" else "AcceleratorError: .*captur"
        message = f"the step cannot be captured as a CUDA graph: {first}.*engine='off'"
        with pytest.raises(BackendError, match=message) as raised:
            policy.infer(observation, "open", seed=0)
    assert "previous error during capture" not in str(raised.value)
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(4, device="cuda").isfinite().all()
    plain = Policy.from_pretrained(small_libero, **kinds, engine="off").infer(observation, "open", seed=0).normalized
    again = policy.infer(observation, "open", seed=0).normalized
    assert np.abs(again - plain).max() < 1e-2 * np.abs(plain).max()
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # an allocation makes the allocator look at what has come free
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    lent = torch.empty(2**22, device="cuda")
    lent.record_stream(torch.cuda.Stream())
    del lent
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_stats()["active_bytes.all.current"] == before
