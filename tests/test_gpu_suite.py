"""gpu_suite.sh: each part by itself, results in one file whatever fails. Here its parts run on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
MERGE = ROOT / "benchmarks" / "merge_results.py"


def suite(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    assert shutil.which("bash")
    here = Path(sys.executable).parent
    path = f"{environment.pop('PROGRAMS', here)}{os.pathsep}{here}{os.pathsep}{os.environ['PATH']}"
    given = {
        **os.environ,
        "PATH": path,
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "BUILD": "0",
        "ALONE": "3",
        **environment,
    }
    given.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return subprocess.run(["bash", SUITE, out], env=given, capture_output=True, text=True, check=False)


def result(out: Path) -> dict:
    (file,) = out.glob("*.json")
    return json.loads(file.read_text())


def test_it_is_a_shell_script() -> None:
    done = subprocess.run(["bash", "-n", SUITE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_part_that_fails_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    # the limits are for a machine that is not shared; that each part has its own is looked at
    (programs / "timeout").write_text(f'#!/bin/bash\necho "$2" >>{tmp_path}/limits\nexec "${{@:3}}"\n')
    (programs / "timeout").chmod(0o755)
    settings = {"PRESETS": "tiny tinny", "CHUNKS": "1", "OPS": "euler_step", "LIMIT": "100000"}
    done = suite(tmp_path, **settings, PROGRAMS=str(programs))
    assert done.returncode == 1, done.stderr
    data = result(tmp_path)
    assert data["machine"]["cores"] >= 1
    assert data["suite"]["failed"] == ["latency_tinny", "latency_fp8_tinny", "flops_tinny"]
    parts = data["suite"]["parts"]
    assert "did you mean 'tiny'" in parts["latency_tinny"]["log"][-1]
    assert parts["latency_tinny"]["exit_code"] == 2
    order = list(parts)
    assert order.index("parity_one_launch") < order.index("gpu_tests") < order.index("latency_tiny")
    needing_a_gpu = {"gpu_tests", "tune", "parity_one_launch", "latency_one_launch_tiny", "latency_one_launch_tinny"}
    assert {name for name, part in parts.items() if "left_out" in part} == {"build", *needing_a_gpu}
    ran = {name for name, part in parts.items() if part.get("exit_code") == 0}
    models = {"parity_libero_tiny", "parity_gr1_tiny", "latency_tiny", "latency_fp8_tiny", "flops_tiny"}
    assert ran == {"doctor", "ops", "options", *models}
    assert ran <= set(data)
    limits = [int(line) for line in (tmp_path / "limits").read_text().split()]
    assert limits == [part["limit"] for part in parts.values() if "exit_code" in part]
    assert all(0 < limit <= 150 for limit in limits)
    assert data["doctor"]["healthy"]
    assert all(stage["ok"] for stage in data["parity_gr1_tiny"]["stages"])
    assert data["latency_tiny"]["ratio"]["total"] > 0
    assert data["ops"]["complete"]
    assert len(data["options"]["subjects"]) == 3
    assert data["flops_tiny"]["executed"]["total"] > 0
    assert (tmp_path / "latency_tiny" / "report.html").is_file()
    assert "/tmp" not in json.dumps(data["suite"])


def test_the_whole_limit_holds_and_what_is_left_is_said(tmp_path: Path) -> None:
    done = suite(tmp_path, PRESETS="tiny", LIMIT="1")
    assert done.returncode == 1
    suite_part = result(tmp_path)["suite"]
    assert all(part.get("limit", 1) <= 1 for part in suite_part["parts"].values())
    left = {name for name, part in suite_part["parts"].items() if part.get("left_out") == "no time was left"}
    assert {"latency_tiny", "ops", "options"} <= left
    assert left <= set(suite_part["failed"])


def test_what_a_stopped_part_wrote_is_kept(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()

    def merge() -> None:
        subprocess.run([sys.executable, "-I", MERGE, scratch, out, "7"], check=True)

    (scratch / "parts.tsv").write_text("build\t1\t3\t120\tpip install .\n")
    (scratch / "build.log").write_text("\n".join(f"line {i}" for i in range(99)))
    merge()  # before the machine is known
    data = result(out)
    assert data["machine"] is None
    assert data["suite"]["parts"]["build"]["log"][0] == "line 69"
    assert data["suite"]["parts"]["build"]["timed_out"] is False

    (scratch / "machine").write_text(json.dumps({"gpu": "NVIDIA H200", "cpu": "x", "cores": 2}))
    with (scratch / "parts.tsv").open("a") as file:
        file.write("ops\t124\t75\t75\tdit4dit bench ops\ntune\t137\t9\t9\tdit4dit tune\n")
    (scratch / "ops.json").write_text('{"complete": false}')
    (scratch / "tune.json").write_text('{"machine": ')  # cut off
    merge()
    data = result(out)
    assert [path.name for path in out.iterdir()] == ["nvidia-h200.json"]
    assert data["ops"] == {"complete": False}
    assert "tune" not in data
    assert data["suite"]["failed"] == ["build", "ops", "tune"]
    assert data["suite"]["parts"]["ops"]["timed_out"]
    assert data["suite"]["seconds"] == 7
