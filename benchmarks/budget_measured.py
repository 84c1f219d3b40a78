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


def read(path: Path, preset: str, head: str, head_dtype: str) -> dict[str, Any]:
    """{"source", "stages": stage -> microseconds, "total": microseconds of a chunk by the host's clock, or None}.

    Of several parts the shortest time of each stage; of other heads all stages but the head's own.
    InputError: no such file, or it has nothing of this preset.
    """
    data = read_json(path, HINT, error=InputError)
    parts = {"": data} if _is_part(data) else {k: v for k, v in data.items() if _is_part(v)}
    if not parts:
        raise InputError(f"--measured {path}: no times of stages in it; {HINT}")
    fitting = {
        name: part for name, part in parts.items() if part.get("preset") == preset and not part.get("quantization")
    }
    if not fitting:
        there = ", ".join(sorted({shown(part.get("preset")) for part in parts.values()}))
        raise InputError(f"--measured {path}: nothing of {preset} in it, only of {there}; {HINT}")
    found: dict[str, Any] = {"source": path.name, "stages": {}, "total": None}
    for part in fitting.values():
        same = _same_head(part, head, head_dtype)
        for stage, us in _stages(part):
            if same or stage in HEADLESS:
                found["stages"][stage] = min(us, found["stages"].get(stage, us))
        engine = part.get("engine")
        p50 = engine.get("p50") if isinstance(engine, dict) else None
        if same and p50 is not None and is_finite(p50):
            found["total"] = min(float(p50) * 1e3, found["total"] or float("inf"))
    return found


def _is_part(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("preset"), str) and ("stage_us" in data or "stages" in data)


def _same_head(part: Mapping[str, Any], head: str, head_dtype: str) -> bool:
    return part.get("head_dtype") == head_dtype and (head == "auto" or part.get("head") == head)


def _stages(part: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Stage -> microseconds: of a latency's engine, of a profile's replays, of a profile's kernels where there is no replay."""
    engine = (part.get("stages") or {}).get("engine") if "stage_us" not in part else None
    for stage, ms in (engine or {}).items():
        if is_finite(ms):
            yield stage, float(ms) * 1e3
    for stage, us in (part.get("replay_us") or {}).items():
        if stage in STAGES and is_finite(us):
            yield stage, float(us)
    kernels = part.get("stages") if "stage_us" in part else None
    for stage, us in _around(kernels or {}).items():
        yield stage, us


def _around(kernels: Mapping[str, Any]) -> dict[str, float]:
    """What a profile has in its first and last stage, by the stages of a step: its noise is drawn in the first one."""
    found: dict[str, float] = {}
    for stage in ("preprocess", "outputs"):
        for one in kernels.get(stage) or ():
            name = str(one.get("kernel"))
            of = "copies" if "HtoD" in name or "DtoH" in name else stage
            if stage == "preprocess" and ("philox" in name or "DtoD" in name):
                of = "noise"
            found[of] = found.get(of, 0.0) + float(one.get("us") or 0.0)
    return found
