"""What gpu_suite.sh has so far, in one file named after the machine. Standard library only: it must run where a build failed.

python -I benchmarks/merge_results.py SCRATCH OUT SECONDS

SCRATCH holds parts.tsv (name, exit code or "-", seconds, limit, command or reason), <part>.log, <part>.json where the part wrote
one, and "machine", JSON of `harness.machine`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

TAIL = 30  # lines of a failed part's log
TIMED_OUT = (124, 137)


def merge(scratch: Path, seconds: float) -> dict[str, Any]:
    """{"machine", "suite": {"seconds", "failed", "parts"}, part: its result, ...}."""
    machine = _json(scratch / "machine")
    parts: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for line in (scratch / "parts.tsv").read_text().splitlines():
        name, code, took, limit, what = line.split("\t", 4)
        if code == "-":
            parts[name] = {"left_out": what}
        else:
            exit_code = int(code)
            parts[name] = {"command": what, "exit_code": exit_code, "seconds": int(took), "limit": int(limit)}
            if exit_code:
                parts[name] |= {"timed_out": exit_code in TIMED_OUT, "log": _tail(scratch / f"{name}.log")}
        found = _json(scratch / f"{name}.json")
        if found is not None:
            results[name] = found
    failed = [n for n, part in parts.items() if part.get("exit_code") or part.get("left_out") == "no time was left"]
    return {"machine": machine, "suite": {"seconds": seconds, "failed": failed, "parts": parts}, **results}


def _json(path: Path) -> Any:
    """What the file holds; None where there is none, or where its part was stopped while writing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-TAIL:] if path.is_file() else []


def file_name(machine: dict[str, Any] | None) -> str:
    """nvidia-h200.json, amd-epyc-2-cores.json."""
    if machine is None:
        return "unknown-machine.json"
    words = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json"


def main(scratch: Path, out: Path, seconds: float) -> None:
    result = merge(scratch, seconds)
    path = out / file_name(result["machine"])
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)
    if result["machine"] is not None:
        (out / file_name(None)).unlink(missing_ok=True)  # of the parts before the machine was known


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
