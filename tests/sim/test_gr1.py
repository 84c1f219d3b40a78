"""GR1's interface, on the stand-in: the loop, both counts of success, and the convention check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import checkpoint
from scripted import Push

from dit4dit import cli
from dit4dit.control.execution import Execution
from dit4dit.evaluation import gr1 as benchmark
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.evaluation.simulators import graphics_of
from dit4dit.evaluation.workers import Worker
from dit4dit.robots import GR1

pytestmark = pytest.mark.sim
STANDIN = "gr1_standin:dit4dit/PushCube-v0"
EXECUTE = benchmark.EXECUTE


def push(gr1, folder, max_steps):
    plan = benchmark.plan(gr1.launch(graphics_of(None)), [STANDIN], 1, max_steps=max_steps)
    options = Options(execution=Execution(EXECUTE), batch=1, videos="all")
    (record,) = evaluate(Push(), plan, options, folder, horizon=16, about_policy={"checkpoint": "a test's"})
    assert record["error"] is None
    return record


def test_a_script_that_acts_through_commands_pushes_the_cube(gr1, tmp_path) -> None:
    record = push(gr1, tmp_path, max_steps=84)
    assert record["steps"] == 84, "the environment goes on after a success"
    assert record["chunks"] == 7
    assert record["success"]
    assert record["success_at_end"]
    assert record["success_at_chunk_ends"]
    assert record["instruction"] == "unlocked_waist: push the cube"
    assert (tmp_path / record["video"]).name.endswith("-success.mp4")


def test_observations_are_the_robots_and_seeds_repeat(gr1) -> None:
    plan = benchmark.plan(gr1.launch(graphics_of(None)), [STANDIN], 1)
    with Worker(plan.launch) as worker:
        facts = worker.make("gr1", plan.episodes[0].options)["facts"]
        assert facts["max_steps"] == 720
        assert facts["control_hz"] == GR1.control_hz
        assert tuple(facts["action_names"]) == GR1.action_names
        first = worker.reset(7, 0)["observation"]
        state = GR1.state_vector(GR1.observe(first).state)
        stay = GR1.command(state)
        stepped = worker.step([stay, stay])
        assert stepped["success"] == [False, False]
        assert stepped["infos"][0] == {"success": False, "grasp_distractor_obj": False}
        other = worker.reset(8, 1)["observation"]
        again = worker.reset(7, 0)["observation"]
    view = GR1.observe(first).images["ego_view"]
    assert view.shape == (256, 256, 3)
    assert view.std() > 5
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(
        first["video.ego_view_bg_crop_pad_res256_freq20"], other["video.ego_view_bg_crop_pad_res256_freq20"]
    )


def test_it_does_not_move_when_it_is_held(gr1) -> None:
    """0.01 rad in 20 steps, once it has settled for 10. After a motion of 0.1 rad the stand-in's weakly driven fingers take some
    40 steps to come to rest, so there only arms and waist are looked at.
    """
    plan = benchmark.plan(gr1.launch(graphics_of(None)), [STANDIN], 1)
    with Worker(plan.launch) as worker:
        worker.make("gr1", plan.episodes[0].options)

        def states(row, blocks):
            """After each of so many blocks of 5 steps in which `row` is held."""
            held = [GR1.command(GR1.hold(row))] * 5
            return [GR1.observe(worker.step(held)["observation"]).state for _ in range(blocks)]

        row = GR1.still(GR1.observe(worker.reset(7, 0)["observation"]).state)
        seen = {"at rest": states(row, 6)}
        row = row + np.random.default_rng(0).uniform(-0.1, 0.1, 29).astype(np.float32)
        worker.step([GR1.command(row)] * 4)
        seen["in motion"] = states(row, 6)
    for motion, after in seen.items():
        for key in GR1.state:
            if motion == "at rest" or not key.name.endswith("hand"):
                held = np.array([state[key.name] for state in after[1:]])
                assert np.abs(held - held[0]).max() < 0.01, (motion, key.name)


def test_convention_check_knows_how_it_stands_still(gr1, tmp_path, capsys) -> None:
    joints = [(-1.5, 1.5)] * 3 + [(-2.5, 0.5)] + [(-1.5, 1.5)] * 3
    ranges = joints * 2 + [(-2.0, 2.0)] * 12 + [(-1.0, 1.0)] * 3
    run = checkpoint(tmp_path, "gr1_tiny", "gr1", ranges, ranges, side=32)
    words = [
        "--path",
        str(gr1.folder),
        "--tasks",
        STANDIN,
        "--trials",
        "1",
        "--checkpoint",
        str(run),
        "--device",
        "cpu",
    ]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "gr1", *words, "--out", str(out), "--check-only"])
    assert caught.value.code == 0, capsys.readouterr().out
    findings = {f["name"]: f for f in json.loads((out / "conventions.json").read_text())["findings"]}
    assert findings["standing still"]["verdict"] == "ok"
    assert set(findings["standing still"]["moved"]) == {"left_arm", "right_arm", "waist"}
    assert max(findings["standing still"]["moved"].values()) < 0.3
    assert findings["state"]["verdict"] != "contradiction"
    assert not Path(out / "run.json").exists(), "nothing was played"
