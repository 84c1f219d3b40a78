"""What ends a run early, and going on from an older checkpoint: nothing is lost, and no two pasts are mixed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_runs as runs
from training_worker import small_config

from dit4dit.errors import ConfigError, DataError
from dit4dit.training import checkpoint, evaluate, loop, stop
from dit4dit.training.config import read_config
from dit4dit.training.loop import PREEMPTED, train
from dit4dit.training.random_data import HELD_OUT, RandomData

STEPS = 4000  # more than a run takes before its signal comes, also where this process has to wait for a core
LONG = ("--run.steps", STEPS, "--run.save_frozen", "false")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_that_data_loaders_get_too_saves(number: int, tmp_path: Path) -> None:
    """torchrun, Slurm and a terminal send it to every process of a run."""
    out = tmp_path / "run"
    run = runs.Run(out, *LONG, "--data.workers", 2)
    code, errors = run.signal_after(2, number, loaders=True)
    assert code == PREEMPTED, errors
    newest = checkpoint.latest(out)
    assert newest is not None
    assert checkpoint.read(newest).progress.step == max(runs.losses(out)) < STEPS


def test_before_the_first_step_a_signal_leaves_at_once(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop.stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(6000):  # another thread may get it, and this one hears of it a little later
            time.sleep(0.01)
        pytest.fail("went on")
    assert stopped.requested
    assert "before the first step; start again" in caplog.text
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_more_signals_do_not_spoil_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "PATIENCE_S", 600.0)  # the second signal is no late one, however busy the machine is
    said = []

    def warning(*words: object) -> None:
        said.append(words)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.log, "warning", warning)
    with stop.stop_signal() as stopped:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")
    assert stopped.requested
    assert len(said) == 1, "the second signal came while the first one's message was written"


def test_a_run_that_is_stopped_before_its_first_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "fill_caches", lambda *_: signal.raise_signal(signal.SIGTERM))
    config = small_config(tmp_path)
    assert train(config, RandomData(config.model, "libero")) == PREEMPTED
    assert checkpoint.latest(tmp_path) is None


def test_ctrl_c_again_and_late_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with stop.stop_signal() as stopped:
        stopped.stepping = True
        for _ in range(2):  # torchrun hands it on, so it comes twice
            signal.raise_signal(signal.SIGINT)
        assert stopped.requested
        now[0] += 1.01 * stop.PATIENCE_S
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_from_an_older_checkpoint_the_later_ones_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest checkpoint is then one of the new branch, and rotation does not take it for an old one."""
    config = small_config(tmp_path).override({"run.save_every": "2", "run.keep": "2", "run.steps": "6"})
    data = RandomData(config.model, "libero")
    folder = tmp_path / "checkpoints"
    assert train(config.override({"run.keep": "3"}), data) == 0
    assert train(config.override({"run.steps": "3"}), data, resume=folder / "step_00000002") == 0
    assert checkpoint.latest(tmp_path) == folder / "step_00000003"
    names = ["abandoned_step_00000004", "abandoned_step_00000006", "step_00000002", "step_00000003"]
    assert sorted(each.name for each in folder.iterdir()) == names
    assert checkpoint.read(folder / "abandoned_step_00000006").progress.step == 6
    assert f"after step 2 before: {folder / 'abandoned_step_00000004'}; delete it" in caplog.text
    # a second time the first ones give way
    assert train(config, data, resume=folder / "step_00000003") == 0
    assert train(config, data, resume=folder / "step_00000004") == 0
    assert sorted(each.name for each in folder.iterdir()) == [*names[:2], "step_00000004", "step_00000006"]


def test_a_refused_run_changes_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    data = RandomData(config.model, "libero")
    assert train(config.override({"run.steps": "1"}), data) == 0
    saved = checkpoint.latest(tmp_path / "run")
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="global batch"):
        train(config.override({"data.batch_size": "8", "data.cache_latents": "true"}), data, resume=saved)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == there
    assert read_config(tmp_path / "run" / "config.yaml").data.batch_size == 4


class Spoilt(RandomData):
    """The first held-out sample cannot be read."""

    skip_bad = False

    def sample(self, index: int, *, video: bool = True):
        if index == self.clips - HELD_OUT:
            raise DataError(f"clip {index}: frame 149: cannot be decoded")
        return super().sample(index, video=video)


class Skipped(Spoilt):
    skip_bad = True


def test_an_evaluation_that_fails_costs_nothing(tmp_path: Path) -> None:
    """The run goes on from the step that it could not evaluate, and makes up for it, at the end too."""
    config = small_config(tmp_path).override({"run.eval_every": "2", "run.save_every": "2", "run.steps": "4"})
    good = RandomData(config.model, "libero")
    for step in (2, 4):
        with pytest.raises(DataError, match="frame 149: cannot be decoded"):
            train(config, Spoilt(config.model, "libero"), resume=checkpoint.latest(tmp_path))
        newest = checkpoint.latest(tmp_path)
        assert newest == checkpoint.folder_of(tmp_path, step)
        assert train(config.override({"run.steps": str(step)}), good, resume=newest) == 0
        assert [line["step"] for line in runs.lines(tmp_path) if "eval/action_loss" in line] == [*range(2, step + 1, 2)]


@pytest.mark.parametrize("count", [1, 2, 4, 6, 10, 97, 1000])
def test_every_other_held_out_sample_can_stand_for_one(count: int) -> None:
    step = evaluate.stride(count)
    assert {attempt * step % count for attempt in range(count)} == set(range(count))
    assert count < 10 or 0.3 <= step / count <= 0.7


def test_unreadable_held_out_samples_are_replaced_and_counted(tmp_path: Path) -> None:
    words = {"run.eval_every": "2", "run.steps": "2", "run.eval_samples": "3", "run.eval_strips": "1"}
    config = small_config(tmp_path).override(words)
    data = Skipped(config.model, "libero")
    assert train(config, data) == 0
    (line,) = [line for line in runs.lines(tmp_path) if "eval/skipped" in line]
    assert line["eval/skipped"] == 1
    assert line["eval/action_loss"] > 0
    (strip,) = (tmp_path / "strips").rglob("*.png")
    assert strip.name != f"clip_{data.clips - HELD_OUT:06d}.png"
