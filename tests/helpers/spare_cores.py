"""Whether other work takes the cores: what is promised of several workers is promised where it does not."""

from __future__ import annotations

import subprocess
import sys

TWO_IDLE_CORES = 1.8
"""`cores_to_spare` of at least this much counts as a machine on which nothing else runs."""
SPIN = """
import sys, time
end, count = time.perf_counter() + float(sys.argv[1]), 0
while time.perf_counter() < end:
    count += sum(range(2000)) > 0
print(count)
"""


def spin(processes: int, seconds: float) -> int:
    """How much work so many processes get done in this time."""
    command = [sys.executable, "-I", "-c", SPIN, str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(int(process.communicate(timeout=600)[0]) for process in running)


def cores_to_spare(seconds: float = 1.0) -> float:
    """What two processes get done here just now, in units of what one does: 2 on a machine with two idle cores."""
    return spin(2, seconds) / max(1, spin(1, seconds))
