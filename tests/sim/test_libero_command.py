"""`dit4dit eval libero` as a user runs it: what it looks at before the run, and what survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit4dit import cli

pytestmark = pytest.mark.sim
DIT4DIT = Path(sys.executable).with_name("dit4dit")


def words(libero, run: Path, out: Path, *more: str) -> list[str]:
    simulator = ["--path", str(libero.folder), "--suite", "libero_spatial", "--tasks", "0", "--videos", "none"]
    policy = ["--checkpoint", str(run), "--device", "cpu", "--batch", "2"]
    return ["eval", "libero", *simulator, *policy, "--out", str(out), *more]


def change_statistics(run: Path, change) -> None:
    file = run / "dataset_statistics.json"
    entry = json.loads(file.read_text())
    change(entry["franka"])
    file.write_text(json.dumps(entry))


def findings(out: Path) -> dict:
    return {f["name"]: f for f in json.loads((out / "conventions.json").read_text())["findings"]}


def test_convention_check_before_the_run(libero, libero_checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "check"
    with pytest.raises(SystemExit) as caught:
        cli.main(words(libero, libero_checkpoint, out, "--check-only", "--data-fps", "10"))
    said = capsys.readouterr().out
    assert caught.value.code == 0, said
    found = findings(out)
    assert {name: f["verdict"] for name, f in found.items()} == {
        "rate": "unusual",
        "picture primary_image": "ok",
        "picture wrist_image": "ok",
        "instruction": "ok",
        "state": "ok",
        "action": "ok",
        "gripper data": "ok",
        "fingers": "ok",
        "standing still": "ok",
    }
    assert found["fingers"]["opened"] > 0.06 > 0.02 > found["fingers"]["closed"], "metres between two fingers"
    seen, drawn = (np.asarray(Image.open(out / name)) for name in ("policy_input.png", "policy_views.png"))
    assert seen.shape == (32, 64, 3)
    assert drawn.shape == (256, 512, 3)
    assert np.abs(drawn.reshape(32, 8, 64, 8, 3).mean(axis=(1, 3)) - seen).max() <= 1, (
        "256 / 32: INTER_AREA is the mean"
    )
    assert not (out / "run.json").exists()


def test_contradictions_stop_the_run(libero, libero_checkpoint, tmp_path, capsys) -> None:
    import shutil

    run = Path(shutil.copytree(libero_checkpoint, tmp_path / "run"))

    def other_conventions(entry):
        entry["action"]["min"][6] = -1.0  # a gripper from -1 to 1
        entry["state"]["min"][2], entry["state"]["max"][2] = 2.0, 2.5  # heights of another table

    change_statistics(run, other_conventions)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        cli.main(words(libero, run, out, "--trials", "1", "--max-steps", "8"))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "gripper data: the data's gripper action runs from -1 to 1" in error
    assert "state: z is" in error
    assert not (out / "run.json").exists()


class Evaluation:
    """A run in a process of its own."""

    def __init__(self, arguments: list[str], out: Path):
        self.out = out
        self._log = (out.parent / f"{out.name}.log").open("ab")
        self.process = subprocess.Popen([DIT4DIT, *arguments], stdout=self._log, stderr=self._log)

    def wait_for_lines(self, count: int, seconds: float = 600) -> None:
        end, file = time.monotonic() + seconds, self.out / "episodes.jsonl"
        while time.monotonic() < end:
            if file.exists() and file.read_bytes().count(b"\n") >= count:
                return
            assert self.process.poll() is None, Path(self._log.name).read_text()[-2000:]
            time.sleep(0.05)
        raise AssertionError(f"{count} episodes took more than {seconds} s")

    def workers(self) -> list[int]:
        """Process ids of its simulators."""
        own = str(self.process.pid)
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if state[1] == own and b"sim_worker.py" in command:
                found.append(int(entry.name))
        return found


def test_killed_workers_and_a_killed_evaluator_lose_nothing(libero, libero_checkpoint, tmp_path) -> None:
    more = ("--trials", "4", "--max-steps", "24", "--workers", "1", "--conventions", "off")
    whole = Evaluation(words(libero, libero_checkpoint, tmp_path / "whole", *more), tmp_path / "whole")
    assert whole.process.wait(600) == 0
    broken = Evaluation(words(libero, libero_checkpoint, tmp_path / "broken", *more), tmp_path / "broken")
    broken.wait_for_lines(1)
    (worker,) = broken.workers()
    os.kill(worker, signal.SIGKILL)
    broken.wait_for_lines(2)
    (worker,) = broken.workers()
    broken.process.kill()
    broken.process.wait()
    end = time.monotonic() + 120
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists(), "a simulator outlived its evaluator"
    kept = (tmp_path / "broken" / "episodes.jsonl").read_text().splitlines()
    assert 2 <= len(kept) < 4
    again = Evaluation(words(libero, libero_checkpoint, tmp_path / "broken", *more, "--resume"), tmp_path / "broken")
    assert again.process.wait(600) == 0
    lines = [(tmp_path / name / "episodes.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    assert lines[1][: len(kept)] == kept
    records = [sorted(map(json.loads, some), key=lambda record: record["trial"]) for some in lines]
    assert max(record["took"]["attempts"] for record in records[1]) == 2, "the killed worker's episode was begun again"
    for some in records:
        for record in some:
            del record["took"]
    assert records[0] == records[1]
    assert len(records[0]) == 4
