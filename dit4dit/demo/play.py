"""A policy plays the built-in world in closed loop: test layouts, success rates, and the policy that ships with the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit4dit.control.execution import Execution
from dit4dit.demo.other_words import OtherWords
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import TEST_SEEDS_FROM
from dit4dit.evaluation import identity, report, tabletop
from dit4dit.evaluation.plan import Plan
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.evaluation.statistics import Rate
from dit4dit.evaluation.summary import summarise
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import read_json
from dit4dit.policy.policy import Policy
from dit4dit.tables import machine, quantiles_ms

EXECUTE = 4
"""Rows of each chunk that are executed, of 8: a policy that looks again sooner comes back from its errors sooner."""


def demo(
    out: Path,
    *,
    episodes: int,
    seed: int,
    device: str,
    bar: Callable[[str, int], Any],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Episodes on layouts from `seed` on, one at a time, as a robot would have it; writes demo.json and report.html into `out`.

    Args:
        out: new folder, or one with the same run, which then goes on.
        bar: (what, how many) -> a context manager that gives a function to be told of each one done.
        checkpoint: another policy for this world than the package's.
    """
    policy = tabletop_policy_dir() if checkpoint is None else checkpoint
    records = play(policy, out / "run", episodes, bar=bar, videos="all", batch=1, seed=seed, device=device, resume=True)
    report.write([out / "run"], out)
    seconds = [ms / 1e3 for record in records for ms in record["took"]["chunk_ms"]]
    result = {
        "success": rate(records),
        "seed": seed,
        "chunk_ms": quantiles_ms(seconds),
        "checkpoint": str(policy),
        "trained": read_json(policy / "metrics.json") if checkpoint is None else None,
        "machine": {**machine_facts(1), "device": device},
    }
    write_json(out / "demo.json", result)
    return result


def plan(episodes: int, *, seed: int | None = None, other_words: bool = False) -> Plan:
    """Test layouts; with `other_words` the instruction names another goal than is judged."""
    made = tabletop.plan(episodes, TEST_SEEDS_FROM if seed is None else seed)
    if not other_words:
        return made
    worlds = [replace(one, environment=f"{OtherWords.__module__}:{OtherWords.__qualname__}") for one in made.episodes]
    return replace(made, episodes=tuple(worlds), about={**made.about, "other_words": True})


def play(
    checkpoint: Path,
    folder: Path,
    episodes: int,
    *,
    bar: Callable[[str, int], Any],
    other_words: bool = False,
    videos: Any = "none",
    batch: int = 8,
    seed: int | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Closed-loop episodes of a checkpoint, their records in order; with `resume` those of a run in `folder` are kept."""
    policy = Policy.from_pretrained(checkpoint, device=device)
    options = Options(Execution(execute=EXECUTE), batch=batch, workers=batch, videos=videos)
    assert policy.config.head is not None
    with bar(folder.name, episodes) as done:
        return evaluate(
            policy,
            plan(episodes, seed=seed, other_words=other_words),
            options,
            folder,
            horizon=policy.config.head.action_horizon,
            about_policy=identity.describe(policy, checkpoint),
            resume=resume,
            on_episode=lambda record: done(1),
        )


def rate(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Successes of episodes with Wilson's 95 % interval; an episode that ended in an error is none of either."""
    summary = summarise(records)
    overall: Rate = summary.overall
    return {
        "successes": overall.successes,
        "episodes": overall.episodes,
        "rate": overall.value,
        "interval_95": [overall.low, overall.high],
        "errors": summary.all_errors,
        "words": overall.percent(),
    }


def machine_facts(processes: int) -> dict[str, Any]:
    """The machine, as demo.json and demo-train.json name it."""
    here = machine()
    return {
        "processor": here["cpu"],
        "cores": here["cores"],
        "processes": processes,
        "python": here["python"],
        "torch": here["torch"],
        "load_average": os.getloadavg(),
    }
