"""The page of a demo training: success before and after, loss curves, futures; `evaluation.report` has the episodes."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit4dit.data.sheet import STYLE

STYLES: dict[str, dict[str, Any]] = {"train": {"linewidth": 1}, "eval": {"linestyle": "", "marker": "o"}}
ROWS = {
    "before": "before training (random weights)",
    "after": "after training",
    "told_other_words": "after training, told another goal's words",
}


def write(out: Path, result: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> Path:
    """Write success.png, losses.png and report.html into `out`; returns the page's path.

    log: lines of the run's log.jsonl.
    """
    plot_success(out / "success.png", {ROWS[name]: one for name, one in result["success"].items()})
    plot_losses(out / "losses.png", log)
    page = out / "report.html"
    page.write_text(_page(out, result), encoding="utf-8")
    return page


def plot_success(path: Path, rates: Mapping[str, Mapping[str, Any]]) -> None:
    """One bar for each rate (as `demo.play.rate` makes them) with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.55 * len(rates)))
    for i, one in enumerate(reversed(list(rates.values()))):
        value, (low, high) = 100 * one["rate"], (100 * end for end in one["interval_95"])
        axis.barh(i, value, color="#2a7f62", height=0.55)
        axis.errorbar(value, i, xerr=[[value - low], [high - value]], color="black", capsize=4, linewidth=1.2)
    axis.set_yticks(range(len(rates)), list(rates)[::-1])
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of episodes that succeeded, with Wilson's 95 % interval")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_losses(path: Path, log: Sequence[Mapping[str, float]]) -> None:
    """Both training losses over the steps (mean of the steps between two lines), and the held-out ones as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, name in zip(axes, ("action_loss", "video_loss"), strict=True):
        for kind, style in STYLES.items():
            lines = [line for line in log if f"{kind}/{name}" in line]
            label = "held out" if kind == "eval" else "training"
            seen = dict(style, marker="o") if len(lines) == 1 else style
            axis.plot([line["step"] for line in lines], [line[f"{kind}/{name}"] for line in lines], label=label, **seen)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _page(out: Path, result: Mapping[str, Any]) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>dit4dit demo-train</title>",
        f"<style>{STYLE}</style><h1>A policy for the tabletop, from nothing but its VAE</h1>",
        _table({ROWS[name]: one["words"] for name, one in result["success"].items()}),
        _picture(out / "success.png", "Test layouts, never trained on; the instruction names block and plate."),
        "<h2>How it was made</h2>",
        _table({**result["recipe"], **{k: f"{v:.0f} s" for k, v in result["seconds"].items()}}),
        f"<p>{html.escape(NOTE)}</p>",
        _picture(out / "losses.png", "Losses."),
        "<h2>Predicted futures</h2>",
        *[
            _picture(strip, "above: what happened; below: what the model expected after the first frame")
            for strip in strips(out)
        ],
        "<h2>Episodes</h2><p><a href='evaluation/report.html'>Every evaluation</a>: videos, comparisons, latencies.</p></html>\n",
    ]
    return "\n".join(parts)


NOTE = (
    "The action loss reaches the backbone in this recipe (flow.action_grad_to_backbone): a backbone that has seen no other video "
    "has no features yet that would help. The published models are trained without."
)


def strips(out: Path) -> list[Path]:
    """Pictures of predicted futures that training drew last."""
    folders = sorted((out / "run" / "strips").glob("step_*"))
    return sorted(folders[-1].glob("*.png")) if folders else []


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{data}'><figcaption>{html.escape(caption)}</figcaption></figure>"
