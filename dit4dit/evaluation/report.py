"""`dit4dit eval report`: what one or several runs say, as one JSON file and one self-contained page (`report_page`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from dit4dit.errors import InputError
from dit4dit.evaluation import published
from dit4dit.evaluation.report_page import page
from dit4dit.evaluation.runs import Run, other_worlds
from dit4dit.evaluation.statistics import compare
from dit4dit.evaluation.summary import Summary, summarise
from dit4dit.files.json_files import write_json
from dit4dit.tables import quantiles


def write(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write report.json and report.html into `out`; returns what report.json holds.

    Raises:
        DataError: a folder is no run. InputError: a run without a finished episode, or two of the same name.
    """
    runs = [Run.open(folder) for folder in folders]
    names = run_names(folders)
    for run in runs:
        if not run.records:
            raise InputError(f"{run.folder}: has no finished episode yet")
    data = {
        "runs": [about(name, run) for name, run in zip(names, runs, strict=True)],
        "comparisons": comparisons(names, runs),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", data)
    (out / "report.html").write_text(page(data, runs), encoding="utf-8")
    return data


def run_names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the ends of their paths, as long as needed."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise InputError("report: the same run is given twice")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def about(name: str, run: Run) -> dict[str, Any]:
    """One run's configuration, rates, and latencies."""
    summary = summarise(run.records)
    benchmark = run.config["benchmark"]
    at_chunk_ends = (
        summarise(run.records, "success_at_chunk_ends") if benchmark in published.COUNTED_AT_CHUNK_ENDS else None
    )
    took = [record["took"] for record in run.records]
    return {
        "name": name,
        "folder": str(run.folder),
        "config": dict(run.config),
        "finished": summary.overall.episodes,
        "errors": summary.all_errors,
        "missing": run.missing,
        "results": _results(benchmark, summary, at_chunk_ends),
        "chunk_ms": _quantiles([ms for one in took for ms in one["chunk_ms"]]),
        "answer_ms": _quantiles([ms for one in took for ms in one["answer_ms"]]),
        "episode_seconds": _quantiles([one["seconds"] for one in took]),
        "versions": sorted({str(record["versions"]) for record in run.records}),
    }


def comparisons(names: Sequence[str], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each pair of runs of one benchmark on the episodes that both have, overall and by suite."""
    out = []
    for (i, first), (j, second) in combinations(enumerate(runs), 2):
        if first.config["benchmark"] != second.config["benchmark"]:
            continue
        a, b = first.outcomes, second.outcomes
        suites = sorted({key[0] for key in a} & {key[0] for key in b})
        for suite in (None, *suites) if len(suites) > 1 else (None,):
            mine, theirs = ({k: v for k, v in one.items() if suite in (None, k[0])} for one in (a, b))
            found = compare(mine, theirs)
            if found is not None:
                pair = {"first": names[i], "second": names[j], "suite": suite}
                out.append({**pair, **asdict(found), "other_worlds": other_worlds(first, second)})
    return out


def _results(benchmark: str, summary: Summary, at_chunk_ends: Summary | None) -> list[dict[str, Any]]:
    """A row for each task, each suite and all."""

    def row(suite: str | None, task: str | None, known: float | None) -> dict[str, Any]:
        key: Any = (suite, task) if task is not None else suite
        rate, again = summary.of(key), None if at_chunk_ends is None else at_chunk_ends.of(key)
        return {
            "suite": suite,
            "task": task,
            "successes": rate.successes,
            "episodes": rate.episodes,
            "percent": 100 * rate.value if rate.episodes else None,
            "interval": [100 * rate.low, 100 * rate.high],
            "errors": summary.errors[key],
            "published_count": None if again is None else again.successes,
            "published": known,
        }

    rows = [row(None, None, published.of_benchmark(benchmark, set(summary.suites)))]
    for suite in summary.suites:
        rows.append(row(suite, None, published.of_suite(suite)))
        rows += [row(suite, task, None) for of, task in summary.tasks if of == suite]
    return rows


def _quantiles(values: Sequence[float]) -> dict[str, Any]:
    return {"count": len(values), **(quantiles(values) if values else {})}
