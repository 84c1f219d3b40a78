"""How much faster several simulators are than one: episodes per second of the tabletop world, one policy, the same padded batch.

Before a rate is taken, the records of every number of workers must be the same but for times. The numbers of workers take turns;
each rate is the median over the rounds. The first episode of each worker, in which it starts, is left out.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording

from dit4dit.evaluation import identity, tabletop
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.policy.policy import Policy

ENOUGH = 0.75
"""Of the rate of one worker times min(workers, cores), which is what is promised."""


def measure(
    policy: Policy,
    checkpoint: Path,
    *,
    workers: Sequence[int],
    batch: int,
    episodes: int,
    rounds: int,
    record: Recording,
    on_episode: Callable[[], None] = lambda: None,
) -> None:
    """Episodes per second for one worker and for each of `workers`, with the machine they belong to, into `record`.

    Args:
        episodes: of each worker and round, after the first, where there are most workers; fewer workers play the same ones,
            because some episodes take six times as long as others.

    `load_before` in the result is the machine's load average (processes that want a core) before it began: a number taken
    beside other work says so.

    Raises:
        AssertionError: two numbers of workers disagree about an episode; nothing is reported.
    """
    about = identity.describe(policy, checkpoint)
    result = record.result
    result |= {"machine": machine(), "load_before": os.getloadavg()[0]}
    counts = [1, *(count for count in dict.fromkeys(workers) if count != 1)]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    result |= {"batch": batch, "episodes": episodes, "rounds": rounds, "runs": [], "all_rates": rates}
    known: dict[int, Any] = {}
    todo = [(turn, count) for turn in range(rounds) for count in counts]
    for _, count in record.each(todo, "rounds", name=lambda pair: f"round {pair[0] + 1}, {pair[1]} workers"):
        rate, records = _play(policy, about, count, batch, max(counts) * (episodes + 1), on_episode)
        for episode in records:
            del episode["took"]
            assert known.setdefault(episode["trial"], episode) == episode, (
                f"{count} workers: another episode; nothing is timed"
            )
        rates[count].append(rate)
        result["runs"] = _runs(rates, result["machine"]["cores"])


def _runs(rates: dict[int, list[float]], cores: int) -> list[dict[str, Any]]:
    """The numbers of workers that have a rate so far; one worker is the first to."""
    one = median(rates[1])
    return [
        {
            "workers": count,
            "episodes_per_second": median(found),
            "times_one": median(found) / one,
            "efficiency": median(found) / one / min(count, cores),
        }
        for count, found in rates.items()
        if found
    ]


def _play(
    policy: Policy, about: dict[str, Any], workers: int, batch: int, episodes: int, on_episode: Callable[[], None]
) -> tuple[float, list[dict[str, Any]]]:
    ends: list[float] = []

    def ended(record: dict[str, Any]) -> None:
        ends.append(time.monotonic())
        on_episode()

    with tempfile.TemporaryDirectory() as folder:
        records = evaluate(
            policy,
            tabletop.plan(episodes),
            Options(batch=batch, workers=workers, videos="none"),
            Path(folder) / "run",
            horizon=policy.config.head.action_horizon,
            about_policy=about,
            on_episode=ended,
        )
    return (len(ends) - workers) / (ends[-1] - ends[workers - 1]), [dict(record) for record in records]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table: workers, episodes per second, times one worker, share of what the cores could give."""
    return [
        [
            str(r["workers"]),
            f"{r['episodes_per_second']:.2f}",
            f"{r['times_one']:.2f}",
            f"{100 * r['efficiency']:.0f} %",
        ]
        for r in result["runs"]
    ]
