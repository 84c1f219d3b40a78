"""`dit4dit eval ...`: one function per subcommand; what they run is `dit4dit.evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tyro

from dit4dit.commands import eval_run
from dit4dit.commands.eval_openloop import openloop
from dit4dit.commands.eval_run import PolicyArgument, RunArgument
from dit4dit.commands.eval_setup import setup
from dit4dit.commands.eval_simulators import gr1, libero
from dit4dit.commands.shell import check_outputs, finish, say
from dit4dit.errors import InputError
from dit4dit.files.atomic import check_folder


def tabletop(
    policy: PolicyArgument,
    run: RunArgument,
    episodes: int = 50,
    seed: int = 1_000_000,
    picture: int = 64,
    max_steps: int = 60,
    paraphrase: int | None = 0,
) -> int:
    """Success rate in the built-in tabletop world.

    Args:
        policy: the policy.
        run: the run.
        episodes: how many layouts.
        seed: of the first layout and its noise, the next ones follow; layouts from 1000000 on are never trained on.
        picture: side of the picture, 64, 96 or 128 px.
        max_steps: an episode without success ends after so many steps of 0.1 s.
        paraphrase: wording of the instruction, 0 to 3; None lets the seed choose.
    """
    from dit4dit.evaluation import tabletop as world

    plan = world.plan(episodes, seed, picture=picture, max_steps=max_steps, paraphrase=paraphrase)
    return eval_run.run(plan, policy, run)


def merge(out: tyro.conf.Positional[Path], shards: tyro.conf.Positional[tuple[Path, ...]]) -> int:
    """The shards of one run (--shard i/n) as one run.

    Args:
        out: new folder.
        shards: folders of the shards, all n of them.
    """
    from dit4dit.evaluation import runs

    run = runs.merge(shards, out)
    say(f"wrote {out}: {len(run.records)} episodes, {run.missing} missing, {len(run.errors)} errors")
    return 0


def compare(
    first: tyro.conf.Positional[Path],
    second: tyro.conf.Positional[Path],
    confidence: float = 0.95,
    json: Path | None = None,
) -> int:
    """Paired comparison of two runs on the episodes that both have.

    Args:
        first: folder of a run.
        second: folder of another run; the difference is its success rate minus the first one's.
        confidence: of the interval.
        json: also write the numbers to this file.
    """
    from dit4dit.evaluation import statistics
    from dit4dit.evaluation.runs import Run, other_worlds

    check_outputs(json=json)
    a, b = Run.open(first), Run.open(second)
    found = statistics.compare(a.outcomes, b.outcomes, confidence)
    if found is None:
        raise InputError(f"{first} and {second}: have no finished episode in common")
    low, high = 100 * found.low, 100 * found.high
    lines = [
        f"{found.episodes} episodes in both: {found.both} succeed in both, {found.only_first} only in {first}, "
        f"{found.only_second} only in {second}, {found.neither} in neither",
        f"difference {100 * found.difference:+.1f} points, {100 * confidence:g} % interval [{low:+.1f}, {high:+.1f}]; "
        f"McNemar (exact) p = {found.p_value:.3g}",
    ]
    other = other_worlds(a, b)
    lines += [
        f"not the same episodes: {key} is {mine!r} in {first}, {theirs!r} in {second}"
        for key, (mine, theirs) in other.items()
    ]
    names = {"first": str(first), "second": str(second), "confidence": confidence}
    finish("\n".join(lines), {**names, **asdict(found), "other_worlds": other}, json)
    return 0


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> int:
    """One page and one JSON file of what the runs say: rates with intervals beside the published ones, comparison, videos.

    Args:
        runs: folders of one or several runs.
        out: folder for report.html and report.json; the first run's when not given.
    """
    from dit4dit.evaluation import report as module
    from dit4dit.tables import table

    if not runs:
        raise InputError("report: give the folder of at least one run")
    folder = runs[0] if out is None else out
    if out is not None or folder.is_dir():
        check_folder("--out", folder)
    rows = []
    for info in module.write(runs, folder)["runs"]:
        whole = info["results"][0]
        low, high = whole["interval"]
        rows.append(
            [info["name"], f"{whole['successes']} of {whole['episodes']}", f"[{low:.1f}, {high:.1f}] %", info["errors"]]
        )
    say(table(["run", "success", "95 % interval", "errors"], rows, right=(1, 2, 3)))
    say(f"wrote {folder / 'report.html'} and {folder / 'report.json'}")
    return 0


def episodes(width: float = 0.1, rate: float = 0.5, confidence: float = 0.95, json: Path | None = None) -> int:
    """How many episodes a success rate needs, so that its Wilson interval is at most so wide.

    Args:
        width: of the whole interval, 0..1; 0.1 is about five points to each side.
        rate: the success rate that is expected, 0..1; 0.5 needs the most.
        confidence: of the interval.
        json: also write the numbers to this file.
    """
    from dit4dit.evaluation import statistics

    check_outputs(json=json)
    count = statistics.episodes_for_width(width, rate, confidence)
    at = statistics.wilson(round(rate * count), count, confidence)
    text = f"{count} episodes: at a success rate of {100 * rate:g} % about {at.percent()}"
    finish(text, {"episodes": count, "width": width, "rate": rate, "confidence": confidence}, json)
    return 0


EVALUATIONS: dict[str, Callable[..., int]] = {
    "tabletop": tabletop,
    "openloop": openloop,
    "libero": libero,
    "gr1": gr1,
    "compare": compare,
    "merge": merge,
    "report": report,
    "episodes": episodes,
    "setup": setup,
}
