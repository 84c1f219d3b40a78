"""Success rates that the authors of the model have published, in percent."""

from __future__ import annotations

LIBERO = {"libero_spatial": 98.6, "libero_object": 100.0, "libero_goal": 99.2, "libero_10": 96.6}
LIBERO_MEAN = 98.6
GR1_RUNS = (56.7, 56.6, 56.3, 57.4, 57.3)
"""Averages over the 24 environments of five evaluations of one checkpoint."""
COUNTED_AT_CHUNK_ENDS = ("gr1",)
"""Benchmarks whose published runner sees a success only at the end of an executed chunk."""


def of_suite(suite: str) -> float | None:
    """The published rate of a suite, the mean where there are several; None where there is none."""
    return sum(GR1_RUNS) / len(GR1_RUNS) if suite == "gr1" else LIBERO.get(suite)


def of_benchmark(benchmark: str, suites: set[str]) -> float | None:
    """The published rate of a whole benchmark, comparable only where exactly its suites were run."""
    if benchmark == "libero":
        return LIBERO_MEAN if suites == set(LIBERO) else None
    return of_suite(benchmark)
