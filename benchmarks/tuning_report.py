"""What `dit4dit tune` found: as text, and as one HTML page.

Of a result that was cut short each makes what it has: `python -m dit4dit.benchmarks.tuning_report RESULT.json PAGE.html`.
"""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit4dit.benchmarks.latency_report import machine_facts, write_page

from dit4dit.errors import InputError
from dit4dit.files.keys import read_json
from dit4dit.ops.verdicts import SWITCHES
from dit4dit.tables import number, table

WIDTH = 100
"""Columns of the printed table, where the names of implementations leave room."""
LEAST_CALL = 24
SHORT = {"bfloat16": "bf16", "float": "f", "uint": "u", "int": "i"}
COLOURS = {"chosen": "#2a7f62", "default": "#3b6ea5", "other": "#9a9a9a"}
STYLE = """body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}
th:first-child,td:first-child{text-align:left}h3{font-size:15px;margin:1.6em 0 .2em}p{margin:.3em 0}code{font-size:13px}
.row{display:flex;align-items:center;margin:2px 0}.name{width:9em}.room{flex:1}.bar{height:1em;min-width:1px}
.ms{width:19em;padding-left:.8em}.refused{color:#a03020}"""


def show(result: Mapping[str, Any]) -> str:
    """A table with a line for each call, what was refused and why, and what one step gains."""
    calls = result.get("calls", [])
    lines = [heading(result)]
    if calls:
        lines.append(_table(calls))
    if compiled := result.get("compiled"):
        lines.append(compiled_text(compiled))
    reasons = refusals(calls)
    if reasons:
        lines.append("refused:\n" + "\n".join(f"  {', '.join(who)}: {reason}" for reason, who in reasons.items()))
    step = step_ms(calls)
    if step is not None:
        lines.append(
            f"these calls, as often as a step makes them: {step[0]:.3f} ms by the defaults, {step[1]:.3f} ms as chosen"
        )
    lines += [f"{call['op']}: {call['call']}: {call['why']}" for call in hopeless(calls)]
    if cut := result.get("cut"):
        lines.append(cut_text(cut))
    return "\n\n".join(lines)


def compiled_text(compiled: Mapping[str, Any]) -> str:
    """What `compile_ahead` did."""
    failed = f", {len(compiled['refused'])} do not compile" if compiled["refused"] else ""
    return (
        f"{compiled['kernels']} Triton kernels: {compiled['shipped']} came with the package, "
        f"{compiled['compiled']} were compiled beforehand in {compiled['seconds']:.0f} s{failed}"
    )


def cut_text(cut: Mapping[str, Any]) -> str:
    """What ended the run before all was measured, and how many calls of which op it left out."""
    left = Counter(name.partition(":")[0] for name in cut["left"])
    counted = ", ".join(f"{count} {op}" for op, count in left.items())
    by = "--seconds" if cut["by"] == "seconds" else cut["by"]
    return f"Cut short by {by}; calls left out, which keep what they have: {counted or 'none'}"


def heading(result: Mapping[str, Any]) -> str:
    """Whose calls, how many of which op, and where."""
    distinct = result.get("distinct") or {}
    kinds = [result.get("dtype"), f"head {result.get('head_dtype')}"]
    kinds += [kind for kind in (result.get("quantization"),) if kind]
    counted = ", ".join(f"{count} {op}" for op, count in distinct.items())
    where = _where(result)
    return (
        f"{result.get('subject')}, {', '.join(map(str, kinds))}, batch {' '.join(map(str, result.get('batch', ())))}; {where}\n"
        f"{sum(distinct.values())} distinct op calls: {counted}"
    )


def _where(result: Mapping[str, Any]) -> str:
    machine = result.get("machine") or {}
    on_cpu = str(result.get("device", "cpu")).startswith("cpu")
    return str(machine.get("cpu") if on_cpu or not machine.get("gpu") else machine.get("gpu"))


def _table(calls: Sequence[Mapping[str, Any]]) -> str:
    header = ["op", "call", "a step", "default", "chosen", "runner-up", "ms", "default ms", "ratio"]
    rows = [
        [
            call["op"],
            "",
            call["count"] or "-",
            call["default"] or "-",
            call["chosen"] or "none",
            call["runner_up"] or "-",
            number(call["ms"].get(call["chosen"]), ".4f"),
            number(call["ms"].get(call["default"]), ".4f"),
            _ratio(call),
        ]
        for call in calls
    ]
    others = (max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header)) if i != 1)
    room = max(WIDTH - sum(others) - 2 * (len(header) - 1), LEAST_CALL)
    for row, call in zip(rows, calls, strict=True):
        row[1] = brief(call["call"], room)
    return table(header, rows, right=(2, 6, 7, 8))


def _ratio(call: Mapping[str, Any]) -> str:
    return "kept" if call["chosen"] == call["default"] else number(call["ratio"])


def brief(call: str, width: int) -> str:
    """A call's text without what tells a reader least, at most `width` characters: the whole is in the JSON and on the page.

    A dtype is named where it differs from the tensor's before.
    """
    text = re.sub(r" strides [\dx]+", " strided", call)
    text = re.sub(r"(?:, |^)(?:None|float|True|False)(?=[,)]|$)", "", text)
    for long, short in SHORT.items():
        text = re.sub(rf"\b{long}(?=\d*\b)", short, text)
    last = ""

    def named(tensor: re.Match[str]) -> str:
        nonlocal last
        before, last = last, tensor[1]
        return tensor[2] if last == before else f"{last} {tensor[2]}"

    text = re.sub(r"(\w+)\[([\dx]*)\]", named, text.removeprefix(", ")).replace(", ", " ")
    return text if len(text) <= width else f"{text[: width - 3]}..."


def how_to_use(result: Mapping[str, Any]) -> str:
    """Where the verdicts are and who follows them: a line."""
    written = sum(call["verdict"] is not None for call in result.get("calls", []))
    if not written:
        return "no verdicts were written: policies run what earlier ones name, else the defaults"
    return (
        f"{written} verdicts in {result['folder']}\nPolicy.from_pretrained, serve and bench latency use them: tune='cached' is "
        "the default (--tune off runs without)"
    )


def refusals(calls: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """reason -> "op implementation" of those that it refused, with the number of calls where there are several."""
    counts: dict[str, dict[str, int]] = {}
    for call in calls:
        for name, reason in call["refused"].items():
            who = counts.setdefault(reason, {})
            key = f"{call['op']} {name}"
            who[key] = who.get(key, 0) + 1
    return {
        reason: [key if n == 1 else f"{key} ({n} calls)" for key, n in who.items()] for reason, who in counts.items()
    }


def hopeless(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The calls for which nothing could be chosen: "why" says whether nothing is right, or nothing could be tried."""
    return [call for call in calls if call["chosen"] not in call["ms"] and call["op"] not in SWITCHES]


def step_ms(calls: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Milliseconds of all op calls in a step, by the defaults and as chosen; None where one of them has no time.

    The head as a whole (action_ode) is not among them: its loop's own calls are; nor is how the kernels are launched.
    """
    step = [call for call in calls if call["count"] and call["op"] not in ("action_ode", *SWITCHES)]
    if not step or any(name not in call["ms"] for call in step for name in (call["default"], call["chosen"])):
        return None
    before, now = (sum(call["count"] * call["ms"][call[key]] for call in step) for key in ("default", "chosen"))
    return before, now


def write(report: Path, result: Mapping[str, Any]) -> Path:
    """The page, one file that holds all it shows; into a folder as report.html. Returns its path."""
    return write_page(report, page(result))


def page(result: Mapping[str, Any]) -> str:
    """HTML: a line for each op, then for each call its implementations as bars, and why which one was chosen or refused."""
    calls = result.get("calls", [])
    subject, escape = html.escape(str(result.get("subject"))), html.escape
    facts = machine_facts(result.get("machine") or {})
    step, cut = step_ms(calls), result.get("cut")
    notes = [
        f"{facts}; milliseconds are medians; {number(result.get('seconds'), '.0f')} s, "
        f"child processes: {escape(str(result.get('children', 0)))}",
        f"verdicts: <code>{escape(str(result.get('folder') or 'none written'))}</code>",
    ]
    if compiled := result.get("compiled"):
        notes.append(escape(compiled_text(compiled)))
    if step is not None:
        notes.append(
            f"These calls, as often as a step makes them: {step[0]:.3f} ms by the defaults, <b>{step[1]:.3f} ms</b> as chosen."
        )
    if cut:
        notes.append(f"<b>{escape(cut_text(cut))}</b>")
    return (
        f"<!doctype html><meta charset='utf-8'><title>dit4dit tune: {subject}</title><style>{STYLE}</style>"
        f"<h1>{escape(heading(result)).replace(chr(10), '</h1><p>', 1)}</p>"
        f"{''.join(f'<p>{note}</p>' for note in notes)}{_overview(calls)}{''.join(map(_section, calls))}\n"
    )


def _overview(calls: Sequence[Mapping[str, Any]]) -> str:
    """op -> calls, calls where another one than the default was chosen, refused candidates."""
    rows = []
    for op in dict.fromkeys(call["op"] for call in calls):
        own = [call for call in calls if call["op"] == op]
        changed = sum(call["chosen"] != call["default"] for call in own)
        cells = (len(own), changed, sum(len(call["refused"]) for call in own))
        rows.append(f"<tr><td>{html.escape(op)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("op", "calls", "not by the default", "candidates refused"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _section(call: Mapping[str, Any]) -> str:
    """One call: a bar for each implementation that was timed, the fastest first, then those that were refused."""
    escape, ms = html.escape, call["ms"]
    slowest = max(ms.values(), default=0.0) or 1.0
    bars = []
    for name in sorted(ms, key=ms.__getitem__):
        roles = [role for role, who in (("chosen", call["chosen"]), ("default", call["default"])) if who == name]
        roles += ["runner-up"] if name == call["runner_up"] else []
        colour = COLOURS[roles[0] if roles and roles[0] in COLOURS else "other"]
        said = f"{ms[name]:.4f} ms{' (' + ', '.join(roles) + ')' if roles else ''}"
        bars.append(
            f"<div class='row'><div class='name'>{escape(name)}</div><div class='room'>"
            f"<div class='bar' style='width:{100 * ms[name] / slowest:.1f}%;background:{colour}'></div></div>"
            f"<div class='ms'>{said}</div></div>"
        )
    refused = "".join(
        f"<p class='refused'>{escape(name)}: {escape(reason)}</p>" for name, reason in call["refused"].items()
    )
    times = f"{call['count']} in a step" if call["count"] else "in other requests"
    return (
        f"<h3>{escape(call['op'])}, {times}</h3><p><code>{escape(call['call'])}</code></p>"
        f"<p>{escape(str(call['why']))}</p>{''.join(bars)}{refused}"
    )


if __name__ == "__main__":
    print(write(Path(sys.argv[2]), read_json(Path(sys.argv[1]), "give a result of dit4dit tune", error=InputError)))
