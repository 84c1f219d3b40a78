"""A run that goes on with another number of steps: the schedule of the new total from its next step on, and nothing else new."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import lines
from training_worker import small_config

from dit4dit.cli import main
from dit4dit.training import checkpoint
from dit4dit.training.config import LearningRates, OptimConfig, read_config, write_config

DONE, OLD, NEW = 2, 3, 5
SCHEDULES = {
    "decay": OptimConfig(LearningRates(1e-3, 2e-3, 5e-3), warmup_steps=0),
    "to nothing": OptimConfig(LearningRates(1e-3, 2e-3, 5e-3), warmup_steps=1, min_lr=0.0),
    "in the warm-up": OptimConfig(LearningRates(1e-3, 1e-3, 1e-3), warmup_steps=4),
}


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""
"""What a process that trains does with the lock of its run."""


def run(folder: Path, *words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(folder / "config.yaml"), *map(str, words)])
    return int(end.value.code or 0)


def start(folder: Path, optim: OptimConfig) -> None:
    """A run of NEW steps, with the checkpoint of step DONE beside its last."""
    small = small_config(folder)
    shorter = replace(small.run, steps=NEW, save_every=DONE, save_frozen=False, keep=9)
    folder.mkdir()
    write_config(folder / "config.yaml", replace(small, optim=optim, run=shorter))
    assert run(folder) == 0


def rewound(source: Path, target: Path) -> Path:
    """The run as one of OLD steps that has done DONE; its newest checkpoint."""
    shutil.copytree(source, target)
    for step, folder in checkpoint.all_steps(target).items():
        if step > DONE:
            shutil.rmtree(folder)
    config = read_config(target / "config.yaml")
    write_config(target / "config.yaml", replace(config, run=replace(config.run, out=str(target), steps=OLD)))
    return checkpoint.folder_of(target, DONE)


def timeless(folder: Path) -> list[dict[str, float]]:
    """The log without how fast the run was."""
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "data_wait")} for line in lines(folder)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_more_steps_are_those_of_a_run_that_had_them_from_the_start(name: str, tmp_path: Path, capsys) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    start(whole, SCHEDULES[name])
    rewound(whole, longer)
    capsys.readouterr()
    assert run(longer, "--resume", "--run.steps", NEW) == 0
    said = capsys.readouterr().out.splitlines()
    # rates, losses and gradients of every step, to the bit; then the weights and the optimiser's moments
    assert timeless(longer) == timeless(whole)
    assert [line["step"] for line in timeless(longer)] == [*range(1, NEW + 1)]
    for part in ("policy", "state"):
        a, b = (load_file(checkpoint.folder_of(one, NEW) / part / "model.safetensors") for one in (whole, longer))
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a)
    assert read_config(longer / "config.yaml").run.steps == NEW
    # the line: what the schedule of OLD steps would have had, and what the log has
    rates = {key.partition("/")[2]: v for key, v in lines(longer)[DONE].items() if key.startswith("learning_rate/")}
    assert said[0].startswith(f"{NEW} steps instead of {OLD}; learning rates of step {DONE + 1}: base ")
    for group, rate in rates.items():
        assert f"{group} " in said[0]
        assert f"-> {rate:.4g}" in said[0]
    assert len(said) == 2


def test_another_number_of_steps(tmp_path: Path, capsys) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    start(whole, SCHEDULES["decay"])
    newest = rewound(whole, out)
    kept = (out / "config.yaml").read_bytes()
    capsys.readouterr()
    # a plan says the rates too, and writes nothing
    assert run(out, "--resume", "--run.steps", NEW, "--dry-run") == 0
    line = "5 steps instead of 3; learning rates of step 3: base 0.0002504 -> 0.0006547, "
    assert capsys.readouterr().out.startswith(line)
    assert (out / "config.yaml").read_bytes() == kept
    # fewer than are done
    for more in ((), ("--dry-run",)):
        assert run(out, "--resume", "--run.steps", 1, *more) == 2
        said = capsys.readouterr()
        assert f"--resume {newest}: 2 steps are done, run.steps is 1; give --run.steps 2 or more, or go" in said.err
        assert "learning rates" not in said.out
        assert (out / "config.yaml").read_bytes() == kept
    # as many as are done: nothing to do, and the run is then a whole one of that many
    assert run(out, "--resume", "--run.steps", DONE) == 0
    assert capsys.readouterr().out == f"{DONE} steps done; the policy is {newest / 'policy'}\n"
    assert read_config(out / "config.yaml").run.steps == DONE
    # which goes on like any other, and says no more where nothing changes
    assert run(out, "--resume", "--run.steps", OLD) == 0
    assert capsys.readouterr().out.startswith(
        "3 steps instead of 2; learning rates of step 3: base 5e-07 -> 0.0002504, "
    )
    assert run(out, "--resume") == 0
    assert capsys.readouterr().out.startswith("3 steps done")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--optim.learning_rate.base", 1), "--optim.learning_rate.base: {run} was started with 0.001, now 1.0; keep it"),
        (("--optim.warmup_steps", 7), "--optim.warmup_steps: {run} was started with 0, now 7; keep it"),
        (("--optim.clip", 2), "--optim.clip: {run} was started with 1.0, now 2.0; keep it"),
        (("--run.seed", 1), "--run.seed: {run} was started with 42, now 1; keep it"),
        (("--run.precision", "bfloat16"), "--run.precision: {run} was started with float32, now bfloat16; keep it"),
        (("--model.flow.training", "action"), "--model.flow.training: {run} was started with joint, now action; keep it"),
        (("--data.batch_size", 2), "global batch (data.batch_size x optim.accumulate x processes): the run has 4, this one 2"),
        (("--data.mixture", "other"), "--data.mixture: {run} was started with random, now other; keep it"),
        (("--data.holdout", 0.5), "--data.holdout: {run} was started with 0.02, now 0.5; keep it"),
    ],
)  # fmt: skip
def test_what_else_changes_a_run_is_refused(words, message: str, one_run: Path, capsys) -> None:
    kept = (one_run / "config.yaml").read_bytes()
    assert run(one_run, "--resume", "--run.steps", 9, *words) == 2
    assert message.format(run=one_run) in capsys.readouterr().err
    assert (one_run / "config.yaml").read_bytes() == kept


def test_a_copy_does_not_go_on_in_the_run_that_it_was_copied_from(one_run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(one_run, copy)
    before = sorted(one_run.rglob("*"))
    for word in ("--resume", "--resume=auto", f"--resume={copy}"):
        assert run(copy, word, "--run.steps", NEW + 1) == 2
        said = capsys.readouterr().err
        assert (
            f"names another, {one_run}; give the one that is to go on with --run.out {copy} or --run.out {one_run}"
            in said
        )
        assert said.count("\n") == 1
    assert run(copy, "--run.out", copy, "--resume", "--run.steps", NEW + 1) == 0
    assert checkpoint.folder_of(copy, NEW + 1).is_dir()
    assert sorted(one_run.rglob("*")) == before
    assert run(copy, "--resume") == 0  # its file names it now


def test_a_run_has_one_writer(one_run: Path, tmp_path: Path, capsys) -> None:
    """A second start would remove the checkpoint that the first is writing."""
    out = tmp_path / "run"
    shutil.copytree(one_run, out)
    half = out / "checkpoints" / ".step_00000009.half"
    half.mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / checkpoint.LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        assert run(out, "--run.out", out, "--resume", "--run.steps", NEW + 1) == 2
        said = capsys.readouterr().err
        assert f"{out}: another process trains there; wait for its end, or choose another folder with --run.out" in said
        assert half.is_dir()
        first.kill()
    # whoever was killed holds nothing
    assert run(out, "--run.out", out, "--resume", "--run.steps", NEW + 1) == 0
    assert not half.exists()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    start(out, SCHEDULES["decay"])
    return out
