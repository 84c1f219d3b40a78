"""A run that is killed goes on as if nothing had happened, and nothing that kills it leaves an unreadable checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import training_runs as runs
import training_worker as worker

from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.training import checkpoint
from dit4dit.training.loop import PREEMPTED, train
from dit4dit.training.random_data import RandomData

STEPS = 30
BASE = ("--run.steps", STEPS, "--run.save_every", 3, "--run.save_frozen", "false")
SHARES = {1: ("--data.batch_size", 2), 2: ("--data.batch_size", 1)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[int, dict[int, tuple[float, ...]]]:
    """Losses of a run that nobody kills, for one and for two processes."""
    found = {}
    for ranks, share in SHARES.items():
        out = tmp_path_factory.mktemp("whole") / str(ranks)
        found[ranks] = runs.losses(runs.Run(out, *BASE, *share, ranks=ranks).ok().out)
        assert sorted(found[ranks]) == list(range(1, STEPS + 1))
    return found


def readable(out: Path) -> list[int]:
    """Steps of all checkpoints, after reading each of them."""
    return [checkpoint.read(folder).progress.step for folder in checkpoint.all_steps(out).values()]


def kill_and_resume(tmp_path: Path, ranks: int, seed: int, whole: dict[int, tuple[float, ...]]) -> None:
    draw = random.Random(seed)
    out, victim = tmp_path / f"{ranks}_{seed}", draw.randint(4, 8)
    runs.Run(out, *BASE, *SHARES[ranks], "--hold", 11, ranks=ranks).kill_after(victim, draw.random() * 0.15)
    steps = readable(out)
    assert steps, "no checkpoint"
    runs.Run(out, *BASE, *SHARES[ranks], "--resume", checkpoint.latest(out), ranks=ranks).ok()
    after = runs.losses(out)
    assert len([step for step in after if step > steps[-1]]) >= 20
    assert after == whole
    assert readable(out) == [STEPS - 3, STEPS]
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", SHARES)
def test_killed_and_resumed_losses_are_bit_identical(ranks: int, uninterrupted, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, ranks, 0, uninterrupted[ranks])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("ranks", SHARES)
def test_killed_and_resumed_ten_times(ranks: int, seed: int, uninterrupted, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, ranks, seed, uninterrupted[ranks])


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    """A run with one checkpoint, of step 3, and all that goes on from it."""
    out = tmp_path_factory.mktemp("three") / "run"
    assert runs.Run(out, *BASE, *SHARES[1], "--hold", 11).signal_after(3, signal.SIGTERM)[0] == PREEMPTED
    for step, folder in checkpoint.all_steps(out).items():
        if step != 3:
            shutil.rmtree(folder)
    assert readable(out) == [3]
    return out


def killed_in_save(source: Path, out: Path, file: int) -> None:
    shutil.copytree(source, out)
    words = (*BASE, *SHARES[1], "--resume", checkpoint.folder_of(out, 3))
    assert runs.Run(out, *words, "--die-in-save", file).wait()[0] == 9
    assert readable(out) == [3]
    assert list((out / "checkpoints").glob(".step_*")), "it did not die while writing"


@pytest.mark.long
@pytest.mark.parametrize("file", [1, 3])
def test_killed_in_the_other_files_of_a_save(file: int, three_steps: Path, tmp_path: Path) -> None:
    killed_in_save(three_steps, tmp_path / "run", file)


@pytest.mark.slow
def test_killed_during_a_save_and_on_a_full_disk(three_steps: Path, uninterrupted, tmp_path: Path) -> None:
    """The second checkpoint dies half-written, then finds no space; the first stays whole, and the run goes on from it."""
    out = tmp_path / "run"
    killed_in_save(three_steps, out, 2)
    words = (*BASE, *SHARES[1], "--resume", checkpoint.folder_of(out, 3))
    # a disk (here: a limit on files) that takes no more than 256 KB
    code, errors = runs.Run(out, *words, file_limit=256).wait()
    assert (code, readable(out)) == (2, [3])
    assert "step_00000006: not written (" in errors
    assert "the newest one is" in errors
    assert not list((out / "checkpoints").glob(".*"))
    runs.Run(out, *words).signal_after(7, signal.SIGTERM)
    after = runs.losses(out)
    assert max(after) >= 7
    assert after == {step: uninterrupted[1][step] for step in after}


@pytest.mark.slow
def test_sigterm_saves_and_another_number_of_processes_goes_on(uninterrupted, tmp_path: Path) -> None:
    """From one process to two that shard the weights, and back."""
    out, resume = tmp_path / "run", ()
    sharded = ("--run.strategy", "fsdp2", "--run.reshard", "false")
    for ranks, how in ((1, ()), (2, sharded), (1, ())):
        start = max(runs.losses(out), default=0)
        process = runs.Run(out, *BASE, *SHARES[ranks], *how, *resume, "--hold", start + 7, ranks=ranks)
        code, errors = process.signal_after(start + 2, signal.SIGTERM)
        assert code == PREEMPTED == 75, errors
        step = readable(out)[-1]
        assert start + 2 <= step == max(runs.losses(out)) < STEPS
        resume = ("--resume", checkpoint.latest(out))
    for at, got in runs.losses(out).items():
        assert got == pytest.approx(uninterrupted[1][at], rel=1e-5)


@pytest.mark.slow
def test_another_run_is_refused(three_steps: Path, tmp_path: Path) -> None:
    saved = checkpoint.folder_of(three_steps, 3)
    small = worker.small_config(tmp_path / "run").override({"data.batch_size": "2", "run.steps": str(STEPS)})
    for changes, message in (
        ({"data.batch_size": "3"}, "global batch .*: the run has 2, this one 3"),
        ({"run.seed": "1"}, "run.seed: the run has 42, this one 1"),
        ({"optim.ema": "0.9"}, "average: .*: expected .*, got none"),
        ({"model.head.num_layers": "2"}, "this run does not have it; resume with the run's own configuration"),
        ({"model.head.hidden_size": "32"}, r"action_model\..*: expected .*32.*, got .*; resume with the run's own"),
    ):
        config = small.override(changes)
        with pytest.raises(ConfigError, match=message):
            train(config, RandomData(config.model, "libero"), resume=saved)


@pytest.mark.slow
def test_a_damaged_checkpoint_names_its_file(three_steps: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint.folder_of(three_steps, 3), tmp_path / "step_00000003"))
    files = json.loads((folder / "manifest.json").read_text())
    assert {"progress.json", "rng.safetensors", "policy/model.safetensors", "state/model.safetensors"} <= set(files)
    victim = folder / "state" / "model.safetensors"
    good = victim.read_bytes()
    for bad, message in ((good[:-1], "expected"), (good[:-1] + bytes([good[-1] ^ 1]), "SHA-256"), (None, "missing")):
        victim.unlink()
        if bad is not None:
            victim.write_bytes(bad)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.read(folder)
        assert str(victim) in str(caught.value)
        if bad is None:
            victim.write_bytes(good)
    assert checkpoint.read(folder).progress.step == 3


def test_rotation_keeps_the_newest_and_leftovers_are_swept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.folder_of(tmp_path, step).mkdir(parents=True)
    for rest in (".step_00000011.xyz", ".removed.step_00000007"):
        (tmp_path / "checkpoints" / rest).mkdir()
    checkpoint.rotate(tmp_path, 2)
    checkpoint.sweep(tmp_path)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000010"]
    assert checkpoint.latest(tmp_path) == checkpoint.folder_of(tmp_path, 10)
