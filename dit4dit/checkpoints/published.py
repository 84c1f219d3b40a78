"""Reading what others wrote: the published run folder's config.yaml and a Cosmos-Predict2.5 folder's JSON files.

This reader, alone in the package, ignores keys that it does not know, because published runs carry many that nothing
reads; it lists them, and it falls back to the published values where a run did not store a key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit4dit.config import FlowConfig, HeadConfig, ModelConfig, TextConfig, VaeConfig, VideoDitConfig
from dit4dit.errors import CheckpointError, ConfigError, shown
from dit4dit.files.keys import NEEDED, KeyReader, naming, read_json, read_yaml

ACTION_MODEL_TYPES = {"DiT-B": (12, 64), "DiT-L": (32, 48)}

# which of the published data mixtures and statistics tags mean which embodiment
MIXTURES = {"libero_all": "libero", "fourier_gr1_unified_1000": "gr1", "fourier_gr1_pretrain_10K": "gr1"}
TAGS = {"franka": "libero", "gr1": "gr1"}


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


def read_run(config_path: Path, cosmos: Path) -> PublishedRun:
    """The model of a published run folder, from its config.yaml and the small files of a Cosmos folder.

    Raises:
        CheckpointError: a file is missing or unreadable. ConfigError: a needed key is missing or has another type.
    """
    keys = KeyReader(read_yaml(config_path, keep_unset=True), str(config_path))
    model, data_mix = read_run_keys(keys, cosmos)
    return PublishedRun(model, data_mix, keys.unread())


def read_run_keys(keys: KeyReader, cosmos: Path) -> tuple[ModelConfig, str | None]:
    """Model and data mixture of a published config.yaml, through a reader that remembers what was read."""
    text, vae, dit, sigma_max = read_cosmos(cosmos)
    deltas = keys.integers("datasets.vla_data.video_delta_indices")
    ratio = keys.integer("datasets.vla_data.action_video_freq_ratio", 1)
    height, width = keys.integers("datasets.vla_data.image_size", (224, 224), count=2)
    with naming(keys.where):
        flow = _read_flow(keys)
        model = ModelConfig(
            text=replace(text, max_length=keys.integer("framework.cosmos25.max_sequence_length", 512)),
            vae=vae,
            dit=dit,
            head=_read_head(keys, dit.width, needed=flow.training != "video"),
            flow=flow,
            frames=len(range(0, len(deltas), ratio)),
            image_size=(height, width),
            extract_layer=keys.integer("framework.cosmos25.extract_layer", 17, least=0),
            conditional_frame_timestep=keys.number("framework.cosmos25.conditional_frame_timestep", 0.0001),
            sigma_max=sigma_max,
        )
    data_mix = keys.raw("datasets.vla_data.data_mix", None)
    return model, data_mix if isinstance(data_mix, str) else None


def _read_head(keys: KeyReader, context_dim: int, *, needed: bool) -> HeadConfig:
    """The action head; `needed` is False for runs on video alone, which built none and may lack its keys."""
    name = "framework.action_model.{}".format
    kind = keys.one_of(name("action_model_type"), list(ACTION_MODEL_TYPES), "DiT-B")
    heads, head_dim = ACTION_MODEL_TYPES[kind]
    sizes = name("diffusion_model_cfg.{}").format
    heads = keys.integer(sizes("num_attention_heads"), heads)
    head_dim = keys.integer(sizes("attention_head_dim"), head_dim)
    keys.only(sizes("norm_type"), "ada_norm")
    keys.only(sizes("positional_embeddings"), None)
    width = keys.integer(sizes("input_embedding_dim"), heads * head_dim)
    if width != heads * head_dim:
        raise ConfigError(
            f"{keys.where}: {sizes('input_embedding_dim')}: expected {heads} heads x {head_dim} = {heads * head_dim}, "
            f"got {width}"
        )
    hidden = keys.integer(name("hidden_size"), 2560)
    if keys.has(name("future_action_window_size")) and not keys.has(name("action_horizon")):
        horizon = keys.integer(name("future_action_window_size"), least=0) + 1
    else:
        horizon = keys.integer(name("action_horizon"), NEEDED if needed else 16)
    return HeadConfig(
        num_layers=keys.integer(sizes("num_layers"), 16),
        num_heads=heads,
        head_dim=head_dim,
        hidden_size=hidden,
        output_dim=keys.integer(sizes("output_dim"), hidden),
        action_dim=keys.integer(name("action_dim"), NEEDED if needed else 32),
        action_horizon=horizon,
        state_dim=keys.integer(name("state_dim"), least=0) or None if keys.has(name("state_dim")) else None,
        context_dim=keys.integer(sizes("cross_attention_dim"), context_dim),
        interleave_self_attention=keys.flag(sizes("interleave_self_attention"), True),
        add_pos_embed=keys.flag(name("add_pos_embed"), True),
        max_seq_len=keys.integer(name("max_seq_len"), 1024),
        dropout=keys.number(sizes("dropout"), 0.2),
        final_dropout=keys.flag(sizes("final_dropout"), True),
        num_inference_timesteps=keys.integer(name("num_inference_timesteps"), 4),
        num_timestep_buckets=keys.integer(name("num_timestep_buckets"), 1000),
    )


def _read_flow(keys: KeyReader) -> FlowConfig:
    matching = "framework.cosmos25.flow_matching.{}".format
    raw = [
        keys.raw(matching(name), default) for name, default in (("high_sigma_ratio", 0.05), ("high_sigma_min", 0.98))
    ]
    ratio: float | None = None
    lowest: float | None = None
    # a ratio of 0 or null turns the branch off, as does a missing lowest time
    if raw[0] and raw[1] is not None:
        ratio = keys.number(matching("high_sigma_ratio"), 0.05)
        lowest = keys.number(matching("high_sigma_min"), 0.98)
    return FlowConfig(
        training=keys.text("framework.cosmos25.training", "joint").lower(),  # type: ignore[arg-type]
        beta_alpha=keys.number("framework.action_model.noise_beta_alpha", 1.5),
        beta_beta=keys.number("framework.action_model.noise_beta_beta", 1.0),
        time_scale=keys.number("framework.action_model.noise_s", 0.999),
        time_distribution=keys.text(matching("time_distribution"), "logit_normal"),  # type: ignore[arg-type]
        high_sigma_ratio=ratio,
        high_sigma_min=lowest,
        # the live one of two; framework.action_model.repeated_diffusion_steps is read by nothing
        repeated_diffusion_steps=keys.integer("trainer.repeated_diffusion_steps", 4),
        future_video_weight=keys.number("trainer.loss_scale.future_video", 1.0),
    )


def read_cosmos(folder: Path) -> tuple[TextConfig, VaeConfig, VideoDitConfig, float]:
    """Sizes from the JSON files of a Cosmos-Predict2.5 folder: text encoder, VAE, backbone, and sigma_max."""
    if not (folder / "transformer" / "config.json").is_file():
        raise CheckpointError(
            f"backbone {folder}: expected a Cosmos-Predict2.5 folder in diffusers' layout (transformer/config.json, "
            "vae/, text_encoder/, tokenizer/, scheduler/), found none; give the folder with --backbone or DIT4DIT_BACKBONE"
        )

    def keys(name: str) -> KeyReader:
        return KeyReader(read_json(folder / name), str(folder / name))

    scheduler = keys("scheduler/scheduler_config.json")
    sigma_max = scheduler.number("sigma_max") if scheduler.has("sigma_max") else 200.0
    text, vae, dit = (keys(f"{part}/config.json") for part in ("text_encoder", "vae", "transformer"))
    with naming(text.where):
        text_config = read_text_config(text)
    with naming(vae.where):
        vae_config = read_vae_config(vae)
    with naming(dit.where):
        return text_config, vae_config, read_dit_config(dit), sigma_max


def read_text_config(keys: KeyReader) -> TextConfig:
    """transformers' Qwen2.5-VL configuration, flat (older files) or with a text_config."""
    nested = keys.raw("text_config", None)
    text: dict[str, Any] = {**keys.data, **(nested if isinstance(nested, dict) else {})}
    scaling = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    both = KeyReader({"rope_theta": text.get("rope_theta", 1_000_000.0), **text, **scaling}, keys.where)
    default = TextConfig()
    return TextConfig(
        hidden_size=both.integer("hidden_size"),
        num_layers=both.integer("num_hidden_layers"),
        num_heads=both.integer("num_attention_heads"),
        num_kv_heads=both.integer("num_key_value_heads"),
        intermediate_size=both.integer("intermediate_size"),
        vocab_size=both.integer("vocab_size"),
        rope_theta=both.number("rope_theta"),
        mrope_section=both.integers("mrope_section", default.mrope_section),
        rms_norm_eps=both.number("rms_norm_eps", default.rms_norm_eps),
        max_position_embeddings=both.integer("max_position_embeddings", default.max_position_embeddings),
    )


def read_vae_config(keys: KeyReader) -> VaeConfig:
    """diffusers' `AutoencoderKLWan` configuration; only Wan 2.1's plain form is known."""
    for key in ("is_residual", "attn_scales", "patch_size"):
        if keys.raw(key, None):
            raise ConfigError(
                f"{keys.where}: {key}: only the Wan 2.1 VAE is known, which has none, got {shown(keys.raw(key))}"
            )
    default = VaeConfig()
    return VaeConfig(
        base_dim=keys.integer("base_dim", default.base_dim),
        decoder_base_dim=keys.integer("decoder_base_dim") if keys.has("decoder_base_dim") else None,
        z_dim=keys.integer("z_dim", default.z_dim),
        dim_mult=keys.integers("dim_mult", default.dim_mult),
        num_res_blocks=keys.integer("num_res_blocks", default.num_res_blocks),
        temperal_downsample=keys.flags("temperal_downsample", default.temperal_downsample),
        latents_mean=keys.numbers("latents_mean", default.latents_mean),
        latents_std=keys.numbers("latents_std", default.latents_std),
    )


def read_dit_config(keys: KeyReader) -> VideoDitConfig:
    """diffusers' `CosmosTransformer3DModel` configuration; what the released backbone does not use is refused."""
    for key in ("extra_pos_embed_type", "img_context_dim_in", "controlnet_block_every_n"):
        keys.only(key, None)
    for key in ("concat_padding_mask", "use_crossattn_projection"):
        keys.only(key, True)
    patch = keys.integers("patch_size", (1, 2, 2), count=3)
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ConfigError(f"{keys.where}: patch_size: expected [1, n, n], got {list(patch)}")
    channels = keys.integer("out_channels")
    if keys.integer("in_channels") != channels + 1:
        raise ConfigError(
            f"{keys.where}: in_channels: expected out_channels + 1 (latents and condition mask), "
            f"got {keys.integer('in_channels')}"
        )
    scale = keys.numbers("rope_scale", (1.0, 3.0, 3.0), count=3)
    size = keys.integers("max_size", (128, 240, 240), count=3)
    return VideoDitConfig(
        num_layers=keys.integer("num_layers"),
        num_heads=keys.integer("num_attention_heads"),
        head_dim=keys.integer("attention_head_dim"),
        mlp_ratio=keys.number("mlp_ratio", 4.0),
        adaln_lora_dim=keys.integer("adaln_lora_dim"),
        text_in=keys.integer("crossattn_proj_in_channels"),
        text_dim=keys.integer("encoder_hidden_states_channels"),
        latent_channels=channels,
        patch=patch[1],
        rope_scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        max_size=(size[0], size[1], size[2]),
    )
