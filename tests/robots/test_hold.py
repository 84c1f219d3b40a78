"""How a robot stands still: every embodiment says it, and in the tabletop world it is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_standin import StandIn

from dit4dit.control.execution import Execution, Latency
from dit4dit.data.catalogue import catalogue
from dit4dit.envs import tabletop as world
from dit4dit.envs.tabletop import Goal, ScriptedExpert, TabletopEnv
from dit4dit.errors import ConfigError, InputError
from dit4dit.evaluation import tabletop as benchmark
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.evaluation.sim_worker import Libero
from dit4dit.robots import EMBODIMENTS, G1, GR1, LIBERO, TABLETOP, Key
from dit4dit.robots.descriptions import described, restored
from dit4dit.robots.embodiment import KINDS
from dit4dit.robots.tabletop import REACH


@pytest.mark.parametrize("robot", EMBODIMENTS.values(), ids=list(EMBODIMENTS))
def test_every_embodiment_has_every_fact(robot) -> None:
    assert all(key.kind in KINDS for key in robot.action)
    assert (robot.gripper is not None) == any(key.kind == "binary" for key in robot.action)
    units = {key.name: key.unit for key in robot.state}
    moved = [key for key in robot.action if key.moves is not None]
    assert moved, "or nobody can look whether it stands still"
    assert all(units[key.moves] in ("m", "rad") for key in moved)
    row = np.linspace(-1, 1, robot.action_dim).astype(np.float32)
    held = robot.hold(row)
    assert (held.shape, held.dtype) == (row.shape, np.float32)
    assert np.array_equal(robot.hold(held), held), "held twice is held"
    state = {key.name: np.full(key.dim, 0.5) for key in robot.state}
    assert np.array_equal(robot.hold(robot.still(state)), robot.still(state))
    if robot.gripper is not None:
        rule = robot.gripper
        assert [key.kind for key in robot.action for _ in range(key.dim)][rule.index] == "binary"
        assert held[rule.index] == row[rule.index]
        assert robot.still(state)[rule.index] == rule.open
        assert {rule.open, rule.close} == {0, 1}
        assert isinstance(rule.opening(state), float)


def test_what_is_held_by_hand() -> None:
    row = np.arange(1, 8, dtype=np.float32)
    assert LIBERO.hold(row).tolist() == [0, 0, 0, 0, 0, 0, 7]
    assert TABLETOP.hold(np.float32([0.1, -0.2, 1])).tolist() == np.float32([0.1, -0.2, 1]).tolist()
    row = np.arange(1, 30, dtype=np.float32)
    assert GR1.hold(row).tolist() == row.tolist()
    row = np.arange(1, 37, dtype=np.float32)
    want = row.copy()
    want[32:35] = 0  # it stops walking, and neither stands up nor turns
    assert G1.hold(row).tolist() == want.tolist()
    assert G1.action_names[32:36] == ("base_velocity.0", "base_velocity.1", "base_velocity.2", "target_yaw")


def test_a_robot_that_was_told_nothing_yet_is_kept_where_it_is() -> None:
    assert TABLETOP.still({"x": [0.125], "y": 0.25, "grip": [0.5]}).tolist() == [0.125, 0.25, 0]
    assert LIBERO.still({key.name: [0.5] for key in LIBERO.state}).tolist() == [0, 0, 0, 0, 0, 0, 1]
    parts = {key.name: np.full(key.dim, i + 1.0) for i, key in enumerate(GR1.state)}
    row = GR1.still(parts, np.full(29, 9.0, np.float32))
    assert row.tolist() == [1] * 7 + [2] * 7 + [9] * 12 + [5] * 3
    assert GR1.still(parts)[14:26].tolist() == [0] * 12


def test_the_simulators_facts_are_the_embodiments() -> None:
    assert REACH == world.REACH
    assert [key.clip for key in TABLETOP.action] == [REACH, REACH, None]
    assert [key.clip for key in LIBERO.action] == [1.0] * 6 + [None]
    still = LIBERO.still({key.name: [0.0] for key in LIBERO.state})
    assert tuple(LIBERO.command(still)) == Libero.STILL, "what the worker waits with"
    assert LIBERO.gripper.meaning == "model value < 0.5 -> 0 (close), else 1 (open)"
    assert TABLETOP.gripper.meaning == "model value < 0.5 -> 0 (open), else 1 (close)"
    assert LIBERO.gripper.opening({"pad": [0.04], "gripper": [-0.03]}) == pytest.approx(0.07)
    assert TABLETOP.gripper.opening({"grip": np.float32([0.4])}) == pytest.approx(0.4)


def moves(env: TabletopEnv, robot, last, settle: int = 10, held: int = 20) -> float:
    """Metres that the gripper goes in `held` steps after it has been held for `settle`, what it carries with it included."""
    row, places = np.float32(last), []
    for _ in range(settle + held):
        row = robot.hold(row)
        env.step(robot.command(row))
        carried = [env.scene.block(env.scene.held)] if env.scene.held else []
        places.append([(body.x, body.y) for body in (env.scene, *carried)])
    way = np.array(places[settle - 1 :]) - np.array(places[settle - 1])
    return float(np.abs(way).max())


@pytest.mark.parametrize("seed", range(5))
def test_the_tabletop_robot_does_not_move_when_it_is_held(seed: int) -> None:
    env = TabletopEnv(seed, max_steps=200)
    target = np.random.default_rng(seed).uniform(-0.25, 0.25, 2)  # beyond its reach, too
    env.step([*target, 0.0])  # half of the way, so that it is on the move
    assert moves(env, TABLETOP, [*target, 0.0]) < 1e-3
    wanted = np.clip(target, -world.REACH, world.REACH)
    assert np.allclose([env.scene.x, env.scene.y], wanted, atol=1e-3), "it arrives where it was told to go"


@pytest.mark.parametrize("seed", range(5))
def test_the_tabletop_robot_keeps_what_it_carries_when_it_is_held(seed: int) -> None:
    env = TabletopEnv(seed, max_steps=200)
    expert = ScriptedExpert(env, goal=Goal(env.scene.blocks[0].colour, "white"))
    while env.scene.held is None:
        action = expert.act()
        env.step(action)
    held = env.scene.held
    action = [-np.sign(env.scene.x) * 0.15, 0.1, 1.0]
    env.step(action)
    assert moves(env, TABLETOP, action) < 1e-3
    assert env.scene.held == held


def test_zeros_are_a_place_in_the_tabletop_world() -> None:
    """What `hold` sent before the world's actions were positions: the look for motion sees it."""
    env = TabletopEnv(0, max_steps=200)
    for _ in range(10):
        env.step([0.2, 0.2, 0.0])
    wrong = replace(TABLETOP, action=tuple(replace(key, kind="relative") for key in TABLETOP.action))
    assert moves(env, wrong, [0.2, 0.2, 0.0], settle=1) > 0.09


def test_actions_of_no_kind_are_not_held() -> None:
    robot = replace(TABLETOP, action=(*TABLETOP.action[:2], Key("grip", normalization="none")))
    with pytest.raises(ConfigError, match=r"embodiment 'tabletop': action 'grip': .*unknown; give its Key a kind"):
        robot.hold(np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"hold: expected a row of 3 actions, got shape \[2, 3\]"):
        TABLETOP.hold(np.zeros((2, 3), np.float32))


def test_a_run_with_latency_ends_before_it_begins_where_the_robot_cannot_be_held(tmp_path: Path) -> None:
    class Unknown:
        embodiment = replace(TABLETOP, action=tuple(replace(key, kind=None) for key in TABLETOP.action))

    options = Options(execution=Execution(4, latency=Latency(150.0)))
    with pytest.raises(ConfigError, match="action 'x': nothing says"):
        evaluate(Unknown(), benchmark.plan(1), options, tmp_path / "run", horizon=8, about_policy={})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["position", "relative"])
def test_late_chunks_are_waited_for_with_the_embodiments_rows(tmp_path: Path, kind) -> None:
    sent = []

    def command(row):
        sent.append(row.tolist())
        return row

    action = (*(replace(key, kind=kind) for key in TABLETOP.action[:2]), TABLETOP.action[2])
    policy = StandIn()
    policy.embodiment = replace(TABLETOP, action=action, command=command)
    options = Options(execution=Execution(2, latency=Latency(150.0)), batch=1, videos="none")
    plan = benchmark.plan(1, max_steps=8)
    (record,) = evaluate(policy, plan, options, tmp_path / "run", horizon=4, about_policy={"checkpoint": "a test's"})
    assert (record["error"], record["held"], len(sent)) == (None, 4, 8)
    for last in (1, 5):  # two rows of a chunk, two held
        x, y, grip = sent[last]
        assert x
        assert sent[last + 1] == sent[last + 2] == ([x, y, grip] if kind == "position" else [0, 0, grip])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"action": (Key("x", moves="z"), *TABLETOP.action[1:])},
            "'x' moves 'z': expected a state key of 1 values, got none",
        ),
        ({"action": (Key("x", 3, moves="x"),)}, "'x' moves 'x': expected a state key of 3 values, got 1"),
        ({"action": TABLETOP.action[:2]}, "gripper: no action 2 of 2"),
    ],
)
def test_embodiments_that_contradict_themselves_are_refused(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TABLETOP, **change)


OWN = """
robots:
  my_arm:
    video: [front]
    state: [joints]
    action: [joints, base, gripper]
    language: annotation.human.action.task_description
    action_steps: 12
    normalization: {action.joints: min_max, action.gripper: binary}
"""
SIZES = {"state.joints": 2, "action.joints": 2, "action.base": 2, "action.gripper": 1}
ROW = np.float32([1, 2, 3, 4, 5])


def my_arm(tmp_path: Path, more: str = ""):
    (tmp_path / "my.yaml").write_text(OWN + more)
    return catalogue(tmp_path / "my.yaml").robot("my_arm")


@pytest.mark.parametrize(
    ("absolute", "more", "want"),
    [
        ({"joints": True, "base": False}, "", [1, 2, 0, 0, 5]),
        ({"joints": False, "base": True}, "", [0, 0, 3, 4, 5]),
        ({"joints": True, "base": True}, "    kinds: {action.base: velocity}\n", [1, 2, 0, 0, 5]),
        ({"base": False, "gripper": False}, "    kinds: {action.joints: angle}\n", [1, 2, 0, 0, 5]),
        ({}, "    kinds: {action.joints: relative, action.base: position}\n", [0, 0, 3, 4, 5]),
    ],
)
def test_a_robot_of_ones_own_is_held_as_its_data_and_its_file_say(tmp_path: Path, absolute, more, want) -> None:
    robot = my_arm(tmp_path, more).to_embodiment(SIZES, 30.0, "here", absolute)
    assert robot.hold(ROW).tolist() == want
    again = restored(json.loads(json.dumps(described(robot))), "config.json: embodiment")
    assert again.hold(ROW).tolist() == want
    assert [key.kind for key in again.action] == [key.kind for key in robot.action]
    assert again.action[2].kind == "binary"


def test_where_nothing_says_it_the_error_names_the_key_to_add(tmp_path: Path) -> None:
    robot = my_arm(tmp_path).to_embodiment(SIZES, 30.0, "/data/a/meta/modality.json", {"base": True})
    with pytest.raises(ConfigError) as caught:
        robot.hold(ROW)
    for part in (
        "embodiment 'my_arm': action 'joints'",
        'give action.joints "absolute": true (a target) or false (a displacement) in meta/modality.json',
        "/data/a/meta/modality.json does not say it",
        "`kinds: {action.joints: position}`",
    ):
        assert part in str(caught.value)
    stored = described(robot)
    assert stored["robot"]["kinds"] == {"action.base": "position", "action.gripper": "binary"}
    with pytest.raises(
        ConfigError, match=r'add "action.joints": "position" or "relative" to robot.kinds of C: embodiment'
    ):
        restored(stored, "C: embodiment").hold(ROW)
    del stored["robot"]["kinds"]  # as a checkpoint that knew nothing of kinds says it
    with pytest.raises(ConfigError, match="action 'joints'"):
        restored(stored, "C: embodiment").hold(ROW)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    kinds: {action.joint: position}\n", "kinds: unknown key 'action.joint'; did you mean 'action.joints'"),
        ("    kinds: {state.joints: position}\n", "kinds: unknown key 'state.joints'"),
        ("  other:\n    embodiment: libero\n    kinds: {action.x: position}\n", "embodiment 'libero' decides it"),
        ("    kinds: {action.joints: absolute}\n", "kind of action.joints: expected one of position, angle, velocity"),
        (
            "    kinds: {action.joints: relative}\n    target_rotations: {action.joints: rotation_6d}\n",
            "zeros as rotation_6d are no rotation",
        ),
    ],
)
def test_mistakes_about_kinds_are_named(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        my_arm(tmp_path, more)
    assert message in str(caught.value)


def test_displacements_are_not_taken_for_targets(tmp_path: Path) -> None:
    for kind in ("position", "angle"):
        robot = my_arm(tmp_path, f"    kinds: {{action.joints: {kind}}}\n")
        with pytest.raises(
            ConfigError, match=rf'M: action.joints: "absolute" is false .* robot .my_arm. takes a target \({kind}\)'
        ):
            robot.to_embodiment(SIZES, 30.0, "M", {"joints": False})
    known = catalogue()
    for name, embodiment in (("tabletop", TABLETOP), ("libero_franka", LIBERO)):
        sizes = {f"{part}.{k.name}": k.dim for part in ("state", "action") for k in getattr(embodiment, part)}
        # "absolute": true is what tools write without a look; LIBERO's deltas come with it
        assert known.robot(name).to_embodiment(sizes, 10.0, "M", {"x": True}) is embodiment
    sizes = {f"{part}.{k.name}": k.dim for part in ("state", "action") for k in getattr(TABLETOP, part)}
    with pytest.raises(ConfigError, match=r"M: action.x: .* robot 'tabletop' takes a target \(position\)"):
        known.robot("tabletop").to_embodiment(sizes, 10.0, "M", {"x": False})
