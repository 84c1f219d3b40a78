"""What `dit4dit demo-train` does: a policy for the built-in world from nothing but its VAE, and what it is worth.

    demonstrations -> success with random weights -> training -> success after, and when told other words -> report

Everything is a function of the seed. Layouts of demonstrations and of evaluation never meet (`TEST_SEEDS_FROM`).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit4dit.checkpoints.native import save_model
from dit4dit.demo.demonstrations import record
from dit4dit.demo.play import EXECUTE, machine_facts, play, rate
from dit4dit.demo.report import write as write_report
from dit4dit.envs import tabletop_tokenizer
from dit4dit.errors import InputError, TrainingError
from dit4dit.evaluation import report as evaluation_report
from dit4dit.files.json_files import write_json
from dit4dit.training import setup
from dit4dit.training.config import TrainConfig
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.recipes import recipe

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        demonstrations, steps: None takes what the recipe was made for.
        episodes: of each of the three evaluations.
        processes: that record, encode and train; the global batch stays the same.
    """

    seed: int = 0
    demonstrations: int = 5400
    steps: int | None = None
    episodes: int = 100
    processes: int = 2

    def __post_init__(self) -> None:
        for name in ("demonstrations", "steps", "episodes", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name}: expected at least 1, got {value}")


@dataclass
class Clock:
    """Seconds by stage: of the clock, and of all processors (children too)."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def demo_train(out: Path, settings: Settings, *, bar: Callable[[str, int], Any]) -> dict[str, Any]:
    """All of it, into the new folder `out`; returns what demo-train.json holds.

    Args:
        bar: (what, how many) -> a context manager that gives a function to be told of each one done.

    Raises:
        InputError: there is something in `out` already. TrainingError: the training processes failed.
    """
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: has a run already, or part of one; give another folder, or remove it")
    clock, config, source = Clock(), configure(out, settings), commit()
    runs = [out / "episodes" / name for name in ("before", "after", "other-words")]
    with clock.stage("demonstrations"), bar("demonstrations", settings.demonstrations) as done:
        first = settings.seed * settings.demonstrations
        data = record(
            out / "data" / "tabletop",
            settings.demonstrations,
            first_seed=first,
            processes=settings.processes,
            done=done,
        )
    with clock.stage("before"):
        random_policy(out / "before", config)
        before = play(out / "before", runs[0], settings.episodes, bar=bar)
    with clock.stage("training"):
        run_training(config, settings.processes, out)
    policy = out / "run" / "checkpoints" / f"step_{config.run.steps:08d}" / "policy"
    with clock.stage("after"):
        after = play(policy, runs[1], settings.episodes, videos="all", bar=bar)
    with clock.stage("control"):
        control = play(policy, runs[2], settings.episodes, other_words=True, bar=bar)
    result = {
        "seed": settings.seed,
        "commit": source,
        "success": {"before": rate(before), "after": rate(after), "told_other_words": rate(control)},
        "demonstrations": {**data, "first_seed": first, "seconds_of_robot_time": data["frames"] / 10},
        "recipe": facts(config),
        "execute": EXECUTE,
        "seconds": clock.wall,
        "processor_seconds": clock.cpu,
        "total_seconds": sum(clock.wall.values()),
        "policy": str(policy),
        "machine": machine_facts(settings.processes),
    }
    write_json(out / "demo-train.json", result)
    write_report(out, result, log_lines(out / "run"))
    evaluation_report.write(runs, out / "evaluation")
    return result


def configure(out: Path, settings: Settings) -> TrainConfig:
    """The tabletop recipe for this folder, seed and number of processes."""
    base = recipe("tabletop")
    batch = base.data.batch_size
    if batch % settings.processes:
        raise InputError(f"--processes {settings.processes}: expected a divisor of the global batch, {batch}")
    steps = settings.steps or base.run.steps
    run = replace(
        base.run, out=str((out / "run").resolve()), seed=settings.seed, steps=steps, save_every=steps, eval_every=steps
    )
    data = replace(base.data, root=str((out / "data").resolve()), batch_size=batch // settings.processes)
    return replace(base, run=run, data=data)


def random_policy(folder: Path, config: TrainConfig) -> None:
    """The policy that training starts from, as a checkpoint: the world's own VAE, everything else fresh from the seed."""
    start = setup.load(config, torch.device("cpu"))
    start.model.text = start.text()
    statistics = LeRobotData.open(config.data, config.model, config.run.seed).statistics
    save_model(folder, start.model, embodiment="tabletop", statistics=statistics, tokenizer=tabletop_tokenizer())


def run_training(config: TrainConfig, processes: int, out: Path) -> None:
    """`dit4dit train` on so many processes of one thread each, which on two cores is faster than two threads."""
    data, run = config.data, config.run
    facts = {"data.root": data.root, "data.batch_size": data.batch_size, "run.out": run.out, "run.seed": run.seed}
    facts |= {"run.steps": run.steps, "run.save_every": run.save_every, "run.eval_every": run.eval_every}
    words = ["train", "--recipe", "tabletop", *(f"--{key}={value}" for key, value in facts.items())]
    command = [sys.executable, "-m", "dit4dit"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "dit4dit"]
        command = [sys.executable, "-m", *launcher]
    # in a folder of its own, because -m looks for the package in the current one first
    done = subprocess.run([*command, *words], cwd=out, env={**os.environ, **ONE_THREAD}, check=False)
    if done.returncode:
        raise TrainingError(f"training ended with exit code {done.returncode}; its messages are above")


def facts(config: TrainConfig) -> dict[str, Any]:
    """What a reader of the result wants to know of the recipe."""
    model, optim = config.model, config.optim
    assert model.head is not None
    return {
        "steps": config.run.steps,
        "seed": config.run.seed,
        "backbone": f"{model.dit.num_layers} blocks, {model.dit.width} wide, features after block {model.extract_layer}",
        "action head": f"{model.head.num_layers} blocks, {model.head.width} wide",
        "learning rate": optim.learning_rate.base,
        "average of the weights": f"decay {optim.ema}",
        "every how manieth frame begins a sample": config.data.sample_every,
        "every how manieth sample has a video loss": model.flow.video_every,
        "weight of the video loss": model.flow.future_video_weight,
        "action loss reaches the backbone": model.flow.action_grad_to_backbone,
    }


def commit() -> str | None:
    """The commit of the current folder's repository, marked where tracked files differ from it; None outside of one."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def log_lines(run: Path) -> list[dict[str, float]]:
    """The run's log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().split("\n") if line]
