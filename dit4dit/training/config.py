"""What a training run is, as frozen data: recipes are values of `TrainConfig`, files and `--a.b.c value` change copies of them.

Unknown keys are refused by name; only the reader of published files (`dit4dit.training.published`) lists and ignores them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit4dit.config import ModelConfig, build_within
from dit4dit.errors import ConfigError, did_you_mean, shown
from dit4dit.files.atomic import whole_file
from dit4dit.files.keys import read_yaml

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
Precision = Literal["float32", "bfloat16", "float16"]
Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class WeightsConfig:
    """Where the first weights come from. With neither, everything is fresh but the tabletop world's own VAE."""

    checkpoint: str | None = None
    """DiT4DiT checkpoint to fine-tune (any layout); its sizes replace the configuration's."""
    backbone: str | None = None
    """Cosmos-Predict2.5 folder or hub id: backbone, VAE and text encoder of a run that starts with a fresh head, and what
    a checkpoint without its frozen parts takes them from."""
    fresh_head: bool = False
    """Fine-tune `checkpoint` with a new action head of the configuration's sizes: another robot."""


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    root: str = "data"
    """Folder below which the mixture's data sets stand."""
    mixture: str = ""
    """Name of a mixture."""
    robots: str | None = None
    """YAML file with robots and mixtures of your own."""
    batch_size: int = 4
    """Samples per process and micro step."""
    workers: int = 4
    """Loader processes per training process; 0 loads in the training process itself."""
    sample_every: int = 1
    """Every how manieth frame of an episode begins a sample; neighbouring ones have nearly the same to teach."""
    holdout: float = 0.02
    """Share of the episodes that is never trained on."""
    mask_padding: bool = False
    """Leave time steps past the end of an episode out of the action loss; the published loader does not."""
    skip_bad: bool = False
    """Leave damaged episodes out, counted, instead of refusing to start; let another sample stand for one whose pictures turn
    out to be unreadable, counted as `skipped` in the log. With `cache_latents` those are found, and refused, beforehand.
    """
    video_delta_indices: tuple[int, ...] | None = None
    """Frames that a clip may have, counted from its first; None spreads them over the action chunk."""
    action_video_freq_ratio: int = 1
    """Every how manieth of them it has."""
    cache_latents: bool = False
    """Encode every clip once, before the first step, and train from the files."""
    cache: str = ""
    """Folder of the prompt and latent caches; `cache` inside the run folder when empty. Runs may share one."""


@dataclass(frozen=True)
class LearningRates:
    """Learning rate per parameter group; `base` is for what is in neither of the others, and scales `min_lr`."""

    base: float = 1e-5
    backbone_interface: float = 1e-5
    action_model: float = 1e-4


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers of backbone and head; everything else is then frozen."""

    rank: int = 0
    """0: no adapters."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    """Ends of module names that get adapters."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and which parameters it moves."""

    learning_rate: LearningRates = field(default_factory=LearningRates)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-8
    warmup_steps: int = 5000
    min_lr: float = 5e-7
    """Floor of the base group; every group ends at the same fraction min_lr / base of its own rate."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""
    accumulate: int = 1
    """Micro steps per step."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what a checkpoint's policy holds."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: published names, whole, with * and ?, or the dotted path of a module."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError(f"optim.accumulate: expected at least 1, got {self.accumulate}")
        for name in ("warmup_steps", "clip", "min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}: expected at least 0, got {getattr(self, name)}")
        if self.learning_rate.base <= 0:
            raise ConfigError(f"optim.learning_rate.base: expected more than 0, got {self.learning_rate.base}")
        for name in ("backbone_interface", "action_model"):
            rate = getattr(self.learning_rate, name)
            if rate < 0:
                raise ConfigError(f"optim.learning_rate.{name}: expected at least 0, got {rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas: expected two numbers from 0 to below 1, got {self.betas}")
        if self.eps < 0:
            raise ConfigError(f"optim.eps: expected at least 0, got {self.eps}")
        if self.lora.rank < 0:
            raise ConfigError(f"optim.lora.rank: expected at least 0 (no adapters), got {self.lora.rank}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"optim.ema: expected a decay between 0 and 1, got {self.ema}")


POSITIVE = ("steps", "save_every", "keep", "log_every", "eval_samples")


@dataclass(frozen=True)
class RunConfig:
    """How long, how, where to, and what is written."""

    out: str = "runs/dit4dit"
    """Run folder: config, logs, checkpoints."""
    seed: int = 42
    steps: int = 80_000
    strategy: Strategy = "ddp"
    """ddp: a whole copy on each process; fsdp2: weights, gradients and optimiser split over the processes; zero2, zero3:
    DeepSpeed's stages 2 (gradients and optimiser split) and 3 (weights too)."""
    reshard: bool = True
    """fsdp2: give gathered weights back after each block's forward pass (what DeepSpeed calls ZeRO-3); False keeps them until
    the backward pass (ZeRO-2), which sends less and holds more."""
    precision: Precision = "bfloat16"
    """Of the arithmetic; trained weights, gradients and optimiser stay float32."""
    gradient_checkpointing: bool = True
    compile: bool = False
    """torch.compile each block."""
    device: Literal["auto", "cpu"] = "auto"
    save_every: int = 5000
    keep: int = 2
    """Checkpoints kept, newest first."""
    save_frozen: bool = False
    """Put text encoder and VAE into the run, so that its checkpoints need no backbone folder; hard links, one copy a run."""
    log_every: int = 10
    eval_every: int = 1000
    """0: no evaluation."""
    eval_samples: int = 64
    eval_strips: int = 4
    """Held-out clips whose predicted future is drawn at each evaluation."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Besides log.jsonl, which is always written."""
    project: str = "dit4dit"
    """Project name for wandb."""

    def __post_init__(self) -> None:
        for name, least in (*((n, 1) for n in POSITIVE), ("eval_every", 0), ("eval_strips", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"run.{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"run.seed: expected 0 to 2^64 - 1, got {self.seed}")
        if self.precision == "float16" and self.strategy != "ddp":
            raise ConfigError(
                "run.precision: float16 scales its loss, which works with strategy ddp alone; use bfloat16"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `model.flow.training` picks the losses: joint, action or video."""

    model: ModelConfig
    embodiment: str | None
    """Robot whose conventions the checkpoints carry, one of the data's; None: the data's own, where they are of one robot."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for key, value in numbers(self.to_dict()):
            if not math.isfinite(value):
                raise ConfigError(f"{key}: expected a finite number, got {value}")
        if self.data.batch_size < 1:
            raise ConfigError(f"data.batch_size: expected at least 1, got {self.data.batch_size}")
        if self.data.sample_every < 1:
            raise ConfigError(f"data.sample_every: expected at least 1, got {self.data.sample_every}")
        if self.data.batch_size % self.model.flow.video_every:
            raise ConfigError(
                f"model.flow.video_every: expected a divisor of data.batch_size = {self.data.batch_size}, "
                f"got {self.model.flow.video_every}; set --model.flow.video_every or --data.batch_size"
            )
        if self.model.latent_frames == 1 and self.model.flow.training != "action":
            raise ConfigError(
                f"model.frames: {self.model.frames} leaves no future frame for the video loss; set --model.frames to 1 + a "
                f"multiple of {self.model.vae.temporal_factor}, or --model.flow.training action"
            )
        if self.data.workers < 0:
            raise ConfigError(f"data.workers: expected at least 0, got {self.data.workers}")
        if not 0 <= self.data.holdout < 1:
            raise ConfigError(f"data.holdout: expected a share from 0 to below 1, got {self.data.holdout}")
        zero = self.run.strategy in ("zero2", "zero3")
        if zero and self.run.compile:
            raise ConfigError(f"run.compile: does not go with strategy {self.run.strategy}; leave it out, or use fsdp2")
        if self.run.strategy == "zero3" and self.optim.ema is not None:
            raise ConfigError("optim.ema: strategy zero3 keeps no moving average; use zero2 or fsdp2")
        if self.weights.fresh_head and self.weights.checkpoint is None:
            raise ConfigError(
                "weights.fresh_head: goes with weights.checkpoint; a run without one has a fresh head anyway"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> TrainConfig:
        """The inverse of `to_dict`; ConfigError names an unknown or mistyped key."""
        return build_within(cls, dict(data), where)

    def override(self, words: Mapping[str, str | None]) -> TrainConfig:
        """A copy with dotted keys replaced, "optim.clip" -> "0.5"; ConfigError for a key that there is not.

        A flag is set by its key alone ("run.compile" -> None); any other key needs a value.
        """
        data = self.to_dict()
        for key, text in words.items():
            node, hint = data, typing.cast(Any, type(self))
            *path, last = key.split(".")
            for part in path:
                hint = typing.get_type_hints(hint)[part] if _has(hint, part, key) else None
                node = node[part]
            _has(hint, last, key)
            kind = typing.get_type_hints(hint)[last]
            if text is None and kind is not bool:
                raise ConfigError(f"--{key}: expected a value after it")
            node[last] = True if text is None else parse(text, kind)
        try:
            return self.from_dict(data, "")
        except ConfigError as error:
            message = str(error)  # a key begins with the dot that would divide it from a place
            raise ConfigError(f"--{message[1:]}" if message.startswith(".") else message) from None


def numbers(node: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a configuration as plain data, with its dotted key."""
    if isinstance(node, float):
        yield key, node
    elif isinstance(node, (dict, list, tuple)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, f"{key}.{name}" if key else str(name))


def _has(hint: Any, part: str, key: str) -> bool:
    known = [f.name for f in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []
    if part not in known:
        raise ConfigError(
            f"--{key}: unknown key {shown(part)}{did_you_mean(part, known)}; known there: {', '.join(known) or 'none'}"
        )
    return True


def parse(text: str, hint: Any = None) -> Any:
    """A word of the command line as the value of a field of type `hint` (None: as JSON, else as it stands)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return text
    if origin is tuple:
        words = [word.strip() for word in text.strip("[]() ").split(",")]
        return [parse(word, args[0]) for word in words if word]
    if type(None) in args:
        return None if text in ("none", "null", "None") else parse(text, next(a for a in args if a is not type(None)))
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if origin is None and hint is None and text.startswith("[") and text.endswith("]"):
        return [parse(word.strip()) for word in text[1:-1].split(",") if word.strip()]
    return text


def split_words(words: Sequence[str]) -> dict[str, str | None]:
    """["--a.b", "1", "--c=2", "--d"] -> {"a.b": "1", "c": "2", "d": None}; ConfigError where a value has no key."""
    out: dict[str, str | None] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{shown(word)}: expected --a.b.c value")
        key, equals, value = word[2:].partition("=")
        if equals:
            out[key] = value
        else:
            out[key] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    return out


def read_config(path: Path) -> TrainConfig:
    """A configuration of our own in YAML, such as a run folder's config.yaml."""
    return TrainConfig.from_dict(read_yaml(path), str(path))


def write_config(path: Path, config: TrainConfig) -> None:
    """The inverse of `read_config`; the file appears whole, because other ranks may be reading it."""
    import yaml

    with whole_file(path) as partial:
        partial.write_text(yaml.safe_dump(_plain(config.to_dict()), sort_keys=False))


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: plain YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
