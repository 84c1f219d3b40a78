"""Where a verdict counts: threads of a CPU, GPUs and what they say, and what is asked for only where there is a file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verdict_files import CPU, DEFAULT, OTHER, ran, verdict

from dit4dit import ops
from dit4dit.ops import dispatch, sources, verdicts
from dit4dit.ops.dispatch import Choices
from dit4dit.ops.verdicts import Verdict, Verdicts, call_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this CPU's verdicts, which is not there yet."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_said", set())
    return verdicts.folder(CPU)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the logger of the ops has said."""
    caplog.set_level(logging.WARNING, logger="dit4dit.ops")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dit4dit.ops"]


def test_another_number_of_threads_is_another_device(cache: Path) -> None:
    verdicts.write(verdict(), cache)
    one = Verdicts(CPU)
    assert ran(one) == OTHER
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert f"{threads + 1} threads" in verdicts.place(CPU)["device"]
        assert verdicts.folder(CPU) != cache
        assert ran(one) == DEFAULT
        shutil.copytree(cache, verdicts.folder(CPU))
        assert ran() == DEFAULT, "copied there by hand"
    finally:
        torch.set_num_threads(threads)
    assert ran(one) == OTHER


def test_without_a_folder_next_to_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("asked")

    for module, names in (
        (verdicts, ("place", "read", "call_text")),
        (sources, ("kernels_hash", "driver", "versions")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, asked)
    assert ran() == DEFAULT


def test_the_place_is_asked_for_only_where_there_is_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)

    def asked(*_: Any) -> None:
        raise AssertionError("asked")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_package", asked)
        assert ran() == DEFAULT
    verdicts.write(verdict(), cache)
    assert ran() == OTHER


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if str(self).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return real(self, *args, **kwargs)

    def started() -> str:
        raise AssertionError("platform.processor starts a process")

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", started)
    monkeypatch.setattr(verdicts, "_cpu", verdicts._cpu.__wrapped__)
    assert ran() == DEFAULT
    assert verdicts.place(CPU)["device"].endswith(("thread", "threads"))
    monkeypatch.setattr(verdicts.sources.native, "driver", lambda: SimpleNamespace(version=13000))
    assert sources.driver.__wrapped__() == "CUDA 13000"

    def none() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(verdicts.sources.native, "driver", none)
    assert sources.driver.__wrapped__() == "unknown"


# GPUs, by a stub of what torch says of them ---------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Two GPUs of a machine, of which the first is a slice of one."""
    two = [
        SimpleNamespace(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, multi_processor_count=16),
        SimpleNamespace(name="NVIDIA GeForce RTX 5090", major=12, minor=0, multi_processor_count=170),
    ]
    current = [0]

    def properties(device: torch.device) -> SimpleNamespace:
        return two[current[0] if device.index is None else device.index]

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", properties)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: properties(device).name)
    monkeypatch.setattr(cuda, "get_device_capability", lambda d: (properties(d).major, properties(d).minor))
    monkeypatch.setattr(cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(sources, "driver", lambda: "580.82.07")
    return two


def gpu(index: int | None) -> torch.device:
    return torch.device("cuda") if index is None else torch.device("cuda", index)


def test_each_gpu_of_a_machine_has_its_own_verdicts(gpus: list[SimpleNamespace], lines) -> None:
    args = tuple(torch.zeros(2, device="meta") for _ in range(2))
    for i in range(2):
        found = Verdict("linear", call_text(args), verdicts.place(gpu(i)), "torch", f"of {i}", {f"of {i}": 1.0})
        verdicts.write(found, verdicts.folder(gpu(i)))
    assert verdicts.folder(gpu(0)).name == "nvidia-h100-80gb-hbm3-mig-1g-10gb"
    assert [Verdicts(gpu(i)).choice("linear", args) for i in range(2)] == ["of 0", "of 1"]
    unnamed = Verdicts(gpu(None))
    assert unnamed.choice("linear", args) == "of 0"
    torch.cuda.set_device(1)
    assert unnamed.choice("linear", args) == "of 1"
    assert not lines()
    gpus[1].multi_processor_count = 168  # the same name
    assert Verdicts(gpu(1)).choice("linear", args) is None
    assert "made with sms 170, here it is 168" in lines()[0]


def test_what_a_place_on_a_gpu_says(gpus: list[SimpleNamespace]) -> None:
    place = verdicts.place(gpu(1))
    facts = {"device", "capability", "sms", "driver", "cuda", "cudnn", "torch", "kernels"}
    assert facts <= set(place) <= facts | set(sources.PACKAGES)
    assert (place["capability"], place["sms"], place["driver"]) == ("12.0", 170, "580.82.07")
    assert json.loads(json.dumps(place)) == place


@pytest.mark.gpu
def test_a_verdict_on_a_gpu(lines) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    here = verdicts.place(device)
    assert json.loads(json.dumps(here)) == here == verdicts.place(torch.device("cuda"))
    x, weight = torch.randn(4, 8, device=device), torch.randn(16, 8, device=device)
    names = ops.implementations("linear")
    found = Verdict("linear", call_text((x, weight, None)), here, names[0], "torch", {"torch": 1.0})
    verdicts.write(found, verdicts.folder(device))
    on_gpu = Verdicts(torch.device("cuda"))
    assert on_gpu.choice("linear", (x, weight, None), dispatch.find("linear").files) == "torch"
    with Choices(on_gpu) as choices:
        ops.linear(x, weight, None)
    assert choices.ran == {"linear": {"torch": 1}}
    assert not lines()
