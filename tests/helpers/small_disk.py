"""A file system of a few bytes, where this user may mount one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """A tmpfs of `size` bytes (whole pages of 4096) at `folder`; the test is skipped where it cannot be mounted."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount here")
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
