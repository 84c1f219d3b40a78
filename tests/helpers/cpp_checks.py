"""What the C++ programs of tests/control/cpp say."""

from __future__ import annotations

import subprocess
from pathlib import Path


def lines_of(program: Path, *case: str) -> dict[str, str]:
    """Its lines, "name: text", by name; it must end well."""
    done = subprocess.run([program, *case], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())
