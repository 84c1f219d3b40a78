"""Simulators' environments, made once a machine, and policies for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import environments  # noqa: E402
from checkpoints import LIBERO_ACTION, LIBERO_STATE, checkpoint  # noqa: E402

from dit4dit.errors import ConfigError, SimulatorError  # noqa: E402
from dit4dit.evaluation.simulators import Simulator  # noqa: E402


def environment(make: Callable[[], Simulator]) -> Simulator:
    """Skips the tests where it cannot be made, and says why; .ci/run makes it before them, and fails there."""
    try:
        return make()
    except (ConfigError, SimulatorError) as error:
        pytest.skip(f"no simulator: {error}")


@pytest.fixture(scope="session")
def libero():
    """LIBERO's environment with stand-in assets."""
    return environment(environments.libero)


@pytest.fixture(scope="session")
def gr1():
    """The GR1 stand-in's environment; its module is found through PYTHONPATH."""
    made = environment(environments.gr1)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(HERE)
    yield made
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
