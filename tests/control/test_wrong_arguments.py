"""What comes easily in the place of what an action stream takes: a policy, bare actions, another clock, a path. One line each."""

from __future__ import annotations

import copy
import pickle
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stream_chunks import MS, T0, chunk, unused_segment

from dit4dit.control import ActionStream, Ensemble, Limits, Status
from dit4dit.errors import ConfigError, InputError, StreamError
from dit4dit.robots import G1, TABLETOP

CHUNK = "expected an ActionChunk of Policy.infer or a Chunk of the client, with names, control_hz and stamps"
GOOD = chunk(TABLETOP, [0.1, 0.2, 1.0])


@pytest.mark.parametrize(
    "given", [SimpleNamespace(embodiment=TABLETOP), "tabletop", None], ids=["policy", "name", "None"]
)
def test_a_robot_that_is_no_embodiment(given: Any) -> None:
    wanted = "embodiment: expected an Embodiment, such as policy.embodiment"
    for make in (ActionStream, Limits.of, lambda robot: Limits(robot, ())):
        with pytest.raises(ConfigError, match=wanted):
            make(given)
    if given is not None:
        with pytest.raises(ConfigError, match=wanted):
            ActionStream.attach("/dit4dit.nowhere", embodiment=given)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ActionStream(G1, limits="limits.yaml"), "limits: expected Limits.of(embodiment), or what its override(FILE)"),
        (lambda: Limits(TABLETOP, ()), "limits of robot 'tabletop': expected 3 bounds, one per action channel, got 0"),
        (lambda: ActionStream(G1, command_hz=0.5), "command_hz: expected a number from 1 to 20000, got 0.5"),
        (lambda: ActionStream(G1, shared=""), "stream : '' is no name for a segment"),
        (lambda: Ensemble(history=2.5), "ensemble: history: expected a whole number of chunks, 1 or more, got 2.5"),
        (lambda: Ensemble(history=True), "ensemble: history: expected a whole number of chunks, 1 or more, got True"),
        (lambda: Ensemble(history="3"), "ensemble: history: expected a whole number of chunks, 1 or more, got '3'"),
        (lambda: Ensemble(alpha="0.1"), "ensemble: expected a finite alpha, got '0.1'"),
        (lambda: Ensemble(alpha=None), "ensemble: expected a finite alpha, got None"),
        (lambda: Limits.of(G1).override({"action.left_arm": {"velocity": 1}}), "did you mean 'left_arm'?"),
    ],
)  # fmt: skip
def test_an_option_of_another_type(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (GOOD.actions, f"{CHUNK}, got float32"),
        (None, f"{CHUNK}, got None"),
        (replace(GOOD, observed_at_ns=T0 * 1.0), "observed_at_ns: expected a whole number, got 1000000000000.0"),
        (replace(GOOD, control_hz="10"), "control_hz: expected a number, got '10'"),
    ],
    ids=["actions", "None", "float", "text"],
)  # fmt: skip
def test_what_is_no_chunk(given: Any, message: str) -> None:
    stream = ActionStream(TABLETOP)
    with pytest.raises(InputError, match=f"^stream of 'tabletop': {re.escape(message)}"):
        stream.publish(given, now_ns=T0)
    assert stream.at(T0).chunk == 0


def test_the_wall_clock_reaches_no_stream() -> None:
    """It would be the last time that a reader knows: every command after it is DEAD; and a loop that stands still would live."""
    with unused_segment() as name:
        stream = ActionStream(TABLETOP, shared=name, loop_dead_after_ms=100)
        stream.publish(GOOD, now_ns=T0)
        robot = ActionStream.attach(name, loop_dead_after_ms=100, dead_after_ms=1e9)
        for call in (stream.heartbeat, stream.estop, stream.at, robot.estop, robot.at):
            for now in (time.time_ns(), np.int64(time.time_ns())):
                with pytest.raises(
                    InputError, match=r"now_ns: expected time.monotonic_ns\(\), got .*; time.time_ns\(\) is another"
                ):
                    call(now)
        assert robot.at(T0 + 50 * MS).status is Status.OK
        assert robot.at(T0 + 101 * MS).status is Status.DEAD
        with pytest.raises(StreamError, match="producer is at work"):
            ActionStream.remove(name)
        stream.close()


def test_a_stream_is_not_copied() -> None:
    """A copy would close with the first of the two that goes; the argument of a process would be another stream."""
    with unused_segment() as name, ActionStream(TABLETOP, shared=name) as stream:
        robot = ActionStream.attach(name)
        for one, hint in (
            (stream, f"ActionStream.attach('{name}') there"),
            (robot, "attach"),
            (ActionStream(G1), "make it there"),
        ):
            for call in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=f"neither copied nor sent to another process; .*{re.escape(hint)}"):
                    call(one)
    for frozen in (Limits.of(G1), Ensemble(), robot.at()):
        assert type(pickle.loads(pickle.dumps(frozen))) is type(copy.deepcopy(frozen)) is type(frozen)
