"""From the model's values to what a robot is sent: every robot type of the package, published checkpoints, never infinite."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import Observation, Policy
from dit4dit.checkpoints import native
from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.robot import for_checkpoint
from dit4dit.commands.inspect import inspect
from dit4dit.data.catalogue import catalogue
from dit4dit.errors import OutputError
from dit4dit.ops import unnormalize
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.descriptions import Robot, described, restored
from dit4dit.robots.embodiment import Embodiment
from dit4dit.robots.statistics import Statistics, VectorStats, parse
from dit4dit.robots.transforms import inverse_table
from dit4dit.serving.backend import PolicyBackend
from dit4dit.types import Noise

ROBOTS = catalogue().robots
ARMS_ONLY = "g1_body29_aloha_arms_only"
WIDE = {"arm": 7, "joints": 6, "position": 3, "rotation": 3, "hand": 6, "waist": 3}


def size_of(robot: Robot, part: str, key: str) -> int:
    if target := robot.target_rotations.get(f"{part}.{key}"):
        return 6 if target == "rotation_6d" else 3
    return 1 if "gripper" in key else next((size for word, size in WIDE.items() if word in key), 1)


def embodiment(name: str, absolute: bool | None = None) -> Embodiment:
    """The robot type with sizes as its data have them; absolute: what they say of every action."""
    robot = ROBOTS[name]
    if robot.embodiment is not None:
        return EMBODIMENTS[robot.embodiment]
    keys = [("state", key) for key in robot.state] + [("action", key) for key in robot.action]
    sizes = {f"{part}.{key}": size_of(robot, part, key) for part, key in keys}
    return robot.to_embodiment(sizes, 30.0, "here", None if absolute is None else dict.fromkeys(robot.action, absolute))


def owners(robot: Embodiment) -> list:
    """The key of each action dimension."""
    return [key for key in robot.action for _ in range(key.dim)]


def action_statistics(robot: Embodiment, rule: str) -> dict:
    """Grippers 0 to 0.065 m, or 0 and 1 where training makes them so; all else far beyond -1..1. rule: who wrote the mask."""
    keys = owners(robot)
    decided = np.array([key.normalization == "binary" for key in keys])
    if robot.gripper is not None:
        decided[robot.gripper.index] = True
    gripper = np.array(["gripper" in key.name for key in keys])
    low = np.where(decided | gripper, 0.0, -2.5 - 0.1 * np.arange(len(keys)))
    high = np.where(decided, 1.0, np.where(gripper, 0.065, 3.0 + 0.1 * np.arange(len(keys))))
    masks = {
        "published": ~gripper,
        "ours": np.array([key.normalization != "none" for key in keys]),
        "nothing": np.zeros(len(keys), bool),
    }
    numbers = {"mean": (low + high) / 2, "std": (high - low) / 4, "min": low, "max": high, "q01": low, "q99": high}
    return {name: value.tolist() for name, value in numbers.items()} | {"mask": masks[rule].tolist()}


def state_statistics(robot: Embodiment) -> dict:
    of_each = {"mean": 0.0, "std": 1.0, "min": -2.0, "max": 2.0, "q01": -2.0, "q99": 2.0}
    return {name: [value] * robot.state_dim for name, value in of_each.items()}


def statistics(robot: Embodiment, rule: str) -> Statistics:
    entry = {"action": action_statistics(robot, rule), "state": state_statistics(robot)}
    return parse({robot.tag: entry}, robot.tag, "test")


def recorded(robot: Embodiment, s: Statistics) -> np.ndarray:
    """What the robot's data hold: any value of its range, the ends too, and 0 or 1 where training makes them so."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(s.action.min, s.action.max, (6, robot.action_dim))
    rows[0], rows[1] = s.action.min, s.action.max
    for i, key in enumerate(owners(robot)):
        if key.normalization == "binary" or (robot.gripper is not None and i == robot.gripper.index):
            rows[:, i] = [0, 1, 1, 0, 0, 1]
    return rows.astype(np.float32)


@pytest.mark.parametrize("rule", ["published", "ours", "nothing"])
@pytest.mark.parametrize("name", ROBOTS)
def test_what_a_robot_recorded_it_is_sent(name: str, rule: str) -> None:
    robot = embodiment(name)
    s = statistics(robot, rule)
    chain, rows = robot.action_chain(s, robot.action_dim + 2), recorded(robot, s)
    model = chain.forward(rows)
    scaled = np.array([key.normalization in ("min_max", "q99") for key in owners(robot)])
    assert scaled.any() or name in ("oxe_droid", "tabletop")
    np.testing.assert_allclose(model[0, :-2][scaled], -1, atol=1e-6)
    np.testing.assert_allclose(model[1, :-2][scaled], 1, atol=1e-6)
    np.testing.assert_allclose(chain.inverse(model), rows, rtol=1e-5, atol=1e-6)
    table = torch.from_numpy(inverse_table(chain))
    assert np.array_equal(unnormalize(torch.from_numpy(model[None]), table)[0][0].numpy(), chain.inverse(model))


@pytest.mark.parametrize("rule", ["published", "ours", "nothing"])
@pytest.mark.parametrize("name", [ARMS_ONLY, "SO101"])
def test_a_gripper_that_training_normalised_is_un_normalised(name: str, rule: str) -> None:
    """The published server passes it through, because its name has "gripper": 0.065 m would come out as 1."""
    robot = embodiment(name)
    grippers = [i for i, key in enumerate(owners(robot)) if "gripper" in key.name]
    assert len(grippers) == {ARMS_ONLY: 2, "SO101": 1}[name]
    chain = robot.action_chain(statistics(robot, rule), robot.action_dim)
    model = np.array([1.0, -1.0, 0.5, 0.0, 7.0], np.float32)[:, None].repeat(robot.action_dim, 1)
    for i in grippers:
        np.testing.assert_allclose(chain.inverse(model)[:, i], [0.065, 0.0, 0.04875, 0.0325, 0.065], atol=1e-7)


def test_which_robots_have_such_a_gripper() -> None:
    """One more, and it has to be thought about."""
    having = {
        name
        for name in ROBOTS
        for key in embodiment(name).action
        if "gripper" in key.name and key.normalization not in ("binary", "none")
    }
    assert having == {ARMS_ONLY, "SO101"}


@pytest.mark.parametrize("name", [name for name, robot in ROBOTS.items() if robot.embodiment is None])
def test_what_is_called_a_displacement_is_held_with_zeros(name: str) -> None:
    """Also where the data's "absolute" is true, which tools write of everything: the last displacement would go on."""
    robot = embodiment(name, absolute=True)
    row = np.arange(1, robot.action_dim + 1, dtype=np.float32)
    delta = np.array(["delta" in key.name for key in owners(robot)])
    assert robot.hold(row).tolist() == np.where(delta, 0, row).tolist()
    assert delta.any() == (name in ("oxe_droid", "demo_sim_franka_delta_joints", "custom_robot_config"))


@pytest.fixture(scope="module")
def arms_only_run(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as published for the G1 with arms only: its tag, and mask false for both grippers."""
    robot = embodiment(ARMS_ONLY)
    run = Path(shutil.copytree(golden_dir / "gr1_tiny", tmp_path_factory.mktemp("arms") / "run"))
    config = run / "config.yaml"
    text = config.read_text()
    for old, new in (
        ("fourier_gr1_unified_1000", "g1_arms_only"),
        ("    image_size:\n    - 224\n    - 224", "    image_size: [32, 32]"),
    ):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    entry = {"action": action_statistics(robot, "published"), "state": state_statistics(robot)}
    assert entry["action"]["mask"] == [True] * 14 + [False] * 2
    (run / "dataset_statistics.json").write_text(json.dumps({"new_embodiment": entry}))
    return run


def units_by_hand(normalized: np.ndarray, s: VectorStats) -> np.ndarray:
    """What training did, backwards: every key of this robot was min_max."""
    clipped = np.clip(normalized[..., : s.size].astype(np.float64), -1, 1)
    return 0.5 * (clipped + 1) * (s.max - s.min) + s.min


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_a_published_checkpoint_of_such_a_robot(arms_only_run: Path, engine) -> None:
    robot = embodiment(ARMS_ONLY)
    policy = Policy.from_pretrained(arms_only_run, device="cpu", embodiment=robot, engine=engine)
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    seen = Observation({"ego_view": image}, {key.name: np.zeros(key.dim) for key in robot.state})
    chunk = policy.infer(seen, "pick up the can", seed=0)
    want = units_by_hand(chunk.normalized, statistics(robot, "published").action)
    np.testing.assert_allclose(chunk.actions, want, atol=1e-6)
    assert (chunk.actions[:, 14:] >= 0).all()
    assert (chunk.actions[:, 14:] <= 0.0651).all()
    assert np.ptp(chunk.actions[:, 14:]) > 1e-3
    sent = robot.command(chunk.actions[0])
    assert sent["action.left_gripper"] == chunk.actions[0, 14]


def test_conversion_keeps_it(arms_only_run: Path, tmp_path: Path) -> None:
    """Published, ours, and published again: the statistics to the byte, and the same actions."""
    robot = embodiment(ARMS_ONLY)
    native.to_own(arms_only_run, tmp_path / "own")
    native.to_published(tmp_path / "own", tmp_path / "back")
    before = (arms_only_run / "dataset_statistics.json").read_bytes()
    assert (tmp_path / "own" / "statistics.json").read_bytes() == before
    assert (tmp_path / "back" / "dataset_statistics.json").read_bytes() == before
    y = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    want = units_by_hand(y, statistics(robot, "published").action)
    for folder in (arms_only_run, tmp_path / "own", tmp_path / "back"):
        codec = for_checkpoint(open_checkpoint(folder), robot)
        np.testing.assert_allclose(codec.action.inverse(y), want, atol=1e-6)


def test_a_robot_that_went_with_its_checkpoint_has_its_modes(arms_only_run: Path, tmp_path: Path) -> None:
    """The native format says which robot type of a user's it was trained for; its modes come with it."""
    own = tmp_path / "own"
    native.to_own(arms_only_run, own)
    config = json.loads((own / "config.json").read_text())
    config["embodiment"] = described(embodiment(ARMS_ONLY))
    (own / "config.json").write_text(json.dumps(config))
    assert restored(config["embodiment"], "here").action == embodiment(ARMS_ONLY).action
    codec = for_checkpoint(open_checkpoint(own), None)
    y = np.full((1, 32), 0.5, np.float32)
    np.testing.assert_allclose(codec.action.inverse(y)[0, 14:], [0.04875, 0.04875], atol=1e-7)
    shown = inspect(own, backbone=None, embodiment=None)["statistics"]["new_embodiment"]["action"]
    assert [row["scaled"] for row in shown] == [True] * 16
    alone = inspect(
        arms_only_run, backbone=None, embodiment=None
    )  # nobody says which robot: the file's mask is all there is
    assert [row["scaled"] for row in alone["statistics"]["new_embodiment"]["action"]] == [True] * 14 + [False] * 2


@pytest.fixture
def too_large(libero_policy: Policy) -> Policy:
    """A policy whose statistics no file may have: 0.5 of y's range is beyond float32, though the model's value is finite."""
    robot = libero_policy.embodiment
    good = parse(
        {robot.tag: {"action": action_statistics(robot, "published"), "state": state_statistics(robot)}}, robot.tag, "t"
    ).action
    low, high = good.min.copy(), good.max.copy()
    low[1], high[1] = -1e100, 1e100
    chain = robot.action_chain(Statistics(robot.tag, replace(good, min=low, max=high), None), 8)
    codec = replace(libero_policy.codec, action=chain)
    assert np.isinf(chain.inverse(np.full((1, 8), 0.5, np.float32))[0, 1])
    texts = {"open": torch.zeros(4, libero_policy.config.dit.text_in)}
    return Policy(libero_policy.model, codec, prompt_embeds=texts, engine=libero_policy.engine)


EXAMPLE = {"image": np.full((32, 64, 3), 7, np.uint8), "lang": "open", "state": np.full((1, 16), 0.25, np.float32)}
SAYS = r"actions: NaN or infinite values in robot units \(y\) with the statistics 'franka'; nothing was returned"


@pytest.mark.parametrize("engine", [True, False])
def test_what_float32_cannot_hold_never_reaches_a_robot(too_large: Policy, make_observation, engine: bool) -> None:
    policy = too_large
    if not engine:
        texts = {"open": torch.zeros(4, policy.config.dit.text_in)}
        policy = Policy(policy.model, policy.codec, prompt_embeds=texts)
    seen = make_observation(0, side=32)
    with pytest.raises(OutputError, match=SAYS):
        policy.infer(seen, "open", seed=0)
    with pytest.raises(OutputError, match=SAYS):
        policy.infer_batch([seen, seen], ["open", "open"], noise=[Noise.from_seed(0), Noise.from_seed(1)])
    with pytest.raises(OutputError, match=SAYS):
        policy.predict_action(EXAMPLE, noise=Noise.from_seed(0))


def test_nor_through_the_server(too_large: Policy, make_observation) -> None:
    backend = PolicyBackend(too_large, "here", "hash")
    seen = make_observation(0, side=32)
    raw = backend.check(
        {"observation": {"images": dict(seen.images), "state": dict(seen.state)}, "instruction": "open"}
    )
    for requests in (raw, backend.check({"examples": [EXAMPLE]})):
        with pytest.raises(OutputError, match=SAYS):
            backend.run(requests)


def test_the_error_names_the_dimensions(libero_policy: Policy) -> None:
    rows = np.zeros((2, 3, 7), np.float32)
    libero_policy.codec.check(rows)
    rows[1, 2, 0], rows[0, 0, 6] = np.nan, -np.inf
    with pytest.raises(OutputError, match=r"in robot units \(x, gripper\)"):
        libero_policy.codec.check(rows)
