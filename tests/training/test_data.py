"""A LeRobot data set through the command: caches, order, held-out episodes, and a policy at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_worker import small_config
from waiting import WAIT

from dit4dit import Noise, Observation, Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.data.sampler import Draws
from dit4dit.errors import CheckpointError, DataError
from dit4dit.model.text import byte_tokenizer, tokenize
from dit4dit.presets import preset
from dit4dit.robots.action_error import ActionError
from dit4dit.training import caches, evaluate
from dit4dit.training.config import DataConfig, read_config, write_config
from dit4dit.training.feed import Feed, Share
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData

pytest.importorskip("pyarrow")
GOLDEN = Path(__file__).parents[1] / "golden"
TINY = preset("tiny").model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    file = tmp_path_factory.mktemp("mine") / "robots.yaml"
    file.write_text("mixtures:\n  mine:\n    - {dataset: lerobot_v3, robot: libero_franka}\n")
    return DataConfig(root=str(GOLDEN), mixture="mine", robots=str(file), holdout=0.34, batch_size=2, workers=0)


@pytest.fixture(scope="module")
def data(config: DataConfig) -> LeRobotData:
    return LeRobotData.open(config, TINY, seed=3)


def test_an_index_is_a_frame(data: LeRobotData) -> None:
    (recording,), (reader,) = data.mixture.recordings, data.readers
    lengths = [recording.length(i) for i in range(3)]
    assert data.clips == sum(lengths)
    assert data.picture_size == (32, 64)
    for index, (episode, frame) in {0: (0, 0), lengths[0]: (1, 0), data.clips - 1: (2, lengths[2] - 1)}.items():
        got, want = data.sample(index), reader.read(episode, frame)
        assert torch.equal(got.video, want.video)
        assert torch.equal(got.actions, want.actions)
    blind = data.sample(5, video=False)
    assert blind.video is None
    assert torch.equal(blind.actions, data.sample(5).actions)


def test_order_is_the_samplers_and_never_held_out(data: LeRobotData) -> None:
    (held,) = data.mixture.episodes("heldout", 0.34, 3)
    (kept,) = data.mixture.episodes("train", 0.34, 3)
    (recording,) = data.mixture.recordings
    draws = Draws([kept], [[recording.length(i) for i in kept]], (1.0,), 3)
    starts = np.cumsum([0, *(recording.length(i) for i in range(3))])
    indices = [data.index(position) for position in range(50)]
    assert indices == [starts[draws.draw(p).episode] + draws.draw(p).frame for p in range(50)]
    assert set(data.held_out()) == {i for e in held for i in range(starts[e], starts[e + 1])}
    assert held
    assert not set(indices) & set(data.held_out())
    assert {data.sample(index).lang for index in range(data.clips)} == set(data.instructions)


def test_the_error_of_actions_in_robot_units(data: LeRobotData) -> None:
    """Against the recorded values; what is not real does not count."""
    (robot,) = data.robots
    assert (robot.names, data.robot(0)) == (("x", "y", "z", "roll", "pitch", "yaw", "gripper"), 0)
    sample, (recording,) = data.sample(2), data.mixture.recordings
    recorded = recording.vector("action", 0, np.arange(2, 2 + TINY.head.action_horizon))
    # the gripper of this set is random numbers, of which a robot's threshold makes 0 and 1
    np.testing.assert_allclose(robot.robot(sample.actions.numpy())[:, :6], recorded[:, :6], atol=1e-5)
    low, high = (np.asarray(data.statistics["franka"]["action"][name]) for name in ("min", "max"))
    error = ActionError(7)
    # a tenth of the range
    off = torch.where(sample.actions > 0, sample.actions - 0.2, sample.actions + 0.2)
    mask = sample.action_mask.clone()
    mask[:, 1] = False
    evaluate.add_robot_error(error, robot, off, sample.actions, mask)
    np.testing.assert_allclose(error.mae[[0, 2, 3, 4, 5]], 0.1 * (high - low)[[0, 2, 3, 4, 5]], rtol=1e-4)
    np.testing.assert_allclose(error.mse[[0, 2]], (0.1 * (high - low)[[0, 2]]) ** 2, rtol=1e-4)
    assert np.isnan(error.mae[1])


def test_fingerprints(config: DataConfig, data: LeRobotData) -> None:
    other = LeRobotData.open(config, TINY, seed=4)
    assert other.fingerprint != data.fingerprint
    assert other.clip_fingerprint == data.clip_fingerprint
    assert LeRobotData.open(config, TINY, seed=3).fingerprint == data.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_feed_goes_on_where_it_is_told(workers: int) -> None:
    data = RandomData(TINY, "libero")
    options = {"workers": workers, "video": False, "pin": False}
    before = torch.get_rng_state()
    whole = list(Feed(data, Share(1, 2, 2, 2), 0, 4, **options))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the run's own"
    rest = list(Feed(data, Share(1, 2, 2, 2), 2, 4, **options))
    assert (len(whole), len(rest)) == (8, 4)
    assert [raw.positions for raw in whole[:2]] == [(2, 3), (6, 7)]
    assert [raw.positions for raw in rest] == [raw.positions for raw in whole[4:]]
    for a, b in zip(rest, whole[4:], strict=True):
        assert a.indices == tuple(data.index(position) for position in a.positions)
        assert torch.equal(a.actions, b.actions)
        assert a.video is None


class Hangs(RandomData):
    hanging = multiprocessing.Event()

    def sample(self, index: int, *, video: bool = True):
        if index == self.index(1):
            self.hanging.set()
            time.sleep(600)
        return super().sample(index, video=video)


@pytest.mark.slow
def test_a_loader_that_hangs_does_not_keep_a_run_that_ends() -> None:
    data = Hangs(TINY, "libero")
    feed = iter(Feed(data, Share(0, 1, 1, 1), 0, 2, workers=1, video=False, pin=False))
    next(feed)
    (worker,) = multiprocessing.active_children()
    assert data.hanging.wait(WAIT)
    feed.close()
    worker.join(WAIT)
    code = worker.exitcode
    worker.kill()  # pytest would wait for one that is left
    assert code == -signal.SIGKILL, "killed while it hung: it has not come to its own end"


class Broken(RandomData):
    def sample(self, index: int, *, video: bool = True):
        raise DataError(f"episode_{index:06d}.mp4: truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_the_readers_own_error(workers: int) -> None:
    feed = Feed(Broken(TINY, "libero"), Share(0, 1, 2, 1), 0, 2, workers=workers, video=True, pin=False)
    with pytest.raises(DataError, match=r"^episode_\d+\.mp4: truncated$"):
        next(iter(feed))


class AllBroken(Broken):
    skip_bad = True


class HalfBroken(RandomData):
    skip_bad = True

    def index(self, position: int, attempt: int = 0) -> int:
        return (2 * position + attempt) % 8

    def sample(self, index: int, *, video: bool = True):
        if index % 4 == 2:
            raise DataError(f"episode_{index:06d}.mp4: truncated")
        return super().sample(index, video=video)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_replaced_and_counted_when_asked_for(workers: int) -> None:
    (raw,) = Feed(HalfBroken(TINY, "libero"), Share(0, 1, 4, 1), 0, 1, workers=workers, video=False, pin=False)
    assert (raw.positions, raw.indices) == ((0, 1, 2, 3), (0, 3, 4, 7))
    assert raw.skipped == ("episode_000002.mp4: truncated", "episode_000006.mp4: truncated")


def test_a_run_goes_on_past_unreadable_samples_and_says_how_many(tmp_path: Path, caplog) -> None:
    config = small_config(tmp_path).override({"run.steps": "2", "run.log_every": "2"})
    assert train(config, HalfBroken(config.model, "libero")) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["skipped"] == 4
    assert "step 1: another sample stands for one that cannot be read: episode_000002.mp4: truncated" in caplog.text


def test_all_unreadable_is_an_error() -> None:
    feed = Feed(AllBroken(TINY, "libero"), Share(0, 1, 2, 1), 0, 1, workers=0, video=True, pin=False)
    with pytest.raises(DataError, match="100 samples in a row cannot be read; the last: episode_"):
        next(iter(feed))


def test_caches_know_what_made_them_and_share_their_work(tmp_path: Path) -> None:
    data, model, tokenizer = RandomData(TINY, "libero", clips=130), random_model(TINY, 0), byte_tokenizer()
    key = caches.prompt_key(model.text, tokenizer)
    prompts = caches.PromptCache(tmp_path, key)
    told: list[int] = []
    caches.fill_prompts(prompts, model.text, tokenizer, data.instructions, rank=0, ranks=2, done=told.append)
    assert len(prompts.missing(data.instructions)) == 1
    caches.fill_prompts(prompts, model.text, tokenizer, data.instructions, rank=1, ranks=2, done=told.append)
    assert (prompts.missing(data.instructions), told) == ([], [1, 1, 1])
    want = model.embed(tokenize(tokenizer, ["open the drawer"], TINY.text.max_length))[0]
    assert torch.equal(prompts["open the drawer"], want)
    with pytest.raises(ValueError, match="no embedding of 'dance'"):
        prompts["dance"]
    other = random_model(TINY, 1)
    assert caches.prompt_key(other.text, tokenizer) != key
    latents = caches.LatentCache(tmp_path, caches.latent_key(model, data), data.clips)
    assert [latents.count(latents.left(rank, 2)) for rank in (0, 1)] == [66, 64]
    for rank in (0, 1):
        caches.fill_latents(latents, model, data, rank=rank, ranks=2, done=told.append)
        assert len(latents.missing(range(latents.chunks))) == 1 - rank
    assert sum(told) == 3 + data.clips
    video = data.sample(129).video[None]
    mean, std = model.backbone.frame_encoder(video[:, 0])
    got = latents[129]
    for name, value in (("mean", mean), ("std", std), ("clip", model.encode_clip(video))):
        assert torch.allclose(got[name], value[0], atol=1e-5), name
    assert caches.latent_key(other, data) != caches.latent_key(model, data)


def test_a_cache_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    from safetensors import SafetensorError
    from safetensors import torch as files

    def full(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not written \(I/O error: No space left.*--data\.cache"):
        caches.write_aside(tmp_path / "new" / "a.safetensors", {"a": torch.zeros(1)})
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_trains_a_policy_and_goes_on(config: DataConfig, tmp_path: Path, capsys) -> None:
    """Trained on the golden LeRobot data set with cached latents, resumed, and asked for actions."""
    out = tmp_path / "run"
    file = tmp_path / "config.yaml"
    write_config(file, replace(small_config(out), data=config))
    words = ["train", "--config", str(file), "--data.cache_latents", "true", "--run.trackers", "tensorboard"]
    words += ["--run.save_every", "2", "--run.eval_every", "3", "--run.eval_samples", "3", "--run.eval_strips", "1"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        return int(end.value.code or 0)

    assert run() == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/action_loss" in line] == [1, 2, 3, 4, 5, 6]
    evaluated = [line for line in lines if "eval/action_mae" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert all({"eval/action_loss", "eval/video_loss"} <= set(line) for line in evaluated)
    dimensions = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert all(
        {f"action_{kind}/{name}" for kind in ("mae", "mse") for name in dimensions} <= set(line) for line in evaluated
    )
    assert len(list((out / "strips").rglob("*.png"))) == 2
    assert list((out / "tensorboard").iterdir())
    assert read_config(out / "config.yaml").data.mixture == "mine"
    # a second start must say what it wants
    assert run() == 2
    assert "has checkpoints already; go on with --resume" in capsys.readouterr().err
    assert run("--resume", "--optim.clip", "0.5") == 2
    assert "--optim.clip: " in capsys.readouterr().err
    assert run("--resume", str(out / "checkpoints" / "step_00000004")) == 0
    again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timing = ("samples_per_s", "data_wait")
    assert [{k: v for k, v in line.items() if k not in timing} for line in again] == [
        {k: v for k, v in line.items() if k not in timing} for line in lines
    ]
    policy = Policy.from_pretrained(out / "checkpoints" / "step_00000006" / "policy", device="cpu")
    state = {key.name: np.zeros(key.dim) for key in policy.embodiment.state}
    picture = np.zeros((24, 32, 3), np.uint8)
    observation = Observation(images=dict.fromkeys(policy.embodiment.views, picture), state=state)
    chunk = policy.infer(observation, "open the drawer", noise=Noise.from_seed(1, 0))
    assert chunk.actions.shape == (8, 7)
    assert np.isfinite(chunk.actions).all()


@pytest.mark.slow
def test_torchrun_starts_the_command_as_the_readme_says(config: DataConfig, tmp_path: Path) -> None:
    """Two processes; the held-out error of each dimension is in the log."""
    write_config(tmp_path / "config.yaml", replace(small_config(tmp_path / "run"), data=replace(config, batch_size=1)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    words = ["dit4dit", "train", "--config", str(tmp_path / "config.yaml"), "--run.steps", "2", "--run.eval_every", "2"]
    facts = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    facts |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(
        [*launch, *words, "--run.eval_strips", "0"],
        env={**os.environ, **facts},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert {"eval/action_mae", "action_mae/gripper", "action_mse/x"} <= set(lines[-1])
