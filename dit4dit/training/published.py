"""The published training YAML as a `TrainConfig`. Keys that nothing reads are listed, and refused on the command line.

Of doubled keys the one that the published code reads wins: trainer.optimizer.weight_decay, trainer.num_warmup_steps,
trainer.gradient_clipping, trainer.repeated_diffusion_steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit4dit.checkpoints.checkpoint import backbone_name, find_backbone
from dit4dit.checkpoints.published import MIXTURES, read_run_keys
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.keys import KeyReader, read_yaml
from dit4dit.training.config import (
    DataConfig,
    LearningRates,
    OptimConfig,
    RunConfig,
    TrainConfig,
    WeightsConfig,
    parse,
)

BASE = "framework.cosmos25.base_model"
ROOTS = (
    "run_id",
    "run_root_dir",
    "seed",
    "trackers",
    "wandb_entity",
    "wandb_project",
    "is_debug",
    "framework",
    "datasets",
    "trainer",
)


def is_published(path: Path) -> bool:
    """Whether a YAML file is in the published layout."""
    data = read_yaml(path, keep_unset=True)
    return "framework" in data and "model" not in data


def read(path: Path, overrides: Mapping[str, str], backbone: str | None) -> tuple[TrainConfig, tuple[str, ...]]:
    """A published file with dotted overrides in its own words -> (configuration, keys that nothing reads).

    Args:
        backbone: Cosmos folder or hub id for the sizes and first weights. When None, a base_model among the overrides, else
            the file's own where it exists here.

    Raises:
        ConfigError: a key is missing or mistyped, or an override names a key that nothing reads.
    """
    data = read_yaml(path, keep_unset=True)
    for key, text in overrides.items():
        _put(data, key, parse(text))
    keys = KeyReader(data, str(path))
    if backbone is not None and BASE in overrides:
        raise ConfigError(f"--weights.backbone and --{BASE} say the same; give one of them")
    named = keys.raw(BASE, None) if backbone is None else None
    if isinstance(named, str) and (BASE in overrides or (Path(named).expanduser() / "transformer").is_dir()):
        backbone = named
    run = path.parent if (path.parent / "cosmos").is_dir() else None
    # its name, and not the folder of what is read of it here: of a hub id that has the small files alone
    chosen = backbone_name(backbone, run)
    cosmos = find_backbone(chosen, None, weights=False)
    model, mixture = read_run_keys(keys, cosmos)
    config = TrainConfig(
        model=model,
        embodiment=MIXTURES.get(mixture or ""),
        weights=WeightsConfig(backbone=chosen),
        data=_data(keys, mixture),
        optim=_optim(keys),
        run=_run(keys),
    )
    unread = keys.unread()
    for key in overrides:
        if key in unread or any(dead.startswith(key + ".") for dead in unread):
            live = sorted(keys.read_keys)
            raise ConfigError(f"--{key}: nothing reads this key{did_you_mean(key, live)}")
    return config, unread


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = data
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {shown(part)} is a value, not a group of keys")
        node = child
    node[last] = value


def _data(keys: KeyReader, mixture: str | None) -> DataConfig:
    default = DataConfig()
    name = "datasets.vla_data.{}".format
    return DataConfig(
        root=keys.text(name("data_root_dir"), default.root),
        mixture=mixture or "",
        batch_size=keys.integer(name("per_device_batch_size"), default.batch_size),
        video_delta_indices=keys.integers(name("video_delta_indices")),
        action_video_freq_ratio=keys.integer(name("action_video_freq_ratio"), 1),
    )


def _optim(keys: KeyReader) -> OptimConfig:
    name = "trainer.{}".format
    default, rates = OptimConfig(), LearningRates()
    keys.only(name("lr_scheduler_type"), "cosine_with_min_lr")
    keys.only(name("optimizer.name"), "AdamW")
    base = keys.number(name("learning_rate.base"), rates.base)
    betas = keys.numbers(name("optimizer.betas"), default.betas, count=2)
    frozen = keys.raw(name("freeze_modules"), "") or ""
    if not isinstance(frozen, str):
        raise ConfigError(
            f"{keys.where}: {name('freeze_modules')}: expected module paths with commas between, got {shown(frozen)}"
        )
    return OptimConfig(
        learning_rate=LearningRates(
            base=base,
            # a group without a rate of its own gets the base's
            backbone_interface=keys.number(name("learning_rate.backbone_interface"), base),
            action_model=keys.number(name("learning_rate.action_model"), base),
        ),
        betas=(betas[0], betas[1]),
        eps=keys.number(name("optimizer.eps"), default.eps),
        weight_decay=keys.number(name("optimizer.weight_decay"), default.weight_decay),
        warmup_steps=keys.integer(name("num_warmup_steps"), default.warmup_steps, least=0),
        min_lr=keys.number(name("scheduler_specific_kwargs.min_lr"), default.min_lr),
        clip=keys.number(name("gradient_clipping"), default.clip),
        accumulate=keys.integer(name("gradient_accumulation_steps"), 1),
        freeze=tuple(word.strip() for word in frozen.split(",") if word.strip()),
    )


def _run(keys: KeyReader) -> RunConfig:
    default = RunConfig()
    trackers = keys.raw("trackers", [])
    wandb = isinstance(trackers, list) and "wandb" in trackers
    folder, name = keys.text("run_root_dir", "runs"), keys.text("run_id", "dit4dit")
    bf16 = keys.flag("trainer.enable_mixed_precision_training", True)
    return RunConfig(
        out=str(Path(folder) / name),
        seed=keys.integer("seed", default.seed, least=0),
        steps=keys.integer("trainer.max_train_steps", default.steps),
        precision="bfloat16" if bf16 else "float32",
        gradient_checkpointing=keys.flag("trainer.enable_gradient_checkpointing", True),
        save_every=keys.integer("trainer.save_interval", default.save_every),
        log_every=keys.integer("trainer.logging_frequency", default.log_every),
        eval_every=keys.integer("trainer.eval_interval", default.eval_every, least=0),
        trackers=("tensorboard", "wandb") if wandb else ("tensorboard",),
        project=keys.text("wandb_project", default.project),
    )
