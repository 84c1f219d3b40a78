"""sanitize.sh: each tool over the GPU tests, and the worst exit code. Here with a sanitizer that only notes what it is asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytest_plugins = "pytester"

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitize.sh"


def run(tmp_path: Path, *tools: str, sanitizer: str | None = "exit 0") -> tuple[int, list[str], str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("dirname", "timeout", "bash"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    scripts = {"python3": "exit 1", "compute-sanitizer": sanitizer}
    for name, body in scripts.items():
        if body is not None:
            file = programs / name
            file.write_text(f'#!/bin/bash\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >>{tmp_path}/calls\n{body}\n')
            file.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", SCRIPT, *tools], env={"PATH": str(programs)}, capture_output=True, text=True, check=False
    )
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr


@pytest.mark.skipif(not os.access("/usr/bin/timeout", os.X_OK), reason="needs coreutils in /usr/bin")
def test_every_tool_runs_and_the_worst_code_is_the_scripts(tmp_path):
    code, calls, text = run(
        tmp_path, sanitizer='[[ "$*" == *racecheck* ]] && exit 9; [[ "$*" == *synccheck* ]] && exit 1; exit 0'
    )
    assert [line.split()[:3] for line in calls] == [
        ["1", "--tool", tool] for tool in ("memcheck", "racecheck", "synccheck")
    ]
    assert all("-m gpu" in line and line.endswith("tests/ops") and "--error-exitcode 9" in line for line in calls)
    assert ["--num-cuda-barriers" in line for line in calls] == [False, False, True]
    assert code == 9
    assert "FAILED (9): racecheck" in text
    assert "FAILED (1): synccheck" in text
    assert "memcheck" not in text.replace("== memcheck", "")


@pytest.mark.parametrize("uncached", [False, True])
def test_what_captures_a_graph_is_left_out_without_the_caching_allocator(uncached, pytester, monkeypatch):
    """There an allocation during capture is an error, which would end the run: the others must still be sanitized."""
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    if uncached:
        monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    pytester.makeini("[pytest]\nmarkers = capture")
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile("""
        import pytest
        @pytest.mark.capture
        def test_replays(): pass
        def test_launches(): pass
    """)
    pytester.runpytest().assert_outcomes(passed=1 if uncached else 2, skipped=int(uncached))


def test_one_tool(tmp_path):
    code, calls, _ = run(tmp_path, "synccheck")
    assert (code, len(calls)) == (0, 1)


def test_without_the_sanitizer(tmp_path):
    code, calls, text = run(tmp_path, sanitizer=None)
    assert (code, calls) == (2, [])
    assert "no compute-sanitizer on PATH" in text
