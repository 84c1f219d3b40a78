"""Robot conventions against values worked out by hand, and every step against its inverse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dit4dit.errors import ConfigError, InputError
from dit4dit.robots import EMBODIMENTS, G1, GR1, LIBERO, TABLETOP, embodiment
from dit4dit.robots import statistics as stats
from dit4dit.robots.libero import axis_angle
from dit4dit.robots.statistics import Statistics, choose_tag, parse

RNG = np.random.default_rng(0)


def statistics(state: int, action: int, mask: list[bool] | None = None) -> stats.Statistics:
    def vector(size: int) -> dict:
        low, high = np.linspace(-2, -1, size), np.linspace(1, 3, size)
        numbers = {
            "mean": (low + high) / 2,
            "std": high - low,
            "min": low,
            "max": high,
            "q01": low / 2,
            "q99": high / 2,
        }
        return {name: value.tolist() for name, value in numbers.items()}

    entry = {"state": vector(state), "action": {**vector(action), "mask": mask or [True] * action}}
    return parse({"tag": entry}, "tag", "test")


def libero_raw() -> dict:
    return {
        "agentview_image": RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8),
        "robot0_eye_in_hand_image": RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8),
        "robot0_eef_pos": np.array([0.1, -0.2, 1.1]),
        "robot0_eef_quat": np.array([0.0, 0.0, math.sin(0.35), math.cos(0.35)]),
        "robot0_gripper_qpos": np.array([0.04, -0.04]),
    }


def test_libero_observation_by_hand() -> None:
    raw = libero_raw()
    seen = LIBERO.observe(raw)
    assert list(seen.images) == ["primary_image", "wrist_image"]
    assert np.array_equal(seen.images["primary_image"][0, 0], raw["agentview_image"][5, 7])
    assert np.array_equal(seen.images["wrist_image"][5, 7], raw["robot0_eye_in_hand_image"][0, 0])
    vector = LIBERO.state_vector(seen.state)
    assert np.allclose(vector, [0.1, -0.2, 1.1, 0, 0, 0.7, 0.04, -0.04], atol=1e-6)
    encoded = LIBERO.state_chain(statistics(8, 7), 16).forward(vector)
    want = [f(v) for v in (0.1, -0.2, 1.1, 0, 0, 0.7, 0.04, -0.04) for f in (math.sin, math.cos)]
    assert np.allclose(encoded, want, atol=1e-6)


@pytest.mark.parametrize(
    "quaternion, want",
    [
        ((0, 0, 0, 1), (0, 0, 0)),
        ((1, 0, 0, 0), (math.pi, 0, 0)),
        ((0, 0.6, 0, 0.8), (0, 2 * math.acos(0.8), 0)),
        ((0, 0, 0, 1.0001), (0, 0, 0)),
    ],
)
def test_axis_angle(quaternion, want) -> None:
    assert np.allclose(axis_angle(np.array(quaternion)), want, atol=1e-6)


def test_libero_gripper_is_decided_then_turned_for_the_simulator() -> None:
    chain = LIBERO.action_chain(statistics(8, 7, [True] * 6 + [False]), 8)
    model = np.zeros((2, 8), np.float32)
    model[:, 6] = [0.49, 0.51]
    robot = chain.inverse(model)
    assert robot.shape == (2, 7)
    assert robot[:, 6].tolist() == [0, 1]
    assert [LIBERO.command(row)[6] for row in robot] == [1.0, -1.0], "0 closes (+1), 1 opens (-1)"
    assert [LIBERO.command([*[0] * 6, grip])[6] for grip in (0.49, 0.51)] == [1.0, -1.0]
    for row in robot:
        assert np.allclose(LIBERO.record(LIBERO.command(row)), row)


def test_gr1_groups_sin_and_cos_by_key() -> None:
    vector = np.linspace(-1, 1, 29).astype(np.float32)
    encoded = GR1.state_chain(statistics(29, 29), 64).forward(vector)
    assert np.allclose(encoded[:7], np.sin(vector[:7]))
    assert np.allclose(encoded[7:14], np.cos(vector[:7]))
    assert np.allclose(encoded[52:55], np.sin(vector[26:]))
    assert encoded[58:].tolist() == [0] * 6


def test_gr1_takes_the_environments_picture_or_the_wrappers() -> None:
    raw = {f"state.{k.name}": np.ones(k.dim) for k in GR1.state}
    picture = np.zeros((4, 4, 3), np.uint8)
    for key in ("video.ego_view", "video.ego_view_bg_crop_pad_res256_freq20"):
        assert GR1.observe({**raw, key: picture}).images["ego_view"].shape == (4, 4, 3)
    with pytest.raises(InputError, match=r"GR1 observation: missing 'video.ego_view_bg"):
        GR1.observe(raw)


def test_g1_state_is_normalised_with_quantiles_and_clipped() -> None:
    s = statistics(32, 36)
    vector = np.concatenate([s.state.q01[:1] - 9, s.state.q99[1:2], ((s.state.q01 + s.state.q99) / 2)[2:]]).astype(
        np.float32
    )
    encoded = G1.state_chain(s, 64).forward(vector)
    assert np.allclose(encoded[:32], [-1, 1, *[0] * 30], atol=1e-6)
    assert encoded[32:].tolist() == [0] * 32
    assert G1.action_dim == 36


@pytest.mark.parametrize("robot", EMBODIMENTS.values(), ids=list(EMBODIMENTS))
def test_everything_has_its_inverse(robot) -> None:
    mask = [k.normalization != "none" for k in robot.action for _ in range(k.dim)]
    s = statistics(robot.state_dim, robot.action_dim, mask)
    low, high = (s.state.q01, s.state.q99) if robot is G1 else (s.state.min / 2, s.state.max / 2)
    state = RNG.uniform(low, high, (5, robot.state_dim)).astype(np.float32)
    chain = robot.state_chain(s, robot.encoded_state_dim + 3)
    assert chain.forward(state).shape == (5, robot.encoded_state_dim + 3)
    assert np.allclose(chain.inverse(chain.forward(state)), state, atol=1e-5)
    action = RNG.uniform(s.action.min, s.action.max, (5, robot.action_dim)).astype(np.float32)
    if robot.gripper is not None:
        action[:, robot.gripper.index] = [0, 1, 0, 1, 1]
    chain = robot.action_chain(s, robot.action_dim + 2)
    assert np.allclose(chain.inverse(chain.forward(action)), action, atol=1e-5)
    for row in action:
        assert np.allclose(robot.record(robot.command(row)), row)
    assert len(robot.action_names) == robot.action_dim
    assert len(set(robot.action_names)) == robot.action_dim


def test_state_errors_name_key_wanted_and_got(observation) -> None:
    state = dict(observation.state)
    cases = [
        ({**state, "x": [1, 2]}, "state 'x': expected 1 value, got 2; known keys: x, y"),
        ({**state, "yaw": np.nan}, "state 'yaw': has NaN or infinite values"),
        ({**state, "yaww": 1.0}, "state 'yaww': unknown key; did you mean 'yaw'"),
        ({k: v for k, v in state.items() if k != "z"}, "state 'z': missing"),
        ({**state, "x": "up"}, "state 'x': expected 1 numbers, got 'up'"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError) as caught:
            LIBERO.state_vector(bad)
        assert message in str(caught.value)


def test_picture_errors_name_view_wanted_and_got() -> None:
    good = np.zeros((4, 4, 3), np.uint8)
    cases = [
        ({"primary_image": good}, "image 'wrist_image': missing"),
        ({"primary_image": good, "wrist_image": good.astype(np.float32)}, "expected uint8 in 0..255, got float32"),
        ({"primary_image": good, "wrist_image": good[..., :1]}, "expected shape [H, W, 3] (RGB), got [4, 4, 1]"),
        ({"primary_image": good, "wrist_image": good[:0]}, "expected shape [H, W, 3] (RGB), got [0, 4, 3]"),
        ({"primary_image": good, "wrist_imag": good}, "unknown view; did you mean 'wrist_image'"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError) as caught:
            LIBERO.ordered_views(bad)
        assert message in str(caught.value)
    swapped = {"wrist_image": good + 1, "primary_image": good}
    assert [v.max() for v in LIBERO.ordered_views(swapped)] == [0, 1], "order is the embodiment's, not the dict's"


def test_tags() -> None:
    data = {"franka": {}, "gr1": {}}
    assert choose_tag({"a": {}}, None, "f") == "a"
    assert choose_tag(data, "gr1", "f") == "gr1"
    with pytest.raises(ConfigError, match=r"2 embodiment tags and none chosen.*franka, gr1"):
        choose_tag(data, None, "f")
    with pytest.raises(ConfigError, match="no statistics for 'frank'; did you mean 'franka'"):
        choose_tag(data, "frank", "f")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 7 action values"):
        LIBERO.action_chain(statistics(8, 9), 32)
    with pytest.raises(
        ConfigError, match=r"actions have 7 values, the model takes at most 6 .* train with --model.head.action_dim 7"
    ):
        LIBERO.action_chain(statistics(8, 7), 6)
    for size in (31, 33):
        with pytest.raises(ConfigError, match=f"expected 32 state values for embodiment 'g1', got {size}"):
            G1.state_chain(statistics(size, 36), 64)
    with pytest.raises(
        ConfigError, match=r"state has 58 values, the model takes at most 16 .* train with --model.head.state_dim 58"
    ):
        GR1.state_chain(statistics(29, 29), 16)
    # a robot without a state is one whose state is all padding, however it is encoded
    blind = replace(G1, state=(), action=tuple(replace(key, moves=None) for key in G1.action))
    for encoding in ("normalized", "sin_cos"):
        chain = replace(blind, state_encoding=encoding).state_chain(Statistics("t", statistics(0, 36).action, None), 64)
        assert chain.forward(np.zeros((1, 0), np.float32)).tolist() == [[0.0] * 64]
    with pytest.raises(ConfigError, match="unknown; did you mean 'libero'"):
        embodiment("libera")
    assert TABLETOP.action_names == ("x", "y", "grip")
