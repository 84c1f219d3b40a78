"""What a policy says of states and images that can hardly be meant, once, and that it says nothing of others."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit4dit import Noise, Observation, Policy
from dit4dit.envs import tabletop_policy_dir
from dit4dit.policy.published_api import Unjoined
from dit4dit.robots import GR1, LIBERO, TABLETOP, Key
from dit4dit.robots.state_range import StateRange
from dit4dit.robots.statistics import parse
from dit4dit.serving.backend import PolicyBackend


def statistics(ranges, actions: int):
    def vector(pairs):
        low, high = ([float(pair[i]) for pair in pairs] for i in (0, 1))
        return {"min": low, "max": high, "q01": low, "q99": high, "mean": low, "std": [1.0] * len(low)}

    entry = {"action": vector([(0, 1)] * actions)}
    if ranges is not None:
        entry["state"] = vector(ranges)
    return parse({"t": entry}, "t", "a test")


def watch(robot, ranges, width: int = 64) -> StateRange:
    known = statistics(ranges, robot.action_dim)
    found = StateRange.of(robot, known, robot.state_chain(known, width))
    assert found is not None
    return found


def said(caplog) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return lines


TABLE = [(-0.2, 0.2), (-0.2, 0.2), (0.4, 1.0)]


def test_a_value_is_told_beyond_five_widths_once_a_key(caplog) -> None:
    found = watch(TABLETOP, TABLE)
    for state in ([2.19, -2.19, 3.99], [-2.19, 0, -2.59]):  # 0.2 + 5 x 0.4 = 2.2, 1 + 5 x 0.6 = 4, 0.4 - 3 = -2.6
        found.look(np.float32(state))
    assert said(caplog) == []
    found.look(np.float32([2.21, 0, 0.5]))
    (line,) = said(caplog)
    assert line.startswith(
        "state 'x': 2.21, in the training data -0.2 to 0.2: 5 times that range outside of it; look at"
    )
    found.look(np.float32([-300, 0, 0.5]))
    assert said(caplog) == []
    found.look(np.float32([-300, -2.21, 4.01]))
    lines = said(caplog)
    assert [line.split(":")[0] for line in lines] == ["state 'y'", "state 'grip'"]
    found.look(np.float32([1e9, -1e9, 1e9]))
    assert said(caplog) == []


def test_degrees_for_radians_are_named(caplog) -> None:
    ranges = [(-1.5, 1.5)] * 29
    found = watch(GR1, ranges)
    state = np.full(29, 0.1, np.float32)
    state[7:14] = np.rad2deg(np.linspace(-1, 1, 7))
    found.look(state)
    (line,) = said(caplog)
    assert line.startswith(
        "state 'right_arm[0]': -57.296, in the training data -1.5 to 1.5: 19 times that range outside"
    )
    assert "degrees? As radians it would be where the training data are" in line
    state[10] = 100.0  # another joint of the same key
    found.look(state)
    assert said(caplog) == []
    state[26] = 200.0  # as radians 3.49, half a width outside
    found.look(state)
    assert "degrees?" in said(caplog)[0]
    state[0] = 400.0  # as radians 6.98
    found.look(state)
    assert "degrees?" not in said(caplog)[0]


@pytest.mark.parametrize(("unit", "high"), [("m", 1.5), (None, 20.0)])
def test_metres_and_encoder_counts_are_no_angles(caplog, unit, high) -> None:
    robot = replace(TABLETOP, state=(Key("h", unit=unit),), action=TABLETOP.action[2:], gripper=None)
    found = watch(robot, [(0.0, high)])
    found.look(np.float32([np.rad2deg(high)]))
    assert "degrees?" not in said(caplog)[0]


@pytest.mark.parametrize(
    ("constant", "fine", "told"),
    [(0.0, (0.49, -0.49), (0.51, -0.51)), (0.74, (1.2, 0.25), (1.3, 740.0)), (2000.0, (2099, 1901), (2101, 1899))],
)
def test_what_never_changed_in_training_has_a_width_too(caplog, constant, fine, told) -> None:
    ranges = [(constant, constant), *TABLE[1:]]
    for value in fine:
        watch(TABLETOP, ranges).look(np.float32([value, 0, 0.5]))
    assert said(caplog) == []
    for value in told:
        watch(TABLETOP, ranges).look(np.float32([value, 0, 0.5]))
        assert f"in the training data always {constant:.5g}" in said(caplog)[0]


def test_a_small_range_is_not_widened(caplog) -> None:
    found = watch(TABLETOP, [(0.0, 0.04), *TABLE[1:]])
    found.look(np.float32([0.23, 0, 0.5]))
    assert said(caplog) == []
    found.look(np.float32([0.25, 0, 0.5]))
    assert len(said(caplog)) == 1


def test_without_statistics_of_these_values_there_is_nothing_to_say() -> None:
    for ranges in (None, [(0, 1)] * 7):
        known = statistics(ranges, 7)
        assert StateRange.of(LIBERO, known, LIBERO.state_chain(known, 16)) is None
    known = statistics([(0, 1)] * 8, 7)
    assert StateRange.of(LIBERO, known, None) is None, "a model without a state token looks at no state"


def test_the_largest_statistics_that_load_have_bounds(caplog) -> None:
    found = watch(TABLETOP, [(-3e38, 3e38), *TABLE[1:]])
    found.look(np.float32([3.4e38, 0, 0.5]))
    assert said(caplog) == []


def test_many_threads_tell_it_once(caplog) -> None:
    """As a server's workers look at the same state."""
    state, before = np.float32([9, 9, 9]), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            found, together = watch(TABLETOP, TABLE), threading.Barrier(8)

            def look(found=found, together=together):
                together.wait()
                found.look(state)

            threads = [threading.Thread(target=look) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(line.split(":")[0] for line in said(caplog)) == ["state 'grip'", "state 'x'", "state 'y'"]
    finally:
        sys.setswitchinterval(before)


def test_a_look_costs_microseconds() -> None:
    found, state = watch(GR1, [(-1.5, 1.5)] * 29), np.zeros(29, np.float32)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(100):
            found.look(state)
        times.append((time.perf_counter() - start) / 100)
    assert min(times) < 25e-6


@pytest.fixture(scope="module")
def tabletop_policy() -> Policy:
    return Policy.from_pretrained(tabletop_policy_dir(), device="cpu")


def test_a_policys_requests_are_looked_at(tabletop_policy: Policy, caplog) -> None:
    def seen(x):
        return Observation({"top": np.zeros((64, 64, 3), np.uint8)}, {"x": x, "y": 0.0, "grip": 1.0})

    tabletop_policy.infer(seen(0.1), "go", seed=0)
    assert said(caplog) == []
    chunks = tabletop_policy.infer_batch([seen(0.1), seen(12.0)], ["go", "go"])
    assert len(chunks) == 2, "it is told, not refused"
    (line,) = said(caplog)
    assert line.startswith("state 'x': 12, in the training data -0.20962 to 0.20988: 28 times")
    served = PolicyBackend(tabletop_policy, "tabletop", "abc")
    width = tabletop_policy.config.head.state_dim
    encoded = tabletop_policy.codec.state.forward(np.float32([[0.1, 0.1, 1.0], [0.1, 12.0, 1.0]]))
    image = np.zeros((64, 64, 3), np.uint8)
    requests = served.check({"examples": [{"image": image, "lang": "go", "state": state[None]} for state in encoded]})
    assert encoded.shape == (2, width)
    served.run(requests)
    (line,) = said(caplog)
    assert line.startswith("state 'y': 12, in")


def _noise() -> Noise:
    return Noise.from_seed(0)


def test_sines_and_cosines_say_nothing_but_the_raw_state_does(small_libero: Path, make_observation, caplog) -> None:
    known = json.loads((small_libero / "dataset_statistics.json").read_text())["franka"]["state"]
    assert len(known["min"]) == 8, "statistics of what was measured, though it is encoded as sines and cosines"
    policy = Policy.from_pretrained(small_libero, device="cpu")
    example = {"image": np.zeros((32, 64, 3), np.uint8), "lang": "go", "state": np.full((1, 16), 9.0, np.float32)}
    policy.predict_action(example)
    assert said(caplog) == []
    far = make_observation(0)
    low, high = known["min"][5], known["max"][5]
    state = {**far.state, "yaw": np.float32([high + 6 * (high - low)])}
    policy.infer(replace(far, state=state), "go")
    assert [line.split(":")[0] for line in said(caplog) if "'yaw'" in line] == ["state 'yaw'"]


def example(image, **more):
    return {"image": image, "lang": "go", "state": np.zeros((1, 16), np.float32), **more}


def of(height: int, width: int):
    return np.full((height, width, 3), 7, np.uint8)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        pytest.param([of(32, 32), of(32, 32)], True, id="two views"),
        pytest.param((of(64, 48), of(64, 48), of(64, 48)), True, id="three upright ones"),
        pytest.param([of(32, 64)], False, id="joined"),
        pytest.param([of(32, 64), of(32, 64)], False, id="future frames"),
        pytest.param([of(160, 304), of(160, 304)], False, id="five percent narrower"),
        pytest.param([of(160, 288), of(160, 288)], True, id="ten percent narrower"),
        pytest.param([of(32, 32)], False, id="one image of a list may be anything"),
        pytest.param(of(32, 32), False, id="one image"),
    ],
)
def test_lists_of_unjoined_images_are_told(caplog, image, told) -> None:
    found = Unjoined(2, (32, 32))
    found.look([example(image)])
    lines = said(caplog)
    assert len(lines) == told
    found.look([example(image)])
    assert said(caplog) == []
    if told:
        height, width = image[0].shape[:2]
        assert f"of a list of {len(image)} images only the first is used, {height} x {width}" in lines[0]
        assert "has 2 views: join them side by side (numpy.concatenate(views, axis=1), 32 x 64)" in lines[0]


def test_the_joined_aspect_is_that_of_the_views_as_the_model_has_them(caplog) -> None:
    for views, size, joined in ((3, (32, 32), (32, 96)), (2, (64, 32), (64, 64)), (2, (32, 64), (32, 128))):
        found = Unjoined(views, size)
        found.look([example([of(*joined)] * 2)])
        assert said(caplog) == []
        found.look([example([of(*size)] * views)])
        assert len(said(caplog)) == 1
    Unjoined(1, (32, 32)).look([example([of(32, 64)] * 2)])
    assert said(caplog) == [], "a robot of one view has nothing to join"


def test_the_first_of_two_unjoined_images_is_used_and_that_is_told_once(small_libero: Path, caplog) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    want = policy.predict_action(example(of(32, 32)), noise=_noise())["normalized_actions"]
    assert said(caplog) == []
    pair = [of(32, 32), np.full((32, 32, 3), 99, np.uint8)]
    assert np.array_equal(policy.predict_action(example(pair), noise=_noise())["normalized_actions"], want)
    assert [line.split(":")[0] for line in said(caplog)] == ["examples[0].image"]
    policy.predict_action(example(pair))
    assert said(caplog) == []


def test_the_servers_door_and_later_examples_are_looked_at(small_libero: Path, caplog) -> None:
    served = PolicyBackend(Policy.from_pretrained(small_libero, device="cpu"), "libero", "abc")
    requests = served.check({"examples": [example(of(32, 32)), example([of(32, 32)] * 2)]})
    served.run(requests)
    assert [line.split(":")[0] for line in said(caplog)] == ["examples[1].image"]
