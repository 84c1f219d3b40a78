"""`dit4dit demo`: the whole path on the built-in world, and the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dit4dit import Policy
from dit4dit.cli import main
from dit4dit.commands import demo as module
from dit4dit.embodiments import TABLETOP
from dit4dit.envs.tabletop import MAX_STEP, REACH, TabletopEnv
from dit4dit.model.vae import FrameEncoder, VideoVae
from dit4dit.presets import preset


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.raises(SystemExit) as end:
        main(["demo", "--out", str(folder), "--device", "cpu"])
    assert end.value.code == 0
    return folder


def test_files(out: Path) -> None:
    data = json.loads((out / "demo.json").read_text())
    assert data["checkpoint_made_now"] is True
    assert data["steps"] == len(data["actions"]) > 8
    assert data["chunks"] == -(-data["steps"] // 8)
    assert 0 < data["chunk_ms"]["p50"] <= data["chunk_ms"]["p99"] <= data["chunk_ms"]["max"]
    with av.open(str(out / "episode.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == data["steps"] + 1
    first = TabletopEnv(data["seed"]).reset().observation["image"]
    shown = frames[0].reshape(64, 6, 64, 6, 3).mean((1, 3))
    assert np.abs(shown - first).mean() < 8
    assert Image.open(out / "actions.png").size[0] > 400
    actions = np.array(data["actions"])
    assert actions.std(0).min() > 0
    assert np.abs(actions[:, :2]).max() <= MAX_STEP + 1e-6
    assert set(actions[:, 2]) <= {0.0, 1.0}


def test_a_second_run_uses_the_checkpoint_and_repeats_the_actions(out: Path) -> None:
    before = json.loads((out / "demo.json").read_text())
    result = module.demo(out, seed=before["seed"], device="cpu", progress=lambda n: None)
    assert result["checkpoint_made_now"] is False
    assert result["actions"] == before["actions"]


def test_checkpoint_holds_the_trained_vae(out: Path) -> None:
    policy = Policy.from_pretrained(out / "checkpoint", device="cpu")
    assert policy.embodiment is TABLETOP
    picture = TabletopEnv(1_000_003).reset().observation["image"]
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = VideoVae(preset("tabletop").model.vae).eval()
    from safetensors.torch import load_file

    tensors = load_file(out / "checkpoint" / "vae" / "model.safetensors")
    prefix = "backbone_interface.extractor.vae."
    vae.wan.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items()})
    with torch.no_grad():
        condition = policy.model.backbone.condition(frame, torch.zeros(1, 16, 1, 8, 8))
        error = (vae.decode(condition)[:, :, 0] - frame).square().mean() / 4
    assert -10 * error.log10() >= 28
    assert isinstance(policy.model.backbone.frame_encoder, FrameEncoder)


def test_statistics_are_measured(out: Path) -> None:
    entry = json.loads((out / "checkpoint" / "statistics.json").read_text())["tabletop"]
    assert entry["num_trajectories"] == module.STATISTICS_EPISODES
    assert entry["num_transitions"] > 10 * module.STATISTICS_EPISODES
    assert max(map(abs, entry["state"]["min"][:2] + entry["state"]["max"][:2])) <= REACH + 1e-6
    assert entry["action"]["mask"] == [True, True, False]
