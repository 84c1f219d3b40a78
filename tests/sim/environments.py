"""The environments of the simulator tests: made by `python tests/sim/environments.py`, or by the first test that needs one.

They stay in ~/.cache/dit4dit-tests (or DIT4DIT_TEST_SIMULATORS), outside the cache folder of a test session.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import libero_assets  # noqa: E402

from dit4dit.evaluation import simulator_setup  # noqa: E402
from dit4dit.evaluation.simulators import LOCKS, Simulator, graphics_of, install, make_environment  # noqa: E402


def root() -> Path:
    return Path(os.environ.get("DIT4DIT_TEST_SIMULATORS") or Path.home() / ".cache" / "dit4dit-tests")


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time: tests that run side by side wait for the first of them to make an environment."""
    root().mkdir(parents=True, exist_ok=True)
    with (root() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@alone()
def libero() -> Simulator:
    """LIBERO with stand-in assets, set up as a user would; not again where it has been with the same lock file and assets."""
    assets = root() / "libero-assets"
    libero_assets.write(assets)
    simulator = Simulator.at("libero", root() / "libero")
    made_from = f"{(LOCKS / 'libero.txt').read_text()}{simulator_setup.TORCH}{libero_assets.files()}"
    ready = root() / "libero-made-from"
    if not (ready.exists() and ready.read_text() == made_from and simulator.installed):
        simulator_setup.setup_libero(simulator, graphics_of(None), say, assets=assets)
        ready.write_text(made_from)
    return simulator


@alone()
def gr1() -> Simulator:
    """The GR1 stand-in's packages."""
    simulator = Simulator.at("gr1", root() / "gr1-standin")
    make_environment(simulator, None)
    install(simulator, say, lock=HERE / "gr1_standin.txt")
    return simulator


if __name__ == "__main__":
    for make in (libero, gr1):
        say(f"{make.__name__}: {make().folder}")
