"""The recipes, as data. A recipe is a whole `TrainConfig`; `dit4dit train --recipe NAME --a.b.c value` trains a copy of it.

libero and robocasa_gr1 are the published ones; what they do not say (AdamW, warm-up, rates) are the published values as defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dit4dit.config import HeadConfig, ModelConfig
from dit4dit.errors import ConfigError, did_you_mean
from dit4dit.presets import preset
from dit4dit.training.config import DataConfig, LearningRates, OptimConfig, RunConfig, TrainConfig, WeightsConfig

COSMOS = WeightsConfig(backbone="nvidia/Cosmos-Predict2.5-2B")


def libero() -> TrainConfig:
    """The published LIBERO recipe: 64 processes x 4 samples, 80 000 steps, uniform video times (in the preset)."""
    return TrainConfig(
        model=preset("libero").model,
        embodiment="libero",
        weights=COSMOS,
        data=DataConfig(mixture="libero_all"),
        run=RunConfig(out="runs/libero", steps=80_000, save_every=40_000),
    )


def robocasa_gr1() -> TrainConfig:
    """The published RoboCasa-GR1 recipe: 16 processes x 4 samples, up to 200 000 steps."""
    return TrainConfig(
        model=preset("robocasa_gr1").model,
        embodiment="gr1",
        weights=COSMOS,
        data=DataConfig(mixture="fourier_gr1_unified_1000"),
        run=RunConfig(out="runs/robocasa_gr1", steps=200_000, save_every=20_000),
    )


def g1_tabletop() -> TrainConfig:
    """Unitree G1's arms and grippers at a table, one view: the published robot type and mixture."""
    model = ModelConfig(head=HeadConfig.dit_b(action_dim=32, action_horizon=16, state_dim=64), frames=5)
    return TrainConfig(
        model=model,
        embodiment=None,
        weights=COSMOS,
        data=DataConfig(mixture="real_robot_all"),
        run=RunConfig(out="runs/g1_tabletop", steps=100_000),
    )


def g1_whole_body() -> TrainConfig:
    """Whole-body Unitree G1: 36 actions, 50 steps ahead (its client executes 32 of them). No such data are published: the
    mixture is every data set of yours below `data.root`.
    """
    return TrainConfig(
        model=preset("unitree_g1").model,
        embodiment="g1",
        weights=COSMOS,
        # 50 actions do not split into 4 equal steps of the clip
        data=DataConfig(mixture="g1_whole_body", video_delta_indices=(0, 12, 24, 36, 48)),
        run=RunConfig(out="runs/g1_whole_body", steps=100_000),
    )


def tabletop() -> TrainConfig:
    """The built-in world from nothing but its VAE, small enough for a CPU. The action loss reaches the backbone: a backbone that
    has seen no other video has no features yet that would help.
    """
    base = preset("tabletop").model
    flow = replace(
        base.flow, action_grad_to_backbone=True, repeated_diffusion_steps=2, future_video_weight=0.1, video_every=8
    )
    return TrainConfig(
        model=replace(base, flow=flow),
        embodiment="tabletop",
        data=DataConfig(mixture="tabletop", batch_size=64, workers=0, cache_latents=True, holdout=0.02, sample_every=6),
        optim=OptimConfig(
            learning_rate=LearningRates(1.4e-3, 1.4e-3, 1.4e-3),
            weight_decay=0.0,
            warmup_steps=100,
            min_lr=1e-5,
            ema=0.997,
        ),
        run=RunConfig(
            out="runs/tabletop",
            steps=4000,
            precision="float32",
            gradient_checkpointing=False,
            device="cpu",
            save_every=4000,
            save_frozen=True,
            eval_every=4000,
            trackers=(),
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "libero": libero,
    "robocasa_gr1": robocasa_gr1,
    "g1_tabletop": g1_tabletop,
    "g1_whole_body": g1_whole_body,
    "tabletop": tabletop,
}


def recipe(name: str) -> TrainConfig:
    """The recipe called `name`; ConfigError with a suggestion when there is none."""
    if name not in RECIPES:
        known = list(RECIPES)
        raise ConfigError(f"--recipe {name}: unknown{did_you_mean(name, known)}; known: {', '.join(known)}")
    return RECIPES[name]()
