"""`dit4dit train`: a recipe or a file, changed by `--a.b.c value`, then a run, its continuation, or a memory plan."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from dit4dit.commands.shell import at_least, say
from dit4dit.errors import CheckpointError, ConfigError, DataError, did_you_mean, shown
from dit4dit.training import checkpoint, published
from dit4dit.training.config import TrainConfig, read_config, split_words
from dit4dit.training.loop import PREEMPTED, train
from dit4dit.training.recipes import RECIPES, recipe
from dit4dit.training.resume import check_place, resumed
from dit4dit.training.start import dry_run, open_data

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors that a write has without naming its file."""


@dataclass(frozen=True)
class Flags:
    """Train from a recipe or a file; every key of the configuration is an option too, as in --a.b.c value:
    --run.steps 1000, --optim.learning_rate.action_model 1e-4, --data.batch_size 8, --model.flow.training action,
    --optim.freeze "backbone_interface.extractor.transformer"; a flag needs no value. With a published file the options of the
    published launch scripts work too, as in --trainer.max_train_steps 1000; those that nothing reads are listed.

    Several processes: torchrun --standalone --nproc-per-node 8 --no-python dit4dit train ...; several nodes: training/slurm.sh.

    SIGTERM and Ctrl-C save a checkpoint and end with exit code 75: start again with --resume. torchrun gives its workers
    30 seconds for that, and ends with 1.
    """

    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=", ".join(RECIPES))] = None
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A configuration of our own (a run folder's config.yaml), or a published training YAML."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="[DIR]")] = None
    """Go on from the run's newest checkpoint, or from its checkpoint DIR; later ones are then renamed to abandoned_step_N.
    "auto": from the newest, or from the beginning where there is none. With another --run.steps the learning rates are those of
    the new total from the next step on."""
    dry_run: bool = False
    """Look for whatever would stop the run before or in its first step, print the memory plan and stop; no weights are loaded,
    nothing is written. With --resume its checkpoint is read whole, as at a start."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of the plan; WORLD_SIZE, else 1, when not given."""
    print: bool = False
    """Print the configuration as JSON and stop."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    # a --resume without a value means the newest checkpoint
    given = [f"{a}=" if a == "--resume" and b.startswith("-") else a for a, b in pairwise([*words, "--"])] or ["--help"]
    flags, rest = tyro.cli(
        Flags, args=given, prog="dit4dit train", return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        return _run(flags, rest)
    except (CheckpointError, ConfigError, DataError) as error:
        raise type(error)(options_here(str(error))) from error


def options_here(message: str) -> str:
    """A message with the options of other commands as they are called here."""
    return message.replace("--backbone", "--weights.backbone").replace("(--robots)", "(--data.robots)")


def _run(flags: Flags, words: Sequence[str]) -> int:
    config = configure(flags, words)
    if flags.print:
        say(json.dumps(config.to_dict(), indent=1))
        return 0
    at_least(1, processes=flags.processes)
    world = _world_size()
    if flags.dry_run:
        dry_run(config, flags.processes or world, flags.resume, lambda text: say(options_here(text)))
        return 0
    if flags.processes is not None:
        raise ConfigError("--processes: goes with --dry-run; torchrun starts the processes of a run")
    run, resume = Path(config.run.out), resumed(config, flags.resume, say if _first() else None)
    try:
        code = train(config, open_data(config), resume=resume)
    except OSError as error:
        if error.filename is None and error.errno not in OF_THE_DISK:
            raise
        newest = checkpoint.latest(run)
        rest = "there is no checkpoint yet" if newest is None else f"go on from {newest} with --resume"
        raise CheckpointError(f"{error.filename or run}: {error.strerror}; mend that, {rest}") from error
    if code != PREEMPTED and _first():
        policy = checkpoint.folder_of(run, config.run.steps) / checkpoint.POLICY
        say(f"{config.run.steps} steps done; the policy is {policy}")
    return code


def _first() -> bool:
    """Whether this process speaks for all of the run's."""
    return os.environ.get("RANK", "0") == "0"


def _world_size() -> int | None:
    """As torchrun says it; None outside of it."""
    world = os.environ.get("WORLD_SIZE")
    if world is not None and (not world.isdecimal() or int(world) < 1):
        raise ConfigError(
            f"WORLD_SIZE: expected a number of at least 1, as torchrun sets it, got {shown(world)}; unset it"
        )
    return None if world is None else int(world)


def configure(flags: Flags, words: Sequence[str]) -> TrainConfig:
    """The configuration of the flags, changed by `words`; what nothing reads of a published file and its options is told once.

    Nothing but the result goes to standard output, so that --print leaves one JSON document there.
    """
    if (flags.recipe is None) == (flags.config is None):
        stray = f", not {shown(words[0])}" if words and not words[0].startswith("-") else ""
        stray = ", not --config_yaml" if any(word.startswith("--config_yaml") for word in words) else stray
        raise ConfigError(f"give one of --recipe ({', '.join(RECIPES)}) and --config FILE{stray}")
    theirs = published.ROOTS if flags.config is not None and published.is_published(flags.config) else ()
    _check_roots(words, theirs)
    options = split_words(words)
    if flags.config is None:
        return recipe(str(flags.recipe)).override(options)
    if not theirs:
        config = read_config(flags.config)
        if flags.resume is not None and "run.out" not in options:
            check_place(config, flags.config)
        return config.override(options)
    ours = {key: text for key, text in options.items() if key.split(".")[0] not in theirs}
    changed = {key: text for key, text in options.items() if key not in ours}
    config, ignored = published.read(flags.config, changed, ours.get("weights.backbone"))
    config = config.override(ours)
    if ignored and _first():
        sys.stderr.write(f"{flags.config}: unread, so without effect: {', '.join(ignored)}\n")
    return config


def _check_roots(words: Sequence[str], theirs: Sequence[str]) -> None:
    """ConfigError for an option that is neither a flag nor a key of a configuration."""
    keys = [*(field.name for field in dataclasses.fields(TrainConfig)), *theirs]
    known = [*keys, *(field.name.replace("_", "-") for field in dataclasses.fields(Flags))]
    for word in words:
        key = word[2:].partition("=")[0]
        root = key.split(".")[0]
        if word.startswith("--") and root not in keys:
            if root in published.ROOTS:
                rest = "; it goes with a published file, --config FILE"
            else:
                rest = f"{did_you_mean(root, known)}; dit4dit train --help"
            raise ConfigError(f"--{key}: unknown option {root!r}{rest}")
