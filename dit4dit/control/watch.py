"""What is in a segment of shared memory, for people and scripts: who produces, which chunks there are, what the driver sent.

Nothing here writes to the segment: `dit4dit._C` maps it for reading alone. What `look` gives is ready for JSON, but for limits
that are infinite: "..._at_ns" are stamps of CLOCK_MONOTONIC, "..._ms" durations, None where there is none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit4dit.errors import StreamError, did_you_mean, listed, said, shown

FOLDER = Path("/dev/shm")
DEAD_AFTER_MS = 50.0
"""When readers call a producer dead that does not stamp, unless they are told otherwise."""
SILENT_MS = 1000.0
"""A driver that has not read for so long is said not to read."""
RATE_OVER_S = 0.2
"""The driver's rate is that between two looks, so far apart where only one is asked for."""


def names() -> list[str]:
    """Segments of this machine that this user may read, with the leading slash, also those of other versions."""
    from dit4dit import _C

    return list(_C.segment_names())


class Watch:
    """Looks at one segment again and again; a segment that another has taken the place of is found by its name."""

    def __init__(self, name: str, dead_after_ms: float = DEAD_AFTER_MS) -> None:
        """name: /dit4dit.g1, with or without the slash or the folder /dev/shm. dead_after_ms: as readers have it."""
        self.name = "/" + name.removeprefix(f"{FOLDER}/").removeprefix("/")
        self._dead_after_ms = dead_after_ms
        self._before: tuple[int, int, int] | None = None

    def look(self) -> dict[str, Any]:
        """What is in it at this moment.

        Raises:
            StreamError: there is no such segment, or it is none of this version of dit4dit.
        """
        found = findings(self.name, _snapshot(self.name), self._dead_after_ms)
        driver = found["driver"]
        seen = (driver["pid"], driver["tick"], driver["at_ns"]) if driver["tick"] is not None else None
        driver["hz"] = _rate(self._before, seen)
        self._before = seen
        return found

    def look_twice(self) -> dict[str, Any]:
        """What is in it, after long enough to know the driver's rate."""
        self.look()
        time.sleep(RATE_OVER_S)
        return self.look()


def _rate(before: tuple[int, int, int] | None, now: tuple[int, int, int] | None) -> float | None:
    """Reads per second between two (pid, tick, at_ns); None where there was none, or another driver."""
    if before is None or now is None or before[0] != now[0] or now[1] <= before[1] or now[2] <= before[2]:
        return None
    return 1e9 * (now[1] - before[1]) / (now[2] - before[2])


def _snapshot(name: str) -> dict[str, Any]:
    from dit4dit import _C

    try:
        return _C.segment_snapshot(name)
    except ValueError as error:
        if "no such segment" not in str(error):
            raise StreamError(said(error, 400)) from None
    there = names()
    here = (
        f"here are {listed(there)}"
        if there
        else "there is none here; a producer makes one: ActionStream(..., shared=NAME)"
    )
    raise StreamError(f"{shown(name)}: no such segment{did_you_mean(name, there)}; {here}")


# -- what it means ---------------------------------------------------------------------------------


def findings(name: str, seen: dict[str, Any], dead_after_ms: float = DEAD_AFTER_MS) -> dict[str, Any]:
    """A snapshot of `dit4dit._C` with ages, states and the status that a reader without a group of its own gets now."""
    now = seen["now_ns"]
    chunks = [_chunk(chunk, now) for chunk in seen["chunks"]]
    groups = [_group(group) for group in seen["groups"]]
    channels = [_channel(channel, groups) for channel in seen["channels"]]
    found = {
        "name": name,
        "robot": said(seen["robot"], 60),
        "version": seen["version"],
        "bytes": seen["bytes"],
        "now_ns": now,
        "created_at_ns": seen["created_at_ns"],
        "age_ms": _ms(now - seen["created_at_ns"]),
        "command_hz": 1e9 / seen["command_period_ns"],
        "interpolation": seen["interpolation"],
        "seam": _seam(seen["seam"]),
        "groups": groups,
        "channels": channels,
        "producer": _producer(name, seen["producer"], now, dead_after_ms),
        "published": seen["head"],
        "chunks": chunks,
        "driver": _driver(name, seen, [channel["name"] for channel in channels]),
        "estop": _estop(seen["estop"], now),
    }
    status, why = _status(found, dead_after_ms)
    return {**found, "status": status, "why": why}


def _seam(seam: dict[str, Any]) -> dict[str, Any]:
    """Its kind, and the numbers that this kind has."""
    own = {"newest": (), "ensemble": ("history", "alpha"), "blend": ("rows",)}
    return {"kind": seam["kind"], **{key: seam[key] for key in own.get(seam["kind"], ())}}


def _group(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": said(group["name"], 40),
        **{rule: group[rule] for rule in ("on_dry", "on_stale", "on_dead")},
        "max_age_ms": _ms(group["max_age_ns"]) if group["max_age_ns"] > 0 else None,
        "decay_ms": _ms(group["decay_ns"]),
    }


def _channel(channel: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {**channel, "name": said(channel["name"], 50), "group": groups[channel["group"]]["name"]}


def _chunk(chunk: dict[str, Any], now: int) -> dict[str, Any]:
    period, rows = chunk["period_ns"], chunk["rows"]
    begins, ends = max(chunk["published_at_ns"], chunk["starts_at_ns"]), chunk["starts_at_ns"] + rows * period
    left = max(ends - max(now, chunk["starts_at_ns"]), 0.0)
    return {
        "id": chunk["id"],
        "rows": rows,
        "control_hz": 1e9 / period,
        **{key: chunk[key] for key in ("observed_at_ns", "computed_at_ns", "published_at_ns", "starts_at_ns")},
        "age_ms": _ms(now - chunk["observed_at_ns"]),
        "computed_after_ms": _ms(chunk["computed_at_ns"] - chunk["observed_at_ns"]),
        "published_after_ms": _ms(chunk["published_at_ns"] - chunk["observed_at_ns"]),
        "begins_in_ms": _ms(begins - now) if begins > now else None,
        "left_ms": _ms(left),
        "left_rows": left / period,
        "ended_ms": _ms(now - ends) if now >= ends else None,
    }


def _producer(name: str, producer: dict[str, Any], now: int, dead_after_ms: float) -> dict[str, Any]:
    """state: alive; late, with its lock and an old stamp; halted, if a signal did that; closed, in order; killed."""
    alive_ms, closed_ms = _since(producer["alive_at_ns"], now), _since(producer["closed_at_ns"], now)
    program, halted = _process(producer["pid"], name) if producer["holds"] else (None, False)
    if closed_ms is not None:
        state = "closed"
    elif not producer["holds"]:
        state = "killed"
    elif alive_ms is not None and alive_ms < dead_after_ms:
        state = "alive"
    else:
        state = "halted" if halted else "late"
    return {
        "pid": producer["pid"],
        "program": program,
        "state": state,
        "count": producer["count"],
        **{key: producer[key] for key in ("alive_at_ns", "loop_at_ns", "closed_at_ns")},
        "alive_ms": alive_ms,
        "loop_ms": _since(producer["loop_at_ns"], now),
        "closed_ms": closed_ms,
    }


def _driver(name: str, seen: dict[str, Any], channels: list[str]) -> dict[str, Any]:
    """state: none; waiting, for its first read; reads; silent, with its lock; gone."""
    sent, holds = seen["feedback"], seen["driver_holds"]
    if sent is None:
        nothing = dict.fromkeys(("pid", "program", "tick", "at_ns", "tick_ms", "chunk", "row", "status", "values"))
        return {**nothing, "state": "waiting" if holds else "none", "hz": None}
    program, halted = _process(sent["pid"], name) if holds else (None, False)
    tick_ms = _ms(seen["now_ns"] - sent["at_ns"])
    state = "gone" if not holds else "halted" if halted else "silent" if tick_ms > SILENT_MS else "reads"
    return {
        "state": state,
        "program": program,
        **{key: sent[key] for key in ("pid", "tick", "at_ns", "status")},
        "tick_ms": tick_ms,
        "chunk": sent["chunk"] or None,
        "row": None if sent["row"] < 0 else sent["row"],
        # channels of other drivers' groups are NaN
        "values": {k: v for k, v in zip(channels, sent["values"], strict=True) if not math.isnan(v)},
        "hz": None,
    }


def _process(pid: int, name: str) -> tuple[str | None, bool]:
    """The program's name, and whether a signal has stopped it; (None, False) of a process that has not mapped this segment:
    the number that a producer has in its container is another process's here.
    """
    folder = Path(f"/proc/{pid}")
    try:
        facts = (FOLDER / name[1:]).stat()
        # not by its path: a file that was made without a name has none here
        mapped = f" {os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x} {facts.st_ino} "
        if mapped not in (folder / "maps").read_text(errors="replace"):
            return None, False
        stat = (folder / "stat").read_text(errors="replace")
    except OSError:
        return None, False
    program, _, rest = stat.partition("(")[2].rpartition(")")
    return said(program, 20), rest.split()[0] in ("T", "t")


def _estop(estop: dict[str, Any], now: int) -> dict[str, Any]:
    since = _since(estop["at_ns"], now)
    return {"latched": since is not None, "since_ms": since, "pid": None if since is None else estop["pid"]}


def _status(found: dict[str, Any], dead_after_ms: float) -> tuple[str, str]:
    """The status, and why, as readers find it: the last of ok, dry, stale, dead, estop that applies."""
    producer, estop, begun = (
        found["producer"],
        found["estop"],
        [c for c in found["chunks"] if c["begins_in_ms"] is None],
    )
    if estop["latched"]:
        why = f"latched {duration(estop['since_ms'])} ago by process {estop['pid']}, until clear_estop()"
        return "estop", f"{why}; the robot brakes and stays"
    if producer["state"] != "alive":
        why = {
            "closed": "the producer has closed the stream",
            "killed": "the producer was killed or has crashed",
        }.get(producer["state"], f"no sign of life from the producer for {dead_after_ms:g} ms")
        return "dead", f"{why}; {_rules(found['groups'], 'on_dead')}"
    if begun:
        over = [g for g in found["groups"] if g["max_age_ms"] is not None and begun[-1]["age_ms"] > g["max_age_ms"]]
        if over:
            allowed = ", ".join(f"{group['name']} allows {group['max_age_ms']:g} ms" for group in over)
            age = duration(begun[-1]["age_ms"])
            return (
                "stale",
                f"the observation of chunk {begun[-1]['id']} is {age} old ({allowed}); {_rules(over, 'on_stale')}",
            )
        if begun[-1]["ended_ms"] is None:
            newest = begun[-1]
            row = min(newest["rows"] - 1, int(newest["rows"] - newest["left_rows"] + 1e-6))
            return (
                "ok",
                f"row {row} of chunk {newest['id']} is due; its observation is {duration(newest['age_ms'])} old",
            )
        why = f"chunk {begun[-1]['id']} ended {duration(begun[-1]['ended_ms'])} ago"
    elif found["chunks"]:
        first = min(found["chunks"], key=lambda chunk: chunk["begins_in_ms"])
        why = f"chunk {first['id']} begins in {duration(first['begins_in_ms'])}"
    else:
        why = "no chunk yet"
    return "dry", f"{why}; {_rules(found['groups'], 'on_dry')}"


_DOES = {
    "hold": "hold",
    "decay": "let velocities fall to 0",
    "finish": "execute the rows that are left",
}


def _rules(groups: Iterable[dict[str, Any]], rule: str) -> str:
    """What the groups do: "readers hold", "arms hold, base let velocities fall to 0"."""
    of = {group["name"]: _DOES.get(group[rule], group[rule]) for group in groups}
    if len({*of.values()}) == 1:
        return f"readers {next(iter(of.values()))}"
    return ", ".join(f"{name}: {does}" for name, does in of.items())


def _ms(ns: float) -> float:
    return ns / 1e6


def _since(stamp: int, now: int) -> float | None:
    """Milliseconds since a stamp; None for one that was never set."""
    return _ms(now - stamp) if stamp else None


def duration(ms: float) -> str:
    """A duration to read: "0.4 ms", "312 ms", "2.31 s", "3 min 12 s", "5 h 12 min"; with a minus where it is below 0."""
    if ms < 0:
        return f"-{duration(-ms)}"
    if ms < 9.95:
        return f"{ms:.1f} ms"
    if ms < 999.5:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
