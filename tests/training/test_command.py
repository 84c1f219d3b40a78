"""`dit4dit train` as users call it: where it goes on, what cannot be written, and robots of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from own_robot import GOLDEN, MINE
from training_runs import lines
from training_worker import small_config

from dit4dit import Observation, Policy
from dit4dit.cli import main
from dit4dit.data.catalogue import catalogue
from dit4dit.errors import ConfigError
from dit4dit.training import checkpoint, lerobot_data
from dit4dit.training.config import DataConfig, read_config, write_config
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.resume import find_resume

pytest.importorskip("pyarrow")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration of a run of seconds on the golden LeRobot data set."""
    (tmp_path / "robots.yaml").write_text(MINE)
    robots = str(tmp_path / "robots.yaml")
    data = DataConfig(root=str(GOLDEN), mixture="franka", robots=robots, holdout=0.34, batch_size=2, workers=0)
    small = small_config(tmp_path / "run")
    write_config(tmp_path / "config.yaml", replace(small, data=data, run=replace(small.run, steps=2)))
    return tmp_path / "config.yaml"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_a_robot_of_ones_own_goes_with_its_checkpoint(file: Path, tmp_path: Path, capsys) -> None:
    """What training did not normalise the policy must not un-normalise, so a recipe's robot is refused for it."""
    words = ("train", "--config", file, "--data.mixture", "mine")
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert "embodiment: the checkpoints would carry 'libero', the mixture 'mine' is of 'my_arm'" in said
    assert "--embodiment none" in said
    assert not (tmp_path / "run").exists()
    assert run(*words, "--embodiment", "none") == 0
    folder = checkpoint.folder_of(tmp_path / "run", 2) / "policy"
    assert f"2 steps done; the policy is {folder}" in capsys.readouterr().out
    named = json.loads((folder / "config.json").read_text())
    assert run(*words, "--embodiment", "my_arm", "--run.out", tmp_path / "named", "--run.steps", 1) == 0
    other = checkpoint.folder_of(tmp_path / "named", 1) / "policy"
    assert json.loads((other / "config.json").read_text())["embodiment"] == named["embodiment"]
    policy = Policy.from_pretrained(folder, device="cpu")
    robot = policy.embodiment
    assert (robot.name, policy.codec.tag) == ("my_arm", "new_embodiment")
    assert [key.normalization for key in robot.action] == ["min_max", *["none"] * 5, "binary"]
    assert named["embodiment"]["robot"]["kinds"]["action.x"] == "position"
    assert robot.hold(np.arange(1, 8, dtype=np.float32)).tolist() == [1, 0, 0, 0, 0, 0, 7]
    images = {f"video.{view}": np.zeros((32, 32, 3), np.uint8) for view in robot.views}
    seen = robot.observe({**images, **{f"state.{key.name}": np.zeros(key.dim) for key in robot.state}})
    assert isinstance(seen, Observation)
    chunk = policy.infer(seen, "open the drawer")
    assert set(robot.command(chunk.actions[0])) == {f"action.{key.name}" for key in robot.action}
    assert Policy.from_pretrained(folder, device="cpu", embodiment="my_arm").embodiment.name == "my_arm"
    with pytest.raises(ConfigError, match="embodiment 'my_amr': unknown; did you mean 'my_arm'"):
        Policy.from_pretrained(folder, device="cpu", embodiment="my_amr")
    # and to the other commands, which need no file of robots then
    words = ("eval", "openloop", GOLDEN / "lerobot_v3", "--checkpoint", folder, "--device", "cpu", "--episodes", 0)
    assert run(*words, "--out", tmp_path / "openloop") == 0
    assert json.loads((tmp_path / "openloop" / "openloop.json").read_text())["robot"] == "my_arm"
    assert run("inspect", folder) == 0
    assert "my_arm" in capsys.readouterr().out
    assert run("convert", folder, tmp_path / "published") == 0
    assert "note: the published layout has no place for a robot of one's own: my_arm" in capsys.readouterr().out


def test_a_damaged_robot_is_named(file: Path, tmp_path: Path) -> None:
    assert run("train", "--config", file, "--data.mixture", "mine", "--embodiment", "none", "--run.steps", 1) == 0
    folder = checkpoint.folder_of(tmp_path / "run", 1) / "policy"
    whole = json.loads((folder / "config.json").read_text())
    for change, message in (
        (lambda robot: robot["sizes"].pop("action.x"), "embodiment.sizes: missing key 'action.x'"),
        (lambda robot: robot.pop("control_hz"), "embodiment: missing key 'control_hz'"),
        (
            lambda robot: robot.update(rate_hz=robot.pop("control_hz")),
            "embodiment: 'rate_hz' is called 'control_hz'; rename the key in its config.json",
        ),
        (lambda robot: robot["robot"].update(colour="red"), "embodiment.robot: unknown key 'colour'"),
    ):
        data = json.loads(json.dumps(whole))
        change(data["embodiment"])
        (folder / "config.json").write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=message):
            Policy.from_pretrained(folder, device="cpu")


def test_the_names_of_the_packages_robots_are_taken(tmp_path: Path) -> None:
    """Or a checkpoint that says "libero" would mean another robot than the one that it was trained for."""
    (tmp_path / "mine.yaml").write_text(MINE.replace("my_arm", "libero"))
    with pytest.raises(ConfigError, match="robots: 'libero' is an embodiment of the package; choose another name"):
        catalogue(tmp_path / "mine.yaml")


def test_episodes_that_are_left_out_need_no_videos(file: Path, tmp_path: Path, write_libero, capsys) -> None:
    """Found before the first step, not at the first save."""
    root = write_libero(tmp_path / "data" / "lerobot_v3")
    video = next(root.rglob("observation.images.image/episode_000002.mp4"))
    video.unlink()
    words = ("train", "--config", file, "--data.root", tmp_path / "data", "--run.steps", 1)
    assert run(*words) == 2
    assert f"{video}: no such file" in capsys.readouterr().err
    assert run(*words, "--data.skip_bad", "true") == 0
    assert checkpoint.latest(tmp_path / "run") is not None


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert find_resume(None, mine) is None
    assert find_resume("auto", mine) is None
    with pytest.raises(ConfigError, match=f"{mine} has no checkpoint; start without --resume"):
        find_resume("", mine)
    for folder in (mine, other):
        for step in (2, 4):
            checkpoint.folder_of(folder, step).mkdir(parents=True)
    newest = checkpoint.folder_of(mine, 4)
    assert find_resume("", mine) == find_resume("auto", mine) == find_resume(str(mine), mine) == newest
    older = checkpoint.folder_of(mine, 2)
    assert find_resume(os.path.relpath(older), mine).resolve() == older
    with pytest.raises(ConfigError, match="has checkpoints already; go on with --resume"):
        find_resume(None, mine)
    with pytest.raises(ConfigError, match=r"no such folder; checkpoints of .*mine: step_00000002, step_00000004"):
        find_resume(str(checkpoint.folder_of(mine, 3)), mine)
    aside = checkpoint.folder_of(mine, 2).with_name("abandoned_step_00000002")
    aside.mkdir()
    with pytest.raises(
        ConfigError, match="expected a folder step_N; move the run's own step_N away and rename this one"
    ):
        find_resume(str(aside), mine)
    linked = tmp_path / "linked"
    (linked / "checkpoints").mkdir(parents=True)
    checkpoint.folder_of(linked, 2).symlink_to(older)
    for word in ("", "auto", str(linked), str(checkpoint.folder_of(linked, 2))):
        assert find_resume(word, linked) == checkpoint.folder_of(linked, 2)
    for foreign in (other, checkpoint.folder_of(other, 2)):
        with pytest.raises(ConfigError, match=r"expected a checkpoint of .*mine.*--weights\.checkpoint"):
            find_resume(str(foreign), mine)


def test_a_refused_resume_leaves_the_configuration_as_it_was(file: Path, tmp_path: Path, capsys) -> None:
    assert run("train", "--config", file) == 0
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert run("train", "--config", file, "--resume", "--data.batch_size", 4) == 2
    assert "global batch" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    assert run("train", "--config", tmp_path / "run" / "config.yaml", "--resume") == 0
    assert run("train", "--config", file, "--run.out", tmp_path / "new", "--run.seed", -1) == 2
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_written_is_one_line(file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "afile").touch()
    for option, folder in (
        ("--run.out", tmp_path / "afile"),
        ("--run.out", tmp_path / "afile" / "run"),
        ("--data.cache", tmp_path / "afile" / "cache"),
    ):
        assert run("train", "--config", file, option, folder) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith(f"dit4dit train: error: {folder}"), said
        assert "Traceback" not in said
    assert (tmp_path / "afile").read_bytes() == b""


def test_a_copy_of_the_data_is_the_same_data(file: Path, tmp_path: Path) -> None:
    """Copied to a node's own disk, with other times; changed videos are others."""
    config = read_config(file)
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN / "lerobot_v3", copy / "lerobot_v3")
    for each in copy.rglob("*"):
        os.utime(each, (1, 1))
    a, b = (
        LeRobotData.open(replace(config.data, root=root), config.model, 3, "libero")
        for root in (str(GOLDEN), str(copy))
    )
    assert a.fingerprint == b.fingerprint
    assert a.clip_fingerprint == b.clip_fingerprint
    video = next(copy.rglob("*.mp4"))
    before, data = lerobot_data.video_digest(video), video.read_bytes()
    for changed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), bytes([data[0] ^ 1]) + data[1:]):
        video.write_bytes(changed)
        assert lerobot_data.video_digest(video) != before


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(file: Path, tmp_path: Path) -> None:
    """It hands the signal to the run and its data loaders, each of its own accord."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--no-python"]
    words = ["dit4dit", "train", "--config", str(file), "--run.steps", "4000", "--data.workers", "1"]
    facts = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    facts |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    out, end = tmp_path / "run", time.monotonic() + 600
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*launch, *words], env={**os.environ, **facts}, cwd=tmp_path, stdout=log, stderr=log)
        while len(lines(out)) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(600)
    said = (tmp_path / "log").read_text()
    assert "stopped by a signal after step" in said, said
    assert checkpoint.read(checkpoint.latest(out)).progress.step == lines(out)[-1]["step"]
