"""Simulators' environments, made once a machine, and policies for them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import environments  # noqa: E402

GOLDEN = HERE.parent / "golden"

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


@pytest.fixture(scope="session")
def libero():
    """LIBERO's environment with stand-in assets."""
    return environments.libero()


@pytest.fixture(scope="session")
def gr1():
    """The GR1 stand-in's environment; its module is found through PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(HERE)
    yield environments.gr1()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def libero_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LIBERO's fixture with views of 32 x 32: for what does not look at pictures."""
    folder = tmp_path_factory.mktemp("small")
    return checkpoint(folder, "libero_tiny", "franka", LIBERO_STATE, LIBERO_ACTION, passed=(6,), side=32)


@pytest.fixture(scope="session")
def libero_small(libero_checkpoint: Path):
    from dit4dit import Policy

    return Policy.from_pretrained(libero_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def libero_full(tmp_path_factory: pytest.TempPathFactory):
    """The policy with views of 224 x 224, as released."""
    from dit4dit import Policy

    folder = tmp_path_factory.mktemp("full")
    run = checkpoint(folder, "libero_tiny", "franka", LIBERO_STATE, LIBERO_ACTION, passed=(6,))
    return Policy.from_pretrained(run, device="cpu")
