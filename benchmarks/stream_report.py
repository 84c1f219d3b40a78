"""`dit4dit bench stream` as one HTML page with its tables and two images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit4dit.benchmarks import stream
from dit4dit.benchmarks.latency_report import check, machine_facts, write_page

__all__ = ["check", "write"]

COLOURS = {"C++": "#2a7f62", "Python": "#b0623c"}
IMAGES = {
    "late": ("late_us_beyond", "microseconds that a tick wakes up late", "share of the ticks that are later"),
    "handover": (
        "handover_ms_beyond",
        "milliseconds from publish to the first command",
        "share of the chunks that take longer",
    ),
}


def write(report: Path, result: Mapping[str, Any]) -> Path:
    """Write report.html and its images into a folder; to a path that ends in .html the page alone. Returns the page's path."""
    images = {name: _drawn(result, *what) for name, what in IMAGES.items() if result["loops"]}
    page = write_page(report, _page(result, images))
    if page != report:
        for name, png in images.items():
            (report / f"{name}.png").write_bytes(png)
    return page


def _drawn(result: Mapping[str, Any], key: str, across: str, up: str) -> bytes:
    """The share of the samples beyond each value, both logarithmic: a tail is seen at its length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for loop in result["loops"]:
        points = [(max(value, 1e-3), share) for value, share in loop[key]]
        style: Any = {"linestyle": "--" if loop["load"] else "-", "linewidth": 2.2 if loop["fifo"] else 1.0}
        if points:
            axis.plot(*zip(*points, strict=True), color=COLOURS[loop["reader"]], label=stream.name_of(loop), **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    return png.getvalue()


def _page(result: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    machine = result["machine"]
    title = html.escape(f"Action stream on {machine['cpu']}, {machine['cores']} cores")
    drawn = "".join(
        f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{name}"></p>'
        for name, png in images.items()
    )
    known = "; ".join(filter(None, [html.escape(machine["system"]), machine_facts(machine)]))
    return (
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>"
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}pre{font-size:13px}</style>"
        f"<h1>{title}</h1><p>{known}; the driver ticks every {result['tick_ms']:g} ms, a chunk comes every "
        f"{result['chunk_every_ms']:g} ms, load is {result['busy']} busy processes</p>"
        f"<pre>{html.escape(stream.show(result))}</pre>{drawn}"
    )
