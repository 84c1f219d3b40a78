"""The latency benchmark as pictures and one HTML page."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"engine": "#2a7f62", "baseline": "#b0623c"}


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Write histogram.png, stages.png, roofline.png and report.html into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"histogram": histogram, "stages": stages, "roofline": roofline}
    for name, draw in pictures.items():
        _save(folder / f"{name}.png", draw, result)
    page = folder / "report.html"
    page.write_text(_page(folder, list(pictures), result))
    return page


def _save(path: Path, draw: Any, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5))
    draw(axis, result)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def histogram(axis: Any, result: dict[str, Any]) -> None:
    """How often each latency came, per contender, on a logarithmic axis where both are there."""
    everything = [ms for samples in result["samples_ms"].values() for ms in samples]
    low, high = min(everything) * 0.95, max(everything) * 1.05
    count = min(120, 30 + len(everything) // 4)
    several = len(result["samples_ms"]) > 1
    edges = np.geomspace(low, high, count) if several else np.linspace(low, high, count)
    for who, samples in result["samples_ms"].items():
        axis.hist(samples, bins=edges, color=COLOURS[who], alpha=0.8, label=who)
    if several:
        axis.set_xscale("log")
    axis.set_xlabel("ms per chunk")
    axis.set_ylabel("chunks")
    axis.legend()


def stages(axis: Any, result: dict[str, Any]) -> None:
    """Median milliseconds per stage, one bar per contender and stage."""
    names = list(dict.fromkeys(stage for who in result["stages"].values() for stage in who))
    height = 0.8 / len(result["stages"])
    for i, (who, medians) in enumerate(result["stages"].items()):
        values = [medians.get(name, 0.0) for name in names]
        places = [n + i * height for n in range(len(names))]
        bars = axis.barh(places, values, height=height, color=COLOURS[who], label=who)
        axis.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], fontsize=7, padding=2)
    axis.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ms, median")
    axis.legend()


def roofline(axis: Any, result: dict[str, Any]) -> None:
    """Each stage by its arithmetic intensity and the rate it reached, under the measured roof."""
    from matplotlib.ticker import NullFormatter

    roof = result["roofline"]
    most, bandwidth, points = roof["matrix_gflops"], roof["memory_gb_per_s"], roof["points"]
    ridge = most / bandwidth
    low = min([p["intensity"] for p in points] + [ridge]) / 4
    high = max([p["intensity"] for p in points] + [ridge]) * 4
    axis.plot([low, ridge, high], [low * bandwidth, most, most], color="0.3", linewidth=1.5)
    axis.text(high, most * 1.12, f"{most:,.0f} GFLOP/s, one large product, {roof['dtype']}", fontsize=7, ha="right")
    axis.text(low * 1.1, most * 1.12, f"{bandwidth:,.0f} GB/s, one large copy", fontsize=7)
    for who in COLOURS:
        own = [p for p in points if p["who"] == who]
        if not own:
            continue
        x, y = [p["intensity"] for p in own], [p["gflop_per_s"] for p in own]
        axis.scatter(x, y, color=COLOURS[who], marker="o" if who == "engine" else "s", label=who, zorder=3)
        for p in own:
            dtype = "" if p["dtype"] == roof["dtype"] else f", {p['dtype']}"
            text = f"{p['stage']}{dtype} {100 * p['share_of_roof']:.0f} %"
            place = {"xytext": (0, 6 if who == "engine" else -13), "textcoords": "offset points", "ha": "center"}
            axis.annotate(text, (p["intensity"], p["gflop_per_s"]), fontsize=7, color=COLOURS[who], **place)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(min(p["gflop_per_s"] for p in points) / 3, most * 2.2)
    axis.set_xlim(low, high * 1.1)
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("FLOP per byte (% of the roof above each point)")
    axis.set_ylabel("GFLOP/s")
    axis.legend(loc="lower right")


def _page(folder: Path, pictures: list[str], result: dict[str, Any]) -> str:
    machine = result["machine"]
    where = html.escape(str(machine["gpu"] or machine["cpu"]))
    keys = ("p50", "p95", "p99", "p999", "max", "jitter")
    body = "".join(
        f"<tr><th>{who}</th>" + "".join(f"<td>{result[who][key]:.2f}</td>" for key in keys) + "</tr>"
        for who in COLOURS
        if who in result
    )
    ratio = result["ratio"]
    verdict = "" if not ratio else f"<p>published / engine: <b>{ratio['total']:.2f}</b></p>"
    counted = f"<p>Bytes in the roofline: {html.escape(result['roofline']['bytes'])}.</p>"
    images = "".join(
        f'<p><img src="data:image/png;base64,{_encoded(folder / f"{p}.png")}" alt="{p}"></p>' for p in pictures
    )
    header = "".join(f"<th>{key}</th>" for key in keys)
    return (
        f"<!doctype html><meta charset='utf-8'><title>dit4dit latency: {html.escape(result['preset'])}</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}</style>"
        f"<h1>{html.escape(result['preset'])}, {result['dtype']}, {where}</h1>"
        f"<p>torch {html.escape(machine['torch'])}, {machine['torch_threads']} threads, "
        f"dit4dit {html.escape(machine['dit4dit'])}; milliseconds per chunk, jitter = p99.9 / p50</p>"
        f"<table><tr><th></th>{header}</tr>{body}</table>{verdict}{images}{counted}"
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
