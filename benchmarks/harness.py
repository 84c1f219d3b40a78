"""What every benchmark shares: the machine, the timing, and the refusal to time a wrong result.

Order of use: `assert_no_worse` on the very tensors that will be timed, then `time_cpu` or `time_gpu`, then `tables.quantiles`.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dit4dit
from dit4dit import tables

VERSIONS = ("triton", "numpy", "transformers", "diffusers")
"""Packages whose versions stand beside a number."""
CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watts": "power.draw"}
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Why the clocks are not higher, a bit mask; drivers before 535 know the second name alone."""
PATIENCE = 5.0
"""Seconds for nvidia-smi to answer."""


def machine() -> dict[str, Any]:
    """What a number must be read with: processor, cores this process may use, versions, GPU (None without one).

    "commit" is what DIT4DIT_COMMIT says: an installed package does not know it.
    """
    from dit4dit import _C

    gpu = torch.cuda.is_available()
    driver = _nvidia_smi(("driver_version",)) if gpu else None
    return {
        **tables.machine(),
        "torch_threads": torch.get_num_threads(),
        **{name: _version(name) for name in VERSIONS},
        "dit4dit": dit4dit.__version__,
        "commit": os.environ.get("DIT4DIT_COMMIT") or None,
        "build": _C.build_info(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "gpu_driver": driver[0] if driver else None,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def clocks(work: Callable[[], object] | None = None) -> dict[str, Any] | None:
    """The GPU's clocks, temperature, power, and the reasons why it is not faster; None where nvidia-smi gives none.

    work: is called again and again until nvidia-smi has answered, so that the numbers are those under load.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    fields, begin = tuple(CLOCKS.values()), time.monotonic()
    for extra in (*((reason,) for reason in REASONS), ()):
        values = _nvidia_smi((*fields, *extra), work)
        if values is not None:
            numbers = {name: _number(value) for name, value in zip(CLOCKS, values, strict=False)}
            return {**numbers, "reasons": values[len(fields)] if extra else None}
        if time.monotonic() - begin > PATIENCE:
            break
    return None


def _number(text: str) -> float | None:
    """The number; None for "[N/A]" and its like."""
    try:
        return float(text)
    except ValueError:
        return None


def _nvidia_smi(fields: Sequence[str], work: Callable[[], object] | None = None) -> list[str] | None:
    """The fields of torch's current GPU; None where nvidia-smi is absent, knows one of them not, or takes too long."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    begin, gpu = time.monotonic(), _gpu_id()
    output = _answer([*query, *gpu], work)
    if output is None and gpu and torch.cuda.device_count() == 1 and time.monotonic() - begin < PATIENCE:
        output = _answer(query, work)  # it knows this GPU by another name
    values = [value.strip() for value in (output or "").partition("\n")[0].split(",")]
    return values if len(values) == len(fields) and any(values) else None


def _answer(words: Sequence[str], work: Callable[[], object] | None) -> str | None:
    """What a program prints, `work` being done meanwhile; None where it fails."""
    end = time.monotonic() + PATIENCE
    try:
        asked = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
    try:
        while work is not None and asked.poll() is None and time.monotonic() < end:
            work()
        output, _ = asked.communicate(timeout=max(end - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    finally:
        if asked.poll() is None:
            asked.kill()
            asked.wait()
    return output if asked.returncode == 0 else None


def _gpu_id() -> list[str]:
    """nvidia-smi's option for torch's current GPU, whose number is another one under CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return []
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return [] if uuid is None else [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"]


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

    A cache-sized buffer is written before each call, so that inputs come from memory as they do in use, and often enough
    that the host has handed over the whole call before the GPU comes to it: what is timed is the GPU, not Python.
    """
    flush = torch.empty(max(2 * _l2_bytes(), 1), dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        fn()
    hosts = []
    for _ in range(5):  # the slowest of some: a host that is late once would be timed as the GPU
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        hosts.append(time.perf_counter() - begin)
    host = max(hosts)
    flushing = min(_between_events(flush.zero_)[0] for _ in range(3))
    events = []
    for _ in range(samples):
        for _ in range(flushes(host, flushing)):
            flush.zero_()
        events.append(_between_events(fn, wait=False)[1])
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def flushes(host: float, flushing: float) -> int:
    """How many flushes of `flushing` seconds keep the GPU busy while the host spends `host` on a call; at most 64."""
    return min(max(math.ceil(1.5 * host / max(flushing, 1e-6)), 1), 64)


def _between_events(fn: Callable[[], object], wait: bool = True) -> tuple[float, tuple[Any, Any]]:
    """Seconds of `fn` on the current stream (0 without waiting for it), and the events around it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    if not wait:
        return 0.0, (start, end)
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, (start, end)


def _l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20))


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
    truth = reference(*exact_arguments(args))
    got = fn(*args)
    expect_no_worse(got, reference(*args), truth, factor, float32_limit)


def exact_arguments(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments that the truth of `assert_no_worse` is made with."""
    single = not any(dtype in (torch.bfloat16, torch.float16) for dtype in _dtypes(list(args)))
    exact: tuple[Any, ...] = _with_dtype(tuple(args), torch.float64 if single else torch.float32)
    return exact


def expect_no_worse(got: Any, plain: Any, truth: Any, factor: float = 2, float32_limit: float = 0) -> None:
    """`assert_no_worse` of results that are there: a contender's, the reference's, and the truth. AssertionError, also where
    the contender has returned something else than tensors.
    """
    results, plains = _tensors(got), _tensors(plain)
    if len(results) != len(plains):
        raise AssertionError(f"expected {len(plains)} tensors as result, got {len(results)}")
    for i, (mine, its, true) in enumerate(zip(results, plains, _tensors(truth), strict=True)):
        _expect_no_worse(f"result {i}", mine, its, true, factor, float32_limit)


def _expect_no_worse(name: str, got: Tensor, plain: Tensor, true: Tensor, factor: float, float32_limit: float) -> None:
    if got.shape != plain.shape or got.dtype != plain.dtype:
        raise AssertionError(f"{name}: expected {list(plain.shape)} {plain.dtype}, got {list(got.shape)} {got.dtype}")
    if not torch.equal(got.isfinite(), true.isfinite()):
        raise AssertionError(f"{name}: infinite or NaN where the truth is not, or the other way round")
    true = true.double()
    rounding = torch.finfo(got.dtype).eps / 2 * _largest(true) if got.is_floating_point() else 0.0
    allowed = factor * _largest(plain.double() - true) + rounding
    if got.dtype == torch.float32:
        allowed = max(allowed, float32_limit * _largest(true))
    distance = _largest(got.double() - true)
    if distance > allowed:
        raise AssertionError(f"{name}: expected at most {allowed:.3g} from the truth, got {distance:.3g}")


def _largest(x: Tensor) -> float:
    x = x[x.isfinite()].abs()
    return float(x.max()) if x.numel() else 0.0


def _tensors(result: Any) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (list, tuple)) else [result]
    for value in found:
        if not isinstance(value, Tensor):
            raise AssertionError(f"expected tensors as result, got {type(value).__name__}")
    return found


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
