"""Where each stage stands under the roof of this device: its arithmetic intensity, the rate it reaches, the rate it could.

The roof is measured in the same run: the rate of one large matrix product in the run's dtype, and the bandwidth of a large copy.
A stage's FLOPs are `flops.count`'s, its bytes are `flops.moved`'s numbers in the dtype that the stage runs in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from dit4dit.benchmarks import flops

from dit4dit.presets import Preset

BYTES = "each operand of each product read once and each result written once, all else fused into the products"


def memory_rate(device: torch.device) -> float:
    """GB/s of the best of five copies of a tensor far larger than any cache, bytes read and written."""
    count = (1 << 30 if device.type == "cuda" else 1 << 28) // 4
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * 4 * count / min(seconds[1:]) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def points(
    preset: Preset,
    counts: Mapping[str, Mapping[str, float]],
    stages_ms: Mapping[str, Mapping[str, float]],
    *,
    matrix_gflops: float,
    memory_gb_per_s: float,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    text: bool,
) -> dict[str, Any]:
    """The roof and one point per contender and stage; ready for JSON.

    counts: `flops.count` of the preset. stages_ms: contender -> stage -> median milliseconds. text: whether the baseline
    encodes its instruction.
    """
    traffic = flops.moved(preset)
    found = []
    for who, medians in stages_ms.items():
        schedule = {"engine": "executed", "baseline": "published"}[who]
        for stage, ms in medians.items():
            if stage == "text" and not text:
                continue
            parts = _parts(who, stage)
            kind = head_dtype if stage == "action_head" else dtype
            gflop = sum(counts[schedule][part] for part in parts)
            gbytes = sum(traffic[schedule][part] for part in parts) * kind.itemsize
            rate, roof = gflop / ms * 1e3, min(matrix_gflops, memory_gb_per_s * gflop / gbytes)
            found.append(
                {
                    "who": who,
                    "stage": stage,
                    "dtype": str(kind).removeprefix("torch."),
                    "gflop": gflop,
                    "gbytes": gbytes,
                    "intensity": gflop / gbytes,
                    "gflop_per_s": rate,
                    "roof_gflop_per_s": roof,
                    "share_of_roof": rate / roof,
                }
            )
    return {
        "matrix_gflops": matrix_gflops,
        "memory_gb_per_s": memory_gb_per_s,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": BYTES,
        "points": found,
    }


def _parts(who: str, stage: str) -> tuple[str, ...]:
    """The counted stages that a timed one does; the published transformer projects its text in each call."""
    if stage == "text":
        return ("text_encoder",)
    return ("backbone", "text_projection") if (who, stage) == ("baseline", "backbone") else (stage,)
