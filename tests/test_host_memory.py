"""host_memory: after the first chunk a step asks the kernel for no more pages."""

from __future__ import annotations

import json
import subprocess
import sys

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


def run(argument: str) -> list:
    done = subprocess.run([sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_memory_that_is_held_is_not_faulted_in_again() -> None:
    held, _, then = run("hold")
    if not held:
        pytest.skip("the C library is not glibc")
    _, _, without = run("leave")
    assert without > 30_000, "three allocations of 64 MB, page by page"
    assert then < 1_000
