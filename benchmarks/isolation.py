"""`bench ops --isolate`: each op in a process of its own, their rows in one file. One that dies or hangs costs its own rows."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit4dit.benchmarks import op_report
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording

from dit4dit import progress

GRACE = 20.0
"""Seconds beyond its share that a process has to start and to end the call that it is in."""
LEAST = 1.0  # seconds of an op whose share the imports have used up
LIMIT = 900.0
"""Seconds of a process where there is no time limit: what takes longer hangs."""
STOPPING = 3.0  # from SIGTERM to SIGKILL; one that waits for a GPU does not see the first
LOG = 30  # lines kept of a process that failed


def command(names: Sequence[str], words: Sequence[str], path: Path | None, seconds: float | None) -> int:
    """The ops in turn into one file, and the table; exit code 1 where something is wrong, failed or died."""
    recording = Recording(path, seconds)
    with recording as record:
        run(names, words, record)
    sys.stdout.write(op_report.show(recording.result) + "\n")
    return 1 if op_report.bad(recording.result) else 0


def run(names: Sequence[str], words: Sequence[str], record: Recording) -> None:
    """words: of `bench ops`, without ops, file and time. What time an op leaves goes to those after it."""
    record.result |= {"machine": None, "dtype": None, "device": None, "rows": [], "processes": []}
    todo = list(dict.fromkeys(names))
    with progress.bar("ops", len(todo), unit="op") as shown, tempfile.TemporaryDirectory() as folder:
        for n, op in enumerate(record.each(todo, "ops")):
            shown.say(op)
            remaining = record.remaining()
            share = None if remaining is None else remaining / (len(todo) - n)
            with shown.ticking():
                _one(op, words, share, Path(folder), record)
            shown.update()
    record.result["unfinished"] = [entry["op"] for entry in record.result["processes"] if entry["cut"]]
    if record.result["machine"] is None:  # no process came so far
        record.result["machine"] = machine()


SCRIPT = """
import sys, time
begin = time.monotonic()
sys.path[:] = {path!r}
from dit4dit.benchmarks import op_bench
from dit4dit.cli import main
seconds = {seconds!r}
left = [] if seconds is None else ["--seconds", str(max(seconds - (time.monotonic() - begin), {least}))]
main({words!r} + left)
"""


def child(op: str, words: Sequence[str], file: Path, seconds: float | None) -> list[str]:
    """The command of one op's process, which finds the packages where this one does; its imports are in its time."""
    given = ["bench", "ops", "--ops", op, *words, "--json", str(file)]
    return [sys.executable, "-c", SCRIPT.format(path=sys.path, seconds=seconds, least=LEAST, words=given)]


def _one(op: str, words: Sequence[str], share: float | None, folder: Path, record: Recording) -> None:
    file, log = folder / f"{op}.json", folder / f"{op}.log"
    before, begin = list(record.result["rows"]), time.monotonic()
    entry: dict[str, Any] = {"op": op, "exit_code": None, "ended_by": None, "seconds": None, "cut": None}
    record.result["processes"].append(entry)
    end = begin + (LIMIT if share is None else share + GRACE)
    with log.open("w") as out:
        process = subprocess.Popen(child(op, words, file, share), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        written = 0
        try:
            while process.poll() is None:
                if time.monotonic() >= end:
                    entry["ended_by"] = f"a time limit of {end - begin:.0f} s"
                    break
                time.sleep(0.1)
                now = file.stat().st_mtime_ns if file.exists() else 0
                if now != written:  # its rows so far are here too, should this process be killed
                    written = now
                    _merge(file, before, entry, record)
        finally:
            _stop(process)
            entry |= {"exit_code": process.returncode, "seconds": round(time.monotonic() - begin, 1)}
            _merge(file, before, entry, record)
    rows = len(record.result["rows"]) - len(before)
    sys.stderr.write(f"{op}: {rows} rows, exit code {process.returncode}, {entry['seconds']} s\n")
    if process.returncode not in (0, 1) or not file.exists() or entry["ended_by"] is not None:
        _died(entry, log, record)
    record.keep()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _merge(file: Path, before: list[dict[str, Any]], entry: dict[str, Any], record: Recording) -> None:
    """What a process has written so far, in the result; its file is whole at any moment."""
    if not file.exists():
        return
    found = json.loads(file.read_text())
    for name in ("machine", "dtype", "device", "samples"):
        record.result[name] = found.get(name) or record.result.get(name)
    record.result["rows"] = before + found.get("rows", [])
    if "heads" in found:
        record.result["heads"] = found["heads"]
    entry["cut"] = found.get("cut")
    record.keep()


def _died(entry: dict[str, Any], log: Path, record: Recording) -> None:
    """The row of a process that did not come to its end, with the case that it was at."""
    entry["log"] = log.read_text(errors="replace").splitlines()[-LOG:]
    code = entry["exit_code"]
    end = entry["ended_by"] or (f"signal {-code}" if code < 0 else f"exit code {code}")
    lost = (entry["cut"] or {}).get("left") or []
    case = lost[0].partition(" ")[2] if lost else ""
    reason = f"its process was ended by {end}" + (f"; not measured: {', '.join(lost)}" if lost else "")
    row = {"op": entry["op"], "case": case, "implementation": "process", "left_out": reason, "failed": True}
    record.result["rows"].append(row)
    sys.stderr.write("\n".join([f"bench ops {entry['op']}: {reason}", *entry["log"]]) + "\n")
