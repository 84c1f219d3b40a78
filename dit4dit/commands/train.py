"""`dit4dit train`: a recipe or a file, changed by `--a.b.c value`, then a run, its continuation, or a memory plan."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dit4dit import robots as embodiments
from dit4dit.data.catalogue import catalogue
from dit4dit.data.fit import check_fit
from dit4dit.errors import CheckpointError, ConfigError, Dit4DitError, did_you_mean
from dit4dit.training import checkpoint, memory, preflight, published, setup
from dit4dit.training.config import TrainConfig, read_config, split_words
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import PREEMPTED, check_progress, train
from dit4dit.training.random_data import RandomData
from dit4dit.training.recipes import RECIPES, recipe
from dit4dit.training.samples import TrainingData

USAGE = f"""usage: dit4dit train (--recipe NAME | --config FILE) [options] [--a.b.c value ...]

  --recipe NAME     {", ".join(RECIPES)}
  --config FILE     a configuration of our own (a run folder's config.yaml), or a published training YAML
  --resume [DIR]    go on from the run's newest checkpoint, or from its checkpoint DIR; later ones are then renamed to
                    abandoned_step_N. "auto": from the newest, or from the beginning where there is none
  --dry-run         look for whatever would stop the run before or in its first step, print the memory plan and stop; no
                    weights are loaded, nothing is written. With --resume its checkpoint is read whole, as at a start
  --processes N     of the plan (default: WORLD_SIZE, else 1)
  --print           print the configuration and stop

Every key of the configuration is an option: --run.steps 1000, --optim.learning_rate.action_model 1e-4, --data.batch_size 8,
--model.flow.training action, --optim.freeze "backbone_interface.extractor.transformer". With a published file its own words
work too: --trainer.max_train_steps 1000.

Several processes: torchrun --standalone --nproc-per-node 8 --no-python dit4dit train ...; several nodes: training/slurm.sh.
SIGTERM and Ctrl-C save a checkpoint and end with exit code {PREEMPTED}: start again with --resume. torchrun gives its workers
30 seconds for that, and ends with 1."""

FLAGS = ("recipe", "config", "resume", "dry-run", "processes", "print")
SAME = (
    "model",
    "embodiment",
    "weights",
    "optim",
    "run.seed",
    "run.steps",
    "run.precision",
    "data.mixture",
    "data.holdout",
)
"""What a run that goes on must keep; how many processes share the work, and what is written, may change."""
MAY_DIFFER = ("optim.accumulate",)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors that a write has without naming its file."""


def main(words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run the command; returns its exit code."""
    try:
        return _main(words, say)
    except (CheckpointError, ConfigError) as error:  # other commands have that option at their top
        raise type(error)(str(error).replace("--backbone", "--weights.backbone")) from error


def _main(words: Sequence[str], say: Callable[[str], None]) -> int:
    if not words or "--help" in words or "-h" in words:
        say(USAGE)
        return 0
    options = split_words(_with_values(words))
    own = {name: options.pop(name) for name in FLAGS if name in options}
    config = configure(own.get("recipe"), own.get("config"), options, say)
    if "print" in own:
        import json

        say(json.dumps(config.to_dict(), indent=1))
        return 0
    if "dry-run" in own:
        dry_run(config, own.get("processes"), own.get("resume"), say)
        return 0
    if "processes" in own:
        raise ConfigError("--processes: goes with --dry-run; torchrun starts the processes of a run")
    run, resume = Path(config.run.out), resumed(config, own.get("resume"))
    try:
        code = train(config, open_data(config), resume=resume)
    except OSError as error:
        if error.filename is None and error.errno not in OF_THE_DISK:
            raise
        newest = checkpoint.latest(run)
        rest = "there is no checkpoint yet" if newest is None else f"go on from {newest} with --resume"
        raise CheckpointError(f"{error.filename or run}: {error.strerror}; mend that, {rest}") from error
    if code != PREEMPTED and int(os.environ.get("RANK", "0")) == 0:
        say(
            f"{config.run.steps} steps done; the policy is {checkpoint.folder_of(run, config.run.steps) / checkpoint.POLICY}"
        )
    return code


def resumed(config: TrainConfig, word: str | None) -> Path | None:
    """The checkpoint that the run goes on from, if any; ConfigError where it is not the same run's."""
    run = Path(config.run.out)
    found = find_resume(word, run)
    if found is not None:
        check_same(read_config(run / "config.yaml"), config, run)
    return found


def find_resume(word: str | None, run: Path) -> Path | None:
    """The checkpoint that `--resume` means, None for a new run.

    Raises:
        ConfigError: there is none, it is another run's, or a new run would have the folder of one.
    """
    newest = checkpoint.latest(run)
    if word is None and newest is not None:
        raise ConfigError(
            f"{run}: has checkpoints already; go on with --resume, or choose another folder with --run.out"
        )
    if word in (None, "auto"):
        return newest
    given = Path(word) if word else run
    folder = checkpoint.latest(given) if given == run or (given / "checkpoints").is_dir() else given
    if folder is None:
        raise ConfigError(
            f"--resume: {word or run} has no checkpoint; start without --resume, or name the run with --run.out"
        )
    if not folder.is_dir():
        known = ", ".join(one.name for one in checkpoint.all_steps(run).values())
        raise ConfigError(f"--resume {word}: no such folder; checkpoints of {run}: {known or 'none'}")
    if not checkpoint.is_step(folder):
        raise ConfigError(
            f"--resume {word}: expected a folder step_N; move the run's own step_N away and rename this one"
        )
    if folder.parent.resolve() != (run / "checkpoints").resolve():
        raise ConfigError(
            f"--resume {word}: expected a checkpoint of {run}, where the run would go on; name its run with --run.out, or "
            "begin a new one from its policy with --weights.checkpoint"
        )
    return folder


def _with_values(words: Sequence[str]) -> list[str]:
    """The words, with an empty value behind each flag that takes none."""
    out: list[str] = []
    for i, word in enumerate(words):
        out.append(word)
        alone = i + 1 == len(words) or words[i + 1].startswith("--")
        if word in ("--dry-run", "--print") or (word == "--resume" and alone):
            out[-1] = f"{word}="
    return out


def configure(name: str | None, file: str | None, options: dict[str, str], say: Callable[[str], None]) -> TrainConfig:
    """The configuration that the words mean; keys of a published file that nothing reads are told once."""
    if (name is None) == (file is None):
        raise ConfigError(f"give one of --recipe ({', '.join(RECIPES)}) and --config FILE")
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    if file is not None and published.is_published(Path(file)):
        theirs = {key: text for key, text in options.items() if key.split(".")[0] in published.ROOTS}
        ours = {key: text for key, text in options.items() if key not in theirs}
        _check_roots(ours, [*fields, *published.ROOTS, *FLAGS])
        config, ignored = published.read(Path(file), theirs, ours.get("weights.backbone"))
        if ignored:
            say(f"{file}: {len(ignored)} keys that nothing reads: {', '.join(ignored)}")
        return config.override(ours)
    _check_roots(options, [*fields, *FLAGS])
    return (recipe(str(name)) if file is None else read_config(Path(file))).override(options)


def _check_roots(options: dict[str, str], known: list[str]) -> None:
    for key in options:
        root = key.split(".")[0]
        if root not in known or root in FLAGS:
            raise ConfigError(f"--{key}: unknown option {root!r}{did_you_mean(root, known)}; dit4dit train --help")


def check_same(before: TrainConfig, now: TrainConfig, run: Path) -> None:
    """ConfigError unless a run that goes on is the run that it was."""
    old, new = _leaves(before.to_dict()), _leaves(now.to_dict())
    for key in old:
        kept = any(key == same or key.startswith(same + ".") for same in SAME) and key not in MAY_DIFFER
        if kept and old[key] != new[key]:
            raise ConfigError(
                f"--resume: --{key}: {run} was started with {old[key]}, now {new[key]}; keep it, or start a new run"
            )


def _leaves(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix: list(node) if isinstance(node, tuple) else node}
    return {
        k: v for key, value in node.items() for k, v in _leaves(value, f"{prefix}.{key}" if prefix else key).items()
    }


def dry_run(config: TrainConfig, processes: str | None, resume: str | None, say: Callable[[str], None]) -> None:
    """Say the memory plan, as far as there is one, and raise the first of what would stop the run; say the others."""
    given = processes or os.environ.get("WORLD_SIZE")
    text = given or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--processes: expected a number of at least 1, got {text!r}")
    faults: dict[str, Dit4DitError] = {}
    sized, data, prompts = config, None, None
    saved = None
    with noted(faults):
        if (folder := resumed(config, resume)) is not None:
            saved = checkpoint.read(folder)
    with noted(faults):
        preflight.check_start(config)
    with noted(faults):
        sized = setup.sized(config)
    with noted(faults):
        data = open_data(config)
    with noted(faults):
        if saved is not None and data is not None:
            check_progress(saved, config, data, int(text) if given else preflight.ranks_of(saved, config))
    with noted(faults):
        if data is not None:
            preflight.check_first_batch(sized, data)
    with noted(faults):
        prompts = preflight.check_weights(config)
        if prompts is None:
            say(f"note: {config.weights.backbone} is not on this machine; the start will download it")
    if (
        data is not None
        and prompts is not None
        and (cut := preflight.cut_prompts(prompts[0], data.instructions, prompts[1]))
    ):
        say(f"note: {cut}")
    with noted(faults):
        size = picture_size(sized) if data is None else data.picture_size
        say(memory.show(memory.plan(sized, size, int(text)), sized, int(text)))
    found = list(faults.values())
    for fault in found[1:]:
        say(f"also: {fault}")
    if found:
        raise found[0]


@contextlib.contextmanager
def noted(faults: dict[str, Dit4DitError]) -> Iterator[None]:
    """Keep a user's error of the block under its words."""
    try:
        yield
    except Dit4DitError as error:
        faults.setdefault(str(error), error)


def picture_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width of the joined views of the configuration's robot; one view where the robot is the data's own."""
    height, width = config.model.image_size
    name = config.embodiment or ""
    if name in embodiments.EMBODIMENTS:
        return height, width * len(embodiments.EMBODIMENTS[name].views)
    robots = catalogue(None if config.data.robots is None else Path(config.data.robots)).robots
    return height, width * (len(robots[name].video) if name in robots else 1)


def open_data(config: TrainConfig) -> TrainingData:
    """The mixture; "random" is data of the right sizes that mean nothing."""
    model = setup.sized(config).model
    if config.data.mixture != "random":
        return LeRobotData.open(config.data, model, config.run.seed, config.embodiment)
    if config.embodiment is None:
        raise ConfigError("data.mixture random: needs an embodiment with known sizes; choose one with --embodiment")
    check_fit(embodiments.embodiment(config.embodiment), model)
    return RandomData(model, config.embodiment)
