"""Measured times beside a budget: out of a result of `bench profile`, of `bench latency`, or of the GPU suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit4dit.errors import InputError, shown
from dit4dit.files.keys import is_finite, read_json

HINT = "give a result of dit4dit bench profile, bench latency, or benchmarks/gpu_suite.sh"
STAGES = ("vae", "backbone", "action_head")
"""Stages that are replayed as graphs of their own."""

HEADLESS = ("copies", "noise", "preprocess", "vae", "backbone", "outputs")
"""Stages that are the same whatever runs the head."""


def read(path: Path, preset: str, head: str, head_dtype: str, gpu: str) -> dict[str, Any]:
    """{"source", "gpu", "stages": stage -> microseconds, "total": microseconds of a chunk by the host's clock, or None, "notes"}.

    Of several parts the shortest time of each stage; of other heads all stages but the head's own. "notes" are lines that say
    so where times were measured on another GPU than `gpu`, a name as PyTorch gives it, or where nothing fits; and the times of
    a head in one launch that was another kernel, which stand nowhere else.

    InputError: no such file, it has nothing of this preset in bfloat16 on a GPU, or what it has is no result.
    """
    data = read_json(path, HINT, error=InputError)
    parts = {"": data} if _is_part(data) else {k: v for k, v in data.items() if _is_part(v)}
    if not parts:
        raise InputError(f"--measured {path}: no times of stages in it; {HINT}")
    named = {name: part for name, part in parts.items() if part["preset"] == preset}
    if not named:
        there = ", ".join(sorted({shown(part["preset"]) for part in parts.values()}))
        raise InputError(f"--measured {path}: nothing of {preset} in it, only of {there}; {HINT}")
    fitting = {name: part for name, part in named.items() if _is_comparable(part)}
    if not fitting:
        raise InputError(
            f"--measured {path}: what it has of {preset} is of a CPU, of another dtype than bfloat16, or quantized; {HINT}"
        )
    found: dict[str, Any] = {"source": path.name, "gpu": None, "stages": {}, "total": None, "notes": []}
    for name, part in fitting.items():
        where = f"--measured {path}" + (f": {name}" if name else "")
        found["gpu"] = found["gpu"] or _gpu(part) or _gpu(data)
        before = _kernel_before(part)
        same = _same_head(part, head, head_dtype)
        for stage, us in _stages(part, where):
            if stage in HEADLESS or (same and not before):
                found["stages"][stage] = min(us, found["stages"].get(stage, us))
            elif same and head == "one_launch":
                found["notes"].append(
                    f"measured of the kernel before, with barriers over all SMs: {stage} {us:,.1f} us ({name or path.name})"
                )
        p50 = _of(part, "engine", where).get("p50")
        if same and not before and p50 is not None:
            found["total"] = min(1e3 * _time(p50, f"{where}: engine.p50"), found["total"] or float("inf"))
    if found["gpu"] not in (None, gpu):
        found["notes"].append(f"measured on another GPU: {shown(found['gpu'])}; the predictions are for {shown(gpu)}")
    if not found["stages"]:
        found["notes"].append("measured: no time of any stage in it")
    return found


def _kernel_before(part: Mapping[str, Any]) -> bool:
    """Whether its head in one launch was another kernel: results of this one say how its launch was cut."""
    return part.get("head") == "one_launch" and not part.get("one_launch")


def _is_comparable(part: Mapping[str, Any]) -> bool:
    """Whether it was measured as a budget is made: on a GPU, in bfloat16, not quantized. What it does not say does not matter."""
    on_cpu = str(part.get("device") or "").startswith("cpu")
    return not on_cpu and part.get("dtype") in (None, "bfloat16") and not part.get("quantization")


def _gpu(part: Mapping[str, Any]) -> str | None:
    machine = part.get("machine")
    gpu = machine.get("gpu") if isinstance(machine, dict) else None
    return gpu if isinstance(gpu, str) else None


def _of(data: Mapping[str, Any], key: str, where: str, kind: type[Any] = dict) -> Any:
    """What stands under a key, empty where there is nothing. InputError: it is of another kind."""
    value = data.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise InputError(f"{where}: {key}: expected {wanted}, got {shown(value)}; {HINT}")
    return value


def _time(value: Any, where: str) -> float:
    """InputError: it is no number above or equal to 0."""
    if not is_finite(value) or value < 0:
        raise InputError(f"{where}: expected a time of at least 0, got {shown(value)}; {HINT}")
    return float(value)


def _is_part(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("preset"), str) and ("stage_us" in data or "stages" in data)


def _same_head(part: Mapping[str, Any], head: str, head_dtype: str) -> bool:
    return part.get("head_dtype") == head_dtype and (head == "auto" or part.get("head") == head)


def _stages(part: Mapping[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """Stage -> microseconds: of a latency's engine, of a profile's replays, of a profile's kernels where there is no replay."""
    stages = _of(part, "stages", where)
    if "stage_us" not in part:
        for stage, ms in _of(stages, "engine", f"{where}: stages").items():
            if ms is not None:
                yield stage, 1e3 * _time(ms, f"{where}: stages.engine.{stage}")
        return
    for stage, us in _of(part, "replay_us", where).items():
        if stage in STAGES and us is not None:
            yield stage, _time(us, f"{where}: replay_us.{stage}")
    yield from _around(stages, f"{where}: stages").items()


def _around(kernels: Mapping[str, Any], where: str) -> dict[str, float]:
    """What a profile has in its first and last stage, by the stages of a step: its noise is drawn in the first one."""
    found: dict[str, float] = {}
    for stage in ("preprocess", "outputs"):
        for i, one in enumerate(_of(kernels, stage, where, list)):
            if not isinstance(one, dict):
                raise InputError(f"{where}.{stage}.{i}: expected an object, got {shown(one)}; {HINT}")
            name = str(one.get("kernel"))
            of = "copies" if "HtoD" in name or "DtoH" in name else stage
            if stage == "preprocess" and ("philox" in name or "DtoD" in name):
                of = "noise"
            found[of] = found.get(of, 0.0) + _time(one.get("us"), f"{where}.{stage}.{i}.us")
    return found
