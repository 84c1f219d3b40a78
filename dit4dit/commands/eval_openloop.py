"""`dit4dit eval openloop`: the policy's chunks beside the recorded actions; JSON, JSON lines, pictures, and a page of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from dit4dit.commands.eval_run import PolicyArgument, PolicyOptions
from dit4dit.commands.shell import at_least, check_inputs, check_seed, progress, say
from dit4dit.errors import InputError
from dit4dit.files.atomic import check_folder
from dit4dit.tables import table


def openloop(
    dataset: tyro.conf.Positional[Path],
    policy: PolicyArgument,
    out: Path,
    robot: str | None = None,
    robots: Path | None = None,
    modality: Path | None = None,
    episodes: tuple[int, ...] = (),
    every: int | None = None,
    seed: int = 0,
    batch: int = 4,
    plots: int = 20,
) -> int:
    """Predicted against recorded actions of a LeRobot data set, per dimension: no robot, no simulator.

    Args:
        dataset: LeRobot data set folder.
        policy: the policy.
        out: folder for openloop.json, episodes.jsonl, plots and index.html.
        robot: robot type of the data set; the one of the checkpoint's embodiment when not given.
        robots: YAML file with robots of your own.
        modality: a modality.json for a data set that has none.
        episodes: numbers of the episodes; all when not given.
        every: frames from one chunk to the next, of which so many rows are compared; the chunk's length when not given.
        seed: of the noise.
        batch: chunks in one pass.
        plots: how many episodes are drawn, the first ones.
    """
    from dit4dit.data import gripper
    from dit4dit.evaluation import identity
    from dit4dit.evaluation import openloop as module
    from dit4dit.evaluation.openloop_report import RESULT, write

    at_least(1, every=every, batch=batch)
    at_least(0, plots=plots)
    check_seed(seed, bits=64)
    check_inputs(robots=robots, modality=modality)
    if (out / RESULT).exists():
        raise InputError(f"--out {out}: has a result already ({RESULT}); give another folder")
    recording, load = _open(dataset, policy, robot, robots, modality)
    spoilt = {problem.episode for problem in recording.problems}
    without = [i for i, episode in enumerate(recording.data.meta.episodes) if episode.index in spoilt]
    # no error: one episode may never close it
    other = [finding.message for finding in gripper.findings(recording, without)]
    for warning in [*recording.data.warnings(recording.columns), *other]:
        say(f"note: {warning}")
    chosen = module.choose_episodes(recording, episodes)
    check_folder("--out", out)
    loaded = load()
    step = loaded.config.head.action_horizon if every is None else every
    about = {
        "dataset": str(dataset),
        "robot": recording.robot.name,
        "policy": identity.describe(loaded, policy.checkpoint, policy.backbone),
    }
    total = sum(len(module.points_of(recording.length(i), step)) for i in chosen)
    with progress("open loop", total) as done:
        wanted = partial(write, about=about, every=step, seed=seed, batch=batch, plots=plots, progress=done)
        summary = wanted(loaded, recording, chosen, out)
    say(show(summary))
    say(f"wrote {out / 'index.html'}")
    return 0


def _open(
    dataset: Path, options: PolicyOptions, robot: str | None, robots: Path | None, modality: Path | None
) -> tuple[Any, Callable[[], Any]]:
    """The data set as the policy's robot sees it, which is quickly looked at, and what loads the policy."""
    from dit4dit.checkpoints.checkpoint import open_checkpoint
    from dit4dit.checkpoints.robot import choose_embodiment
    from dit4dit.data.catalogue import catalogue
    from dit4dit.data.lerobot import LeRobot
    from dit4dit.data.samples import Recording
    from dit4dit.evaluation import openloop

    known, checkpoint = catalogue(robots), open_checkpoint(options.checkpoint, options.backbone)
    own = robot is not None and known.robot(robot).embodiment is None
    # a robot of the user's own is known from its file alone: the policy takes it as it is
    implied = None if own else choose_embodiment(checkpoint, options.embodiment)[0]
    chosen = openloop.choose_robot(known, robot, implied)
    recording = Recording.of(LeRobot.open(dataset, modality=modality, standard=chosen.modality), chosen)
    if implied is not None:
        openloop.check_fits(recording, implied)
        return recording, options.load
    return recording, partial(options.load, embodiment=recording.embodiment)


def show(summary: dict[str, Any]) -> str:
    """The result as text."""
    from dit4dit.evaluation.openloop_report import HEADER, dimension_rows

    whole = summary["normalized"]["total"]
    head = (
        f"{summary['episodes']} episodes, {summary['chunks']} chunks, one every {summary['every']} frames; normalised over all "
        f"dimensions: MSE {whole['mse']:.4g}, MAE {whole['mae']:.4g}"
    )
    left_out = f"\n{summary['damaged']} damaged episodes left out" if summary["damaged"] else ""
    return f"{table(HEADER, dimension_rows(summary), right=(1, 2, 3, 4))}\n{head}{left_out}"
