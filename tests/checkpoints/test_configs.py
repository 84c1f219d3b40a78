"""Configurations of checkpoints that cannot be meant: refused before anything is built, with file and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dit4dit.checkpoints import checkpoint as ck
from dit4dit.checkpoints import native
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.files.keys import read_yaml


def refusal(run: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        ck.open_checkpoint(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(run: Path, old: str, new: str) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "old, new, wanted",
    [
        ("num_inference_timesteps: 4", "num_inference_timesteps: 1001", "timesteps: at most num_timestep_buckets = 1000"),
        ("noise_s: 0.999", "noise_s: true", "framework.action_model.noise_s: expected a finite number, got True"),
        ("noise_s: 0.999", "noise_s: .nan", "framework.action_model.noise_s: expected a finite number, got nan"),
        ("noise_s: 0.999", "noise_s: .inf", "framework.action_model.noise_s: expected a finite number, got inf"),
        ("noise_beta_alpha: 1.5", "noise_beta_alpha: 1.0e+400", "noise_beta_alpha: expected a finite number, got inf"),
        ("noise_beta_alpha: 1.5", "noise_beta_alpha: -1.5", "flow.beta_alpha: expected more than 0, got -1.5"),
        ("dropout: 0.2", "dropout: 1.0", "head.dropout: expected a share from 0 to below 1, got 1.0"),
        ("conditional_frame_timestep: 0.0001", "conditional_frame_timestep: -.inf", "expected a finite number, got -inf"),
        ("noise_s: 0.999", "noise_s: ${oc.env:DIT4DIT_NOWHERE}", "noise_s: '${oc.env:DIT4DIT_NOWHERE}' has no value"),
        ("- 224\n    - 224\n    delete", "- 1936\n    - 224\n    delete", "at most 1920 x 1920 pixels, got 1936 x 224"),
    ],
)  # fmt: skip
def test_a_configuration_is_refused_before_anything_is_built(libero_run: Path, old: str, new: str, wanted: str) -> None:
    edit(libero_run, old, new)
    said = refusal(libero_run)
    assert wanted in said
    assert said.startswith(str(libero_run / "config.yaml"))


def test_two_views_side_by_side_must_fit(libero_run: Path) -> None:
    from dit4dit import Policy

    edit(libero_run, "- 224\n    - 224\n    delete", "- 224\n    - 976\n    delete")
    with pytest.raises(ConfigError, match="at most 1920 x 1920 pixels, got 224 x 1952"):
        Policy.from_pretrained(libero_run, device="cpu")


def test_an_unset_variable_that_nobody_reads_does_not_matter(libero_run: Path) -> None:
    edit(libero_run, "wandb_entity: your_wandb_entity", "wandb_entity: ${oc.env:DIT4DIT_NOWHERE}")
    edit(libero_run, "base_model: /path/to/Cosmos-Predict2.5-2B", "base_model: '${oc.env:DIT4DIT_NOWHERE}/x'")
    opened = ck.open_checkpoint(libero_run)
    assert "wandb_entity" in opened.ignored
    assert len(opened.tensors) == len(ck.load_pt(opened.path))
    with pytest.raises(
        ConfigError, match=r"wandb_entity: .*DIT4DIT_NOWHERE.* has no value .*'DIT4DIT_NOWHERE' not found"
    ):
        read_yaml(libero_run / "config.yaml")
    from dit4dit.training import published

    with pytest.raises(ConfigError, match=r"framework\.cosmos25\.base_model: .*DIT4DIT_NOWHERE"):
        published.read(libero_run / "config.yaml", {}, None)
    config, _ = published.read(libero_run / "config.yaml", {}, str(libero_run / "cosmos"))
    assert config.weights.backbone == str(libero_run / "cosmos")


@pytest.mark.parametrize(
    "file, key, value, wanted",
    [
        ("vae/config.json", "latents_std", [float("inf")] * 16, "latents_std: expected a list of finite numbers"),
        ("vae/config.json", "latents_std", [0.0] * 16, "vae.latents_std: expected more than 0"),
        ("transformer/config.json", "mlp_ratio", float("nan"), "mlp_ratio: expected a finite number, got nan"),
        ("transformer/config.json", "max_size", [128, 8, 8], "image_size: at most 64 x 64 pixels, got 224 x 224"),
        ("transformer/config.json", "max_size", [1, 240, 240], "frames: at most 1 latent frames"),
        ("transformer/config.json", "attention_head_dim", 11, "dit.head_dim: expected an even number of at least 12"),
        ("transformer/config.json", "attention_head_dim", 10, "dit.head_dim: expected an even number of at least 12"),
        ("scheduler/scheduler_config.json", "sigma_max", 10**400, "sigma_max: expected a finite number"),
        ("text_encoder/config.json", "text_config", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 259, "rms_norm_eps": float("inf")},
         "rms_norm_eps: expected a finite number, got inf"),
    ],
)  # fmt: skip
def test_json_of_a_cosmos_folder_is_finite(libero_run: Path, file: str, key: str, value, wanted: str) -> None:
    path = libero_run / "cosmos" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert wanted in refusal(libero_run)


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("num_attention_heads", 3, "text.num_heads: expected a divisor of hidden_size = 32, got 3"),
        ("num_key_value_heads", 3, "text.num_kv_heads: expected a divisor of num_heads = 2, got 3"),
        ("rope_scaling", {"mrope_section": [16, 24, 24]}, "text.mrope_section: expected sizes that add up to 8, half of"),
        ("rope_scaling", None, "text.mrope_section: expected sizes that add up to 8"),
    ],
)  # fmt: skip
def test_sizes_of_a_text_encoder_that_cannot_be(libero_run: Path, key: str, value, wanted: str) -> None:
    """Else it is built, and the first prompt fails."""
    path = libero_run / "cosmos" / "text_encoder" / "config.json"
    data = json.loads(path.read_text())
    data["text_config"][key] = value
    path.write_text(json.dumps(data))
    assert refusal(libero_run).startswith(f"{path}: {wanted}")


def test_a_head_of_odd_width(libero_run: Path) -> None:
    edit(libero_run, "num_attention_heads: 4", "num_attention_heads: 5")
    edit(libero_run, "attention_head_dim: 16", "attention_head_dim: 13")
    edit(libero_run, "input_embedding_dim: 64", "input_embedding_dim: 65")
    assert "head.head_dim: expected num_heads x head_dim to be even, got 5 x 13" in refusal(libero_run)


def test_the_largest_images_are_those_of_diffusers(libero_run: Path) -> None:
    """max_size counts latents: diffusers' rotary embedding has max_size / patch_size positions."""
    cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    model = ck.open_checkpoint(libero_run).model
    rope = cosmos.CosmosRotaryPosEmbed(model.dit.head_dim, max_size=model.dit.max_size)
    most = tuple(model.pixels_per_token * tokens for tokens in rope.max_size[1:])
    assert most == (1920, 1920)
    rows, columns = model.latent_size(*most)
    assert (rows, columns) == model.dit.max_size[1:]
    for height, width in ((most[0] + 16, 16), (16, most[1] + 16)):
        with pytest.raises(ConfigError, match=f"at most 1920 x 1920 pixels, got {height} x {width}"):
            model.latent_size(height, width)


def test_the_own_format_is_held_to_the_same(golden_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    native.to_own(golden_dir / "libero_tiny", own)
    config, where = json.loads((own / "config.json").read_text()), str(own / "config.json")
    for part, key, value, wanted in (
        (None, "sigma_max", float("nan"), "model.sigma_max: expected a finite number, got nan"),
        ("flow", "time_scale", float("inf"), "model.flow.time_scale: expected a finite number, got inf"),
        ("flow", "time_scale", 10**400, "model.flow.time_scale: expected a number that a float can hold"),
        ("vae", "latents_std", [float("-inf")] * 16, "model.vae.latents_std[0]: expected a finite number, got -inf"),
        ("head", "num_inference_timesteps", 2000, "head.num_inference_timesteps: at most num_timestep_buckets"),
    ):
        changed = json.loads(json.dumps(config))
        (changed["model"] if part is None else changed["model"][part])[key] = value
        (own / "config.json").write_text(json.dumps(changed))
        said = refusal(own)
        assert said.startswith(where)
        assert wanted in said
    for text in ('{"format": "dit4dit", "x": ' + "9" * 5000 + "}", "[" * 100_000):
        (own / "config.json").write_text(text)
        assert "config.json: not valid JSON" in refusal(own)
    (own / "config.json").write_text(json.dumps(config))
    save_file({f"{ck.VAE}quant_conv.weight": torch.zeros(1)}, own / "extra.safetensors")
    assert "both hold the tensor" in refusal(own)


def test_more_euler_steps_than_buckets(libero_run: Path) -> None:
    from dit4dit import Policy

    edit(libero_run, "num_timestep_buckets: 1000", "num_timestep_buckets: 4")
    with pytest.raises(ConfigError, match="engine steps: at most the model's num_timestep_buckets = 4, got 8"):
        Policy.from_pretrained(libero_run, device="cpu", steps=8)
