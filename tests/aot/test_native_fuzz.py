"""Everything in the compiled module, called with what no caller should send: none of it ends the process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "helpers" / "fuzz_native.py"


def fuzz(library: Path, folder: Path, cases: int, seed: int = 0, **environment: str) -> dict[str, Any]:
    """What the program reports of that many cases. A process that a signal or a sanitizer has ended fails the test."""
    last, log = folder / "last", folder / "calls"
    log.symlink_to(os.devnull)
    command = [sys.executable, PROGRAM, "--driver", library, "--last", last, "--cases", str(cases), "--seed", str(seed)]
    given = {**os.environ, "FAKE_CUDA_LOG": str(log), "PYTHONFAULTHANDLER": "1", **environment}
    done = subprocess.run([*map(str, command)], cwd=folder, env=given, capture_output=True, text=True, check=False)
    at = last.read_text().strip() if last.is_file() else "none"
    assert done.returncode == 0, f"case {at} of seed {seed}: exit {done.returncode}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def expect_thorough(found: dict[str, Any], each: int) -> None:
    """Everything was called, with success where it can have any, and refused in more than one way."""
    for name in found["targets"]:
        ends = found["ends"][name]
        assert sum(ends.values()) >= each, name
        assert ends.get("left out", 0) < 0.2 * sum(ends.values()), name
        if name.endswith(("_cuda", "_facts")):
            assert ends.get("CudaError"), name
        elif name != "Kernel":
            assert ends.get("sound"), name
        if name.endswith(("preprocess", "_cuda", "load", "launch", "publish", "StreamWriter", "StreamReader", "read")):
            assert {"ValueError", "TypeError", "KeyError"} <= set(ends), name
    assert {"preprocess", "Driver.load", "Kernel.launch"} <= set(found["targets"])


def test_no_object_ends_the_process(fake_library, tmp_path):
    expect_thorough(fuzz(fake_library, tmp_path, 40_000), each=1000)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_sanitizers_find_nothing(fake_library, tmp_path, seed):
    """AddressSanitizer and UBSan in a build of their own: memory that is read past its end need not end a process."""
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("make") is None:
        pytest.skip("needs g++ and make")
    subprocess.run(["make", "-s", "build/asan/.built", f"BIN={Path(sys.executable).parent}"], cwd=ROOT, check=True)
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second: Python brings none, and the first looks for it
    ]
    options = dict(
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(ROOT / "build" / "asan" / "site"),
        PYTHONMALLOC="malloc",  # each object an allocation that is watched
    )
    found = fuzz(fake_library, tmp_path, 400_000, seed, **options)
    assert Path(found["module"]).is_relative_to(ROOT / "build" / "asan")
    expect_thorough(found, each=10_000)
