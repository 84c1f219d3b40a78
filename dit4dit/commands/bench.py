"""The commands that measure: `dit4dit bench ...`, one function each. They print; what they measure is in `dit4dit.benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit4dit.commands.shell import Device, Dtype, dtype_of, finish
from dit4dit.errors import InputError


def flops(preset: str = "robocasa_gr1", json: Path | None = None) -> int:
    """GFLOP per stage of one chunk, counted over the real modules: the published schedule, and what this package runs.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        json: also write the counts to this file.
    """
    from dit4dit.benchmarks import flops as module  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.commands.report import table
    from dit4dit.presets import preset as find

    counts = module.count(find(preset))
    rows = [[stage, *(f"{counts[s][stage]:,.2f}" for s in counts)] for stage in (*module.STAGES, "total")]
    finish(table(["GFLOP", *counts], rows, right=(1, 2, 3)), {"preset": preset, **counts}, json)
    return 0


def latency(
    preset: str = "mid",
    device: Device = "auto",
    dtype: Dtype = "auto",
    chunks: int = 5,
    baseline: bool = False,
    text: bool = True,
    seed: int = 0,
    json: Path | None = None,
    report: Path | None = None,
) -> int:
    """Latency of one chunk on random weights of true sizes: the engine and, beside it, the published schedule.

    Args:
        preset: libero, robocasa_gr1, unitree_g1, mid, tiny or tabletop.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        chunks: timed chunks of each contender.
        baseline: also time the published schedule, alternating, and report the ratio.
        text: the baseline encodes its instruction in each chunk, as published; --no-text leaves that out.
        seed: of weights and inputs.
        json: also write every number to this file.
        report: write an HTML report and its pictures into this folder.
    """
    import torch

    from dit4dit.benchmarks import latency as module
    from dit4dit.benchmarks import latency_report
    from dit4dit.commands.report import table
    from dit4dit.policy import pick_device
    from dit4dit.presets import preset as find

    if chunks < 1:
        raise InputError(f"--chunks: expected at least 1, got {chunks}")
    place, chosen = pick_device(device), find(preset)
    kind = dtype_of(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    options = {"chunks": chunks, "baseline": baseline, "text": text, "seed": seed}
    result = module.measure(chosen, preset, device=place, dtype=kind, **options)
    header = ["", "p50 ms", "p95", "p99", "p99.9", "max", "jitter", "of matrix rate", "stages, p50 ms"]
    lines = [table(header, module.rows(result), right=range(1, 8))]
    if result["ratio"]:
        lines.append("published / engine: " + "  ".join(f"{k} {v:.2f}" for k, v in result["ratio"].items()))
    if report is not None:
        lines.append(f"wrote {latency_report.write(report, result)}")
    finish("\n".join(lines), result, json)
    return 0


BENCHMARKS: dict[str, Callable[..., int]] = {"flops": flops, "latency": latency}
