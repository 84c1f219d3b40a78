"""A run's success rates by task, by suite and overall. Episodes that ended in an error count in none of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dit4dit.evaluation.runs import Record
from dit4dit.evaluation.statistics import Rate, wilson


@dataclass(frozen=True)
class Summary:
    """tasks: (suite, task) -> rate; errors: episodes of that task, that suite, or all that ended in an error."""

    overall: Rate
    suites: dict[str, Rate]
    tasks: dict[tuple[str, str], Rate]
    errors: dict[Any, int]

    def of(self, key: Any) -> Rate:
        """key: (suite, task), a suite, or None for all, as in `errors`."""
        if key is None:
            return self.overall
        return self.tasks[key] if isinstance(key, tuple) else self.suites[key]

    @property
    def all_errors(self) -> int:
        return int(self.errors[None])


def summarise(records: Sequence[Record], field: str = "success") -> Summary:
    """field: which count: "success" (at any step), "success_at_end", or "success_at_chunk_ends" (as the published GR1 runner)."""

    def by(key: Callable[[Record], Any]) -> tuple[dict[Any, Rate], dict[Any, int]]:
        groups: dict[Any, list[Record]] = defaultdict(list)
        for record in records:
            groups[key(record)].append(record)
        outcomes = {k: [r[field] for r in found if r["error"] is None] for k, found in groups.items()}
        errors = {k: len(groups[k]) - len(found) for k, found in outcomes.items()}
        return {k: wilson(sum(found), len(found)) for k, found in outcomes.items()}, errors

    tasks, in_tasks = by(lambda r: (r["suite"], r["task"]))
    suites, in_suites = by(lambda r: r["suite"])
    overall, in_all = by(lambda r: None)
    errors = {**in_tasks, **in_suites, None: in_all.get(None, 0)}
    return Summary(overall.get(None, wilson(0, 0)), suites, tasks, errors)


def rows(summary: Summary) -> list[list[str]]:
    """suite, task, success rate with interval, errors: one row a task, a suite where it has several, and all."""
    out = []
    for suite, rate in summary.suites.items():
        tasks = {task: r for (s, task), r in summary.tasks.items() if s == suite}
        out += [[suite, task, r.percent(), str(summary.errors[suite, task])] for task, r in tasks.items()]
        if len(tasks) > 1:
            out.append([suite, "all tasks", rate.percent(), str(summary.errors[suite])])
    if len(summary.suites) != 1:
        out.append(["all suites", "", summary.overall.percent(), str(summary.all_errors)])
    return out
