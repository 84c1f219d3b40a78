"""Our configuration in others' words: the published config.yaml, and the JSON files of a Cosmos-Predict2.5 folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit4dit.checkpoints.published import ACTION_MODEL_TYPES, MIXTURES
from dit4dit.config import ModelConfig
from dit4dit.errors import ConfigError
from dit4dit.model.text import qwen_text_arguments
from dit4dit.model.vae import wan_arguments


def run_yaml(model: ModelConfig, embodiment: object) -> str:
    """A published run's config.yaml for `model` and the embodiment of that name; `read_run` is its inverse."""
    from omegaconf import OmegaConf

    head, flow = model.head, model.flow
    mixture = next((mix for mix, name in MIXTURES.items() if name == embodiment), None)
    data = {
        "framework": {
            "name": "DiT4DiT",
            "cosmos25": {
                "extract_layer": model.extract_layer,
                "base_model": "cosmos",
                "vl_hidden_dim": model.dit.width,
                "training": flow.training,
                "flow_matching": {
                    "time_distribution": flow.time_distribution,
                    "high_sigma_ratio": flow.high_sigma_ratio,
                    "high_sigma_min": flow.high_sigma_min,
                },
                "conditional_frame_timestep": model.conditional_frame_timestep,
                "max_sequence_length": model.text.max_length,
            },
            "action_model": _action_model(model),
        },
        "datasets": {
            "vla_data": {
                "data_mix": mixture,
                "image_size": list(model.image_size),
                "video_delta_indices": list(range(model.frames)),
                "action_video_freq_ratio": 1,
                "max_state_dim": head.state_dim,
                "max_action_dim": head.action_dim,
            }
        },
        "trainer": {
            "repeated_diffusion_steps": flow.repeated_diffusion_steps,
            "loss_scale": {"future_video": flow.future_video_weight},
        },
    }
    return OmegaConf.to_yaml(OmegaConf.create(data))


def _action_model(model: ModelConfig) -> dict[str, Any]:
    head, flow = model.head, model.flow
    types = {sizes: name for name, sizes in ACTION_MODEL_TYPES.items()}
    return {
        "action_model_type": types.get((head.num_heads, head.head_dim), "DiT-B"),
        "hidden_size": head.hidden_size,
        "add_pos_embed": head.add_pos_embed,
        "max_seq_len": head.max_seq_len,
        "action_dim": head.action_dim,
        "state_dim": head.state_dim,
        "future_action_window_size": head.action_horizon - 1,
        "action_horizon": head.action_horizon,
        "past_action_window_size": 0,
        "noise_beta_alpha": flow.beta_alpha,
        "noise_beta_beta": flow.beta_beta,
        "noise_s": flow.time_scale,
        "num_timestep_buckets": head.num_timestep_buckets,
        "num_inference_timesteps": head.num_inference_timesteps,
        "diffusion_model_cfg": {
            "input_embedding_dim": head.width,
            "num_attention_heads": head.num_heads,
            "attention_head_dim": head.head_dim,
            "cross_attention_dim": head.context_dim,
            "dropout": head.dropout,
            "final_dropout": head.final_dropout,
            "interleave_self_attention": head.interleave_self_attention,
            "norm_type": "ada_norm",
            "num_layers": head.num_layers,
            "output_dim": head.output_dim,
            "positional_embeddings": None,
        },
    }


def cosmos_configs(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """JSON file (relative to a Cosmos folder) -> content, in diffusers' and transformers' layouts."""
    return {
        "model_index.json": {
            "_class_name": "Cosmos2_5_PredictBasePipeline",
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "CosmosTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "use_karras_sigmas": True,
            "sigma_max": model.sigma_max,
            "sigma_min": 0.01,
        },
        "text_encoder/config.json": {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "text_config": {"model_type": "qwen2_5_vl_text", **qwen_text_arguments(model.text)},
        },
        "transformer/config.json": {"_class_name": "CosmosTransformer3DModel", **transformer_arguments(model)},
        "vae/config.json": {"_class_name": "AutoencoderKLWan", **wan_arguments(model.vae)},
    }


def transformer_arguments(model: ModelConfig) -> dict[str, Any]:
    """The keyword arguments (and JSON keys) that diffusers' `CosmosTransformer3DModel` takes for `model.dit`."""
    dit = model.dit
    if dit.learned_positions:
        raise ConfigError(
            "dit.learned_positions: the published layout has none; such a model stays in the native format"
        )
    return {
        "in_channels": dit.latent_channels + 1,
        "out_channels": dit.latent_channels,
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.head_dim,
        "num_layers": dit.num_layers,
        "mlp_ratio": dit.mlp_ratio,
        "text_embed_dim": dit.text_dim,
        "adaln_lora_dim": dit.adaln_lora_dim,
        "max_size": list(dit.max_size),
        "patch_size": [1, dit.patch, dit.patch],
        "rope_scale": list(dit.rope_scale),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": dit.text_in,
        "encoder_hidden_states_channels": dit.text_dim,
    }


def write_cosmos_configs(folder: Path, model: ModelConfig) -> None:
    """All JSON files of `cosmos_configs` below `folder`."""
    for name, content in cosmos_configs(model).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
