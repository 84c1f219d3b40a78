"""The options of the published launch scripts behind `dit4dit train --config FILE`: what is read has its value, what is not is
listed once, and a typing mistake is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.cli import main
from dit4dit.training import published

FILE = Path(__file__).parents[1] / "golden" / "libero_tiny" / "config.yaml"
BASE = "framework.cosmos25.base_model"
FROZEN = "backbone_interface.extractor.text_encoder,backbone_interface.extractor.vae"
SCRIPT = {
    "config_yaml": "./DiT4DiT/config/libero/dit4dit_libero.yaml",
    "framework.name": "DiT4DiT",
    "framework.action_model.action_model_type": "DiT-B",
    "datasets.vla_data.data_root_dir": "/data/libero",
    "datasets.vla_data.data_mix": "libero_all",
    "datasets.vla_data.per_device_batch_size": "4",
    "trainer.freeze_modules": FROZEN,
    "trainer.max_train_steps": "100",
    "trainer.save_interval": "10",
    "trainer.logging_frequency": "5",
    "trainer.eval_interval": "50",
    "trainer.learning_rate.backbone_interface": "1e-5",
    "trainer.learning_rate.action_model": "2e-4",
    "trainer.num_warmup_steps": "50",
    "framework.cosmos25.extract_layer": "2",
    "framework.cosmos25.flow_matching.time_distribution": "uniform",
    "framework.cosmos25.flow_matching.high_sigma_ratio": "null",
    "framework.cosmos25.flow_matching.high_sigma_min": "null",
    "trainer.framework.cosmos25.conditional_frame_timestep": "0.0001",
    "datasets.vla_data.action_video_freq_ratio": "2",
    "run_root_dir": "./playground/Checkpoints_libero",
    "run_id": "20260401",
    "wandb_project": "DiT4DiT_libero",
    "wandb_entity": "your_wandb_entity",
}
"""What the published LIBERO script gives to train.py, with other numbers than the file has."""
UNREAD = {"config_yaml", "framework.name", "trainer.framework.cosmos25.conditional_frame_timestep", "wandb_entity"}


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(FILE), *map(str, words)])
    return int(end.value.code or 0)


def told(capsys: pytest.CaptureFixture[str]) -> tuple[dict, list[str]]:
    """The one JSON document on standard output, and what the one line on standard error says is unread."""
    said = capsys.readouterr()
    line, *rest = said.err.splitlines()
    assert rest == []
    head, _, names = line.partition(": unread, so without effect: ")
    assert head == str(FILE)
    return json.loads(said.out), names.split(", ")


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_a_launch_script_s_arguments(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for pair in SCRIPT.items() for word in form.format(*pair).split()]
    assert run(*words, "--print") == 0
    config, unread = told(capsys)
    optim, data, steps = config["optim"], config["data"], config["run"]
    assert (data["root"], data["mixture"], data["batch_size"]) == ("/data/libero", "libero_all", 4)
    assert (data["action_video_freq_ratio"], config["model"]["extract_layer"]) == (2, 2)
    assert config["model"]["flow"]["time_distribution"] == "uniform"
    assert (config["model"]["flow"]["high_sigma_ratio"], config["model"]["flow"]["high_sigma_min"]) == (None, None)
    assert optim["freeze"] == FROZEN.split(",")
    assert optim["learning_rate"] == {"base": 1e-5, "backbone_interface": 1e-5, "action_model": 2e-4}
    assert (optim["warmup_steps"], steps["steps"], steps["save_every"]) == (50, 100, 10)
    assert (steps["log_every"], steps["eval_every"]) == (5, 50)
    assert (steps["out"], steps["project"]) == ("playground/Checkpoints_libero/20260401", "DiT4DiT_libero")
    options = {name.removeprefix("--").partition(" ")[0] for name in unread if name.startswith("--")}
    assert options == UNREAD
    assert "--config_yaml (here: --config)" in unread
    # keys of the file beside them, each once
    assert {"trainer.epochs", "framework.cosmos25.attn_implementation", "is_debug"} <= set(unread)
    assert not {"framework.name", "wandb_entity"} & set(unread)
    assert len(set(unread)) == len(unread)


def test_what_the_file_has_unread_is_ignored_and_what_to_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--trainer.weight_decay", 0.1, "--trainer.epochs", 3, "--trainer.is_resume", "--is_debug")
    assert run(*words, "--print") == 0
    config, unread = told(capsys)
    assert config["optim"]["weight_decay"] == 1e-8
    assert unread[:4] == [
        "--trainer.weight_decay (here: --trainer.optimizer.weight_decay)",
        "--trainer.epochs",
        "--trainer.is_resume (here: --resume)",
        "--is_debug",
    ]


def test_flags_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trainer.enable_gradient_checkpointing", "false", "--print") == 0
    assert not told(capsys)[0]["run"]["gradient_checkpointing"]
    # the list of a launch script that freezes nothing is empty, so that its option has no value
    words = ("--trainer.enable_gradient_checkpointing", "--trainer.freeze_modules", "--run.compile", "--data.skip_bad")
    assert run(*words, "--print") == 0
    config = told(capsys)[0]
    assert (config["run"]["gradient_checkpointing"], config["run"]["compile"], config["data"]["skip_bad"]) == (
        True,
    ) * 3
    assert config["optim"]["freeze"] == []


@pytest.mark.parametrize(
    "words, message",
    [
        (("--trainer.max_train_step", "5"), "--trainer.max_train_step: nothing reads this key; did you mean "
         "'trainer.max_train_steps'?"),
        (("--trainer.max_trian_steps=5",), "did you mean 'trainer.max_train_steps'?"),
        (("--framework.nam", "X"), "--framework.nam: nothing reads this key; did you mean 'framework.name'?"),
        (("--framework.cosmos25.conditional_frame_timesteps", "X"), "did you mean"),
        (("--trainer.optimizer", "AdamW"), "--trainer.optimizer: expected one of its keys, --trainer.optimizer.KEY, got"),
        (("--wandb_entiti", "me"), "--wandb_entiti: unknown option 'wandb_entiti'; did you mean 'wandb_entity'?"),
        (("--config_yml", "x"), "--config_yml: unknown option 'config_yml'; did you mean 'config_yaml'?"),
        (("--num_processes", "8"), "--num_processes: unknown option 'num_processes'; did you mean 'processes'?"),
        (("--trainer.max_train_steps", "many"), "error: --trainer.max_train_steps: expected an integer of at least 1, got"),
        (("--trainer.max_train_steps",), "error: --trainer.max_train_steps: expected an integer of at least 1, got True"),
        (("--trainer.pretrained_checkpoint", "x.pt"), "give the checkpoint with --weights.checkpoint"),
        (("--run.steps",), "--run.steps: expected a value after it"),
        (("5", "--trainer.max_train_steps"), "'5': expected --a.b.c value"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--print") == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("--wandb_entity", "me", "--print") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words, message",
    [
        (("--config_yaml", str(FILE)), "and --config FILE, not --config_yaml"),
        (("--recipe", "libero", "--wandb_entity", "me"), "'wandb_entity'; it goes with a published file, --config FILE"),
        (("--recipe", "libero", "--trainer.max_train_steps", "9"), "'trainer'; it goes with a published file, --config FILE"),
    ],
)  # fmt: skip
def test_without_a_published_file(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *words])
    assert message in capsys.readouterr().err


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where its Cosmos folder is not there, nor one beside it, on a machine that cannot ask the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    file = tmp_path / "published.yaml"
    file.write_text(FILE.read_text().replace("/path/to/Cosmos-Predict2.5-2B", "/models/cosmos"))
    return file


def test_a_missing_cosmos_folder_is_named_with_an_option(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (((), "'/models/cosmos'"), ((f"--{BASE}", "/given/cosmos"), "/given/cosmos: no such folder")):
        with pytest.raises(SystemExit) as end:
            main(["train", "--config", str(nowhere), *words, "--dry-run"])
        said = capsys.readouterr().err
        assert (end.value.code, said.count("\n")) == (2, 1)
        assert named in said
        assert "with --weights.backbone" in said
        assert " --backbone" not in said


def test_another_backbone_than_the_file_s_is_told(
    nowhere: Path, cosmos_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cosmos_folder))
    assert published.read(nowhere, {}, None)[0].weights.backbone == ck.HUB_BACKBONE
    assert caplog.messages == [
        f"{nowhere}: {BASE}: no Cosmos-Predict2.5 folder at '/models/cosmos'; {ck.HUB_BACKBONE} is used"
    ]
    caplog.clear()
    # who names one has chosen
    published.read(nowhere, {}, str(cosmos_folder))
    monkeypatch.setenv("DIT4DIT_BACKBONE", str(cosmos_folder))
    published.read(nowhere, {}, None)
    assert caplog.messages == []
