"""The latency benchmark as images and one HTML page.

A result that was cut short makes a page of what it has: `python -m dit4dit.benchmarks.latency_report RESULT.json PAGE.html`.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit.errors import InputError
from dit4dit.files.atomic import check_folder
from dit4dit.files.keys import read_json
from dit4dit.tables import backed, number

COLOURS = {"engine": "#2a7f62", "baseline": "#b0623c"}
SPACED = "#3b6ea5"


def check_place(report: Path) -> None:
    """InputError where a report cannot be written: before anything is measured."""
    if report.suffix == ".html" and report.is_dir():
        raise InputError(f"--report {report}: is a folder; give a file to write, or a folder without .html")
    check_folder("--report", report.parent if report.suffix == ".html" else report)


def check(report: Path) -> None:
    """InputError where the report cannot be written or drawn: before anything is measured."""
    check_place(report)
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f"--report: matplotlib cannot be imported ({error}); pip install matplotlib") from None


def write(report: Path, result: dict[str, Any]) -> Path:
    """Write report.html, which holds its images, and the images beside it into a folder; to a path that ends in .html the page
    alone. Returns the page's path.
    """
    images = {draw.__name__: _drawn(draw, result) for draw, there in IMAGES.items() if there(result)}
    page = write_page(report, _page(images, result))
    if page != report:
        for name, png in images.items():
            (report / f"{name}.png").write_bytes(png)
    return page


def write_page(report: Path, text: str) -> Path:
    """An HTML page at the report's own path where that ends in .html, else as report.html in that folder. Returns its path."""
    page = report if report.suffix == ".html" else report / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def _drawn(draw: Any, result: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    FigureCanvasAgg(figure)
    draw(figure.subplots(), result)
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    return png.getvalue()


def _series(result: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """Name, colour and samples of everything that was timed; the engine alone in place of the engine in turns."""
    found = dict(result.get("samples_ms") or {})
    if result.get("engine_alone_ms"):
        found["engine"] = result["engine_alone_ms"]
    series = [(who, COLOURS[who], found[who]) for who in COLOURS if found.get(who)]
    spaced = result.get("spaced")
    return [*series, *([(f"engine at {spaced['hz']:g} Hz", SPACED, spaced["samples_ms"])] if spaced else [])]


def histogram(axis: Any, result: dict[str, Any]) -> None:
    """How often each latency came, per contender, on a logarithmic axis where there are several."""
    series = _series(result)
    everything = [ms for _, _, samples in series for ms in samples]
    low, high = min(everything) * 0.95, max(everything) * 1.05
    count = min(120, 30 + len(everything) // 4)
    several = len(series) > 1
    edges = np.geomspace(low, high, count) if several else np.linspace(low, high, count)
    for who, colour, samples in series:
        axis.hist(samples, bins=edges, color=colour, alpha=0.7, label=who)
    if several:
        axis.set_xscale("log")
    axis.set_xlabel("ms per chunk")
    axis.set_ylabel("chunks")
    axis.legend()


def in_time(axis: Any, result: dict[str, Any]) -> None:
    """The engine's samples in the order in which they came: where the slow ones are."""
    for who, colour, samples in _series(result):
        if who != "baseline":
            axis.plot(range(len(samples)), samples, ".", markersize=2, color=colour, label=who)
    axis.set_xlabel("sample")
    axis.set_ylabel("ms per chunk")
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


IMAGES = {
    histogram: lambda result: bool(_series(result)),
    in_time: lambda result: bool(_series(result)),
    stages: lambda result: bool(result.get("stages")),
    roofline: lambda result: bool((result.get("roofline") or {}).get("points")),
}
"""What is drawn, and whether the result has it."""


def _page(images: dict[str, bytes], result: dict[str, Any]) -> str:
    machine, preset = result.get("machine") or {}, html.escape(str(result.get("preset")))
    where = html.escape(str(machine.get("gpu") or machine.get("cpu")))
    keys = ("p50", "p95", "p99", "p999", "max", "jitter", "samples")
    spaced = result.get("spaced")
    found = {who: result[who] for who in COLOURS if who in result}
    found |= {f"engine at {spaced['hz']:g} Hz": spaced} if spaced else {}
    body = "".join(
        f"<tr><th>{who}</th>" + "".join(f"<td>{_cell(q.get(key))}</td>" for key in keys) + "</tr>"
        for who, q in ((who, backed(q, q["samples"])) for who, q in found.items())
    )
    drawn = "".join(
        f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{name}"></p>'
        for name, png in images.items()
    )
    heads = {"p999": "p99.9", "samples": "chunks"}
    header = "".join(f"<th>{heads.get(key, key)}</th>" for key in keys)
    known = machine_facts(machine)
    return (
        f"<!doctype html><meta charset='utf-8'><title>dit4dit latency: {preset}</title>"
        "<style>body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}</style>"
        f"<h1>{preset}, {html.escape(str(result.get('dtype')))}, {where}</h1>"
        f"<p>{known}{'; ' if known else ''}milliseconds per chunk, jitter = p99.9 / p50; "
        "- where there are too few samples to know</p>"
        f"<table><tr><th></th>{header}</tr>{body}</table>{_notes(result)}{drawn}"
    )


def machine_facts(machine: dict[str, Any]) -> str:
    """Versions and the like that a number must be read with, as HTML: "torch 2.13.0, threads 2, ..."."""
    named = {
        "torch": "torch",
        "threads": "torch_threads",
        "dit4dit": "dit4dit",
        "commit": "commit",
        "driver": "gpu_driver",
    }
    return ", ".join(
        f"{name} {html.escape(str(machine[key]))}" for name, key in named.items() if machine.get(key) is not None
    )


def _notes(result: dict[str, Any]) -> str:
    """Ratio, agreement, clocks, and what was cut: each where the result has it."""
    ratio, agreement, spaced = result.get("ratio"), result.get("agreement"), result.get("spaced")
    notes = []
    if ratio:
        notes.append(f"published / engine: <b>{ratio['total']:.2f}</b>")
    if agreement:
        notes.append(f"Agreement (largest relative difference): {_listed(agreement)}.")
    if spaced:
        notes.append(
            f"At {spaced['hz']:g} Hz {spaced['missed_slots']} control steps were missed; chunks began "
            f"{spaced['late_ms']['p50']:.2f} ms late (p50), {spaced['late_ms']['max']:.2f} ms at most."
        )
    for what, clocks in (("Clocks", result.get("clocks")), ("Clocks at that rate", (spaced or {}).get("clocks"))):
        notes += [f"{what}, {when}: {_listed(seen)}." for when, seen in (clocks or {}).items() if seen]
    collections = (result.get("collections") or {}).get("by_generation")
    if collections:
        notes.append(
            "Garbage collections while samples were taken: "
            + "; ".join(f"generation {g}: {c['count']} in {c['ms']:.1f} ms" for g, c in collections.items())
            + "."
        )
    if result.get("roofline"):
        notes.append(f"Bytes in the roofline: {html.escape(result['roofline']['bytes'])}.")
    if result.get("cut"):
        notes.append(f"<b>Cut short</b>: {_listed(result['cut'])}.")
    return "".join(f"<p>{note}</p>" for note in notes)


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else number(value)


def _listed(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "nothing"
        return f"{value:.3g}" if isinstance(value, float) and value < 1000 else f"{value}"

    return html.escape(", ".join(f"{name.replace('_', ' ')}: {text(value)}" for name, value in values.items()))


if __name__ == "__main__":
    print(
        write(
            Path(sys.argv[2]), read_json(Path(sys.argv[1]), "give a result of dit4dit bench latency", error=InputError)
        )
    )
