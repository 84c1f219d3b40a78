"""Recipes, files and words of the command line; the published file's dead keys; nothing that nobody reads."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from dit4dit.cli import main
from dit4dit.errors import ConfigError
from dit4dit.training import config as module
from dit4dit.training import published
from dit4dit.training.config import TrainConfig, read_config, split_words, write_config
from dit4dit.training.recipes import RECIPES, recipe

SOURCE = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, words)])
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_round_trip_through_their_file(name: str, tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", recipe(name))
    assert read_config(tmp_path / "config.yaml") == recipe(name)


def test_words_change_copies() -> None:
    words = ["--optim.clip", "0.5", "--optim.betas=0.8,0.9", "--optim.freeze", "a.b, c", "--data.workers", "0"]
    words += [
        "--model.flow.high_sigma_ratio",
        "none",
        "--run.out",
        "12",
        "--optim.ema",
        "0.999",
        "--run.compile",
        "true",
    ]
    changed = recipe("libero").override(split_words(words))
    assert (changed.optim.clip, changed.optim.betas, changed.optim.freeze) == (0.5, (0.8, 0.9), ("a.b", "c"))
    assert (changed.data.workers, changed.run.out, changed.optim.ema, changed.run.compile) == (0, "12", 0.999, True)
    assert changed.model == recipe("libero").model


@pytest.mark.parametrize(
    "words, message",
    [
        (("--recipe", "libro"), "--recipe libro: unknown; did you mean 'libero'?"),
        ((), "usage"),
        (("--recipe", "libero", "--config", "x"), "give one of --recipe"),
        (("--run.steps", "3"), "give one of --recipe"),
        (("--recipe", "libero", "--optim.lernrate", "1"), "unknown key 'lernrate'; did you mean 'learning_rate'?"),
        (("--recipe", "libero", "--optm.clip", "1"), "--optm.clip: unknown option 'optm'; did you mean 'optim'?"),
        (("--recipe", "libero", "--trainer.max_train_steps", "1"), "unknown option 'trainer'"),
        (("--recipe", "libero", "--run.steps"), "--run.steps: expected a value after it"),
        (("--recipe", "libero", "--run.steps", "many"), "error: --run.steps: expected int, got 'many'"),
        (("--recipe", "libero", "--run.precision", "float8"), "expected one of float32, bfloat16, float16, got 'float8'"),
        (("--recipe", "libero", "steps"), "'steps': expected --a.b.c value"),
        (("libero",), "and --config FILE, not 'libero'"),
        (("--recipe", "libero", "--processes", "2"), "--processes: goes with --dry-run"),
        (("--recipe", "tabletop", "--run.out", "nowhere", "--resume"), "nowhere has no checkpoint"),
        (("--recipe", "libero", "--run.strategy", "fsdp2", "--run.precision", "float16"), "float16 scales its loss"),
        (("--recipe", "libero", "--dry-rn"), "--dry-rn: unknown option 'dry-rn'; did you mean 'dry-run'?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys) -> None:
    code = run(*words)
    said = capsys.readouterr()
    if not words:
        assert (code, said.out.startswith(message)) == (0, True)
        return
    assert code == 2
    assert said.err.startswith("dit4dit train: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_published_files_are_read_as_the_published_code_reads_them() -> None:
    config, ignored = published.read(GOLDEN / "gr1_tiny" / "config.yaml", {}, None)
    assert (config.run.steps, config.optim.warmup_steps, config.run.save_every) == (100_000, 5000, 5000)
    # the live one of each pair
    assert (config.optim.weight_decay, config.optim.clip, config.model.flow.repeated_diffusion_steps) == (1e-8, 1.0, 4)
    assert (config.embodiment, config.data.mixture, config.data.batch_size) == ("gr1", "fourier_gr1_unified_1000", 16)
    assert config.data.video_delta_indices == tuple(range(17))
    assert config.data.action_video_freq_ratio == 2
    assert (config.run.precision, config.run.gradient_checkpointing) == ("bfloat16", True)
    dead = {"trainer.weight_decay", "trainer.warmup_ratio", "trainer.max_grad_norm", "trainer.epochs"}
    assert dead | {"framework.action_model.repeated_diffusion_steps"} <= set(ignored)
    libero, _ = published.read(GOLDEN / "libero_tiny" / "config.yaml", {"trainer.freeze_modules": "a.b,c"}, None)
    assert libero.optim.freeze == ("a.b", "c")
    assert libero.model.flow.high_sigma_ratio is None


def test_published_words(capsys) -> None:
    file = GOLDEN / "gr1_tiny" / "config.yaml"
    assert run("--config", file, "--trainer.max_train_steps", "7", "--optim.clip", "0.25", "--print") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run"]["steps"], printed["optim"]["clip"]) == (7, 0.25)
    assert run("--config", file, "--trainer.optimizer.name", "Muon", "--print") == 2
    assert "--trainer.optimizer.name: only 'AdamW' is known, got 'Muon'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "group, keys", [("framework", "name, "), ("trainer.learning_rate", "base, "), ("trainer", "epochs, ")]
)
def test_a_value_does_not_take_the_place_of_a_group(group: str, keys: str, capsys) -> None:
    assert run("--config", GOLDEN / "gr1_tiny" / "config.yaml", f"--{group}", 5, "--print") == 2
    said = f"--{group}: expected one of its keys, --{group}.KEY, got 5; keys: {keys}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, trackers",
    [("wandb", True), ("jsonl,wandb", True), ("[jsonl, wandb]", True), ("jsonl", False), ("null", False)],
)
def test_trackers_are_read_however_they_are_written(words: str, trackers: bool, capsys) -> None:
    file = GOLDEN / "gr1_tiny" / "config.yaml"
    assert run("--config", file, "--trackers", words, "--print") == 0
    assert ("wandb" in json.loads(capsys.readouterr().out)["run"]["trackers"]) == trackers
    assert run("--config", file, "--trackers", "--print") == 2
    assert "--trackers: expected a list of words, such as [jsonl, wandb], got True" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_can_be_left_out(monkeypatch, tmp_path: Path, capsys) -> None:
    """The published files have wandb."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["--config", GOLDEN / "gr1_tiny" / "config.yaml", "--run_root_dir", tmp_path, "--dry-run"]
    assert run(*words) == 2
    option = "--run.trackers tensorboard"
    assert f"pip install 'dit4dit[wandb]', or train without it: {option}\n" in capsys.readouterr().err
    assert run(*words, *option.split()) == 2  # there are no data here
    said = capsys.readouterr()
    assert "no such folder, wanted a data set" in said.err
    assert "wandb is not" not in said.out + said.err


@pytest.mark.parametrize("name", RECIPES)
def test_print_leaves_one_json_document(name: str, capsys) -> None:
    assert run("--recipe", name, "--print") == 0
    said = capsys.readouterr()
    assert TrainConfig.from_dict(json.loads(said.out), "printed") == recipe(name)
    assert said.err == ""


def test_our_own_file_refuses_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_config(file, recipe("libero"))
    file.write_text(file.read_text().replace("  warmup_steps:", "  warm_steps:"))
    with pytest.raises(ConfigError, match="unknown key 'warm_steps'; did you mean 'warmup_steps'"):
        read_config(file)


def test_every_field_is_read() -> None:
    read: set[str] = set()
    for file in (SOURCE / "dit4dit").rglob("*.py"):
        tree = ast.parse(file.read_text())
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    configs = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    fields = {f"{c.__name__}.{f.name}": f.name for c in configs for f in dataclasses.fields(c)}
    assert TrainConfig in configs
    assert len(fields) > 40
    # one rate per group is looked up by the group's name
    groups = {f.name for f in dataclasses.fields(module.LearningRates)}
    assert [name for name, attribute in fields.items() if attribute not in read | groups] == []
