"""The schedules of the one-launch action head in which tests plant faults."""

from __future__ import annotations

import pytest
from head_case import Case
from head_faults import faults_case, sound_schedule

from dit4dit.engine.action_ode import Schedule
from dit4dit.engine.action_ode.validate import validate


@pytest.fixture(scope="module")
def case() -> Case:
    return faults_case()


@pytest.fixture(scope="module")
def sound() -> Schedule:
    validate(sound_schedule())
    return sound_schedule()


@pytest.fixture(scope="module")
def fused() -> Schedule:
    """With attention to the tokens as part of the products that follow it."""
    validate(sound_schedule(fused=True))
    return sound_schedule(fused=True)
