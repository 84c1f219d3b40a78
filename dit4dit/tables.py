"""What is printed and stored beside numbers: a table, percentiles, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; columns listed in `right` are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        parts = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])])


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Latency percentiles in milliseconds, with the number of samples."""
    import numpy as np

    ms = np.asarray(seconds) * 1e3
    names = {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    return {**{k: float(np.percentile(ms, q)) for k, q in names.items()}, "max": float(ms.max()), "samples": len(ms)}


def machine() -> dict[str, Any]:
    """This machine: processor, cores that this process may use, system, versions. CUDA is not touched: runs on a CPU ask too;
    the benchmarks' `harness.machine` adds the GPU.
    """
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    """As Linux tells it, otherwise what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
