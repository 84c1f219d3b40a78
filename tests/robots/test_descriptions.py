"""Robots and mixtures as data: the published ones, the policy's, and a user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.mixture import Mixture, matching
from dit4dit.errors import ConfigError, DataError
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.descriptions import MODES

PUBLISHED = Path(__file__).parents[1] / "golden" / "published_data"
SIZES_OF_OURS = {"libero_franka": "libero", "fourier_gr1_arms_waist": "gr1"}


@pytest.fixture(scope="module")
def known():
    return catalogue()


def test_the_published_robots_are_all_there_as_published(known) -> None:
    published = json.loads((PUBLISHED / "robots.json").read_text())
    assert len(published) == 12
    for name, facts in published.items():
        robot = known.robot(name)
        got = {
            "video": list(robot.video),
            "state": list(robot.state),
            "action": list(robot.action),
            "language": robot.language,
            "action_steps": robot.action_steps,
            "normalization": robot.normalization,
            "sin_cos_state": robot.sin_cos_state,
        }
        if robot.target_rotations:
            got["target_rotations"] = robot.target_rotations
        assert got == facts, name


def test_the_published_mixtures_are_all_there_as_published(known) -> None:
    published = json.loads((PUBLISHED / "mixtures.json").read_text())
    assert len(published) == 18
    assert set(known.mixtures) == {*published, "g1_whole_body", "tabletop"}, "the last two are ours"
    for name, entries in published.items():
        got = [{"dataset": e.dataset, "weight": e.weight, "robot": e.robot} for e in known.mixtures[name]]
        assert got == entries, name


def test_a_star_is_every_data_set_that_matches(known, libero_data: Path, tmp_path: Path) -> None:
    entry = Entry("v2*", "libero_franka", weight=0.5)
    assert [(e.dataset, e.weight) for e in matching(entry, libero_data)] == [("v2.0", 0.5), ("v2.1", 0.5)]
    mixture = Mixture.open([entry, Entry("v3.0", "libero_franka")], libero_data, known)
    assert (mixture.names, mixture.weights) == (("v2.0", "v2.1", "v3.0"), (0.5, 0.5, 1.0))
    (tmp_path / "meta").mkdir()  # a folder that is no data set
    with pytest.raises(DataError, match=r"no data set matches '\*', wanted folders with meta/info.json for robot 'g1_"):
        Mixture.open(known.mixture("g1_whole_body"), tmp_path, known)


def test_every_mixture_but_the_one_with_an_unpublished_robot_is_available(known) -> None:
    for name in known.mixtures:
        if name != "BEHAVIOR_challenge":
            assert known.mixture(name)
    with pytest.raises(ConfigError, match="robot 'R1Pro': never published"):
        known.mixture("BEHAVIOR_challenge")


@pytest.mark.parametrize(
    "robot,embodiment", [*SIZES_OF_OURS.items(), ("g1_whole_body", "g1"), ("tabletop", "tabletop")]
)
def test_a_robot_that_the_policy_knows_is_the_policys_own_object(known, robot: str, embodiment: str) -> None:
    ours = EMBODIMENTS[embodiment]
    sizes = {f"{part}.{key.name}": key.dim for part in ("state", "action") for key in getattr(ours, part)}
    assert known.robot(robot).to_embodiment(sizes, 10.0, "here") is ours
    with pytest.raises(ConfigError, match="values there, the data set 99"):
        known.robot(robot).to_embodiment(sizes | {f"action.{ours.action[0].name}": 99}, 10.0, "here")


def test_tags_are_the_published_ones(known) -> None:
    tags = {name: known.robot(name).tag for name in json.loads((PUBLISHED / "robots.json").read_text())}
    assert tags.pop("libero_franka") == "franka"
    assert tags.pop("fourier_gr1_arms_waist") == "gr1"
    for name, tag in tags.items():
        assert tag == (name if name.startswith("oxe_") else "new_embodiment")


OWN = """
robots:
  my_arm:
    video: [front]
    state: [joints]
    action: [joints, gripper]
    language: annotation.human.action.task_description
    action_steps: 12
    normalization: {action.joints: min_max, action.gripper: binary, state.joints: q99}
mixtures:
  mine:
    - {dataset: a, robot: my_arm, fps: 30}
    - {dataset: b, robot: libero_franka, weight: 0.5}
"""


def test_users_add_robots_and_mixtures_without_python(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(OWN)
    known = catalogue(path)
    first, second = known.mixture("mine")
    assert (first.fps, first.weight, second.weight) == (30, 1.0, 0.5)
    robot = known.robot("my_arm").to_embodiment(
        {"state.joints": 6, "action.joints": 6, "action.gripper": 1}, 30.0, "here"
    )
    assert (robot.name, robot.tag, robot.views, robot.control_hz) == ("my_arm", "new_embodiment", ("front",), 30.0)
    assert [(key.name, key.dim, key.normalization) for key in robot.action] == [
        ("joints", 6, "min_max"),
        ("gripper", 1, "binary"),
    ]
    assert robot.encoded_state_dim == 6
    sent = robot.command([0, 1, 2, 3, 4, 5, 1])
    assert sent["action.gripper"].tolist() == [1]
    assert robot.record(sent).tolist() == [0, 1, 2, 3, 4, 5, 1]
    seen = robot.observe({"video.front": "picture", "state.joints": [1.0] * 6})
    assert robot.state_vector(seen.state).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("video: [front]", "vidoe: [front]", "unknown key 'vidoe'; did you mean 'video'"),
        ("robots:", "robot:", "unknown key 'robot'; did you mean 'robots'"),
        ("action.joints: min_max", "action.joint: min_max", "unknown key 'action.joint'; did you mean 'action.joints'"),
        ("action.joints: min_max", "action.joints: minmax", f"expected one of {', '.join(MODES)}, got 'minmax'"),
        ("fps: 30", "rate: 30", "mixtures.mine[0]: unknown key 'rate'"),
        ("weight: 0.5", "weight: -1", "weight: expected more than 0"),
        ("weight: 0.5", "weight: 0", "weight: expected more than 0, got 0"),
        ("my_arm:", "libero:", "robots: 'libero' is an embodiment of the package"),
        ("my_arm:", "oxe_rt1:", "'oxe_rt1' is the package's own"),
        ("language: annotation", "language: words", "expected 'annotation.<key>'"),
        ("    action_steps: 12\n", "", "missing key 'action_steps'"),
        ("    video: [front]\n", "", "video: expected at least one key"),
        ("    video: [front]", "    embodiment: libero\n    video: [front]", "embodiment 'libero' decides it"),
        ("    video: [front]", "    embodiment: libera", "unknown 'libera'; did you mean 'libero'"),
        ("robots:", "robots: [", "not readable YAML"),
    ],
)
def test_mistakes_in_a_users_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    assert old in OWN
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        catalogue(path)
    assert message in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    with pytest.raises(ConfigError, match=r"my.yaml: no such file; give another file"):
        catalogue(path)
    path.write_bytes(b"robots: \xff")
    with pytest.raises(ConfigError, match=r"my.yaml: cannot be read as text"):
        catalogue(path)
    path.write_text("- a")
    with pytest.raises(ConfigError, match=r"my.yaml: expected a mapping, got list"):
        catalogue(path)


def test_unknown_names_suggest(known) -> None:
    with pytest.raises(ConfigError, match="did you mean 'libero_all'"):
        known.mixture("libero_al")
    with pytest.raises(ConfigError, match="did you mean 'robotwin'"):
        known.robot("robotwim")
