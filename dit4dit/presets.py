"""Model configurations by name. The first three are the released models' true sizes; the others are for tests and demos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dit4dit.config import FlowConfig, HeadConfig, ModelConfig, TextConfig, VaeConfig, VideoDitConfig
from dit4dit.errors import ConfigError, did_you_mean, shown


@dataclass(frozen=True)
class Preset:
    """A model configuration and the embodiment (by name) that it is meant for."""

    model: ModelConfig
    embodiment: str


def libero() -> Preset:
    """Published LIBERO model: two views, K = 8, A = 8, F = 5, S = 784."""
    head = HeadConfig.dit_b(action_dim=8, action_horizon=8, state_dim=16)
    flow = FlowConfig(time_distribution="uniform", high_sigma_ratio=None, high_sigma_min=None)
    return Preset(ModelConfig(head=head, flow=flow, frames=5), "libero")


def robocasa_gr1() -> Preset:
    """Published RoboCasa-GR1 model: one view, K = 16, A = 32, F = 9, S = 588."""
    return Preset(ModelConfig(head=HeadConfig.dit_b(action_dim=32, action_horizon=16, state_dim=64)), "gr1")


def unitree_g1() -> Preset:
    """Whole-body Unitree G1: one view, K = 50, A = 36, F = 5, S = 392."""
    return Preset(ModelConfig(head=HeadConfig.dit_b(action_dim=36, action_horizon=50, state_dim=64), frames=5), "g1")


def mid() -> Preset:
    """True VAE, DiT-B head and depth, narrow backbone and text encoder: big enough to time on a CPU."""
    text = TextConfig(
        hidden_size=256,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=1024,
        vocab_size=512,
        mrope_section=(8, 12, 12),
        max_position_embeddings=2048,
    )
    dit = VideoDitConfig(num_heads=16, head_dim=32, adaln_lora_dim=64, text_in=text.embed_width, text_dim=512)
    head = HeadConfig.dit_b(action_dim=32, action_horizon=16, state_dim=64, context_dim=dit.width)
    return Preset(ModelConfig(text=text, dit=dit, head=head), "gr1")


def tiny() -> Preset:
    """Everything small: a few million parameters, for tests."""
    text = TextConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        vocab_size=259,
        mrope_section=(2, 3, 3),
        max_position_embeddings=2048,
        max_length=192,
    )
    vae = VaeConfig(base_dim=4)
    dit = VideoDitConfig(
        num_layers=5, num_heads=2, head_dim=32, adaln_lora_dim=16, text_in=text.embed_width, text_dim=48
    )
    head = HeadConfig(
        num_layers=4,
        num_heads=4,
        head_dim=16,
        hidden_size=96,
        output_dim=96,
        action_dim=8,
        action_horizon=8,
        state_dim=16,
        context_dim=dit.width,
    )
    flow = FlowConfig(time_distribution="uniform", high_sigma_ratio=None, high_sigma_min=None)
    model = ModelConfig(
        text=text, vae=vae, dit=dit, head=head, flow=flow, frames=5, image_size=(32, 32), extract_layer=3
    )
    return Preset(model, "libero")


def tabletop() -> Preset:
    """The built-in tabletop world: 64 x 64 pictures through its own small VAE, K = 8, A = 3, S = 32."""
    from dit4dit.checkpoints.published import read_vae_config
    from dit4dit.envs import tabletop_vae_dir
    from dit4dit.files.keys import KeyReader, read_json

    vae_file = tabletop_vae_dir() / "config.json"
    text = TextConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=256,
        vocab_size=328,
        mrope_section=(2, 3, 3),
        max_position_embeddings=2048,
        max_length=40,
    )
    dit = VideoDitConfig(
        num_layers=4,
        num_heads=4,
        head_dim=32,
        mlp_ratio=2.0,
        adaln_lora_dim=16,
        max_size=(128, 8, 8),
        learned_positions=True,
        text_in=text.embed_width,
        text_dim=64,
    )
    head = HeadConfig(
        num_layers=4,
        num_heads=3,
        head_dim=32,
        hidden_size=96,
        output_dim=96,
        max_seq_len=8,
        action_dim=3,
        action_horizon=8,
        state_dim=3,
        context_dim=dit.width,
        dropout=0.0,
    )
    model = ModelConfig(
        text=text,
        vae=read_vae_config(KeyReader(read_json(vae_file), str(vae_file))),
        dit=dit,
        head=head,
        frames=5,
        image_size=(64, 64),
        extract_layer=2,
    )
    return Preset(model, "tabletop")


PRESETS: dict[str, Callable[[], Preset]] = {
    "libero": libero,
    "robocasa_gr1": robocasa_gr1,
    "unitree_g1": unitree_g1,
    "mid": mid,
    "tiny": tiny,
    "tabletop": tabletop,
}


def preset(name: str) -> Preset:
    """The preset called `name`; ConfigError with a suggestion when there is none."""
    if name not in PRESETS:
        raise ConfigError(
            f"preset {shown(name)}: unknown{did_you_mean(name, list(PRESETS))}; known: {', '.join(PRESETS)}"
        )
    return PRESETS[name]()
