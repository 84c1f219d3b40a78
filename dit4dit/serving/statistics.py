"""What a server has done: counts, and how long requests waited and took."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from dit4dit.tables import quantiles_ms

KEPT = 100_000
"""Latest requests of which times are kept."""
TIMES = ("queue", "infer", "total")


class Statistics:
    """Grows no further than `KEPT` requests."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.batches: Counter[int] = Counter()
        self._times: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in TIMES}
        self._start = time.monotonic()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._start

    def add(self, batch: int, **seconds: float) -> None:
        """One inference request answered: how many shared its pass, and its times by name."""
        self.counts["requests"] += 1
        self.batches[batch] += 1
        for name in TIMES:
            self._times[name].append(seconds[name])

    def summary(self) -> dict[str, Any]:
        """Counts, and per time its percentiles [ms], ready for JSON; None for those that take more requests (`tables.LEAST`)."""
        times = {f"{name}_ms": quantiles_ms(found) for name, found in self._times.items() if found}
        shared = {str(size): count for size, count in sorted(self.batches.items())}
        return {"uptime_s": self.uptime_s, **self.counts, "requests_by_batch": shared, **times}

    def line(self) -> str:
        """The summary in one line."""
        counts = {"requests": 0, "errors": 0, **self.counts}
        words = [f"{count} {name}" for name, count in counts.items()]
        summary = self.summary()
        for name in TIMES:
            found = summary.get(f"{name}_ms")
            if found:
                shown = [(q, found[q]) for q in ("p50", "p95", "p99", "max") if found[q] is not None]
                words.append(f"{name} {', '.join(f'{q} {ms:.1f}' for q, ms in shown)} ms")
        return "; ".join(words)
