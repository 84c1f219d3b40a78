"""The report's page: tables beside the published results, bars with intervals, latencies, comparisons, failure videos first."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit4dit.evaluation.charts import COLOURS, Bar, bars, histogram
from dit4dit.evaluation.runs import Record, Run
from dit4dit.tables import number

VIDEO_BUDGET = 48 * 2**20
"""Bytes of videos inside the page; the others are links."""
MOST_GROUPS = 60
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse;margin:.6em 0}
td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
tr.sum td{font-weight:600;border-top:1px solid #ddd}.bad{color:#a3262a}.note{color:#555;font-size:13px}svg text{font-size:11px}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .8em}.videos{display:flex;flex-wrap:wrap;gap:12px}
figure{margin:0;width:200px}video{width:200px}figcaption{font-size:12px;color:#555}pre{font-size:12px;overflow:auto}"""


def page(data: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """data: what report.json holds; runs: in the same order."""
    infos = data["runs"]
    names = ", ".join(info["name"] for info in infos)
    sections = [
        f"<h1>dit4dit evaluation: {html.escape(names)}</h1>",
        _about(infos),
        _results(infos),
        _bars(infos),
        _comparisons(data["comparisons"], len(runs)),
        _latency(infos, runs),
        _errors(infos, runs),
        _videos(infos, runs),
    ]
    head = f"<head><meta charset=utf-8><title>dit4dit evaluation</title><style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(sections)}</body></html>\n"


def _table(name: str, header: Iterable[str], rows: Iterable[tuple[str, Sequence[Any]]], left: int = 1) -> str:
    """rows: (class, cells); the first `left` columns are words, the others numbers."""

    def cells(tag: str, values: Iterable[Any]) -> str:
        return "".join(f"<{tag}{' class=n' * (i >= left)}>{html.escape(str(v))}</{tag}>" for i, v in enumerate(values))

    body = "".join(f"<tr class='{kind}'>{cells('td', values)}</tr>" for kind, values in rows)
    return f"<table id={name}><tr>{cells('th', header)}</tr>{body}</table>"


def _about(infos: Sequence[Mapping[str, Any]]) -> str:
    facts = {
        "benchmark": lambda c: c["benchmark"],
        "checkpoint": lambda c: f"{c['policy']['checkpoint']} ({c['policy'].get('path', '')})",
        "policy": lambda c: _words({k: v for k, v in c["policy"].items() if k not in ("checkpoint", "path")}),
        "execution": lambda c: _words(c["execution"]),
        "batch, workers": lambda c: f"{c['batch']}, {c['workers']}",
        "plan": lambda c: _words(c["plan"]),
        "versions": lambda c: _words(c["versions"]),
        "machine": lambda c: _words(c["machine"]),
    }
    rows: list[tuple[str, list[Any]]] = [
        ("", [name, *(read(i["config"]) for i in infos)]) for name, read in facts.items()
    ]
    for name in ("finished", "errors", "missing"):
        rows.append(("", [f"episodes: {name}", *(info[name] for info in infos)]))
    notes = []
    for info in infos:
        if info["errors"] or info["missing"]:
            notes.append(
                f"<p class=bad>{html.escape(info['name'])}: {info['errors']} episodes ended in an error and {info['missing']} "
                "have not been played. They count neither as success nor as failure: go on with --resume.</p>"
            )
        if info["config"].get("row_independent") is False:
            notes.append(
                f"<p class=bad>{html.escape(info['name'])}: the rows of a pass were not independent of each other to the "
                "bit; another run may differ in single episodes.</p>"
            )
    return "<h2>Runs</h2>" + _table("runs", ["", *(i["name"] for i in infos)], rows, left=99) + "".join(notes)


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in facts.items())


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_words(value)})"
    return "-" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def _key(row: Mapping[str, Any]) -> str:
    if row["suite"] is None:
        return "all"
    return str(row["suite"]) if row["task"] is None else f"{row['suite']} / {row['task']}"


def _shown(infos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the rows in their order; a sum of one thing only is left out."""
    rows = [row for info in infos for row in info["results"]]
    suites = {row["suite"] for row in rows if row["suite"] is not None}
    tasks = {suite: {r["task"] for r in rows if r["suite"] == suite and r["task"] is not None} for suite in suites}

    def alone(row: Mapping[str, Any]) -> bool:
        return len(suites) == 1 if row["suite"] is None else row["task"] is None and len(tasks[row["suite"]]) == 1

    return list(dict.fromkeys(_key(row) for row in rows if not alone(row) or row["published"] is not None))


def _results(infos: Sequence[Mapping[str, Any]]) -> str:
    found = [{_key(row): row for row in info["results"]} for info in infos]
    names = _shown(infos)
    twice = any(row["published_count"] is not None for rows in found for row in rows.values())
    header = [""]
    for info in infos:
        header += [f"{info['name']}: success", "95 % interval", "episodes", "errors"]
        header += ["as the published runner counts"] * twice
    rows = []
    for name in names:
        cells: list[Any] = [name]
        for of_run in found:
            cells += _cells(of_run.get(name), twice)
        known = next((r[name]["published"] for r in found if name in r and r[name]["published"] is not None), None)
        sums = any(name in r and r[name]["task"] is None for r in found)
        rows.append(("sum" if sums else "", [*cells, "" if known is None else f"{known:.1f} %"]))
    note = (
        "<p class=note>Wilson intervals. An episode that ended in an error is not counted. Published rates come without "
        "intervals; that of GR1 is the mean of five runs.</p>"
    )
    return "<h2>Success</h2>" + _table("results", [*header, "published"], rows) + note


def _cells(row: Mapping[str, Any] | None, twice: bool) -> list[str]:
    if row is None:
        return [""] * (4 + twice)
    low, high = row["interval"]
    rate = "" if row["percent"] is None else f"{row['percent']:.1f} %"
    out = [rate, f"{low:.1f} to {high:.1f}", f"{row['successes']} of {row['episodes']}", str(row["errors"] or "")]
    if not twice:
        return out
    count = row["published_count"]
    return [*out, "" if count is None or not row["episodes"] else f"{100 * count / row['episodes']:.1f} %"]


def _bars(infos: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, list[Bar]] = {}
    known: dict[str, float | None] = {}
    for i, info in enumerate(infos):
        for row in info["results"]:
            if row["percent"] is not None:
                low, high = row["interval"]
                groups.setdefault(_key(row), []).append(Bar(i, row["percent"] / 100, low / 100, high / 100))
                if row["published"] is not None:
                    known[_key(row)] = row["published"] / 100
    groups = {key: groups[key] for key in _shown(infos) if key in groups}
    shown = dict(list(groups.items())[:MOST_GROUPS])
    more = f"<p class=note>and {len(groups) - len(shown)} more in the table</p>" if len(groups) > len(shown) else ""
    return f"<p>{_legend(infos)}<span class=note> red line: published</span></p>{bars(shown, known)}{more}"


def _legend(infos: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<span class=key style='background:{COLOURS[i % len(COLOURS)]}'></span>{html.escape(info['name'])}"
        for i, info in enumerate(infos)
    )


def _comparisons(found: Sequence[Mapping[str, Any]], runs: int) -> str:
    if runs < 2:
        return ""
    if not found:
        return "<h2>Paired comparison</h2><p>The runs have no finished episode in common.</p>"
    rows = []
    for one in found:
        points = [f"{100 * one[name]:+.1f}" for name in ("difference", "low", "high")]
        counts = [one[name] for name in ("both", "only_first", "only_second", "neither")]
        sizes = [sum(counts), *counts, points[0], f"{points[1]} to {points[2]}", f"{one['p_value']:.3g}"]
        rows.append(("" if one["suite"] else "sum", [one["first"], one["second"], one["suite"] or "all", *sizes]))
    header = ["first", "second", "suite", "episodes", "both succeed", "only first", "only second", "neither"]
    header += ["second - first, points", "95 % interval", "McNemar p"]
    note = (
        "<p class=note>On the episodes that both runs have, by task, trial and seed. Newcombe's paired interval, exact "
        "McNemar test.</p>"
    )
    other = {
        f"{key} is {a!r} in {one['first']}, {b!r} in {one['second']}": None
        for one in found
        for key, (a, b) in one["other_worlds"].items()
    }
    warnings = "".join(f"<p class=bad>Not the same episodes: {html.escape(text)}</p>" for text in other)
    return "<h2>Paired comparison</h2>" + _table("comparisons", header, rows, left=3) + warnings + note


def _latency(infos: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    rows = []
    for what, words in (
        ("chunk_ms", "a pass of the policy, ms"),
        ("answer_ms", "asked to answered, ms"),
        ("episode_seconds", "episode, s"),
    ):
        for info in infos:
            q = info[what]
            if q["count"]:
                numbers = [number(q[name], ".4g") for name in ("p50", "p95", "p99", "max")]
                rows.append(("", [words, info["name"], q["count"], *numbers]))
    series = [(i, [ms for r in run.records for ms in r["took"]["chunk_ms"]]) for i, run in enumerate(runs)]
    drawn = [(i, values) for i, values in series if values]
    plot = f"<p>{_legend(infos)}</p>{histogram(drawn, 'ms')}" if drawn else ""
    table = _table("latency", ["", "run", "count", "p50", "p95", "p99", "max"], rows, left=2)
    note = "<p class=note>On the machine and under the load of the evaluation; `dit4dit bench latency` measures latency.</p>"
    return f"<h2>Latency</h2>{table}{note}{plot}"


def _errors(infos: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    parts = []
    for info, run in zip(infos, runs, strict=True):
        for record in run.errors:
            title = f"{info['name']}: {_episode(record)}: {record['error']['type']}: {record['error']['message']}"
            parts.append(
                f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(record['error']['traceback'])}</pre></details>"
            )
    return f"<h2>Errors</h2>{''.join(parts)}" if parts else ""


def _episode(record: Record) -> str:
    return f"{record['suite']} / {record['task']}, trial {record['trial']}"


def _videos(infos: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    filmed = [
        (info["name"], run, record)
        for info, run in zip(infos, runs, strict=True)
        for record in run.records
        if record["video"] is not None and (run.folder / record["video"]).is_file()
    ]
    rank = {False: 0, None: 1, True: 2}
    filmed.sort(key=lambda item: rank[item[2]["success"]])
    left, figures = VIDEO_BUDGET, []
    for name, run, record in filmed:
        file = run.folder / record["video"]
        left -= file.stat().st_size
        end = {True: "success", False: "failure", None: "error"}[record["success"]]
        words = f"{end}, {_episode(record)}, {record['steps']} steps: {record['instruction'] or ''}"
        caption = f"<figcaption>{html.escape(f'{name}: {words}')}</figcaption>"
        if left >= 0:
            text = base64.b64encode(file.read_bytes()).decode()
            shown = f"<video controls muted preload=metadata src='data:video/mp4;base64,{text}'></video>"
        else:
            link = html.escape(file.resolve().as_uri())
            shown = f"<a href='{link}'>{html.escape(file.name)}</a>"
        figures.append(f"<figure class={end}>{shown}{caption}</figure>")
    return f"<h2>Videos, failures first</h2><div class=videos>{''.join(figures)}</div>" if figures else ""
