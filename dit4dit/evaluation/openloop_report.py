"""Open-loop evaluation as a folder: a line per episode, pictures, the result as JSON, and a page of it all."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit4dit.data.samples import Recording
from dit4dit.data.sheet import page
from dit4dit.evaluation import openloop
from dit4dit.files.json_files import write_json
from dit4dit.robots.action_error import ActionError

if TYPE_CHECKING:
    from dit4dit.policy.policy import Policy

RESULT, LINES = "openloop.json", "episodes.jsonl"
COLUMNS = 4
"""Dimensions side by side in a picture."""
HEADER = ("dimension", "MAE, robot units", "MSE, robot units", "MAE, normalised", "MSE, normalised")


def write(
    policy: Policy,
    recording: Recording,
    chosen: Sequence[int],
    out: Path,
    *,
    about: Mapping[str, Any],
    every: int,
    seed: int,
    batch: int,
    plots: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Evaluate the `chosen` episodes into the folder `out`; returns what openloop.json holds.

    Args:
        about: of data set, robot and policy, for openloop.json.
        every, seed, batch, progress: see `openloop.evaluate`.
        plots: how many episodes are drawn, the first ones.
    """
    names = policy.embodiment.action_names
    units, normalized = ActionError(len(names)), ActionError(len(names))
    found: list[dict[str, Any]] = []
    pictures: list[tuple[str, Path]] = []
    with (out / LINES).open("w") as lines:
        for result in openloop.evaluate(
            policy, recording, chosen, every=every, seed=seed, batch=batch, progress=progress
        ):
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
        **about,
        "seed": seed,
        "every": every,
        "batch": batch,
        "chunks": sum(episode["chunks"] for episode in found),
        "episodes": len(found),
        "damaged": len({problem.episode for problem in recording.problems}),
        "actions": int(units.sums[2].max()),
        **openloop.errors(units, normalized, names),
    }
    write_json(out / RESULT, summary)
    write_page(out, summary, found, pictures)
    return summary


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
