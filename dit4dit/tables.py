"""What is printed and stored beside numbers: a table, percentiles, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LEAST = {"p90": 10, "p95": 20, "p99": 100, "p999": 1000, "jitter": 1000}
"""How many samples a quantile q needs, 1 / (1 - q): with fewer none lies beyond it, and it is the maximum under another name."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; columns listed in `right` are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        parts = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])])


def quantiles(values: Iterable[float], names: Sequence[str] = ("p50", "p95", "p99", "p999")) -> dict[str, Any]:
    """The quantiles of these names, "max" and "jitter", in the unit of the values; nearest rank, so each is one of them.

    jitter is p999 / p50, without a unit. What `LEAST` says there are too few values for is None: see `backed`.

    Args:
        names: "p" and the decimals of the quantile: p50, p90, p95, p99, p999.

    Raises:
        ValueError: no value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("quantiles: expected at least one value, got none")

    def rank(per_mille: int) -> float:
        return ordered[max(-(-per_mille * len(ordered) // 1000) - 1, 0)]

    p50, p999 = rank(500), rank(999)
    found = {name: rank(int(name[1:].ljust(3, "0"))) for name in names}
    return backed({**found, "max": ordered[-1], "jitter": p999 / p50 if p50 > 0 else 1.0}, len(ordered))


def quantiles_ms(seconds: Iterable[float]) -> dict[str, Any]:
    """`quantiles` of times in seconds, in milliseconds; "samples" says how many there are."""
    ms = [1e3 * one for one in seconds]
    return {**quantiles(ms), "samples": len(ms)}


def backed(found: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The quantiles with None for each that so few samples do not show; for readers of results from before this rule."""
    return {name: None if samples < LEAST.get(name, 1) else value for name, value in found.items()}


def number(value: float | None, form: str = ".2f") -> str:
    """A cell of a table: the number, "-" where there is none."""
    return "-" if value is None else format(value, form)


def machine() -> dict[str, Any]:
    """This machine: processor, cores that this process may use, system, versions. CUDA is not touched: runs on a CPU ask too;
    the benchmarks' `harness.machine` adds the GPU.
    """
    import torch

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """As Linux tells it, otherwise the architecture; no process is started for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
