"""What every benchmark shares: it refuses what is wrong before it times, it names the machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import (
    harness,
)
from dit4dit.benchmarks.harness import assert_no_worse, time_cpu


def product(x, y):
    return x @ y


ARGS = {
    dtype: (torch.randn(9, 64, dtype=dtype), torch.randn(64, 7, dtype=dtype))
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("dtype", ARGS)
def test_accepts_the_reference_and_rounding(dtype):
    assert_no_worse(product, product, ARGS[dtype])
    assert_no_worse(lambda x, y: (x.float() @ y.float()).to(dtype), product, ARGS[dtype])


@pytest.mark.parametrize("dtype", ARGS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: (x @ y) * 1.05, "from the truth"),
        (lambda x, y: (x @ y).index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
        (lambda x, y: (x @ y)[:-1], "expected .9, 7."),
        (lambda x, y: (x @ y).half(), "got .9, 7. torch.float16"),
    ],
)
def test_refuses(dtype, wrong, message):
    with pytest.raises(AssertionError, match=message):
        assert_no_worse(wrong, product, ARGS[dtype])


def test_times_every_call():
    calls = []
    samples = time_cpu(lambda: calls.append(1), samples=5, warmup=2)
    assert len(samples) == 5
    assert len(calls) == 7
    assert min(samples) >= 0


def test_the_machine_is_named():
    found = harness.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["torch"] == torch.__version__
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    json.dumps(found)


def test_the_gpu_is_kept_busy_while_the_host_hands_a_call_over():
    assert harness.flushes(host=0.0, flushing=20e-6) == 1
    assert harness.flushes(host=100e-6, flushing=20e-6) == 8
    assert harness.flushes(host=1.0, flushing=20e-6) == 64


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_clocks_are_those_under_load_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "sleep 0.1; echo '1980, 3201, 41, [N/A], 0x0000000000000004'; echo other", monkeypatch)
    called: list[int] = []
    want = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "celsius": 41.0, "watts": None, "reasons": "0x0000000000000004"}
    assert harness.clocks(lambda: called.append(1)) == want
    assert called
    old = 'case "$1" in *clocks_event*) exit 2;; esac; echo "1, 2, 3, 4, 0x1"'
    nvidia_smi(tmp_path, old, monkeypatch)
    assert harness.clocks() == {"sm_mhz": 1, "memory_mhz": 2, "celsius": 3, "watts": 4, "reasons": "0x1"}
    nvidia_smi(tmp_path, "echo 'No devices were found'; exit 6", monkeypatch)
    assert harness.clocks() is None
    nvidia_smi(tmp_path, "printf '\\377\\376'", monkeypatch)
    assert harness.clocks() is None
    monkeypatch.setattr(harness, "PATIENCE", 0.2)
    nvidia_smi(tmp_path, "exec sleep 30", monkeypatch)
    begin = time.monotonic()
    assert harness.clocks() is None
    assert time.monotonic() - begin < 10
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.clocks() is None


def test_a_gpu_that_nvidia_smi_knows_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_gpu_id", lambda: ["--id=GPU-0"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    nvidia_smi(tmp_path, 'case "$*" in *--id*) exit 6;; esac; echo "1, 2, 3, 4, 0x1"', monkeypatch)
    found = harness.clocks()
    assert found is not None
    assert found["sm_mhz"] == 1


def test_the_machine_names_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT4DIT_COMMIT", "abc123")
    found = harness.machine()
    assert found["commit"] == "abc123"
    assert all(found[name] for name in ("numpy", "transformers", "diffusers"))
    assert {"gpu_driver", "cudnn", "triton"} <= set(found)
