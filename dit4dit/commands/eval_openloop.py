"""`dit4dit eval openloop`: the policy's chunks beside the recorded actions; JSON, JSON lines, pictures, and a page of them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit.commands.eval_run import PolicyOptions
from dit4dit.commands.shell import say
from dit4dit.data.sheet import page
from dit4dit.errors import InputError
from dit4dit.evaluation import openloop
from dit4dit.files.atomic import check_folder
from dit4dit.files.json_files import write_json
from dit4dit.robots.action_error import ActionError
from dit4dit.tables import table

RESULT, LINES = "openloop.json", "episodes.jsonl"
COLUMNS = 4
"""Dimensions side by side in a picture."""


def run(
    dataset: Path,
    policy_options: PolicyOptions,
    out: Path,
    *,
    robot: str | None,
    robots: Path | None,
    modality: Path | None,
    episodes: Sequence[int],
    every: int | None,
    seed: int,
    batch: int,
    plots: int,
) -> int:
    """See `dit4dit eval openloop --help`; returns the exit code."""
    from tqdm import tqdm

    from dit4dit.data import gripper
    from dit4dit.evaluation import identity

    _check_numbers(every, batch, plots)
    if (out / RESULT).exists():
        raise InputError(f"--out {out}: has a result already ({RESULT}); give another folder")
    recording, policy = _open(dataset, policy_options, robot, robots, modality)
    spoilt = {problem.episode for problem in recording.problems}
    without = [i for i, episode in enumerate(recording.data.meta.episodes) if episode.index in spoilt]
    other = [
        finding.message for finding in gripper.findings(recording, without)
    ]  # no error: one episode may never close it
    for warning in [*recording.data.warnings(recording.columns), *other]:
        say(f"note: {warning}")
    chosen = openloop.choose_episodes(recording, episodes)
    step = policy.config.head.action_horizon if every is None else every
    check_folder("--out", out)
    names = policy.embodiment.action_names
    total = sum(len(openloop.points_of(recording.length(i), step)) for i in chosen)
    units, normalized = ActionError(len(names)), ActionError(len(names))
    found: list[dict[str, Any]] = []
    pictures: list[tuple[str, Path]] = []
    with tqdm(total=total, unit="chunk", desc="open loop", disable=None) as bar, (out / LINES).open("w") as lines:
        walk = openloop.evaluate(policy, recording, chosen, every=step, seed=seed, batch=batch, progress=bar.update)
        for result in walk:
            units += result.units
            normalized += result.normalized
            found.append(result.to_dict(names))
            lines.write(json.dumps(found[-1]) + "\n")
            lines.flush()
            if len(pictures) < plots:
                file = out / "plots" / f"episode_{result.index:06d}.png"
                draw(file, result, names, recording.data.fps)
                pictures.append((f"episode {result.index}: {result.task}", file))
    summary = {
        "dataset": str(dataset),
        "robot": recording.robot.name,
        "policy": identity.describe(policy, policy_options.checkpoint, policy_options.backbone),
        "seed": seed,
        "every": step,
        "batch": batch,
        "chunks": total,
        "episodes": len(found),
        "damaged": len({problem.episode for problem in recording.problems}),
        "actions": int(units.sums[2].max()),
        **openloop.errors(units, normalized, names),
    }
    write_json(out / RESULT, summary)
    write_page(out, summary, found, pictures)
    say(show(summary))
    say(f"wrote {out / 'index.html'}")
    return 0


def _check_numbers(every: int | None, batch: int, plots: int) -> None:
    for option, value, least in (("--every", every, 1), ("--batch", batch, 1), ("--plots", plots, 0)):
        if value is not None and value < least:
            raise InputError(f"{option}: expected at least {least}, got {value}")


def _open(
    dataset: Path, options: PolicyOptions, robot: str | None, robots: Path | None, modality: Path | None
) -> tuple[Any, Any]:
    """The data set as the policy's robot sees it, and the policy; the data set first, because it is quickly looked at."""
    from dit4dit.checkpoints.checkpoint import open_checkpoint
    from dit4dit.checkpoints.robot import choose_embodiment
    from dit4dit.data.catalogue import catalogue
    from dit4dit.data.lerobot import LeRobot
    from dit4dit.data.samples import Recording

    known, checkpoint = catalogue(robots), open_checkpoint(options.checkpoint, options.backbone)
    own = robot is not None and known.robot(robot).embodiment is None
    # a robot of the user's own is known from its file alone: the policy takes it as it is
    implied = None if own else choose_embodiment(checkpoint, options.embodiment)[0]
    chosen = openloop.choose_robot(known, robot, implied)
    recording = Recording.of(LeRobot.open(dataset, modality=modality, standard=chosen.modality), chosen)
    if implied is not None:
        openloop.check_fits(recording, implied)
        return recording, options.load()
    return recording, options.load(recording.embodiment)


def draw(file: Path, episode: openloop.Episode, names: Sequence[str], fps: float) -> None:
    """One panel a dimension: recorded and predicted actions over time, a dot where the policy was asked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(COLUMNS, len(names))
    down = -(-len(names) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.6 * across, 1.9 * down + 0.6), squeeze=False, sharex=True)
    time = episode.rows / fps
    # a gap where frames were not compared must not be bridged, nor one chunk joined to the next
    cuts = np.flatnonzero(np.isin(episode.rows, episode.points))[1:]
    dots = np.isin(episode.rows, episode.points)
    for d, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        axis.plot(time, episode.recorded[:, d], color="#222222", linewidth=1.0, label="recorded")
        for i, part in enumerate(np.split(np.arange(len(time)), cuts)):
            axis.plot(
                time[part],
                episode.predicted[part, d],
                color="#c2410c",
                linewidth=1.0,
                label="predicted" if not i else None,
            )
        axis.plot(time[dots], episode.predicted[dots, d], "o", color="#c2410c", markersize=3, label="asked here")
        axis.set_title(f"{name}   MAE {episode.units.mae[d]:.3g}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("s", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (1.9 * down + 0.6)))
    figure.legend(handles, labels, loc="upper center", ncol=3, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def dimension_rows(entry: dict[str, Any]) -> list[list[str]]:
    """[dimension, MAE and MSE in robot units, MAE and MSE normalised] of a summary or an episode's line."""
    units, normal = entry["robot_units"], entry["normalized"]
    cells = [
        [name, units["mae"][name], units["mse"][name], normal["mae"][name], normal["mse"][name]]
        for name in units["mae"]
    ]
    return [[row[0], *("" if value is None else f"{value:.4g}" for value in row[1:])] for row in cells]


HEADER = ("dimension", "MAE, robot units", "MSE, robot units", "MAE, normalised", "MSE, normalised")


def show(summary: dict[str, Any]) -> str:
    """The result as text."""
    whole = summary["normalized"]["total"]
    head = (
        f"{summary['episodes']} episodes, {summary['chunks']} chunks, one every {summary['every']} frames; normalised over all "
        f"dimensions: MSE {whole['mse']:.4g}, MAE {whole['mae']:.4g}"
    )
    left_out = f"\n{summary['damaged']} damaged episodes left out" if summary["damaged"] else ""
    return f"{table(HEADER, dimension_rows(summary), right=(1, 2, 3, 4))}\n{head}{left_out}"


def write_page(
    out: Path, summary: dict[str, Any], episodes: Sequence[dict[str, Any]], pictures: Sequence[tuple[str, Path]]
) -> None:
    """index.html; its pictures lie beside it in plots/."""
    policy, whole = summary["policy"], summary["normalized"]["total"]
    facts = {
        "checkpoint": f"{policy['path']} ({policy['checkpoint'][:12]})",
        "data set": f"{summary['dataset']}, read as robot {summary['robot']}",
        "asked": f"every {summary['every']} frames, {summary['chunks']} times; seed {summary['seed']}",
        "episodes": f"{summary['episodes']}, {summary['damaged']} damaged ones left out",
        "over all dimensions, normalised": f"MSE {whole['mse']:.4g}, MAE {whole['mae']:.4g}",
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    lines = [
        [
            str(e["episode"]),
            e["task"],
            str(e["frames"]),
            *(f"{e['normalized']['total'][k]:.4g}" for k in ("mse", "mae")),
        ]
        for e in episodes
    ]
    parts = [f"<table>{rows}</table>", "<h2>Dimensions</h2>", _table(HEADER, dimension_rows(summary))]
    parts += ["<h2>Episodes</h2>", _table(("episode", "task", "frames", "MSE, normalised", "MAE, normalised"), lines)]
    for caption, file in pictures:
        where = file.relative_to(out).as_posix()
        parts.append(f"<figure><img src='{where}'><figcaption>{html.escape(caption)}</figcaption></figure>")
    page(out / "index.html", "Open loop", "\n".join(parts))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
