"""The convention check on worlds that keep conventions, and on worlds that break them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dit4dit.evaluation import conventions as module
from dit4dit.evaluation import tabletop
from dit4dit.robots import LIBERO, TABLETOP
from dit4dit.robots.statistics import parse
from dit4dit.types import ActionChunk, Noise, Observation


def statistics(state, action, tag="t"):
    def vector(ranges):
        low, high = ([r[i] for r in ranges] for i in (0, 1))
        return {"min": low, "max": high, "q01": low, "q99": high, "mean": low, "std": [1.0] * len(low)}

    entry = {"action": vector(action)}
    if state is not None:
        entry["state"] = vector(state)
    return parse({tag: entry}, tag, "a test")


WORLD = statistics([(-0.25, 0.25), (-0.25, 0.25), (0, 1)], [(-0.2, 0.2), (-0.2, 0.2), (0, 1)])


class Still:
    """A policy of the tabletop world that stands still."""

    def __init__(self, embodiment=TABLETOP):
        self.embodiment = embodiment
        self.config = SimpleNamespace(image_size=(32, 32))

    def infer(self, observation, instruction, *, noise: Noise):
        rows = np.zeros((8, 3), np.float32)
        return ActionChunk(rows, self.embodiment.action_names, 10.0, rows, noise)


def verdicts(findings):
    return {finding.name: finding.verdict for finding in findings}


def test_the_tabletop_world_keeps_its_conventions(tmp_path) -> None:
    found = module.examine(Still(), tabletop.plan(1), WORLD, tmp_path)
    assert verdicts(found) == {
        "rate": "ok",
        "picture top": "ok",
        "instruction": "ok",
        "state": "ok",
        "action": "ok",
        "gripper data": "ok",
        "fingers": "ok",
        "standing still": "ok",
    }
    assert not module.contradictions(found)
    numbers = found[-1].numbers
    assert set(numbers["moved"]) == set(numbers["drift"]) == {"x", "y"}
    assert max(*numbers["moved"].values(), *numbers["drift"].values()) < 1e-6
    from PIL import Image

    from dit4dit.envs.tabletop import TEST_SEEDS_FROM, TabletopEnv

    drawn = np.asarray(Image.open(tmp_path / "policy_views.png"))
    assert np.array_equal(drawn, TabletopEnv(TEST_SEEDS_FROM).reset().observation["image"])
    assert np.asarray(Image.open(tmp_path / "policy_input.png")).shape == (32, 32, 3)
    assert (tmp_path / "conventions.json").exists()


def test_a_gripper_the_wrong_way_round_is_found(tmp_path) -> None:
    def turned(row):
        return np.array([row[0], row[1], 1 - row[2]], np.float32)

    policy = Still(replace(TABLETOP, command=turned))
    found = module.examine(policy, tabletop.plan(1), WORLD, tmp_path)
    (wrong,) = module.contradictions(found)
    assert wrong.name == "fingers"
    assert "they close when told to open" in wrong.text


def test_fingers_that_do_not_move_are_found(tmp_path) -> None:
    policy = Still(replace(TABLETOP, command=lambda row: np.array([row[0], row[1], 0], np.float32)))
    (wrong,) = module.contradictions(module.examine(policy, tabletop.plan(1), WORLD, tmp_path))
    assert "they do not move" in wrong.text


def of_kind(kind):
    return replace(TABLETOP, action=(*(replace(key, kind=kind) for key in TABLETOP.action[:2]), TABLETOP.action[2]))


@pytest.mark.parametrize(
    "robot",
    [
        pytest.param(of_kind("relative"), id="targets taken for displacements"),
        pytest.param(of_kind("velocity"), id="targets taken for velocities"),
        pytest.param(replace(TABLETOP, command=lambda row: row * np.float32([-1, 1, 1])), id="one axis turned"),
        pytest.param(replace(TABLETOP, command=lambda row: row * np.float32([0.1, 0.1, 1])), id="another unit"),
    ],
)
def test_actions_that_mean_something_else_are_found(robot, tmp_path) -> None:
    (wrong,) = module.contradictions(module.examine(Still(robot), tabletop.plan(1), WORLD, tmp_path))
    assert wrong.name == "standing still"
    assert "told to stay, " in wrong.text
    assert "the simulator takes its actions for something else" in wrong.text


def test_a_first_pose_far_from_the_datas_targets_is_found(tmp_path) -> None:
    elsewhere = statistics([(-0.25, 0.25), (-0.25, 0.25), (0, 1)], [(-0.2, -0.19), (-0.2, 0.2), (0, 1)])
    (wrong,) = module.contradictions(module.examine(Still(), tabletop.plan(1), elsewhere, tmp_path))
    assert "widths outside the range of the data's targets" in wrong.text


def test_a_robot_that_settles_slowly_is_unusual() -> None:
    class Sagging:
        """Falls by a centimetre in 10 steps, and never stops."""

        def reset(self, seed, trial):
            self.x = 0.1
            return {"observation": self.seen(), "instruction": ""}

        def step(self, rows):
            self.x -= 1e-3 * len(rows)
            return {"observation": self.seen()}

        def seen(self):
            return {"image": np.zeros((64, 64, 3), np.uint8), "state": np.float32([self.x, 0, 1])}

    found = module.standing_still(TABLETOP, WORLD, Sagging(), tabletop.plan(1).episodes[0])
    assert found.verdict == "unusual"
    assert (
        "told to stay, x moves by 0.03 m in 30 steps; in the last 20 of them, settled and held, still x 0.02 m"
        in found.text
    )
    nobody = replace(TABLETOP, action=tuple(replace(key, kind=None) for key in TABLETOP.action))
    assert module.standing_still(nobody, WORLD, Sagging(), tabletop.plan(1).episodes[0]).verdict == "not tested"


@pytest.mark.parametrize(
    ("openings", "verdict", "words"),
    [
        ((0.0, 1.0, 0.0), "ok", "opening 0.000 after 'close', 1.000 after 'open'"),
        ((1.0, 0.0, 1.0), "contradiction", "they close when told to open"),
        ((0.1, 0.4, 0.5), "contradiction", "they do not move"),
        ((0.5, 0.4, 0.1), "contradiction", "they do not move"),
    ],
)
def test_fingers_are_watched_while_they_close_open_and_close(openings, verdict, words) -> None:
    told, left = [], list(openings)

    class Told:
        def reset(self, seed, trial):
            return {"observation": seen(1.0), "instruction": ""}

        def step(self, rows):
            told.append([row[2] for row in rows])
            return {"observation": seen(left.pop(0))}

    def seen(opening):
        return {"image": np.zeros((64, 64, 3), np.uint8), "state": np.float32([0, 0, opening])}

    found = module.fingers(TABLETOP, Told(), tabletop.plan(1).episodes[0])
    assert told == [[grip] * module.STEPS for grip in (1, 0, 1)]
    assert found.verdict == verdict
    assert words in found.text


@pytest.mark.parametrize(
    "here, fps, verdict",
    [
        (10.0, None, "ok"),
        (10.0, 10.0, "ok"),
        (10.0, 20.0, "unusual"),
        (20.0, None, "contradiction"),
        (10.05, 10.0, "ok"),
        (10.0, 10.2, "unusual"),
        (9.8, None, "contradiction"),
    ],
)
def test_rates(here, fps, verdict) -> None:
    assert module.rate(TABLETOP, {"control_hz": here}, fps).verdict == verdict


def test_states_are_held_against_the_data() -> None:
    def at(x):
        return [Observation(images={}, state={"x": [x], "y": [0.0], "grip": [1.0]})]

    for x, verdict in ((0.2, "ok"), (0.29, "ok"), (0.4, "unusual"), (0.8, "contradiction"), (-0.8, "contradiction")):
        found = module.states(TABLETOP, WORLD, at(x))
        assert found.verdict == verdict, x
    assert "x is -0.8 to -0.8, in the data -0.25 to 0.25" in found.text
    assert module.states(TABLETOP, statistics(None, [(0, 1)] * 3), at(0)).verdict == "not tested"
    short = statistics([(0, 1)] * 2, [(0, 1)] * 3)
    assert "3 values, the checkpoint's statistics have 2" in module.states(TABLETOP, short, at(0)).text


def test_actions_are_held_against_what_the_world_clips_at() -> None:
    rows = np.zeros((8, 3), np.float32)
    found = module.actions(TABLETOP, WORLD, rows)
    assert (found.verdict, found.numbers["simulator_clips_at"]) == ("ok", 0.21)
    for largest, verdict in ((0.23, "ok"), (0.3, "unusual"), (20.0, "contradiction")):
        one = statistics(None, [(-0.2, 0.2), (-largest, 0.2), (0, 1)])
        found = module.actions(TABLETOP, one, rows)
        assert found.verdict == verdict
        assert f"the data's largest y is {largest:g}, the simulator clips at 0.21" in found.text


def test_an_angle_goes_the_short_way_round() -> None:
    assert module._way("rad", [3.1, 0.0], [-3.1, 0.01]) == pytest.approx(2 * np.pi - 6.2)
    assert module._way("m", [3.1], np.float32([-3.1])) == pytest.approx(6.2)


def test_libero_data_with_other_conventions_are_found() -> None:
    rows = np.zeros((8, 7), np.float32)
    good = [(-0.9, 0.9)] * 6 + [(0.0, 1.0)]
    assert module.actions(LIBERO, statistics(None, good), rows).verdict == "ok"
    assert module.gripper_statistics(LIBERO, statistics(None, good)).verdict == "ok"
    large = [(-1.5, 0.9), *good[1:]]
    assert module.actions(LIBERO, statistics(None, large), rows).verdict == "unusual"
    metres = [(-300.0, 900.0), *good[1:]]
    assert module.actions(LIBERO, statistics(None, metres), rows).verdict == "contradiction"
    found = module.gripper_statistics(LIBERO, statistics(None, [*good[:6], (-1.0, 1.0)]))
    assert found.verdict == "contradiction"
    assert "runs from -1 to 1, the model's from 0 to 1" in found.text
    for robot, others, low, high, never in (
        (LIBERO, good[:6], 0.0, 0.08, "open"),
        (LIBERO, good[:6], 0.6, 1.0, "close"),
        (TABLETOP, good[:2], 0.0, 0.08, "close"),
    ):
        found = module.gripper_statistics(robot, statistics(None, [*others, (low, high)]))
        assert found.verdict == "contradiction"
        assert f"runs from {low:g} to {high:g}, so the policy would never {never}: model value < 0.5" in found.text


def test_pictures_of_one_colour_and_one_camera_twice_are_found() -> None:
    rng = np.random.default_rng(0)
    views = {name: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for name in LIBERO.views}
    assert set(verdicts(module.pictures(LIBERO, Observation(views))).values()) == {"ok"}
    black = {**views, "wrist_image": np.zeros((8, 8, 3), np.uint8)}
    assert verdicts(module.pictures(LIBERO, Observation(black)))["picture wrist_image"] == "contradiction"
    twice = dict.fromkeys(LIBERO.views, views["primary_image"])
    assert verdicts(module.pictures(LIBERO, Observation(twice)))["pictures"] == "contradiction"
