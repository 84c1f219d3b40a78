"""host_memory: after the first chunk a step asks the kernel for no more pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys, torch
from dit4dit.engine import host_memory

held = host_memory.hold() if sys.argv[1] == "hold" else None

def faults():  # of three allocations of 64 MB, beyond what glibc keeps by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, then = faults(), faults()
print(json.dumps([held, first, then]))
"""


def run(argument: str, folder: Path) -> list:
    # away from the source tree, which would be taken for the package
    command = [sys.executable, "-c", SCRIPT, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_memory_that_is_held_is_not_faulted_in_again(tmp_path: Path) -> None:
    held, _, then = run("hold", tmp_path)
    if not held:
        pytest.skip("the C library is not glibc")
    _, _, without = run("leave", tmp_path)
    assert without > 30_000, "three allocations of 64 MB, page by page"
    assert then < 1_000
