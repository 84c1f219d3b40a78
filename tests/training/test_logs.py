"""What a run tells: log.jsonl, TensorBoard read back, and a stand-in for Weights & Biases that records its calls."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from training_worker import small_config

from dit4dit.errors import MissingExtra
from dit4dit.training import logs
from dit4dit.training.logs import Log


def log_of(folder: Path, *trackers: str, first_step: int = 0, active: bool = True) -> Log:
    run = replace(small_config(folder).run, trackers=trackers)
    return Log(folder, run, first_step=first_step, active=active, settings={"seed": 1})


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/action_loss": step / 10})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 4, "train/ac')  # a process that died while it wrote
    log_of(tmp_path, first_step=2).close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train/action_loss": 0.1}, {"step": 2, "train/action_loss": 0.2}]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = log_of(tmp_path, "tensorboard", active=False)
    log.write(1, {"train/action_loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_numbers_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(tmp_path / "strip.png")
    log = log_of(tmp_path, "tensorboard")
    log.write(3, {"eval/action_mae": 0.5, "action_mae/gripper": 0.25})
    log.picture(3, "future/clip_000001", tmp_path / "strip.png")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("action_mae/gripper")] == [(3, 0.25)]
    assert events.Scalars("eval/action_mae")[0].value == 0.5
    (picture,) = events.Images("future/clip_000001")
    assert (picture.width, picture.height) == (6, 4)


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch) -> None:
    calls: list[tuple] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",))
    )
    ids = iter(("first", "second"))
    wandb = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)) or run,
        util=SimpleNamespace(generate_id=lambda: next(ids)),
        Image=lambda path: ("picture", path),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "strip.png")
    for first_step in (0, 1):
        log = log_of(tmp_path, "wandb", first_step=first_step)
        log.write(first_step + 1, {"eval/action_mae": 0.5})
        log.picture(first_step + 1, "future/a", tmp_path / "strip.png")
        log.close()
    starts = [call[1] for call in calls if call[0] == "init"]
    assert [(s["id"], s["resume"], s["project"], s["config"]) for s in starts] == [
        ("first", "allow", "dit4dit", {"seed": 1})
    ] * 2
    assert ("log", {"eval/action_mae": 0.5}, 2) in calls
    assert ("log", {"future/a": ("picture", str(tmp_path / "strip.png"))}, 1) in calls
    assert calls[-1] == ("finish",)


def test_where_no_bar_can_be_drawn_there_are_lines(tmp_path: Path, monkeypatch, capsys) -> None:
    """A file or a batch system's log: one line as often as it is time for one, and always the last."""
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    log = log_of(tmp_path / "mine", first_step=1)  # 6 steps, 16 s each
    for step in range(2, 7):
        now[0] += 16
        log.advance()
        if step % 3 == 0:
            log.tell(f"loss {step}")
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "mine: 3 of 6, 00:48 left",
        "mine: 5 of 6, loss 3, 00:16 left",
        "mine: 6 of 6, loss 6, 00:00 left",
    ]


def test_a_run_goes_on_when_nobody_reads_its_lines(tmp_path: Path, monkeypatch) -> None:
    """`dit4dit train 2>&1 | head`"""

    tried = []

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    log = log_of(tmp_path)
    for step in range(1, 7):
        log.advance()
        log.tell(f"loss {step}")
    log.close()
    assert tried


def test_a_cache_says_how_far_it_is(monkeypatch, capsys) -> None:
    with logs.bar("latents", 3, active=True) as done:
        done(2)
        done(1)
    with logs.bar("latents", 3, active=False) as done:
        done(3)
    assert capsys.readouterr().err.splitlines() == ["latents: 3 of 3, 00:00 left"]


def test_without_wandb_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'dit4dit\[wandb\]'"):
        log_of(tmp_path, "wandb")
