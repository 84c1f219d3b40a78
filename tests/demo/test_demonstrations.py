"""Demonstrations of the tabletop: a data set that the training reads, with what the expert intended; and the control's world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit.demo.demonstrations import GOALS_EACH, NOISE, demonstrate, record
from dit4dit.demo.other_words import OtherWords, other_goal
from dit4dit.demo.play import plan
from dit4dit.envs import tabletop_tokenizer
from dit4dit.envs.tabletop import (
    BLOCK_COLOURS,
    INSTRUCTIONS,
    MAX_STEP,
    PLATE_COLOURS,
    SERVO,
    SPAWN,
    TEST_SEEDS_FROM,
    Goal,
    layout,
)
from dit4dit.errors import ConfigError, InputError
from dit4dit.evaluation import sim_worker
from dit4dit.model.text import tokenize
from dit4dit.presets import preset
from dit4dit.robots import TABLETOP
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.recipes import recipe

pytest.importorskip("pyarrow")
MODEL = preset("tabletop").model
EPISODES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    told: list[int] = []
    facts = record(folder / "tabletop", EPISODES, first_seed=8, done=told.append)
    assert (facts["episodes"], sum(told)) == (EPISODES, EPISODES)
    assert facts["frames"] > 12 * EPISODES
    assert facts["solved"] == 1.0
    return folder


def open_data(root: Path, **changes: object) -> LeRobotData:
    config = replace(recipe("tabletop").data, root=str(root), holdout=0.2, **changes)  # type: ignore[arg-type]
    return LeRobotData.open(config, MODEL, seed=0)


def test_samples_are_what_was_seen_and_intended(root: Path) -> None:
    data = open_data(root, sample_every=1)
    demo = demonstrate(8)
    statistics = data.statistics["tabletop"]["action"]
    mean, std = np.array(statistics["mean"]), np.array(statistics["std"])
    reach = np.abs([statistics["min"][:2], statistics["max"][:2]]).max()
    assert reach <= SPAWN + 1e-6, "the disturbance is not recorded"
    for frame in (0, len(demo.actions) - 3):
        sample = data.sample(frame)
        seen = sample.video[0].permute(1, 2, 0).numpy()
        assert np.abs(seen - (demo.pictures[frame] / 127.5 - 1)).mean() < 0.05
        want = demo.actions[frame : frame + 8]
        scaled = (want[:, :2] - mean[:2]) / std[:2]
        assert np.allclose(sample.actions[: len(want), :2], scaled, atol=1e-4)
        assert np.allclose(sample.actions[: len(want), 2], want[:, 2])
        assert sample.lang == demo.instruction


def errors(number: int) -> np.ndarray:
    """How far each step ended from where the recorded action would have led [m]."""
    demo = demonstrate(number)
    wanted = np.clip(SERVO * (demo.actions[:-1, :2] - demo.states[:-1, :2]), -MAX_STEP, MAX_STEP)
    return np.abs(np.diff(demo.states[:, :2], axis=0) - wanted).max(axis=1)


def test_the_disturbances_are_executed() -> None:
    calm, lively = (np.concatenate([errors(GOALS_EACH * NOISE.index(n) + i) for i in range(3)]) for n in (0.0, 0.06))
    assert (calm > 0.02).mean() > 0.2, "led elsewhere, often"
    assert (calm < 1e-6).mean() > 0.2, "and otherwise not disturbed"
    assert (lively < 1e-6).mean() < 0.1, "noise is in every step"


def test_each_layout_is_shown_with_every_block() -> None:
    demos = [demonstrate(number) for number in range(3 * GOALS_EACH, 5 * GOALS_EACH)]
    for layout_demos in (demos[:GOALS_EACH], demos[GOALS_EACH:]):
        assert all(np.array_equal(demo.pictures[0], layout_demos[0].pictures[0]) for demo in layout_demos)
        assert len({demo.instruction.split()[2] for demo in layout_demos}) == GOALS_EACH
    assert {demo.instruction.split()[-2] for demo in demos} == set(PLATE_COLOURS)
    assert not np.array_equal(demos[0].pictures[0], demos[-1].pictures[0])


def test_processes_do_not_matter(root: Path, tmp_path: Path) -> None:
    record(tmp_path / "tabletop", EPISODES, first_seed=8, processes=2)
    one, two = open_data(root), open_data(tmp_path)
    assert one.clips == two.clips > 7
    for index in range(0, one.clips, 7):
        a, b = one.sample(index), two.sample(index)
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.actions, b.actions)


def test_every_third_frame_begins_a_sample(root: Path) -> None:
    whole, some = open_data(root, sample_every=1), open_data(root, sample_every=3)
    (recording,) = whole.mixture.recordings
    lengths = [recording.length(i) for i in range(EPISODES)]
    assert some.clips == sum(-(-length // 3) for length in lengths)
    assert some.clip_fingerprint != whole.clip_fingerprint
    first = -(-lengths[0] // 3)
    for index, frame in ((0, 0), (1, 3), (first - 1, 3 * (first - 1)), (first, lengths[0])):
        assert torch.equal(some.sample(index).video, whole.sample(frame).video)
    assert some.held_out()
    assert not {some.index(position) for position in range(60)} & set(some.held_out())
    with pytest.raises(ConfigError, match=r"data.sample_every: expected at least 1, got 0"):
        recipe("tabletop").override({"data.sample_every": "0"})


def test_layouts_for_testing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected at least 1 episode with seeds within 0\.\.999999"):
        record(tmp_path / "x", 2, first_seed=TEST_SEEDS_FROM - 1)
    assert not (tmp_path / "x").exists()


def test_each_word_is_one_token() -> None:
    tokenizer, text = tabletop_tokenizer(), MODEL.text
    assert len(tokenizer) <= text.vocab_size
    goals = [Goal(block, plate) for block in BLOCK_COLOURS for plate in PLATE_COLOURS]
    words = [goal.instruction(i) for goal in goals for i in range(len(INSTRUCTIONS))]
    tokens = tokenize(tokenizer, words, text.max_length)
    assert (tokens[:, -1] == tokenizer.pad_token_id).all(), "no prompt is cut"
    assert len({tuple(row) for row in tokens.tolist()}) == len(words)
    for row, sentence in zip(tokens, words, strict=True):
        assert sentence in tokenizer.decode(row)
        assert {" " + word for word in sentence.split()[1:]} <= {tokenizer.decode([t]) for t in row.tolist()}
    assert "öffne" in tokenizer.decode(tokenize(tokenizer, ["öffne"], 64)[0]), "other words still go in as bytes"


def test_other_words_name_another_goal_of_the_same_table() -> None:
    world = OtherWords()
    for seed in range(TEST_SEEDS_FROM, TEST_SEEDS_FROM + 20):
        _, words = world.reset(seed, 0)
        scene, goal, _ = layout(seed)
        told = other_goal(scene, goal)
        assert words == told.instruction(0)
        assert told.block != goal.block
        assert told.plate != goal.plate
        assert told.block in {body.colour for body in scene.blocks}
        assert world._env.goal == goal, "what is judged stays"
    assert world.facts["control_hz"] == TABLETOP.control_hz


def test_the_control_is_played_in_that_world() -> None:
    (episode,) = plan(1, other_words=True).episodes
    assert type(sim_worker.make(episode.environment, dict(episode.options))) is OtherWords
    assert plan(1).episodes[0].environment == "tabletop"
