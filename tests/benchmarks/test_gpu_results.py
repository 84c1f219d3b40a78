"""Results of the GPU suite: several calls as one, all tests in one XML, and the numbers that README has of them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from gpu_modules import ROOT, gpu_results, gpu_suite

from dit4dit.tables import backed, number


def one(gpu: str | None = None, /, **parts: Any) -> dict[str, Any]:
    known = {name: record for name, (record, _) in parts.items()}
    data = {name: found for name, (_, found) in parts.items() if found is not None}
    return {"machine": {"gpu": gpu}, "suite": {"seconds": 2, "commit": "c", "limit": 9, "parts": known}, **data}


def test_merged_results_hold_the_best_of_each_part() -> None:
    whole, cut = {"exit_code": 0}, {"exit_code": 0, "cut": {"by": "seconds"}, "seconds": 5}
    failed, left = {"exit_code": 1}, {"left_out": "no time was left"}
    shorter = {**cut, "seconds": 3}
    late = {"exit_code": -15, "complete": True}  # it was done when its time was over
    first = one("H", a=(whole, 1), b=(cut, 2), c=(failed, 3), d=(left, None), f=(cut, 4), g=(cut, 5), h=(late, 6))
    second = one(
        "H",
        a=(cut, 10),
        b=(whole, 20),
        c=(left, None),
        d=(failed, None),
        e=(whole, 50),
        f=(shorter, 40),
        g=(failed, None),
    )
    together = gpu_results.merge([first, second])
    wanted = {"a": 1, "b": 20, "c": 3, "d": None, "e": 50, "f": 4, "g": 5, "h": 6}
    assert {name: together.get(name) for name in wanted} == wanted
    assert together["suite"]["parts"]["g"] == cut  # record and numbers of one run
    assert together["suite"]["failed"] == ["c", "d"]
    assert together["suite"]["left_out"] == []
    assert together["suite"]["seconds"] == 4
    assert gpu_results.rank(late) == gpu_results.FINISHED
    assert first["suite"]["parts"]["d"] == left  # what was given is as it was


def test_results_of_two_cards_are_not_put_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one card, got H100 and H200"):
        gpu_results.merge([one("H100"), one("H200")])
    for name, gpu in (("a", "H100"), ("b", "H200")):
        (tmp_path / name).write_text(json.dumps(one(gpu)))
    assert gpu_suite.main(["merge", *(str(tmp_path / name) for name in ("c", "a", "b"))]) == 2
    assert not (tmp_path / "c").exists()
    (tmp_path / "b").write_text(json.dumps(one("H100", x=({"exit_code": 0}, 5))))
    assert gpu_suite.main(["merge", *(str(tmp_path / name) for name in ("c", "a", "b"))]) == 0
    assert json.loads((tmp_path / "c").read_text())["x"] == 5


def test_all_runs_of_tests_are_in_one_file(tmp_path: Path) -> None:
    for name, skipped in (("a", 0), ("b", 1)):
        (tmp_path / name).write_text(
            f"<testsuites><testsuite name='{name}' tests='3' failures='1' errors='0' skipped='{skipped}'/></testsuites>"
        )
    whole = tmp_path / "whole.xml"
    assert gpu_results.add_tests(whole, tmp_path / "a", "x") == {"tests": 3, "failures": 1, "errors": 0, "skipped": 0}
    assert gpu_results.add_tests(whole, tmp_path / "b", "y")["skipped"] == 1
    gpu_results.add_tests(whole, tmp_path / "b", "y")  # run again: instead of before
    assert [suite.get("part") for suite in ElementTree.parse(whole).getroot()] == ["x", "y"]
    (tmp_path / "half").write_text("<testsuites><testsu")
    assert "unreadable" in gpu_results.add_tests(whole, tmp_path / "half", "z")
    assert len(ElementTree.parse(whole).getroot()) == 2


def row(label: str, q: dict[str, Any], stages: dict[str, float] | None = None) -> str:
    """A line of the README's table of GPU latencies."""
    shown = backed(q, q["samples"])
    times = [number(shown[k]) for k in ("p50", "p99", "max")]
    parts = [""] * 3 if stages is None else [f"{stages[s]:.2f}" for s in ("vae", "backbone", "action_head")]
    return re.sub(r"\|  (?=\|)", "| ", f"| {label} | {' | '.join([*times, str(q['samples']), *parts])} |")


def test_the_rows_of_the_h100_are_those_of_its_result() -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert data["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    for dtype, name in (("bfloat16", "latency_library_robocasa_gr1"), ("float32", "latency_robocasa_gr1")):
        found = data[name]
        assert (found["head"], found["head_dtype"], found["dtype"]) == ("library", dtype, "bfloat16")
        assert row(f"H100: GR1, head {dtype}", found["engine"], found["stages"]["engine"]) in readme
    text = " ".join(readme[readme.index("The last two rows are of an NVIDIA H100") :].split("\n\n")[0].split())
    tests = data["tests"]["gpu_tests"]
    assert (tests["failures"], tests["errors"]) == (0, 0)
    assert f"{tests['tests'] - tests['skipped']} GPU tests pass and {tests['skipped']} are skipped" in text
    worst = max(stage["error"] for name in ("gr1", "libero") for stage in data[f"parity_{name}"]["stages"])
    assert f"float32 parity is {worst:.1e} at most".replace("e-0", "e-") in text
    head = data["latency_one_launch_robocasa_gr1"]["stages"]["engine"]["action_head"]
    assert f"one-launch head took {head:.2f} ms" in text
    # what did not come to its end is said
    assert data["suite"]["failed"] == ["gpu_tests_alone", "sanitizer"]
    assert "their time was over before pytest had ended" in text
    assert "as far as its time went" in text


def test_the_numbers_in_the_readme_are_those_of_the_result() -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())
    readme = (ROOT / "README.md").read_text()
    spaced = data["spaced_robocasa_gr1"]
    bfloat16, libero = data["latency_library_robocasa_gr1"], data["ratio_libero"]
    for line in (
        row("GR1, head bfloat16", bfloat16["engine"], bfloat16["stages"]["engine"]),
        row("GR1, head float32 (the published choice)", spaced["engine"], spaced["stages"]["engine"]),
        row("the same, one chunk every 1/30 s", spaced["spaced"]),
        row("LIBERO, head float32", libero["engine"], libero["stages"]["engine"]),
    ):
        assert line in readme
    for name, label in (("robocasa_gr1", "GR1"), ("libero", "LIBERO")):
        found = data[f"ratio_{name}"]
        q, stages = found["baseline"], found["stages"]["baseline"]
        shown = backed(q, q["samples"])
        numbers = [*(number(shown[k], ".0f") for k in ("p50", "p99", "max")), str(q["samples"])]
        numbers += [f"{stages[s]:.1f}" for s in ("vae", "backbone", "action_head")]
        text = f"published schedule, {label}, with its text encoder ({stages['text']:.0f} ms)"
        assert f"| {text} | {' | '.join(numbers)} |" in readme
        assert f"{found['ratio']['total']:.1f}" == "9.6"
        assert "alternation: 9.6 for each of the two" in readme
    assert not data["suite"]["failed"]
