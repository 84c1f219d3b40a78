"""The published training YAML as a `TrainConfig`, changed by options in its own words. What nothing reads is listed.

An option that nothing reads is ignored where the file has its key, or the published launch scripts have the option, so that
their command lines work as they are; any other is refused.

Of doubled keys the one that the published code reads wins: trainer.optimizer.weight_decay, trainer.num_warmup_steps,
trainer.gradient_clipping, trainer.repeated_diffusion_steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit4dit.checkpoints.checkpoint import HUB_BACKBONE, backbone_name, find_backbone
from dit4dit.checkpoints.published import MIXTURES, read_run_keys
from dit4dit.checkpoints.tensor_files import say_once
from dit4dit.errors import CheckpointError, ConfigError, did_you_mean, listed, shown
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
STARTED_FROM = "trainer.pretrained_checkpoint"
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
    "config_yaml",
)
OF_SCRIPTS = ("config_yaml", "framework.name", "trainer.framework.cosmos25.conditional_frame_timestep", "wandb_entity")
"""Options of the published launch scripts that nothing reads, whether the file has their keys or not."""
INSTEAD = {
    "config_yaml": "config",
    "framework.action_model.repeated_diffusion_steps": "trainer.repeated_diffusion_steps",
    "trainer.framework.cosmos25.conditional_frame_timestep": "framework.cosmos25.conditional_frame_timestep",
    "trainer.is_resume": "resume",
    "trainer.max_grad_norm": "trainer.gradient_clipping",
    "trainer.warmup_ratio": "trainer.num_warmup_steps",
    "trainer.weight_decay": "trainer.optimizer.weight_decay",
}
"""Option that nothing reads -> the one that does what a user of it wants."""
WORDS = (
    "run_id",
    "run_root_dir",
    "wandb_project",
    "datasets.vla_data.data_root_dir",
    "datasets.vla_data.data_mix",
    BASE,
)
"""Keys whose values are words even where they look like numbers: a run may be called 20260401."""


def is_published(path: Path) -> bool:
    """Whether a YAML file is in the published layout."""
    data = read_yaml(path, keep_unset=True)
    return "framework" in data and "model" not in data


def read(path: Path, overrides: Mapping[str, str | None], backbone: str | None) -> tuple[TrainConfig, tuple[str, ...]]:
    """A published file with dotted overrides in its own words -> (configuration, what nothing reads).

    Args:
        overrides: dotted key -> its value; None, where the command line gives none, is true, as in the published code.
        backbone: Cosmos folder or hub id for the sizes and first weights. When None, a base_model among the overrides, else
            the file's own where it exists here.

    Returns:
        The configuration, and what nothing reads: overrides first, as options ("--wandb_entity"), then keys of the file.

    Raises:
        ConfigError: a key is missing or mistyped, or nothing reads an override that neither the file nor the published launch
            scripts have. CheckpointError: no Cosmos folder.
    """
    data = read_yaml(path, keep_unset=True)
    held = KeyReader(read_yaml(path, keep_unset=True), str(path)).unread()
    for key, text in overrides.items():
        _put(data, key, True if text is None else text if key in WORDS else parse(text))
    keys = KeyReader(data, str(path))
    if backbone is not None and BASE in overrides:
        raise ConfigError(f"--weights.backbone and --{BASE} say the same; give one of them")
    chosen, cosmos = _cosmos(keys, overrides, backbone, path)
    try:
        model, mixture = read_run_keys(keys, cosmos)
        config = TrainConfig(
            model=model,
            embodiment=MIXTURES.get(mixture or ""),
            weights=_weights(keys, chosen),
            data=_data(keys, mixture),
            optim=_optim(keys),
            run=_run(keys),
        )
    except ConfigError as error:  # what the command line says wrong is not looked for in the file
        key = str(error).removeprefix(f"{path}: ").partition(":")[0]
        raise ConfigError(f"--{str(error).removeprefix(f'{path}: ')}") if key in overrides else error from None
    unread = keys.unread()
    options = [key for key in overrides if key in unread]
    for key in options:
        if key not in held and key not in OF_SCRIPTS:
            raise ConfigError(f"--{key}: nothing reads this key{_instead(key, keys)}")
    told = [f"--{key}" + (f" (here: --{INSTEAD[key]})" if key in INSTEAD else "") for key in options]
    return config, (*told, *(key for key in unread if key not in options))


def _instead(key: str, keys: KeyReader) -> str:
    """The key or option that was meant."""
    return f"; use --{INSTEAD[key]}" if key in INSTEAD else did_you_mean(key, sorted({*keys.read_keys, *OF_SCRIPTS}))


def _cosmos(keys: KeyReader, overrides: Mapping[str, str | None], backbone: str | None, path: Path) -> tuple[str, Path]:
    """The Cosmos folder or hub id that is meant, and the folder of what is read of it here: of an id its small files alone."""
    named = keys.raw(BASE, None) if backbone is None else None
    there = isinstance(named, str) and (BASE in overrides or (Path(named).expanduser() / "transformer").is_dir())
    run = path.parent if (path.parent / "cosmos").is_dir() else None
    chosen = backbone_name(str(named) if there else backbone, run)
    missing = "" if there or not named else f"{path}: {BASE}: no Cosmos-Predict2.5 folder at {shown(str(named), 200)}"
    try:
        cosmos = find_backbone(chosen, None, weights=False)
    except CheckpointError as error:
        raise CheckpointError(f"{missing}; {error}") if missing else error from None
    if missing and named != chosen == HUB_BACKBONE:
        say_once(f"{missing}; {chosen} is used")
    return chosen, cosmos


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = data
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {shown(part)} is a value, not a group of keys")
        node = child
    if isinstance(group := node.get(last), dict) and not isinstance(value, dict):
        raise ConfigError(f"--{key}: expected one of its keys, --{key}.KEY, got {shown(value)}; keys: {listed(group)}")
    node[last] = value


def _weights(keys: KeyReader, backbone: str) -> WeightsConfig:
    if given := keys.raw(STARTED_FROM, None):
        raise ConfigError(
            f"{keys.where}: {STARTED_FROM}: expected none, got {shown(given, 200)}; give the checkpoint with "
            f"--weights.checkpoint, and --{STARTED_FROM} null"
        )
    return WeightsConfig(backbone=backbone)


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
    if frozen is True:  # the option without a value, as a launch script has it whose list is empty
        frozen = ""
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
    trackers = keys.raw("trackers", None) or []
    trackers = trackers.split(",") if isinstance(trackers, str) else trackers  # as the command line has them
    if not isinstance(trackers, list) or any(not isinstance(one, str) for one in trackers):
        raise ConfigError(
            f"{keys.where}: trackers: expected a list of words, such as [jsonl, wandb], got {shown(trackers)}"
        )
    wandb = any(one.strip() == "wandb" for one in trackers)
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
