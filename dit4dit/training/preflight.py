"""What would stop a run before or in its first step, found before anything large is loaded.

Every start looks at `check_start`; `--dry-run` at everything here, with the code that a start runs, on weights without bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dit4dit.errors import CheckpointError, MissingExtra, require, shown
from dit4dit.model.text import tokenize
from dit4dit.training import setup
from dit4dit.training.checkpoint import Saved
from dit4dit.training.config import TrainConfig
from dit4dit.training.feed import Feed, Share
from dit4dit.training.samples import TrainingData, pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_start(config: TrainConfig) -> None:
    """The folders that a run writes, and the packages that its options need.

    Raises:
        CheckpointError: a folder that cannot be written. MissingExtra: a package that is not installed.
    """
    check_writable(Path(config.run.out), "--run.out")
    if config.data.cache:
        check_writable(Path(config.data.cache), "--data.cache")
    require("accelerate", "train")
    if config.optim.lora.rank:
        require("peft", "train")
    if config.run.strategy in ("zero2", "zero3"):
        require("deepspeed", "deepspeed")
    if os.environ.get("RANK", "0") == "0":  # who writes the logs
        for tracker, extra in (("tensorboard", "train"), ("wandb", "wandb")):
            if tracker in config.run.trackers:
                others = ",".join(name for name in config.run.trackers if name != tracker) or '""'
                try:
                    require(tracker, extra)
                except MissingExtra as error:
                    raise MissingExtra(f"{error}, or train without it: --run.trackers {others}") from None


def check_writable(folder: Path, option: str) -> None:
    """CheckpointError unless the folder is there, or can be made, and can be written; nothing is made."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CheckpointError(f"{folder}: cannot be written ({place} is a file); choose another folder with {option}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: cannot be written (no permission in {place}); choose another with {option}")


def check_first_batch(config: TrainConfig, data: TrainingData) -> None:
    """Read what the first process's first micro step trains on, pictures decoded; raises what the step would."""
    share = Share(0, 1, config.data.batch_size, config.optim.accumulate)
    batch = next(iter(Feed(data, share, 0, 1, workers=0, video=True, pin=False)))
    pictures(batch, config.model, torch.device("cpu"))


def ranks_of(saved: Saved, config: TrainConfig) -> int:
    """The number of processes with which the run goes on as it was; 1 where there is none."""
    ranks, rest = divmod(saved.progress.global_batch, config.data.batch_size * config.optim.accumulate)
    return 1 if rest else ranks


def check_weights(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, int] | None:
    """Hold every tensor's name and shape against the model, in the files that the first weights are in; none is read.

    Returns:
        The tokenizer and the most tokens of a prompt; None where the files are a hub's and not on this machine.

    Raises:
        CheckpointError, ConfigError: as a start would.
    """
    given = config.weights
    if given.checkpoint is None and given.backbone is None:
        return setup.fresh_tokenizer(config), config.model.text.max_length
    if given.checkpoint is None and setup.local_backbone(str(given.backbone)) is None:
        return None
    start = setup.load(config, torch.device("meta"))
    start.text()
    return start.tokenizer, start.config.model.text.max_length


def cut_prompts(tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], most: int) -> str | None:
    """What a user should know of instructions that have more than `most` tokens: a prompt ends there. None where none has."""
    cut = []
    for words in instructions:
        # one more than fit: filled up to there where it is shorter
        tokens = tokenize(tokenizer, [words], most + 1)
        if int((tokens != tokenizer.pad_token_id).sum()) > most:
            cut.append(words)
    if not cut:
        return None
    return (
        f"{len(cut)} of {len(instructions)} instructions have more than {most} tokens with the prompt around them, and are cut "
        f"there; the first: {shown(cut[0])}; shorten them, or train from other weights than a checkpoint's with "
        "--model.text.max_length"
    )
