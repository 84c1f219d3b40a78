"""`dit4dit.control.watch` as text: a block of lines per look, and the list of all segments."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import Any, TextIO

from dit4dit.control.watch import duration
from dit4dit.tables import table


def show(found: dict[str, Any], chunks: int = 4) -> str:
    """What was found, as lines: what changes first, channels last. chunks: of the newest, how many."""
    head = [
        f"{found['name']}: {found['robot']}, {len(found['channels'])} channels, commands at {found['command_hz']:g} Hz, "
        f"{found['interpolation']} interpolation, {_seam(found['seam'])}; made {duration(found['age_ms'])} ago",
        f"status    {found['status'].upper()}: {found['why']}",
        f"producer  {_producer(found['producer'])}",
        f"driver    {_driver(found['driver'])}",
        f"e-stop    {_estop(found['estop'])}",
        f"chunks    {found['published']} published",
    ]
    return "\n".join([*head, *_chunks(found["chunks"][-chunks:]), "", _groups(found), "", _channels(found)])


def show_list(found: Sequence[tuple[str, dict[str, Any] | str]]) -> str:
    """A line per segment: what was found, or why it cannot be read."""
    if not found:
        return "no segment here; a producer makes one: ActionStream(..., shared=NAME)"
    readable = [(name, one) for name, one in found if not isinstance(one, str)]
    rows = [
        [n, f["robot"], f["producer"]["state"], f["driver"]["state"], f["published"], f["status"].upper()]
        for n, f in readable
    ]
    lines = [table(["name", "robot", "producer", "driver", "chunks", "status"], rows, right=(4,))] if rows else []
    return "\n".join([*lines, *(one for _, one in found if isinstance(one, str))])


def _seam(seam: dict[str, Any]) -> str:
    if seam["kind"] == "blend":
        return f"blend over {seam['rows']:g} rows"
    if seam["kind"] == "ensemble":
        return f"ensemble of {seam['history']} chunks with alpha {seam['alpha']:g}"
    return "switches to the newest chunk"


def _who(process: dict[str, Any]) -> str:
    return f"process {process['pid']}" + (f" ({process['program']})" if process["program"] else "")


def _producer(producer: dict[str, Any]) -> str:
    who = _who(producer)
    if producer["count"] > 1:
        who += f", the {_ordinal(producer['count'])} producer of this segment,"
    last = (
        "it has never stamped" if producer["alive_ms"] is None else f"last stamp {duration(producer['alive_ms'])} ago"
    )
    if producer["loop_ms"] is not None:
        last += f", of its loop {duration(producer['loop_ms'])} ago"
    if producer["state"] == "closed":
        return f"{who} stopped in order {duration(producer['closed_ms'])} ago"
    does = {
        "alive": "is alive",
        "late": "has its lock but does not stamp, for want of CPU or in a debugger",
        "halted": f"was stopped by a signal (kill -CONT {producer['pid']} resumes it)",
        "killed": "was killed or has crashed: its lock is free and the stream was not closed",
    }
    return f"{who} {does[producer['state']]}; {last}"


def _ordinal(count: int) -> str:
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def _driver(driver: dict[str, Any]) -> str:
    if driver["state"] == "none":
        return "none"
    if driver["state"] == "waiting":
        return "holds its lock, and has not read yet"
    does = {
        "reads": "",
        "silent": " does not read",
        "halted": " was stopped by a signal (SIGSTOP)",
        "gone": " has ended",
    }[driver["state"]]
    rate = "" if driver["hz"] is None else f" at {driver['hz']:.1f} Hz"
    rows = "no row" if driver["row"] is None else f"row {driver['row']} of chunk {driver['chunk']}"
    ago = duration(driver["tick_ms"])
    return f"{_who(driver)}{does}: tick {driver['tick']} {ago} ago{rate}; {rows}, {driver['status'].upper()}"


def _estop(estop: dict[str, Any]) -> str:
    if not estop["latched"]:
        return "not latched"
    return f"LATCHED {duration(estop['since_ms'])} ago by process {estop['pid']}"


def _chunks(chunks: Sequence[dict[str, Any]]) -> list[str]:
    if not chunks:
        return []
    header = ["chunk", "rows", "Hz", "observed", "computed", "published", "left"]
    rows = [
        [
            chunk["id"],
            chunk["rows"],
            f"{chunk['control_hz']:g}",
            f"{duration(chunk['age_ms'])} ago",
            f"+{duration(chunk['computed_after_ms'])}",
            f"+{duration(chunk['published_after_ms'])}",
            _left(chunk),
        ]
        for chunk in reversed(chunks)
    ]
    return _indented(table(header, rows, right=range(6)))


def _left(chunk: dict[str, Any]) -> str:
    if chunk["ended_ms"] is not None:
        return f"ended {duration(chunk['ended_ms'])} ago"
    begins = "" if chunk["begins_in_ms"] is None else f", begins in {duration(chunk['begins_in_ms'])}"
    return f"{duration(chunk['left_ms'])}, {chunk['left_rows']:.1f} rows{begins}"


def _groups(found: dict[str, Any]) -> str:
    rows = [
        [
            group["name"],
            group["on_dry"],
            group["on_stale"],
            group["on_dead"],
            "any" if group["max_age_ms"] is None else f"{group['max_age_ms']:g} ms",
            f"{group['decay_ms']:g} ms",
        ]
        for group in found["groups"]
    ]
    return table(["group", "on dry", "on stale", "on dead", "observation's age", "decay"], rows, right=(4, 5))


def _channels(found: dict[str, Any]) -> str:
    sent = found["driver"]["values"] or {}
    bounds = ("low", "high", "velocity", "acceleration", "jerk")
    rows = [
        [c["name"], c["kind"], c["group"], *(_bound(c[key]) for key in bounds), _value(sent.get(c["name"]))]
        for c in found["channels"]
    ]
    return table(["channel", "kind", "group", *bounds, "sent"], rows, right=range(3, 9))


def _bound(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


class Screen:
    """Draws a block over the last one on a terminal, and one below the other elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._terminal, self._drawn = out, out.isatty(), 0

    def draw(self, text: str) -> None:
        """Show this block. What does not fit the terminal is left out, and said."""
        if not self._terminal:
            self._out.write(text + "\n\n")
            self._out.flush()
            return
        lines, room = text.splitlines(), max(shutil.get_terminal_size().lines - 1, 1)
        if len(lines) > room:
            lines = [
                *lines[: room - 1],
                f"... {len(lines) - room + 1} more lines: make the terminal taller, or use --once",
            ]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        # the terminal cuts long lines (?7l), so that each is one; one write, so that it does not flicker
        self._out.write(f"{up}\x1b[J\x1b[?7l" + "\n".join(lines) + "\x1b[?7h\n")
        self._out.flush()
        self._drawn = len(lines)
