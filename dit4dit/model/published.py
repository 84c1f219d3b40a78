"""Reading what others wrote: the published run folder's config.yaml and a Cosmos-Predict2.5 folder's JSON files.

This reader, alone in the package, ignores keys that it does not know, because published runs carry many that nothing
reads; it lists them, and it falls back to the published values where a run did not store a key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit4dit.config import FlowConfig, HeadConfig, ModelConfig, TextConfig, VaeConfig, VideoDitConfig
from dit4dit.errors import CheckpointError, ConfigError, did_you_mean

ACTION_MODEL_TYPES = {"DiT-B": (12, 64), "DiT-L": (32, 48)}

# which of the published data mixtures and statistics tags mean which embodiment
MIXTURES = {"libero_all": "libero", "fourier_gr1_unified_1000": "gr1", "fourier_gr1_pretrain_10K": "gr1"}
TAGS = {"franka": "libero", "gr1": "gr1"}

_NEEDED = object()


@dataclass(frozen=True)
class PublishedRun:
    """What a run folder's config.yaml says about its model.

    Attributes:
        model: the configuration; sizes of text encoder, VAE and backbone come from the Cosmos folder.
        data_mix: the data mixture it was trained on, where the run kept it.
        ignored: dotted keys of the file that nothing here reads.
    """

    model: ModelConfig
    data_mix: str | None
    ignored: tuple[str, ...]


class KeyReader:
    """Dotted access to a nested mapping that remembers what was read."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _NEEDED, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value at dotted `key`; ConfigError when it is needed and missing, or of another type than `kind`."""
        self._read.add(key)
        node: Any = self.data
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                if default is _NEEDED:
                    raise ConfigError(f"{self.where}: missing key {key!r}; a published run's config.yaml has it")
                return default
            node = node[part]
        if kind is not None and node is not None and (not isinstance(node, kind) or isinstance(node, bool)):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"{self.where}: {key}: expected {names}, got {node!r}")
        return node

    def unread(self) -> tuple[str, ...]:
        """Dotted keys of all leaves that nobody asked for, in file order."""
        return tuple(
            key for key in _leaves(self.data) if not any(key == r or key.startswith(r + ".") for r in self._read)
        )


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def read_run(config_path: Path, cosmos: Path) -> PublishedRun:
    """The model of a published run folder, from its config.yaml and the small files of a Cosmos folder.

    Raises:
        CheckpointError: a file is missing or unreadable. ConfigError: a needed key is missing or has another type.
    """
    text, vae, dit, sigma_max = read_cosmos(cosmos)
    keys = KeyReader(read_yaml(config_path), str(config_path))
    deltas = keys.get("datasets.vla_data.video_delta_indices", kind=list)
    ratio = keys.get("datasets.vla_data.action_video_freq_ratio", 1, int)
    size = keys.get("datasets.vla_data.image_size", [224, 224], list)
    try:
        model = ModelConfig(
            text=replace(text, max_length=keys.get("framework.cosmos25.max_sequence_length", 512, int)),
            vae=vae,
            dit=dit,
            head=_read_head(keys, dit.width),
            flow=_read_flow(keys),
            frames=len(range(0, len(deltas), ratio)),
            image_size=(int(size[0]), int(size[1])),
            extract_layer=keys.get("framework.cosmos25.extract_layer", 17, int),
            conditional_frame_timestep=float(keys.get("framework.cosmos25.conditional_frame_timestep", 0.0001)),
            sigma_max=sigma_max,
        )
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(keys.where) else f"{keys.where}: {error}") from None
    data_mix = keys.get("datasets.vla_data.data_mix", None, str)
    return PublishedRun(model=model, data_mix=data_mix, ignored=keys.unread())


def _read_head(keys: KeyReader, context_dim: int) -> HeadConfig:
    def get(key: str, default: Any = _NEEDED, kind: type | tuple[type, ...] | None = None) -> Any:
        return keys.get(f"framework.action_model.{key}", default, kind)

    kind = get("action_model_type", "DiT-B")
    if kind not in ACTION_MODEL_TYPES:
        raise ConfigError(
            f"{keys.where}: framework.action_model.action_model_type: expected {' or '.join(ACTION_MODEL_TYPES)}, "
            f"got {kind!r}{did_you_mean(str(kind), list(ACTION_MODEL_TYPES))}"
        )
    heads, head_dim = ACTION_MODEL_TYPES[kind]
    heads = get("diffusion_model_cfg.num_attention_heads", heads, int)
    head_dim = get("diffusion_model_cfg.attention_head_dim", head_dim, int)
    for key, wanted in (("norm_type", "ada_norm"), ("positional_embeddings", None)):
        got = get(f"diffusion_model_cfg.{key}", wanted)
        if got != wanted:
            raise ConfigError(
                f"{keys.where}: framework.action_model.diffusion_model_cfg.{key}: only {wanted!r} is known, got {got!r}"
            )
    width = get("diffusion_model_cfg.input_embedding_dim", heads * head_dim, int)
    if width != heads * head_dim:
        raise ConfigError(
            f"{keys.where}: framework.action_model.diffusion_model_cfg.input_embedding_dim: expected "
            f"{heads} heads x {head_dim} = {heads * head_dim}, got {width}"
        )
    hidden = get("hidden_size", 2560, int)
    return HeadConfig(
        num_layers=get("diffusion_model_cfg.num_layers", 16, int),
        num_heads=heads,
        head_dim=head_dim,
        hidden_size=hidden,
        output_dim=get("diffusion_model_cfg.output_dim", hidden, int),
        action_dim=get("action_dim", kind=int),
        action_horizon=get("action_horizon", kind=int),
        state_dim=get("state_dim", None, int) or None,
        context_dim=get("diffusion_model_cfg.cross_attention_dim", context_dim, int),
        interleave_self_attention=bool(get("diffusion_model_cfg.interleave_self_attention", True)),
        add_pos_embed=bool(get("add_pos_embed", True)),
        max_seq_len=get("max_seq_len", 1024, int),
        dropout=float(get("diffusion_model_cfg.dropout", 0.2)),
        final_dropout=bool(get("diffusion_model_cfg.final_dropout", True)),
        num_inference_timesteps=get("num_inference_timesteps", 4, int),
        num_timestep_buckets=get("num_timestep_buckets", 1000, int),
    )


def _read_flow(keys: KeyReader) -> FlowConfig:
    matching = "framework.cosmos25.flow_matching"
    ratio = keys.get(f"{matching}.high_sigma_ratio", 0.05, (float, int))
    lowest = keys.get(f"{matching}.high_sigma_min", 0.98, (float, int))
    if not ratio or lowest is None:
        ratio = lowest = None
    return FlowConfig(
        training=str(keys.get("framework.cosmos25.training", "joint")).lower(),  # type: ignore[arg-type]
        beta_alpha=float(keys.get("framework.action_model.noise_beta_alpha", 1.5)),
        beta_beta=float(keys.get("framework.action_model.noise_beta_beta", 1.0)),
        time_scale=float(keys.get("framework.action_model.noise_s", 0.999)),
        time_distribution=keys.get(f"{matching}.time_distribution", "logit_normal", str),
        high_sigma_ratio=ratio,
        high_sigma_min=lowest,
        # the live one of two; framework.action_model.repeated_diffusion_steps is read by nothing
        repeated_diffusion_steps=keys.get("trainer.repeated_diffusion_steps", 4, int),
        future_video_weight=float(keys.get("trainer.loss_scale.future_video", 1.0)),
    )


def read_cosmos(folder: Path) -> tuple[TextConfig, VaeConfig, VideoDitConfig, float]:
    """Sizes from the JSON files of a Cosmos-Predict2.5 folder: text encoder, VAE, backbone, and sigma_max."""
    if not (folder / "transformer" / "config.json").is_file():
        raise CheckpointError(
            f"backbone {folder}: expected a Cosmos-Predict2.5 folder in diffusers' layout (transformer/config.json, "
            "vae/, text_encoder/, tokenizer/, scheduler/), found none; give the folder with --backbone or DIT4DIT_BACKBONE"
        )
    text = read_text_config(read_json(folder / "text_encoder" / "config.json"))
    vae = read_vae_config(read_json(folder / "vae" / "config.json"), str(folder / "vae" / "config.json"))
    where = str(folder / "transformer" / "config.json")
    dit = read_dit_config(read_json(folder / "transformer" / "config.json"), where)
    sigma_max = float(read_json(folder / "scheduler" / "scheduler_config.json").get("sigma_max") or 200.0)
    return text, vae, dit, sigma_max


def read_text_config(data: dict[str, Any]) -> TextConfig:
    """transformers' Qwen2.5-VL configuration, flat (older files) or with a text_config."""
    text = {**data, **data.get("text_config", {})}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    default = TextConfig()
    return TextConfig(
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", default.rope_theta))),
        mrope_section=tuple(rope.get("mrope_section", default.mrope_section)),
        rms_norm_eps=text.get("rms_norm_eps", default.rms_norm_eps),
        max_position_embeddings=text.get("max_position_embeddings", default.max_position_embeddings),
    )


def read_vae_config(data: dict[str, Any], where: str) -> VaeConfig:
    """diffusers' `AutoencoderKLWan` configuration; only Wan 2.1's plain form is known."""
    for key in ("is_residual", "attn_scales", "patch_size"):
        if data.get(key):
            raise ConfigError(f"{where}: {key}: only the Wan 2.1 VAE is known, which has none, got {data[key]!r}")
    default = VaeConfig()
    return VaeConfig(
        base_dim=data.get("base_dim", default.base_dim),
        decoder_base_dim=data.get("decoder_base_dim"),
        z_dim=data.get("z_dim", default.z_dim),
        dim_mult=tuple(data.get("dim_mult", default.dim_mult)),
        num_res_blocks=data.get("num_res_blocks", default.num_res_blocks),
        temperal_downsample=tuple(data.get("temperal_downsample", default.temperal_downsample)),
        latents_mean=tuple(data.get("latents_mean", default.latents_mean)),
        latents_std=tuple(data.get("latents_std", default.latents_std)),
    )


def read_dit_config(data: dict[str, Any], where: str) -> VideoDitConfig:
    """diffusers' `CosmosTransformer3DModel` configuration; what the released backbone does not use is refused."""
    wanted = {
        "extra_pos_embed_type": None,
        "img_context_dim_in": None,
        "controlnet_block_every_n": None,
        "concat_padding_mask": True,
        "use_crossattn_projection": True,
    }
    for key, value in wanted.items():
        if key in data and data[key] != value:
            raise ConfigError(f"{where}: {key}: only {value!r} (Cosmos-Predict2.5) is known, got {data[key]!r}")
    patch = data.get("patch_size", [1, 2, 2])
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ConfigError(f"{where}: patch_size: expected [1, n, n], got {patch}")
    scale = data.get("rope_scale", (1.0, 3.0, 3.0))
    if data["in_channels"] != data["out_channels"] + 1:
        raise ConfigError(
            f"{where}: in_channels: expected out_channels + 1 (latents and condition mask), got {data['in_channels']}"
        )
    return VideoDitConfig(
        num_layers=data["num_layers"],
        num_heads=data["num_attention_heads"],
        head_dim=data["attention_head_dim"],
        mlp_ratio=float(data.get("mlp_ratio", 4.0)),
        adaln_lora_dim=data["adaln_lora_dim"],
        text_in=data["crossattn_proj_in_channels"],
        text_dim=data["encoder_hidden_states_channels"],
        latent_channels=data["out_channels"],
        patch=patch[1],
        rope_scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        max_size=tuple(data.get("max_size", (128, 240, 240))),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing or not one."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the folder is incomplete") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, OmegaConf interpolations resolved; CheckpointError when it is missing or not one."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a published run folder has one beside checkpoints/") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(data).__name__}")
    return {str(key): value for key, value in data.items()}
