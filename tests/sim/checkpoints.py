"""Golden checkpoints with the statistics of a robot, which their own are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "golden"

# Ranges as LIBERO's data have them, roughly: positions in metres, axis-angle in radians, finger joints in metres.
LIBERO_STATE = [
    (-0.5, 0.25),
    (-0.4, 0.4),
    (0.0, 1.4),
    (0.2, 3.7),
    (-3.6, 3.6),
    (-1.8, 1.4),
    (0.0, 0.045),
    (-0.045, 0.0),
]
LIBERO_ACTION = [(-0.94, 0.94), (-0.94, 0.9), (-0.9, 0.94), (-0.26, 0.36), (-0.37, 0.36), (-0.36, 0.37), (0.0, 1.0)]


def vector(ranges, passed=()):
    """Statistics of a vector with these ranges; the dimensions `passed` are not scaled."""
    low, high = ([bounds[side] for bounds in ranges] for side in (0, 1))
    entry = {"min": low, "max": high, "q01": low, "q99": high}
    entry["mean"] = [(a + b) / 2 for a, b in ranges]
    entry["std"] = [(b - a) / 4 for a, b in ranges]
    return {**entry, "mask": [i not in passed for i in range(len(ranges))]}


def checkpoint(folder: Path, fixture: str, tag: str, state, action, passed=(), side: int | None = None) -> Path:
    """A golden checkpoint with statistics of a real robot, and views of side x side."""
    run = Path(shutil.copytree(GOLDEN / fixture, folder / fixture))
    entry = {"state": vector(state), "action": vector(action, passed)}
    (run / "dataset_statistics.json").write_text(json.dumps({tag: entry}))
    if side is not None:
        text = (run / "config.yaml").read_text()
        changed = text.replace("    image_size:\n    - 224\n    - 224", f"    image_size: [{side}, {side}]")
        assert changed != text
        (run / "config.yaml").write_text(changed)
    return run
