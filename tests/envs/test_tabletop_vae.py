"""The committed tabletop autoencoder: what its metrics.json claims is measured again, on other seeds it never saw."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from example_scripts import load, path
from safetensors.torch import load_file

from dit4dit.envs import tabletop, tabletop_vae_dir
from dit4dit.errors import ConfigError

train_vae = load("train_vae")
UNSEEN = tabletop.TEST_SEEDS_FROM + 500_000  # not the ones that metrics.json was measured on either


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """Loaded as anybody would, in float32."""
    config = json.loads((tabletop_vae_dir() / "config.json").read_text())
    model = AutoencoderKLWan.from_config(config)
    model.load_state_dict(load_file(tabletop_vae_dir() / "model.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def videos(frames: int, count: int, moving: bool = False) -> torch.Tensor:
    clips = train_vae.Clips(UNSEEN, UNSEEN + 1000, seed=1, store=count)
    return train_vae.to_video(clips.batch(count, frames, moving))


def expert_clip(seed: int, frames: int, stride: int) -> torch.Tensor:
    """The clip from before the grasp on, as a policy would see it."""
    env = tabletop.TabletopEnv(seed)
    expert = tabletop.ScriptedExpert(env)
    pictures = [env.observation()["image"]]
    while env.scene.held is None:
        pictures.append(env.step(expert.act()).observation["image"])
    pictures = pictures[-1:]
    while len(pictures) < (frames - 1) * stride + 1:
        pictures.append(env.step(expert.act()).observation["image"])
    return train_vae.to_video(np.array(pictures[::stride])[None])


def test_folder_is_small_and_complete():
    folder = tabletop_vae_dir()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "metrics.json"}
    assert sum(sizes.values()) <= 2_000_000


def test_shapes_are_those_of_the_real_one(vae):
    posterior = vae.encode(torch.zeros(1, 3, 5, 64, 64)).latent_dist
    assert posterior.mean.shape == (1, 16, 2, 8, 8)
    assert vae.decode(posterior.mean).sample.shape == (1, 3, 5, 64, 64)
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 16
    assert min(vae.config.latents_std) > 0.05


@pytest.mark.parametrize(("frames", "count", "moving"), [(1, 16, False), (5, 8, False), (5, 8, True), (9, 8, True)])
def test_unseen_pictures_survive(vae, frames, count, moving):
    video = videos(frames, count, moving)
    posterior = vae.encode(video).latent_dist
    by_mean = train_vae.psnr(vae.decode(posterior.mean).sample, video)
    by_sample = train_vae.psnr(vae.decode(posterior.sample(torch.Generator().manual_seed(0))).sample, video)
    assert by_mean.shape == (count, frames)
    assert by_mean.mean() >= 28.0, by_mean.mean()
    assert by_mean.mean(dim=0).min() >= 26.5, by_mean.mean(dim=0)
    assert by_sample.mean() >= 27.0, by_sample.mean()


def test_a_carried_block_survives(vae):
    """The hardest clips: all that counts moves. The average hides it, so every frame counts by itself."""
    video = torch.cat([expert_clip(seed, frames=5, stride=2) for seed in range(UNSEEN, UNSEEN + 24)])
    seen = train_vae.psnr(vae.decode(vae.encode(video).latent_dist.mean).sample, video)
    assert seen.mean() >= 28.0, seen.mean()
    assert seen.mean(dim=0).min() >= 24.5, seen.mean(dim=0)


def test_colours_stay_at_their_places(vae):
    right, count, hidden = 0, 0, 0
    for seed in range(UNSEEN, UNSEEN + 16):
        scene, _, _ = tabletop.layout(seed)
        video = train_vae.to_video(tabletop.render(scene)[None, None])
        decoded = vae.decode(vae.encode(video).latent_dist.mean).sample[0, :, 0]
        for block in scene.blocks:
            row, column = (int(v * 64) for v in (0.5 - block.y / tabletop.TABLE, 0.5 + block.x / tabletop.TABLE))
            centre = (decoded[:, row - 1 : row + 2, column - 1 : column + 2].mean(dim=(1, 2)) + 1) * 127.5
            distances = {name: np.abs(np.array(c) - centre.numpy()).sum() for name, c in tabletop.BLOCK_COLOURS.items()}
            covered = np.hypot(block.x - scene.x, block.y - scene.y) < 0.08  # by the gripper
            right += covered or min(distances, key=distances.__getitem__) == block.colour
            count += 1
            hidden += covered
    assert right == count == 48
    assert hidden < count / 4


def test_normalised_latents_are_near_unit(vae):
    shift, scale = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = (vae.encode(videos(5, 16)).latent_dist.sample(torch.Generator().manual_seed(0)) - shift) / scale
    by_channel = latents.transpose(0, 1).flatten(1)
    assert abs(float(by_channel.mean())) < 0.1
    assert 0.85 < float(by_channel.std()) < 1.15
    assert by_channel.std(dim=1).min() > 0.6
    assert by_channel.std(dim=1).max() < 1.4


def test_metrics_are_complete_and_kept():
    metrics = json.loads((tabletop_vae_dir() / "metrics.json").read_text())
    assert {"command", "seed", "steps", "minutes", "machine", "test_seeds_from"} <= set(metrics)
    for name, frames in (("1", 1), ("5", 5), ("9", 9), ("5_moving", 5), ("9_moving", 9)):
        measured = metrics[f"frames_{name}"]
        assert len(measured["psnr_db_by_frame"]) == frames
        assert min(measured["psnr_db_by_frame"]) >= 28.0
        assert measured["psnr_db_sampled"] >= 27.0


def test_the_short_cut_in_training_is_the_same_function():
    torch.manual_seed(0)
    plain, fast = train_vae.build(fast=False), train_vae.build(fast=True)
    fast.load_state_dict(plain.state_dict())
    for frames in (1, 9):
        video = torch.randn(2, 3, frames, 32, 32)
        wanted = plain.decode(plain.encode(video).latent_dist.mean).sample
        torch.testing.assert_close(
            fast.decode(fast.encode(video).latent_dist.mean).sample, wanted, atol=1e-4, rtol=1e-4
        )


@pytest.mark.slow
def test_training_means_its_seed(tmp_path):
    for name in ("a", "b"):
        assert train_vae.fit(train_vae.TrainConfig(tmp_path / name, seed=3, steps=2)) == 2
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert len((tmp_path / "a_train.jsonl").read_text().splitlines()) == 1
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_decoder_is_trained_alone(tmp_path):
    """What a policy sees and has learned from stays, bit by bit."""
    start = tabletop_vae_dir()
    config = train_vae.TrainConfig(tmp_path / "new", steps=2, start=start, decoder_only=True)
    train_vae.fit(config)
    old, new = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "new"))
    differ = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert differ == {"decoder", "post_quant_conv"}
    assert (start / "config.json").read_text() == (tmp_path / "new" / "config.json").read_text()
    assert "--decoder-only --start START" in train_vae.provenance(config, steps=2, minutes=0.1)["command"]


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="decoder_only: needs `start`"):
        train_vae.TrainConfig(tmp_path, decoder_only=True)
    with pytest.raises(ConfigError, match="positive"):
        train_vae.TrainConfig(tmp_path, minutes=0)
    with pytest.raises(ConfigError, match="positive"):
        train_vae.TrainConfig(tmp_path, steps=0)
    for shares in ((1.0,), (0.5,) * len(train_vae.KINDS)):
        with pytest.raises(ConfigError, match="add up to 1"):
            train_vae.TrainConfig(tmp_path, shares=shares)


def test_provenance_names_the_way(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    first = train_vae.provenance(train_vae.TrainConfig(start, seed=4), steps=7, minutes=1.0)
    (start / "metrics.json").write_text(json.dumps(first))
    second = train_vae.provenance(train_vae.TrainConfig(tmp_path, lr=0.001, start=start), steps=3, minutes=1.0)
    assert first["command"] == "python examples/tabletop/train_vae.py --out DIR --seed 4 --steps 7"
    assert second["command"].endswith("--seed 0 --steps 3 --lr 0.001 --start START")
    assert second["start"] == first


@pytest.mark.parametrize("name", ["train_vae", "ship_policy"])
def test_the_scripts_run_beside_an_installed_package(name, tmp_path):
    done = subprocess.run(
        [sys.executable, path(name), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr
