"""Which robot a checkpoint is for, and which of its statistics are that robot's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dit4dit.checkpoints.robot import choose_embodiment
from dit4dit.data.catalogue import catalogue
from dit4dit.errors import ConfigError
from dit4dit.robots import LIBERO
from dit4dit.robots.descriptions import described

SIZES = {"state.arm": 3, "action.arm": 3}


def checkpoint(embodiment: Any, *tags: str) -> Any:
    return SimpleNamespace(path="a/run", embodiment=embodiment, statistics={tag: {} for tag in tags})


@pytest.fixture
def own(tmp_path) -> Any:
    """What a checkpoint says of a robot that only a user's file has."""
    (tmp_path / "robots.yaml").write_text(
        "robots: {my_arm: {tag: mine, video: [front], state: [arm], action: [arm], kinds: {action.arm: position},"
        " action_steps: 8, language: annotation.task}}"
    )
    return described(catalogue(tmp_path / "robots.yaml").robot("my_arm").to_embodiment(SIZES, 10.0, "data"))


@pytest.mark.parametrize(
    "tags,label", [(("franka",), "franka"), (("other",), None), (("franka", "other"), "franka"), (("a", "b"), "franka")]
)
def test_a_robot_of_the_package_by_its_name(tags: tuple[str, ...], label: str | None) -> None:
    """The only statistics are its own whatever they are called; of several those of its tag, or none fits."""
    assert choose_embodiment(checkpoint(None, *tags), "libero") == (LIBERO, label)


def test_an_embodiment_is_taken_as_it_is() -> None:
    mine = replace(LIBERO, name="mine", tag="mine")
    assert choose_embodiment(checkpoint("gr1", "mine"), mine) == (mine, "mine")


@pytest.mark.parametrize("wanted", [None, "my_arm"])
@pytest.mark.parametrize("tags,label", [(("mine",), "mine"), (("mine", "b"), "mine"), (("b",), None)])
def test_a_robot_that_the_checkpoint_describes(own: Any, wanted: str | None, tags: tuple[str, ...], label) -> None:
    robot, chosen = choose_embodiment(checkpoint(own, *tags), wanted)
    assert (robot.name, robot.tag, chosen) == ("my_arm", "mine", label)


def test_a_label_of_the_statistics(own: Any) -> None:
    robot, chosen = choose_embodiment(checkpoint(own, "mine", "b"), "b")
    assert (robot.name, chosen) == ("my_arm", "b")


def test_what_is_not_known_is_refused(own: Any) -> None:
    with pytest.raises(ConfigError, match="embodiment 'my_arn': unknown; did you mean 'my_arm'"):
        choose_embodiment(checkpoint(own, "mine"), "my_arn")
    with pytest.raises(ConfigError, match="a/run: does not say which robot it is for"):
        choose_embodiment(checkpoint(None, "mine"), None)
