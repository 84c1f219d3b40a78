"""What every benchmark shares: the machine, the timing, the quantiles, and the refusal to time a wrong result.

Order of use: `assert_no_worse` on the very tensors that will be timed, then `time_cpu` or `time_gpu`, then `report`.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dit4dit
from dit4dit import _C


def machine() -> dict[str, Any]:
    """What a number must be read with: processor, cores this process may use, versions, GPU (None without one)."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dit4dit": dit4dit.__version__,
        "build": _C.build_info(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_cpu(fn: Callable[[], object], samples: int = 200, warmup: int = 20) -> list[float]:
    """Wall time of each call, seconds."""
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return times


def time_gpu(fn: Callable[[], object], samples: int = 200, warmup: int = 20) -> list[float]:
    """Time of each call on torch's current CUDA stream between two events, seconds.

    A cache-sized buffer is written before each call, so that inputs come from memory as they do in use.
    """
    flush = torch.empty(max(2 * _l2_bytes(), 1), dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        fn()
    events = []
    for _ in range(samples):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def _l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20))


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99, p999 and max in the unit of the samples, nearest rank (each is a sample), and jitter = p999 / p50."""
    if not samples:
        raise ValueError("quantiles: expected at least one sample, got none")
    ordered = sorted(samples)

    def rank(per_mille: int) -> float:
        return ordered[max(-(-per_mille * len(ordered) // 1000) - 1, 0)]

    p50, p999 = rank(500), rank(999)
    jitter = p999 / p50 if p50 > 0 else 1.0
    return {"p50": p50, "p95": rank(950), "p99": rank(990), "p999": p999, "max": ordered[-1], "jitter": jitter}


def assert_no_worse(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    factor: float = 2,
    float32_limit: float = 0,
) -> None:
    """AssertionError unless fn(*args) is at most `factor` times as far from the truth as reference(*args).

    The truth is the reference with every float tensor and every dtype among the arguments made float32 (float64 where
    they are float32). One rounding of the result's own dtype is always allowed, and in a float32 result `float32_limit`
    of the largest value: where all sums are in float32, twice a lucky order of adding is no fair bound. Shapes and dtypes
    must agree, and what is finite in the truth must be finite in the result.
    """
    single = not any(dtype in (torch.bfloat16, torch.float16) for dtype in _dtypes(args))
    truth = reference(*_with_dtype(args, torch.float64 if single else torch.float32))
    results = zip(_tensors(fn(*args)), _tensors(reference(*args)), _tensors(truth), strict=True)
    for i, (got, plain, true) in enumerate(results):
        if got.shape != plain.shape or got.dtype != plain.dtype:
            raise AssertionError(
                f"result {i}: expected {list(plain.shape)} {plain.dtype}, got {list(got.shape)} {got.dtype}"
            )
        if not torch.equal(got.isfinite(), true.isfinite()):
            raise AssertionError(f"result {i}: infinite or NaN where the truth is not, or the other way round")
        true = true.double()
        rounding = torch.finfo(got.dtype).eps / 2 * _largest(true) if got.is_floating_point() else 0.0
        allowed = factor * _largest(plain.double() - true) + rounding
        if got.dtype == torch.float32:
            allowed = max(allowed, float32_limit * _largest(true))
        distance = _largest(got.double() - true)
        if distance > allowed:
            raise AssertionError(f"result {i}: expected at most {allowed:.3g} from the truth, got {distance:.3g}")


def _largest(x: Tensor) -> float:
    x = x[x.isfinite()].abs()
    return float(x.max()) if x.numel() else 0.0


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _dtypes(arg: Any) -> list[torch.dtype]:
    if isinstance(arg, Tensor):
        return [arg.dtype]
    if isinstance(arg, torch.dtype):
        return [arg]
    return [dtype for inner in arg for dtype in _dtypes(inner)] if isinstance(arg, (list, tuple)) else []


def _with_dtype(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, Tensor):
        return arg.to(dtype) if arg.is_floating_point() else arg
    if isinstance(arg, torch.dtype):
        return dtype if arg.is_floating_point else arg
    return type(arg)(_with_dtype(inner, dtype) for inner in arg) if isinstance(arg, (list, tuple)) else arg


def report(title: str, rows: Sequence[dict[str, Any]], path: Path | None = None) -> None:
    """Print the machine and a table of `rows` (each {"case": ..., "implementation": ..., "ratio": ..., quantiles in
    seconds}); with `path`, write both there as JSON. `ratio` is the reference's median over this one's: above 1 is faster.
    """
    here = machine()
    print(f"{title} on {here['gpu'] or here['cpu']}, torch {here['torch']}, {here['torch_threads']} thread(s)")
    width = max(len(str(row["case"])) for row in rows)
    print(
        f"{'case':{width}}  {'by':6} {'ratio':>6} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} {'max ms':>9} {'jitter':>7}"
    )
    for row in rows:
        times = " ".join(f"{row[q] * 1e3:9.4f}" for q in ("p50", "p95", "p99", "max"))
        print(f"{row['case']:{width}}  {row['implementation']:6} {row['ratio']:6.2f} {times} {row['jitter']:7.2f}")
    if path is not None:
        path.write_text(json.dumps({"benchmark": title, "machine": here, "rows": list(rows)}, indent=2) + "\n")
