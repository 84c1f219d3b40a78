"""Opening, building, saving and converting checkpoints; what a user gets to read when one is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import pt, same_tensors

from dit4dit import Policy
from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import published
from dit4dit.checkpoints.weights import build, from_cosmos
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.files.keys import read_yaml
from dit4dit.presets import preset

CPU = torch.device("cpu")
F32 = {"device": CPU, "dtype": torch.float32, "head_dtype": torch.float32}


# -- published layout ------------------------------------------------------------------------------------------------


def test_published_configuration_is_read(golden_dir: Path) -> None:
    model = ck.open_checkpoint(golden_dir / "gr1_tiny").model
    assert (model.frames, model.latent_frames, model.extract_layer, model.text.max_length) == (9, 3, 3, 192)
    assert (model.head.width, model.head.num_heads, model.head.state_dim, model.head.action_horizon) == (64, 4, 64, 16)
    assert model.flow.repeated_diffusion_steps == 4, "trainer's number is the live one, not action_model's 8"
    assert (model.flow.high_sigma_ratio, model.flow.high_sigma_min) == (0.35, 0.98)
    assert model.sigma_max == 200.0
    vae = json.loads((golden_dir / "gr1_tiny" / "cosmos" / "vae" / "config.json").read_text())
    assert model.vae.latents_std == tuple(vae["latents_std"])
    assert model.vae.latents_mean == tuple(vae["latents_mean"])


def test_ignored_keys_are_listed(golden_dir: Path) -> None:
    ignored = ck.open_checkpoint(golden_dir / "libero_tiny").ignored
    assert "wandb_project" in ignored
    assert "framework.action_model.repeated_diffusion_steps" in ignored
    assert not any("extract_layer" in key or "video_delta_indices" in key for key in ignored)


def test_missing_unread_keys_fall_back_to_the_published_values(libero_run: Path) -> None:
    data = read_yaml(libero_run / "config.yaml")
    kept = {key: data["framework"]["action_model"][key] for key in ("action_dim", "action_horizon", "state_dim")}
    kept["diffusion_model_cfg"] = data["framework"]["action_model"]["diffusion_model_cfg"]
    indices = {"video_delta_indices": list(range(9)), "action_video_freq_ratio": 2}
    lean = {"framework": {"action_model": kept, "cosmos25": {"extract_layer": 3}}, "datasets": {"vla_data": indices}}
    (libero_run / "config.yaml").write_text(json.dumps(lean))
    model = published.read_run(libero_run / "config.yaml", libero_run / "cosmos")
    assert model.model.text.max_length == 512
    assert model.model.head.num_inference_timesteps == 4
    assert model.model.flow.time_distribution == "logit_normal"
    assert model.model.flow.high_sigma_ratio == 0.05
    assert model.data_mix is None


@pytest.mark.parametrize("kind, sizes", [("DiT-B", (12, 64)), ("DiT-L", (32, 48))])
def test_head_types(libero_run: Path, kind: str, sizes: tuple[int, int]) -> None:
    config = libero_run / "config.yaml"
    data = read_yaml(config)
    head = data["framework"]["action_model"]
    head["action_model_type"] = kind
    for key in ("input_embedding_dim", "num_attention_heads", "attention_head_dim"):
        del head["diffusion_model_cfg"][key]
    config.write_text(json.dumps(data))
    model = published.read_run(config, libero_run / "cosmos").model
    assert (model.head.num_heads, model.head.head_dim) == sizes


def test_the_highest_step_wins_and_a_named_file_is_taken(libero_run: Path) -> None:
    (libero_run / "checkpoints" / "steps_9_pytorch_model.pt").write_bytes(pt(libero_run).read_bytes())
    assert ck.open_checkpoint(libero_run).path.name == "steps_10_pytorch_model.pt"
    named = libero_run / "checkpoints" / "steps_9_pytorch_model.pt"
    assert ck.open_checkpoint(named).path == named
    final = libero_run / "final_model"
    final.mkdir()
    shutil.move(pt(libero_run), final / "pytorch_model.pt")
    named.unlink()
    assert ck.open_checkpoint(libero_run).path == final / "pytorch_model.pt"


def test_backbone_by_argument_variable_and_hub(libero_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = libero_run.parent / "elsewhere"
    shutil.move(libero_run / "cosmos", moved)
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        return str(moved)

    monkeypatch.delenv("DIT4DIT_BACKBONE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert ck.open_checkpoint(libero_run, backbone=moved).tokenizer == moved / "tokenizer"
    assert not asked
    ck.open_checkpoint(libero_run)
    assert asked == [("nvidia/Cosmos-Predict2.5-2B", "diffusers/base/post-trained", ck.SMALL_FILES)]
    monkeypatch.setenv("DIT4DIT_BACKBONE", str(moved))
    ck.open_checkpoint(libero_run)
    assert len(asked) == 1
    monkeypatch.setenv("DIT4DIT_BACKBONE", "/nowhere at all")
    with pytest.raises(CheckpointError, match="no such folder"):
        ck.open_checkpoint(libero_run)


def test_weights_are_copied_out_of_the_file(libero_run: Path) -> None:
    opened = ck.open_checkpoint(libero_run)
    model = build(opened.model, opened.tensors, "here", **F32)
    before = model.head.action_decoder.layer2.weight.clone()
    with pt(libero_run).open("r+b") as stream:
        stream.write(b"\0" * pt(libero_run).stat().st_size)
    assert torch.equal(model.head.action_decoder.layer2.weight, before)


def test_parts_that_are_not_needed_are_not_read(golden_dir: Path) -> None:
    opened = ck.open_checkpoint(golden_dir / "libero_tiny")
    tensors = {n: t for n, t in opened.tensors.items() if not n.startswith(ck.TEXT) and ".vae.decoder." not in n}
    model = build(opened.model, tensors, "here", **F32, with_text=False)
    assert model.text is None
    assert model.video_vae is None
    with pytest.raises(CheckpointError, match=r"here: text encoder: .* tensors missing"):
        build(opened.model, tensors, "here", **F32)


# -- broken checkpoints ----------------------------------------------------------------------------------------------


def truncate(run: Path) -> None:
    pt(run).write_bytes(pt(run).read_bytes()[:-5000])


def not_a_state_dict(run: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, pt(run))


def other_tensors(run: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, pt(run))


def pickled_code(run: Path) -> None:
    torch.save({"a": Path("x")}, pt(run))


def drop_key(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("    action_dim: 8\n", ""))


def wrong_kind(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("    action_horizon: 8\n", "    action_horizon: eight\n"))


def bad_yaml(run: Path) -> None:
    (run / "config.yaml").write_text("framework: [unclosed")


def twice(run: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write("\nframework: {}\n")


def odd_picture(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("    - 224\n    - 224\n    delete", "    - 230\n    - 224\n    delete")
    )


def other_widths(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("    hidden_size: 96\n", "    hidden_size: 128\n"))


BROKEN = {
    "missing .pt": (lambda run: pt(run).unlink(), "no checkpoints/steps_N_pytorch_model.pt"),
    "truncated .pt": (truncate, "truncated, or not written by torch.save? copy it again"),
    "nested .pt": (not_a_state_dict, "expected a flat state dict"),
    "other .pt": (other_tensors, "not a DiT4DiT checkpoint"),
    "code in .pt": (pickled_code, "not readable as a PyTorch checkpoint"),
    "missing key": (drop_key, "missing key 'framework.action_model.action_dim'"),
    "wrong kind": (wrong_kind, "action_horizon: expected an integer of at least 1, got 'eight'"),
    "bad yaml": (bad_yaml, "not readable YAML"),
    "key twice": (twice, "found duplicate key framework"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "neither config.yaml"),
    "no statistics": (lambda run: (run / "dataset_statistics.json").unlink(), "no such file"),
    "odd picture": (odd_picture, "image_size: expected multiples of 16, got (230, 224)"),
    "other widths": (other_widths, "expected shape [128, 16] from the configuration, got [96, 16]"),
    "no backbone": (
        lambda run: (run / "cosmos" / "transformer" / "config.json").unlink(),
        "expected a Cosmos-Predict2.5",
    ),
    "broken tokenizer": (
        lambda run: (run / "cosmos" / "tokenizer" / "tokenizer.json").write_text("{}"),
        "not a readable tokenizer",
    ),
    "no tokenizer": (lambda run: shutil.rmtree(run / "cosmos" / "tokenizer"), "no tokenizer_config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_gives_one_clear_line(libero_run: Path, name: str) -> None:
    spoil, wanted = BROKEN[name]
    spoil(libero_run)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Policy.from_pretrained(libero_run, device="cpu")
    message = str(caught.value)
    assert wanted in message
    assert "\n" not in message
    assert str(libero_run) in message


@pytest.mark.parametrize("path", ["nowhere", "/nowhere/run", "nowhere.pt"])
def test_no_such_checkpoint(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        ck.open_checkpoint(path)


# -- Cosmos folders --------------------------------------------------------------------------------------------------


def test_a_cosmos_folder_loads_with_a_fresh_head(cosmos_folder: Path, golden_dir: Path) -> None:
    base = preset("tiny").model
    model = from_cosmos(cosmos_folder, base, seed=1)
    again = from_cosmos(cosmos_folder, base, seed=1)
    opened = ck.open_checkpoint(golden_dir / "libero_tiny")
    source = build(opened.model, opened.tensors, "x", **F32)
    assert same_tensors(model.backbone.transformer.state_dict(), source.backbone.transformer.state_dict())
    assert same_tensors(model.text.state_dict(), source.text.state_dict())
    assert same_tensors(model.head.state_dict(), again.head.state_dict())
    assert model.config.head == base.head


def test_a_backbone_folder_without_weights_says_so(golden_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights, download them too"):
        from_cosmos(golden_dir / "libero_tiny" / "cosmos", preset("tiny").model, seed=0)


def test_a_truncated_safetensors_file_says_so(cosmos_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cosmos"
    shutil.copytree(cosmos_folder, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not readable"):
        from_cosmos(broken, preset("tiny").model, seed=0)
