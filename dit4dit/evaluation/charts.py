"""The report's drawings as SVG text: bars with intervals, and histograms."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = ("#3b6ea8", "#c8772c", "#3f8f5f", "#9a4f96", "#7a7a33", "#a33d3d")
WIDTH = 760


@dataclass(frozen=True)
class Bar:
    """A rate with its interval, 0..1, of the run number `run`."""

    run: int
    value: float
    low: float
    high: float


def bars(groups: Mapping[str, Sequence[Bar]], published: Mapping[str, float | None]) -> str:
    """One group of horizontal bars a row, an interval on each, and a line at the published rate (0..1) where there is one."""
    label, bar, gap = 250, 13, 9
    scale = WIDTH - label - 60
    parts, y = [], 6
    for name, found in groups.items():
        height = bar * len(found)
        text = html.escape(name if len(name) < 38 else name[:36] + "…")
        parts.append(f'<text x="{label - 8}" y="{y + height / 2 + 4:g}" text-anchor="end">{text}</text>')
        for i, one in enumerate(found):
            top, colour = y + i * bar, COLOURS[one.run % len(COLOURS)]
            parts.append(
                f'<rect class="bar" x="{label}" y="{top}" width="{scale * one.value:.2f}" height="{bar - 2}" fill="{colour}">'
                f"<title>{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]</title></rect>"
            )
            left, right, middle = label + scale * one.low, label + scale * one.high, top + (bar - 2) / 2
            parts.append(
                f'<path class="interval" d="M{left:.2f} {middle - 3:g}v6M{left:.2f} {middle:g}H{right:.2f}M{right:.2f} '
                f'{middle - 3:g}v6" stroke="#222" fill="none"/>'
            )
        known = published.get(name)
        if known is not None:
            x = label + scale * known
            parts.append(
                f'<line class="published" x1="{x:.2f}" x2="{x:.2f}" y1="{y - 3}" y2="{y + height + 1}" stroke="#c00" '
                f'stroke-width="2"><title>published {100 * known:.1f} %</title></line>'
            )
        y += height + gap
    axis = "".join(
        f'<line x1="{label + scale * t / 100:g}" x2="{label + scale * t / 100:g}" y1="0" y2="{y}" stroke="#ddd"/>'
        f'<text x="{label + scale * t / 100:g}" y="{y + 14}" text-anchor="middle">{t} %</text>'
        for t in (0, 25, 50, 75, 100)
    )
    return _svg("bars", y + 20, axis + "".join(parts))


def histogram(series: Sequence[tuple[int, Sequence[float]]], unit: str, bins: int = 40) -> str:
    """Counts of (run, values) as outlines over common bins; the top half percent lies in the last bin."""
    values = np.concatenate([np.asarray(one, dtype=float) for _, one in series])
    top = float(np.quantile(values, 0.995)) * 1.02 or 1.0
    edges = np.linspace(0.0, top, bins + 1)
    left, height, scale = 40, 150, WIDTH - 80
    shares = [(run, np.histogram(np.minimum(one, top), edges)[0] / len(one)) for run, one in series]
    most = max(float(share.max()) for _, share in shares)
    parts = []
    for run, share in shares:
        colour, step = COLOURS[run % len(COLOURS)], scale / bins
        for i, part in enumerate(share):
            if part:
                tall = height * part / most
                parts.append(
                    f'<rect class="bin" x="{left + i * step:.2f}" y="{height - tall + 6:.2f}" width="{step - 0.5:.2f}" '
                    f'height="{tall:.2f}" fill="{colour}" fill-opacity="0.55"><title>{100 * part:.1f} % of the chunks '
                    f"{edges[i]:.3g} to {edges[i + 1]:.3g} {unit}</title></rect>"
                )
    ticks = "".join(
        f'<text x="{left + scale * k / 4:g}" y="{height + 22}" text-anchor="middle">{top * k / 4:.3g} {unit}</text>'
        for k in range(5)
    )
    base = f'<line x1="{left}" x2="{left + scale}" y1="{height + 6}" y2="{height + 6}" stroke="#888"/>'
    return _svg("histogram", height + 28, "".join(parts) + base + ticks)


def _svg(name: str, height: float, inside: str) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )
