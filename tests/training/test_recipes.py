"""Every recipe as a user starts it: its memory plan without weights or data, and what it says where the data are not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit.cli import main
from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.robots.g1 import ACTION, BODY
from dit4dit.training.recipes import RECIPES, recipe
from dit4dit.training.start import open_data


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, words)])
    return int(end.value.code or 0)


# the tabletop's data are made by the package itself
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tabletop"])
def test_every_recipe_has_a_plan_and_says_which_data_it_wants(name: str, tmp_path: Path, capsys) -> None:
    words = ["--recipe", name, "--data.root", tmp_path / "data", "--run.out", tmp_path / "run"]
    # one sample a micro step: the activations of a small batch are counted as those of a large one
    assert run(*words, "--data.batch_size", 1, "--dry-run") == 2
    dry = capsys.readouterr()
    assert "memory of each process" in dry.out
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert dry.err == said
    assert said.count("\n") == 1
    assert said.startswith(f"dit4dit train: error: {tmp_path / 'data'}")
    assert "info.json" in said
    assert "--data.root" in said


def slices(keys: tuple[tuple[str, int], ...]) -> dict[str, dict[str, int]]:
    ends = np.cumsum([size for _, size in keys]).tolist()
    return {name: {"start": end - size, "end": end} for (name, size), end in zip(keys, ends, strict=True)}


def test_the_whole_body_recipe_reads_every_data_set_below_its_root(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for day, length in (("monday", 60), ("tuesday", 55)):
        with Writer(tmp_path / day, 30, codec=VideoCodec.lossless()) as writer:
            columns = {"observation.state": random.standard_normal((length, 32), dtype=np.float32)}
            columns["action"] = random.standard_normal((length, 36), dtype=np.float32)
            pictures = random.integers(0, 256, (length, 48, 64, 3), dtype=np.uint8)
            writer.add(columns, {"observation.images.ego_view": pictures}, f"work on {day}")
        modality = {
            "state": slices(BODY),
            "action": slices(ACTION),
            "video": {"ego_view": {"original_key": "observation.images.ego_view"}},
            "annotation": {"human.task_description": {"original_key": "task_index"}},
        }
        (tmp_path / day / "meta" / "modality.json").write_text(json.dumps(modality))
    config = recipe("g1_whole_body").override({"data.root": str(tmp_path), "data.holdout": "0"})
    data = open_data(config)
    assert tuple(data.instructions) == ("work on monday", "work on tuesday")
    assert data.clips == 115
    sample = data.sample(100)
    model = config.model
    assert sample.lang == "work on tuesday"
    assert sample.video.shape == (model.frames, 3, *model.image_size)
    assert (sample.actions.shape, sample.state.shape) == ((50, model.head.action_dim), (1, 64))
    assert torch.equal(sample.action_mask.any(dim=0), torch.arange(model.head.action_dim) < 36)
