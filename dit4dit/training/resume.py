"""From which checkpoint a run goes on, and whether it is the run that it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from dit4dit.errors import ConfigError
from dit4dit.training import checkpoint
from dit4dit.training.config import LearningRates, TrainConfig, read_config
from dit4dit.training.optim import schedule

SAME = (
    *("model", "embodiment", "weights", "optim"),
    *("run.seed", "run.precision", "data.mixture", "data.holdout"),
)
"""What a run that goes on must keep; how many processes share the work, how long it is, and what is written, may change."""
MAY_DIFFER = ("optim.accumulate",)


def resumed(config: TrainConfig, word: str | None, say: Callable[[str], object] | None) -> Path | None:
    """The checkpoint that the run goes on from, if any. Says the rates of its next step where its number of steps changes.

    Raises:
        ConfigError: it is not the same run's.
    """
    run = Path(config.run.out)
    found = find_resume(word, run)
    if found is not None:
        before, done = read_config(run / "config.yaml"), checkpoint.step_of(found)
        check_same(before, config, run)
        if say is not None and before.run.steps != config.run.steps and done < config.run.steps:
            say(changed_rates(before, config, done))
    return found


def changed_rates(before: TrainConfig, now: TrainConfig, done: int) -> str:
    """A line with each group's learning rate of the step after `done`, as it was to be and as it is."""
    old, new = (schedule(done, config.run.steps, config.optim) for config in (before, now))
    tops = {field.name: getattr(now.optim.learning_rate, field.name) for field in fields(LearningRates)}
    rates = ", ".join(f"{name} {top * old:.4g} -> {top * new:.4g}" for name, top in tops.items())
    return f"{now.run.steps} steps instead of {before.run.steps}; learning rates of step {done + 1}: {rates}"


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


def check_place(config: TrainConfig, file: Path) -> None:
    """ConfigError where `file`, from which a run is to go on, lies in another run's folder than the one that it names.

    A run that was copied or moved still names the old folder; nobody means to go on there from the copy's file.
    """
    here, named = file.resolve().parent, Path(config.run.out)
    if (here / "checkpoints").is_dir() and here != named.resolve():
        raise ConfigError(
            f"--resume: {file} lies in a run, and names another, {named}; give the one that is to go on with --run.out "
            f"{file.parent} or --run.out {named}"
        )


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
