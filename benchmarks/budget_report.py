"""A budget as one HTML page: a stacked bar for each stage and total, and the launches that take the longest."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit4dit.benchmarks import budget_head
from dit4dit.benchmarks.budget import NAMES, said_of_guesses
from dit4dit.benchmarks.latency_report import write_page

COLOURS = {
    "product": "#3b6ea5",
    "convolution": "#2a7f62",
    "attention": "#b0623c",
    "triton": "#8a5fa8",
    "cuda": "#c2a23a",
    "elementwise": "#7d8a94",
    "copies and memsets": "#b9b9b9",
    "gaps": "#e4ded2",
}
SHOWN = 40
"""Launches in the table."""


def write(report: Path, result: Mapping[str, Any]) -> Path:
    """The page at `report` where that ends in .html, else report.html in that folder. Returns its path."""
    return write_page(report, page(result))


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    title = html.escape(f"{result['preset']} on {result['gpu']}: the budget of one chunk")
    stages = list(dict.fromkeys(stage for of in result["stages"].values() for stage in of))
    most = max([of["us"] for total in result["stages"].values() for of in total.values()] + [1e-9])
    bars = "".join(_stage(result, stage, most) for stage in stages)
    legend = " ".join(f"<span style='background:{colour}'>&emsp;</span> {name}" for name, colour in COLOURS.items())
    totals = ", ".join(
        f"{NAMES[name]} <b>{of['us'] / 1e3:.2f} ms</b> in {of['launches']} launches"
        for name, of in result["totals"].items()
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>"
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
        "td:nth-child(-n+3){text-align:left}.bar{display:flex;height:1.1em;margin:.15em 0}.bar div{height:100%}"
        ".name{display:inline-block;width:22em}</style>"
        f"<h1>{title}</h1><p>Head {html.escape(result['head'])}, {html.escape(result['head_dtype'])}; predicted: {totals}.</p>"
        f"{''.join(f'<p>{html.escape(line)}</p>' for line in _notes(result))}"
        f"<p>{legend}</p>{bars}{head_tables(result)}{_launches(result)}"
    )


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the numbers: which rest on guesses, and what was measured elsewhere or otherwise."""
    return [*said_of_guesses(result), *(result.get("measured") or {}).get("notes", ())]


def _stage(result: Mapping[str, Any], stage: str, most: float) -> str:
    measured = ((result.get("measured") or {}).get("stages") or {}).get(stage)
    lines = [f"<h3>{html.escape(stage)}</h3>"]
    for total, rows in result["launches"].items():
        parts = parts_of([row for row in rows if row["stage"] == stage])
        us = sum(parts.values())
        pieces = "".join(
            f"<div style='width:{100 * part / most:.3f}%;background:{COLOURS[name]}' title='{name}: {part:.1f} us'></div>"
            for name, part in parts.items()
        )
        lines.append(f"<span class=name>{NAMES[total]}: {us:,.1f} us</span><div class=bar>{pieces}</div>")
    if measured is not None:
        width = min(100.0, 100 * measured / most)
        piece = f"<div style='width:{width:.3f}%;background:#444'></div>"
        lines.append(f"<span class=name>measured: {measured:,.1f} us</span><div class=bar>{piece}</div>")
    return "".join(lines)


def parts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a bar is stacked of: microseconds by the kind of launch, and the gaps; in the order of `COLOURS`."""
    found = dict.fromkeys(COLOURS, 0.0)
    for one in rows:
        found[one["kind"] if one["kind"] in COLOURS else "copies and memsets"] += one["us"]
        found["gaps"] += one["gap_us"]
    return {name: us for name, us in found.items() if us > 0}


def head_tables(result: Mapping[str, Any]) -> str:
    """The one-launch head's tables, where it runs."""
    head = result["one_launch_head"]
    if head is None:
        return ""
    text = f"<h2>The head in one launch, predicted</h2><p>{html.escape(budget_head.said(head))}</p>"
    for header, rows in budget_head.tables(head):
        lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in rows)
        text += f"<table><tr>{_cells(header, 'th')}</tr>{lines}</table>"
    return text + "".join(f"<p>{html.escape(line)}</p>" for line in budget_head.notes(head))


def _cells(row: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)


def _launches(result: Mapping[str, Any]) -> str:
    """The launches of "as if chosen" that take the longest, equal ones together."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for one in result["launches"]["as_if_chosen"]:
        facts = {
            k: v for k, v in one.items() if k in ("m", "n", "k", "pixels", "out", "grid", "shape", "length", "keys")
        }
        key = one["stage"], one["name"], ", ".join(f"{k} {v}" for k, v in facts.items())
        of = sums.setdefault(key, [0.0, 0.0, 0.0])
        of[0] += 1
        of[1] += one["us"]
        of[2] += one["gflop"]
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:SHOWN]
    body = "".join(
        f"<tr><td>{html.escape(stage)}</td><td>{html.escape(name)}</td><td>{html.escape(facts)}</td>"
        f"<td>{count:g}</td><td>{us:,.1f}</td><td>{us / count:,.2f}</td><td>{gflop:,.1f}</td></tr>"
        for (stage, name, facts), (count, us, gflop) in longest
    )
    head = "".join(f"<th>{name}</th>" for name in ("stage", "launch", "shape", "count", "us", "us each", "GFLOP"))
    return f"<h2>As if chosen: the longest launches</h2><table><tr>{head}</tr>{body}</table>"
