"""Results of gpu_suite.py: what a record is worth, several calls as one, and the XML of all tests in one file.

Standard library only: it must run where nothing is installed yet. So it writes its files itself, not with dit4dit.files.atomic.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FINISHED = 4
"""`rank` of a part that need not run again."""


def rank(part: dict[str, Any]) -> int:
    """What a record of a part is worth: nothing, left out, failed, cut, finished."""
    if not part:
        return 0
    if "left_out" in part:
        return 1
    if has_failed(part) or part.get("exit_code") is None:
        return 2
    return 3 if part.get("cut") else FINISHED


def has_failed(part: dict[str, Any]) -> bool:
    """Not where it was ended by its time while it shut down, with its result complete."""
    return bool(part.get("exit_code")) and not part.get("complete")


def summed_up(result: dict[str, Any]) -> dict[str, Any]:
    """The result with "failed" and "left_out", the names of such parts."""
    known = result["suite"]["parts"]
    result["suite"]["failed"] = [name for name, part in known.items() if has_failed(part)]
    result["suite"]["left_out"] = [name for name, part in known.items() if "left_out" in part]
    return result


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several calls on one card as one result: of each part the last finished run, else the most that there is of it.

    A part's record and its numbers are always of the same run. ValueError: they are different GPUs'.
    """
    first, *others = results
    together: dict[str, Any] = json.loads(json.dumps(first))
    for other in others:
        same_gpu(together, other["machine"])
        known = together["suite"]["parts"]
        for name, part in other["suite"]["parts"].items():
            if worth(part) >= worth(known.get(name, {})) or rank(part) == FINISHED:
                known[name] = part
                _take(together, other, name)
                _take(together.setdefault("tests", {}), other.get("tests", {}), name)
        together["machine"] |= other["machine"]
        seconds = together["suite"]["seconds"] + other["suite"]["seconds"]
        together["suite"] |= {"seconds": round(seconds, 1), "commit": other["suite"]["commit"]}
    return summed_up(together)


def worth(part: dict[str, Any]) -> tuple[int, float]:
    """Of two that were cut, the one that ran for longer has more."""
    value = rank(part)
    return value, float(part.get("seconds", 0)) if value == 3 else 0.0


def _take(to: dict[str, Any], other: dict[str, Any], name: str) -> None:
    to.pop(name, None)
    if name in other:
        to[name] = other[name]


def same_gpu(result: dict[str, Any], machine: dict[str, Any]) -> None:
    had, has = result["machine"].get("gpu"), machine.get("gpu")
    if had != has:
        raise ValueError(f"expected results of one card, got {had or 'a CPU'} and {has or 'a CPU'}")


def read_result(path: Path) -> dict[str, Any]:
    """A result of gpu_suite.py. ValueError: the file is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a result of gpu_suite.sh, got {error}") from None
    found = data if isinstance(data, dict) else {}
    suite = found["suite"] if isinstance(found.get("suite"), dict) else {}
    if not isinstance(suite.get("parts"), dict) or not isinstance(found.get("machine"), dict) or "seconds" not in suite:
        raise ValueError(f"{path}: expected a result of gpu_suite.sh, with machine and suite.parts, got other JSON")
    return found


def read_json(path: Path) -> Any:
    """What the file holds; None where there is none, or where its part was killed while writing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, data: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)


def add_tests(whole: Path, new: Path, name: str) -> dict[str, Any]:
    """Bring a part's suites into the one XML file, instead of those that it has there; how many tests ended how.

    "unreadable" where pytest was killed while it wrote, or the whole file is no XML: then it is as it was.
    """
    kinds = ("tests", "failures", "errors", "skipped")
    try:
        root = ElementTree.parse(new).getroot()
        together = ElementTree.parse(whole).getroot() if whole.is_file() else ElementTree.Element("testsuites")
        suites = list(root) if root.tag == "testsuites" else [root]
        counts = {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds}
        for suite in together.findall("testsuite"):
            if suite.get("part") == name:
                together.remove(suite)
        for suite in suites:
            suite.set("part", name)
        together.extend(suites)
        aside = whole.with_name(f".{whole.name}.{os.getpid()}")
        ElementTree.ElementTree(together).write(aside, encoding="utf-8", xml_declaration=True)
        aside.replace(whole)
    except (ElementTree.ParseError, ValueError, OSError) as error:
        return {"unreadable": str(error)}
    return counts
