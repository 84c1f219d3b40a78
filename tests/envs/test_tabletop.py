"""The built-in world: the same seed gives the same bits, the picture shows the truth, and the words decide what success is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from counting import lines_run, peak_bytes

from dit4dit.envs import tabletop
from dit4dit.envs.tabletop import BLOCK_COLOURS, PICTURES, PLATE_COLOURS, Goal, ScriptedExpert, TabletopEnv
from dit4dit.errors import InputError

TEST = tabletop.TEST_SEEDS_FROM


def run(env: TabletopEnv, act) -> tuple[bool, int]:
    """Play to the end of the episode: (success, steps)."""
    while True:
        result = env.step(act())
        if result.success or result.truncated:
            return result.success, result.steps


def pixel(picture: int, x: float, y: float) -> tuple[int, int]:
    """Row and column of a place on the table."""
    return int((tabletop.TABLE / 2 - y) / tabletop.TABLE * picture), int(
        (x + tabletop.TABLE / 2) / tabletop.TABLE * picture
    )


def test_same_seed_same_bits():
    runs = []
    for _ in range(2):
        env = TabletopEnv(7, paraphrase=None)
        expert = ScriptedExpert(env, noise=0.01, seed=3)
        bits = [env.instruction.encode()]
        for _ in range(15):
            observation = env.step(expert.act()).observation
            bits += [observation["image"].tobytes(), observation["state"].tobytes()]
        runs.append(b"".join(bits))
    assert runs[0] == runs[1]


def test_reset_goes_back_to_the_start():
    env = TabletopEnv(5)
    first = env.observation()
    env.step([0.03, 0.0, 1.0])
    assert not np.array_equal(env.observation()["image"], first["image"])
    frame = env.reset()
    assert env.seed == frame.seed == 5
    assert env.steps == 0
    for key in ("image", "state"):
        np.testing.assert_array_equal(frame.observation[key], first[key])


def test_layouts_differ_and_nothing_touches():
    scenes = [tabletop.layout(seed) for seed in range(200)]
    assert len({(scene.blocks, scene.plates) for scene, _, _ in scenes}) == 200
    assert {goal for _, goal, _ in scenes} == {Goal(block, plate) for block in BLOCK_COLOURS for plate in PLATE_COLOURS}
    assert {paraphrase for _, _, paraphrase in scenes} == set(range(len(tabletop.INSTRUCTIONS)))
    for scene, goal, _ in scenes:
        assert goal.block in {block.colour for block in scene.blocks}
        assert len({block.colour for block in scene.blocks}) == 3
        bodies = [(body, tabletop.BLOCK / 2) for body in scene.blocks] + [
            (body, tabletop.PLATE_RADIUS) for body in scene.plates
        ]
        for i, (a, a_size) in enumerate(bodies):
            for b, b_size in bodies[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a_size + b_size


@pytest.mark.parametrize("picture", PICTURES)
def test_observation_is_what_it_says(picture):
    env = TabletopEnv(0, picture=picture)
    observation = env.observation()
    assert set(observation) == {"image", "state"}
    assert observation["image"].shape == (picture, picture, 3)
    assert observation["image"].dtype == np.uint8
    assert observation["state"].shape == (3,)
    assert observation["state"].dtype == np.float32
    np.testing.assert_allclose(observation["state"], [env.scene.x, env.scene.y, 1.0], rtol=1e-6)


@pytest.mark.parametrize("picture", PICTURES)
def test_picture_shows_the_scene(picture):
    for seed in range(20):
        scene, _, _ = tabletop.layout(TEST + seed)
        scene = dataclasses.replace(scene, x=0.21, y=0.21)  # out of the way
        image = tabletop.render(scene, picture).astype(int)
        clear = [body for body in (*scene.blocks, *scene.plates) if np.hypot(body.x - 0.21, body.y - 0.21) > 0.12]
        assert len(clear) >= 3
        for body in clear:
            colour = (BLOCK_COLOURS | PLATE_COLOURS)[body.colour]
            assert np.abs(image[pixel(picture, body.x, body.y)] - colour).max() <= 4, (seed, body)


def test_picture_tells_open_from_closed():
    scene, _, _ = tabletop.layout(1)
    scene = dataclasses.replace(scene, blocks=(), plates=(), x=0.0, y=0.0)
    images = [tabletop.render(dataclasses.replace(scene, opening=opening)) for opening in (0.0, 0.4, 1.0)]
    tips = [np.argwhere((image[..., 0] > 170) & (image[..., 1] < 140))[:, 1] for image in images]
    widths = [int(columns.max() - columns.min()) for columns in tips]
    assert widths[0] + 2 <= widths[1]
    assert widths[1] + 3 <= widths[2]


def test_what_is_held_moves_with_the_gripper():
    env = TabletopEnv(3)
    expert = ScriptedExpert(env)
    while env.scene.held is None:
        env.step(expert.act())
    before = env.scene.block(env.goal.block)
    away = 0.04 if before.x < 0 else -0.04
    env.step([env.scene.x + away, env.scene.y, 1.0])
    after = env.scene.block(env.goal.block)
    assert abs(after.x - before.x - tabletop.SERVO * away) < 1e-9
    assert env.observation()["state"][2] == np.float32(tabletop.CONTACT_OPENING)


def test_actions_are_limited():
    env = TabletopEnv(0)
    start = env.observation()["state"]
    moved = env.step([9.0, -9.0, 0.0]).observation["state"] - start
    assert np.abs(moved[:2]).max() <= tabletop.MAX_STEP + 1e-6
    for _ in range(40):
        state = env.step([9.0, 9.0, 0.0]).observation["state"]
    np.testing.assert_allclose(state[:2], tabletop.REACH, rtol=1e-6)


def test_expert_succeeds():
    env = TabletopEnv(0)
    results = []
    for seed in range(60):
        env.reset(TEST + seed)
        results.append(run(env, ScriptedExpert(env).act))
    assert np.mean([success for success, _ in results]) >= 0.95
    assert 8 <= np.mean([steps for _, steps in results]) <= 25


@pytest.mark.parametrize("disturbance", [{"noise": 0.03}, {"detours": 0.4}])
def test_disturbed_expert_recovers(disturbance):
    env = TabletopEnv(0)
    won = 0
    for seed in range(60):
        env.reset(TEST + seed)
        won += run(env, ScriptedExpert(env, **disturbance, seed=seed).act)[0]
    assert won >= 57


def test_expert_says_where_to_go():
    """Its intention is the named block until that is held, then where the block is on the plate, whatever disturbs it."""
    env = TabletopEnv(11)
    expert = ScriptedExpert(env, noise=0.02, detours=0.3, seed=1)
    block, plate = env.scene.block(env.goal.block), env.scene.plate(env.goal.plate)
    towards = {"block": 0, "plate": 0}  # steps
    while not env.scene.reached(env.goal):
        held, scene = env.scene.held, env.scene
        env.step(expert.act())
        if held is None and env.scene.held is None and scene.block(env.goal.block) == block:
            np.testing.assert_allclose(expert.intended[:2], [block.x, block.y], rtol=1e-5)
            towards["block"] += 1
        if held == env.goal.block:
            moved = expert.intended[:2] - [scene.x, scene.y]
            lands = np.array([scene.block(held).x, scene.block(held).y]) + moved
            np.testing.assert_allclose(lands, [plate.x, plate.y], atol=1e-6)
            towards["plate"] += 1
    assert min(towards.values()) >= 2, towards


def test_random_policy_is_near_chance():
    env = TabletopEnv(0)
    rng = np.random.default_rng(0)
    won = 0
    for seed in range(40):
        env.reset(TEST + seed)
        won += run(env, lambda: [*rng.uniform(-tabletop.REACH, tabletop.REACH, 2), rng.uniform()])[0]
    assert won <= 2


def test_the_instruction_matters():
    env = TabletopEnv(0)
    for seed in range(20):
        env.reset(TEST + seed)
        own = env.goal
        other_block = next(block.colour for block in env.scene.blocks if block.colour != own.block)
        other_plate = next(plate for plate in PLATE_COLOURS if plate != own.plate)
        for goal in (Goal(other_block, own.plate), Goal(own.block, other_plate)):
            env.reset()
            assert not run(env, ScriptedExpert(env, goal=goal).act)[0]
            env.reset(goal=goal)  # the same moves win when the words ask for them
            assert env.instruction == goal.instruction() != own.instruction()
            assert run(env, ScriptedExpert(env).act)[0]


def test_success_needs_the_open_gripper():
    env = TabletopEnv(2, max_steps=200)
    expert = ScriptedExpert(env)
    plate = env.scene.plate(env.goal.plate)

    def distance() -> float:
        block = env.scene.block(env.goal.block)
        return float(np.hypot(block.x - plate.x, block.y - plate.y))

    while distance() > 0.01:
        env.step(expert.act())
    here = (env.scene.x, env.scene.y)
    assert not env.step([*here, 1.0]).success  # there, but still held
    assert not env.step([*here, 0.0]).success  # let go, fingers still opening
    assert env.step([*here, 0.0]).success


def test_words():
    assert TabletopEnv(0).instruction == TabletopEnv(0).goal.instruction(0)
    said = {Goal("red", "white").instruction(i) for i in range(len(tabletop.INSTRUCTIONS))}
    assert len(said) == len(tabletop.INSTRUCTIONS)
    assert all("red" in words and "white" in words for words in said)
    assert len({TabletopEnv(seed, paraphrase=None).instruction.split()[0] for seed in range(30)}) > 1


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ([0.0, 0.0], "shape (2,)"),
        (np.zeros((1, 3)), "shape (1, 3)"),
        ([np.nan, 0.0, 0.0], "finite"),
        ([0.0, np.inf, 0.0], "finite"),
        (["left", 0, 0], "3 numbers"),
        (None, "expected"),
    ],
)
def test_bad_actions_are_refused(action, says):
    env = TabletopEnv(0)
    with pytest.raises(InputError, match=r"TabletopEnv\.step") as caught:
        env.step(action)
    assert says in str(caught.value)
    assert env.steps == 0


def test_other_bad_inputs_are_refused():
    for seed in (-1, 1.5, "3", True):
        with pytest.raises(InputError, match="seed"):
            TabletopEnv(seed)
    with pytest.raises(InputError, match="picture"):
        TabletopEnv(0, picture=65)
    with pytest.raises(InputError, match="max_steps"):
        TabletopEnv(0, max_steps=0)
    with pytest.raises(InputError, match="paraphrase"):
        TabletopEnv(0, paraphrase=9)
    with pytest.raises(InputError, match="did you mean 'red'"):
        Goal("rad", "white")
    env = TabletopEnv(0)
    (absent,) = set(BLOCK_COLOURS) - {block.colour for block in env.scene.blocks}
    with pytest.raises(InputError, match="on the table"):
        env.reset(goal=Goal(absent, "white"))
    with pytest.raises(InputError, match="noise"):
        ScriptedExpert(env, noise=-0.1)
    with pytest.raises(InputError, match="detours"):
        ScriptedExpert(env, detours=1.0)


def test_the_episode_ends():
    env = TabletopEnv(0, max_steps=3)
    ends = [env.step([0.0, 0.0, 0.0]).truncated for _ in range(3)]
    assert ends == [False, False, True]
    with pytest.raises(InputError, match="reset"):
        env.step([0.0, 0.0, 0.0])


def test_rendering_is_fast():
    """0.3 ms on a quiet core: the bare table is kept, each shape is drawn in a window of its own, and nothing pixel by pixel."""
    scene, _, _ = tabletop.layout(0)
    tabletop.render(scene)
    tables = tabletop._table.cache_info().misses
    assert lines_run(lambda: tabletop.render(scene)) < 1000, "244 when this was written; the image has 4096 pixels"
    assert peak_bytes(lambda: tabletop.render(scene)) < 1_000_000, "0.44 MB; 22 shapes on the whole canvas take 2.4 MB"
    assert tabletop._table.cache_info().misses == tables
