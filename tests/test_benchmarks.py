"""The harness: it refuses what is wrong before it times, and its quantiles are samples."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from dit4dit.benchmarks import harness, op_bench
from dit4dit.benchmarks.harness import assert_no_worse, quantiles, time_cpu
from dit4dit.benchmarks.ops import bench_action_ode, bench_preprocess

from dit4dit import ops
from dit4dit.config import HeadConfig


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


def test_quantiles_are_samples():
    samples = [float(i) for i in range(1000, 0, -1)]
    found = quantiles(samples)
    assert found == {"p50": 500, "p95": 950, "p99": 990, "p999": 999, "max": 1000, "jitter": 999 / 500}
    assert set(quantiles([3.0]).values()) == {3.0, 1.0}
    with pytest.raises(ValueError, match="at least one sample"):
        quantiles([])


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


def test_a_benchmark_runs_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setattr(bench_preprocess, "CASES", {"small": ([(8, 8), (9, 9)], (4, 4), "cv2_area")})
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--samples", "3", "--json", str(path)])
    threads = torch.get_num_threads()
    try:
        bench_preprocess.main()
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert {row["implementation"] for row in written["rows"]} == {"cpp", "torch"}
    assert "p50 ms" in capsys.readouterr().out


def test_a_benchmark_does_not_time_what_is_wrong(monkeypatch):
    monkeypatch.setattr(bench_preprocess, "CASES", {"small": ([(8, 8)], (4, 4), "cv2_area")})
    monkeypatch.setattr(bench_preprocess, "reference", lambda *args: bench_preprocess.preprocess(*args) + 0.5)
    monkeypatch.setattr(bench_preprocess, "time_cpu", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu"])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(AssertionError, match="from the truth"):
            bench_preprocess.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", [op for op in ops.names() if op not in ("preprocess", "action_ode")])
def test_every_op_is_benchmarked_at_sizes_of_the_models(op, tmp_path, monkeypatch):
    """Shrunk here: the head's calls, at most two of each op, timed twice."""
    real = [call for call in op_bench.calls() if call[1] == op]
    assert real
    smallest = sorted(real, key=lambda call: call[2][0].numel())[:2]
    monkeypatch.setattr(op_bench, "calls", lambda batch: iter(smallest))
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--samples", "2", "--json", str(path)])
    threads = torch.get_num_threads()
    try:
        op_bench.bench(op, None)
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert {row["implementation"] for row in written["rows"]} == {"torch"}
    assert len(written["rows"]) == len(smallest)


def small_head(horizon):
    return HeadConfig(num_layers=2, num_heads=2, head_dim=16, hidden_size=32, output_dim=32, action_horizon=horizon)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_benchmarked(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(bench_action_ode, "config", small_head)
    path = tmp_path / "result.json"
    words = ["bench", "--device", "cpu", "--dtype", dtype, "--samples", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    bench_action_ode.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["implementation"]) for row in rows] == [("9", "torch"), ("17", "torch"), ("51", "torch")]
    assert all(row["weight_bytes_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_wrong_head_is_not_timed(monkeypatch, wrong):
    monkeypatch.setattr(bench_action_ode, "config", small_head)
    right = bench_action_ode.candidates
    monkeypatch.setattr(
        bench_action_ode, "candidates", lambda *args: {"torch": lambda: right(*args)["torch"]() + wrong}
    )
    monkeypatch.setattr(bench_action_ode, "time_cpu", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--tokens", "9"])
    with pytest.raises(AssertionError, match="torch: expected at most"):
        bench_action_ode.main()
