"""`train --dry-run` finds what a start would stumble over, in the same words, with the option to set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_samples import flip
from own_robot import GOLDEN, MINE
from training_worker import small_config

from dit4dit.cli import main
from dit4dit.data import Mixture
from dit4dit.data.catalogue import catalogue
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.model.text import byte_tokenizer, tokenize
from dit4dit.training import memory, preflight, setup, start
from dit4dit.training.config import DataConfig, WeightsConfig, read_config, write_config
from dit4dit.training.recipes import recipe

pytest.importorskip("pyarrow")
SOLO = """
  solo:
    video: [primary_image]
    state: [x]
    action: [x]
    action_steps: 8
    language: annotation.human.action.task_description
    modality: MODALITY
mixtures:
  unequal: [{dataset: lerobot_v3, robot: libero_franka}, {dataset: lerobot_v3, robot: solo}]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the golden data set; its memory plan, which is tested elsewhere, is left out."""
    standard = MINE[MINE.index("    modality: ") + 14 : MINE.index("\nmixtures:")]
    (tmp_path / "robots.yaml").write_text(MINE.replace("\nmixtures:", SOLO.replace("MODALITY", standard).rstrip()))
    robots = str(tmp_path / "robots.yaml")
    data = DataConfig(root=str(GOLDEN), mixture="franka", robots=robots, holdout=0.34, batch_size=2, workers=0)
    write_config(tmp_path / "config.yaml", replace(small_config(tmp_path / "run"), data=data))
    monkeypatch.setattr(memory, "plan", lambda *_: memory.Plan(1, 2, 3, 4, 5, 6))
    return tmp_path / "config.yaml"


def run(file: Path, *words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(file), *map(str, words)])
    return int(end.value.code or 0)


FAULTS = {
    "actions": (("--model.head.action_dim", 6), "its actions have 7 values, the model takes at most 6 (head.action_dim); train "
                "with --model.head.action_dim 7"),
    "state": (("--model.head.state_dim", 15), "its encoded state has 16 values, the model takes at most 15 (head.state_dim); "
              "train with --model.head.state_dim 16"),
    "max_size": (("--model.dit.max_size", "128,4,7"), "model.image_size: 2 views of robot 'libero' at 32 x 32 pixels join to 32 "
                 "x 64, the model takes at most 32 x 56 (dit.max_size); lower --model.image_size"),
    "max_seq_len": (("--model.head.max_seq_len", 7), "head.max_seq_len: expected at least action_horizon = 8, got 7; raise "
                    "--model.head.max_seq_len"),
    "video_every": (("--model.flow.video_every", 3), "model.flow.video_every: expected a divisor of data.batch_size = 2, got 3; "
                    "set --model.flow.video_every or --data.batch_size"),
    "frames": (("--data.video_delta_indices", "0,1,2"), "the model takes 5 frames, video_delta_indices give 3: (0, 1, 2); give "
               "as many (training: --data.video_delta_indices"),
    "no future": (("--model.frames", 1), "model.frames: 1 leaves no future frame for the video loss; set --model.frames to 1 + a "
                  "multiple of 4, or --model.flow.training action"),
    "indices": (("--data.video_delta_indices", "0,2,1,3,4"), "--data.video_delta_indices"),
    "ratio": (("--data.action_video_freq_ratio", 2), "ratio 2 thins out video_delta_indices, which are not given"),
    "ratio 0": (("--data.action_video_freq_ratio", 0, "--data.video_delta_indices", "0,1,2,3,4"), "expected at least 1, got"),
    "views": (("--data.mixture", "unequal"), "--data.mixture unequal: its robots have different numbers of views (libero 2, "
              "solo 1)"),
    "held out": (("--data.mixture", "one"), "hold none out (training: --data.holdout 0)"),
    "robot": (("--embodiment", "gr1"), "the checkpoints would carry 'gr1', the mixture 'franka' is of 'libero'; give "
              "--embodiment none"),
    "no mixture": (("--data.mixture", ""), "--data.mixture: none given; choose one: "),
    "no data": (("--data.root", "nowhere"), "nowhere/lerobot_v3: no such folder, wanted a data set with meta/info.json for "
                "robot 'libero_franka'; put it there, or name the folder above it (training: --data.root"),
    "no robots": (("--data.robots", "nowhere.yaml"), "nowhere.yaml: no such file"),
    "random too wide": (("--data.mixture", "random", "--embodiment", "g1"), "--model.head.action_dim 36"),
    "checkpoint": (("--weights.checkpoint", "nowhere"), "checkpoint 'nowhere': no such file or folder"),
    "backbone": (("--weights.backbone", "nowhere"), "backbone nowhere: no such folder; give a Cosmos-Predict2.5 folder or its "
                 "hub id with --weights.backbone"),
    "not a backbone": (("--weights.backbone", GOLDEN), "give the folder with --weights.backbone or DIT4DIT_BACKBONE"),
    "no weights": (("--weights.backbone", GOLDEN / "libero_tiny" / "cosmos"), "transformer: no .safetensors files"),
    "out": (("--run.out", "FILE/run"), "FILE/run: cannot be written (FILE is a file); choose another folder with --run.out"),
    "cache": (("--data.cache", "FILE"), "FILE: cannot be written (FILE is a file); choose another folder with --data.cache"),
    "wandb": (("--run.trackers", "wandb"), "pip install 'dit4dit[wandb]'"),
    "deepspeed": (("--run.strategy", "zero2"), "pip install 'dit4dit[deepspeed]'"),
    "nan": (("--optim.clip", "nan"), "optim.clip: expected a finite number, got nan"),
    "infinite": (("--optim.learning_rate.base", "inf"), "optim.learning_rate.base: expected a finite number, got inf"),
    "betas": (("--optim.betas", "0.9,1"), "optim.betas: expected two numbers from 0 to below 1, got (0.9, 1.0)"),
    "seed": (("--run.seed", -1), "run.seed: expected 0 to 2^64 - 1, got -1"),
    "eval_samples": (("--run.eval_samples", 0), "run.eval_samples: expected at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_dry_run_says_what_a_start_would(
    name: str, file: Path, tmp_path: Path, write_libero, capsys, monkeypatch
) -> None:
    words, message = FAULTS[name]
    (tmp_path / "afile").touch()
    replaced = [str(word).replace("FILE", str(tmp_path / "afile")) for word in words]
    message = message.replace("FILE", str(tmp_path / "afile"))
    if name == "held out":
        one_episode(tmp_path, write_libero)
    if name in ("wandb", "deepspeed"):
        absent(name, monkeypatch)
    said = []
    for more in (("--dry-run",), ()):
        assert run(file, *replaced, *more) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert message in said[0]
    assert said[0] == said[1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def one_episode(tmp_path: Path, write_libero) -> None:
    """A mixture "one", whose data set has one episode."""
    write_libero(tmp_path / "single", lengths=(12,))
    robots = tmp_path / "robots.yaml"
    robots.write_text(robots.read_text() + f"  one: [{{dataset: {tmp_path / 'single'}, robot: libero_franka}}]\n")


def absent(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import fails, as where it is not installed."""
    from dit4dit import errors

    find = errors.importlib.import_module

    def import_module(name: str, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return find(name, *rest)

    monkeypatch.setattr(errors.importlib, "import_module", import_module)


def test_a_dry_run_that_finds_nothing_writes_nothing(file: Path, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    # the joined views are 32 x 64 pixels, which is then the most
    assert run(file, "--dry-run", "--model.dit.max_size", "128,4,8") == 0
    said = capsys.readouterr()
    assert "memory of each process" in said.out
    assert "note" not in said.out + said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_all_at_once_and_still_the_plan(file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "afile").touch()
    words = ("--run.out", tmp_path / "afile" / "run", "--data.root", "nowhere", "--weights.checkpoint", "nowhere")
    assert run(file, *words, "--dry-run") == 2
    said = capsys.readouterr()
    assert "choose another folder with --run.out" in said.err
    assert said.err.count("\n") == 1
    also = [line for line in said.out.splitlines() if line.startswith("also: ")]
    assert [line.split()[1] for line in also] == [
        "checkpoint"
    ]  # sizes are a checkpoint's, so that no data is held to them
    assert run(file, *words[:4], "--dry-run") == 2
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("also: ")] == ["nowhere/lerobot_v3:"]
    assert "memory of each process" in said.out


def test_a_dry_run_in_the_folder_of_a_run(file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert run(file, "--dry-run") == 2
    assert "has checkpoints already; go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
@pytest.mark.parametrize("world", ["eight", "0", ""])
def test_a_number_of_processes_that_is_none_is_refused(file: Path, monkeypatch, capsys, world, words) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert run(file, *words) == 2
    assert f"WORLD_SIZE: expected a number of at least 1, as torchrun sets it, got '{world}'" in capsys.readouterr().err


def test_a_dry_run_looks_at_what_it_would_go_on_from(file: Path, tmp_path: Path, capsys) -> None:
    words = ("--run.steps", 1, "--run.save_every", 1, "--run.save_frozen", "false")
    assert run(file, *words) == 0
    before = sorted(tmp_path.rglob("*"))
    assert run(file, *words, "--resume", "--dry-run") == 0
    # two processes would do the same with half of the batch, one would not
    half = ("--data.batch_size", 1)
    assert run(file, *words, *half, "--resume", "--dry-run") == 0
    capsys.readouterr()
    batch = "global batch (data.batch_size x optim.accumulate x processes): the run has 2, this one"
    for options, processes, message in (
        (half, ("--processes", 1), f"{batch} 1; make them equal"),
        (("--data.batch_size", 4), (), f"{batch} 4; make them equal"),
        (("--data.sample_every", 2), (), "the data's fingerprint (files, statistics, split, window): the run has"),
    ):
        said = []
        for more in (("--dry-run", *processes), ()):
            assert run(file, *words, *options, "--resume", *more) == 2
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert message in said[0]
        assert said[0] == said[1]
    flip(tmp_path / "run" / "checkpoints" / "step_00000001" / "policy" / "model.safetensors")
    assert run(file, *words, "--resume", "--dry-run") == 2
    assert "policy/model.safetensors: damaged: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "part,damage,message",
    [
        ("text_encoder", "weights", "text_encoder: no .safetensors files"),
        ("vae", "weights", "vae: no .safetensors files"),
        ("tokenizer", "tokenizer_config.json", "no tokenizer_config.json; give a backbone folder with its tokenizer"),
        ("vae", "config.json", "vae/config.json: no such file"),
    ],
)  # fmt: skip
def test_an_incomplete_base_model_folder(
    cosmos_folder: Path, file: Path, tmp_path: Path, capsys, part: str, damage: str, message: str
) -> None:
    """Found without reading weights: files that a start would read last, after the others."""
    folder = tmp_path / "cosmos"
    shutil.copytree(cosmos_folder, folder)
    words = ("--weights.backbone", folder)
    for target in folder.joinpath(part).glob("*.safetensors") if damage == "weights" else [folder / part / damage]:
        target.unlink()
    assert run(file, *words, "--dry-run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    if part == "text_encoder":  # one is enough: the code is the start's own
        assert run(file, *words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_tensor_of_another_shape_is_found_without_reading_any(
    cosmos_folder: Path, file: Path, tmp_path: Path, capsys
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cosmos"
    shutil.copytree(cosmos_folder, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("proj_out.weight"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, weights)
    assert run(file, "--weights.backbone", folder, "--dry-run") == 2
    said = capsys.readouterr().err
    assert f"{name}: expected shape {list(tensors[name].shape)} from the configuration, got" in said


def test_sizes_are_the_base_models(cosmos_folder: Path, tmp_path: Path) -> None:
    """So that the plan and `max_size` are of the model that a start makes."""
    small = small_config(tmp_path)
    smaller = replace(small.model, dit=replace(small.model.dit, max_size=(128, 64, 64)))
    config = replace(small, model=smaller, weights=WeightsConfig(backbone=str(cosmos_folder)))
    dit = json.loads((cosmos_folder / "transformer" / "config.json").read_text())
    found = setup.sized(config).model
    assert (found.dit.num_layers, found.dit.num_heads) == (dit["num_layers"], dit["num_attention_heads"])
    assert found.dit.max_size == tuple(dit["max_size"]) != smaller.dit.max_size
    assert found.head.context_dim == found.dit.width
    assert found.text.max_length == small.model.text.max_length


def test_a_hub_id_that_is_not_here_is_a_note(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert setup.local_backbone("nobody/nothing-at-all") is None
    assert setup.sized(recipe("libero")).model == recipe("libero").model


def test_unequal_views_are_noted_where_no_batch_is_made(file: Path) -> None:
    """`stats` can merge what training cannot put into one batch."""
    known = catalogue(file.parent / "robots.yaml")
    (note,) = Mixture.open(known.mixture("unequal"), GOLDEN, known).notes
    assert note.startswith("its robots have different numbers of views (libero 2, solo 1)")
    assert note.endswith("for training make one mixture for each number")
    assert Mixture.open(known.mixture("franka"), GOLDEN, known).notes == ()


def test_a_robot_of_ones_own_has_a_plan_too(file: Path, capsys) -> None:
    words = ("--data.mixture", "mine", "--embodiment", "my_arm", "--dry-run")
    assert run(file, *words) == 0
    assert start.picture_size(read_config(file).override({"embodiment": "my_arm"})) == (32, 64)


@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_first_image_is_found(file: Path, tmp_path: Path, capsys, cached: bool) -> None:
    """Its header is whole: what decoding finds, the first step would."""
    root = tmp_path / "data"
    shutil.copytree(GOLDEN / "lerobot_v3", root / "lerobot_v3")
    for video in root.rglob("*.mp4"):
        content = bytearray(video.read_bytes())
        at = content.index(b"mdat") + 4
        content[at : at + 3000] = bytes(3000)
        video.write_bytes(content)
    words = ("--data.root", root, "--data.cache_latents", str(cached).lower())
    assert run(file, *words, "--dry-run") == 2
    assert "cannot be decoded" in capsys.readouterr().err


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    preflight.check_writable(tmp_path / "new" / "er", "--run.out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(preflight.os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/new: cannot be written \(no permission in {tmp_path}\)"):
        preflight.check_writable(tmp_path / "new", "--run.out")


def test_instructions_that_are_cut_are_counted(file: Path, capsys, caplog) -> None:
    tokenizer = byte_tokenizer()
    words = ["a", "b" * 50, "c" * 60]
    tokens = tokenize(tokenizer, words, 1000)
    lengths = [int((row != tokenizer.pad_token_id).sum()) for row in tokens]
    assert lengths[2] == lengths[1] + 10
    assert preflight.cut_prompts(tokenizer, words, lengths[2]) is None
    one = preflight.cut_prompts(tokenizer, words, lengths[2] - 1)
    assert one.startswith(f"1 of 3 instructions have more than {lengths[2] - 1} tokens")
    assert f"'{words[2][:50]}" in one
    assert preflight.cut_prompts(tokenizer, words, lengths[1] - 1).startswith("2 of 3")
    assert run(file, "--model.text.max_length", 20, "--dry-run") == 0
    assert "note: 2 of 2 instructions have more than 20 tokens" in capsys.readouterr().out
    assert run(file, "--model.text.max_length", 20, "--run.steps", 1) == 0
    assert sum("2 of 2 instructions have more than 20 tokens" in text for text in caplog.messages) == 1


def test_every_float_is_looked_at(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with pytest.raises(ConfigError, match=r"flow\.beta_alpha: expected a finite number, got nan"):
        replace(config, model=replace(config.model, flow=replace(config.model.flow, beta_alpha=float("nan"))))
    with pytest.raises(ConfigError, match=r"dit\.rope_scale: expected a finite number"):
        replace(config, model=replace(config.model, dit=replace(config.model.dit, rope_scale=(1.0, float("inf"), 1.0))))
