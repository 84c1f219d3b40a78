"""Simulators in processes of their own: what crosses the wire, and what happens when one of the two ends is gone."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from waiting import WAIT

from dit4dit.envs.tabletop import TabletopEnv
from dit4dit.errors import ConfigError, SimulatorError, WorkerLost
from dit4dit.evaluation import sim_worker
from dit4dit.evaluation.workers import SCRIPT, Launch, Worker

TESTS = Path(__file__).parents[1] / "helpers"
LAUNCH = Launch(variables={"PYTHONPATH": str(TESTS)})


def gone(pid: int, seconds: float = WAIT) -> bool:
    """Whether the process ends (or is a zombie) in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_messages_cross_unchanged() -> None:
    rng = np.random.default_rng(0)
    message = {
        "picture": rng.integers(0, 256, (480, 640, 3), dtype=np.uint8),
        "turned": rng.normal(size=(4, 6))[::-1, ::2],  # not contiguous
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(0.1),
        "flags": np.array([True, False]),
        "nested": [{"array": np.int64(3), "dict": {"dict": 1}}, [None, True, -1, 2.5, "ü"], ()],
    }
    ends = socket.socketpair()
    sender = threading.Thread(target=sim_worker.send, args=(ends[0], message))
    sender.start()
    got = sim_worker.receive(ends[1])
    sender.join()
    for name in ("picture", "turned", "empty", "scalar", "flags"):
        assert got[name].dtype == np.asarray(message[name]).dtype
        assert np.array_equal(got[name], message[name])
    assert got["picture"].flags.writeable
    assert got["nested"][0]["array"] == 3
    assert got["nested"][0]["dict"] == {"dict": 1}
    assert got["nested"][1:] == [[None, True, -1, 2.5, "ü"], []]
    for end in ends:
        end.close()


@pytest.mark.parametrize("header", [None, b'{"tree": 0, "arrays": [{"dtype": "O", "shape": [1]}]}'])
def test_messages_that_are_none_are_refused(header: bytes | None) -> None:
    ends = socket.socketpair()
    ends[0].sendall(b"\xff" * 4 if header is None else struct.pack(">I", len(header)) + header)
    with pytest.raises(ValueError, match="message: a"):
        sim_worker.receive(ends[1])


def test_tabletop_in_a_worker_is_the_tabletop() -> None:
    here = TabletopEnv(11)
    frame = here.reset()
    commands = np.random.default_rng(1).uniform(-0.04, 0.04, (12, 3))
    with Worker(Launch()) as worker:
        assert worker.make("tabletop", {})["facts"]["max_steps"] == 60
        start = worker.reset(11, 0, pictures=True)
        assert start["instruction"] == frame.instruction
        assert np.array_equal(start["picture"], frame.observation["image"])
        there = worker.step(list(commands), pictures=True)
    for i, command in enumerate(commands):
        result = here.step(command)
        assert np.array_equal(there["pictures"][i], result.observation["image"])
    for name in ("image", "state"):
        assert np.array_equal(there["observation"][name], result.observation[name])
    assert there["success"] == [False] * 12
    assert there["done"] is False


def test_steps_stop_where_the_episode_ends() -> None:
    with Worker(LAUNCH) as worker:
        worker.make("eval_worlds:world", {"goal": 6})
        worker.reset(0, 4)
        result = worker.step([np.ones(3, np.float32)] * 5)
    assert result["success"] == [False, True]
    assert result["done"] is True
    assert [info["steps"] for info in result["infos"]] == [1, 2]
    assert result["infos"][0]["trial"] == 4
    assert result["observation"]["extra"] == {"numbers": [1, 2.5, None, True], "text": "ä"}


def test_an_exception_comes_back_with_its_traceback_and_the_worker_goes_on(tmp_path: Path) -> None:
    with Worker(LAUNCH) as worker:
        with pytest.raises(SimulatorError, match="ask for make first"):
            worker.reset(0, 0)
        worker.make("eval_worlds:world", {"trouble": "raise", "at": 2})
        worker.reset(0, 0)
        with pytest.raises(SimulatorError, match="step: ZeroDivisionError: the world is flat") as error:
            worker.step([np.zeros(3)] * 3)
        assert "in break_down" in error.value.traceback
        worker.reset(0, 0)
        worker.make("eval_worlds:unsendable", {})
        worker.reset(0, 0)
        with pytest.raises(SimulatorError, match=r"\['infos'\]\[0\]\['what'\]: a object cannot be sent"):
            worker.step([np.zeros(3)])
        with pytest.raises(SimulatorError, match=r"expected one of .*tabletop"):
            worker.make("tablet", {})


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose connection is closed may take longer to end than the moment that `Worker` gives it."""
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: wait(self, timeout and WAIT))


def test_a_worker_that_dies_is_told_from_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    worker = Worker(LAUNCH, log)
    worker.make("eval_worlds:world", {"trouble": "die", "at": 1})
    worker.reset(0, 0)
    with monkeypatch.context() as patch:
        patient(patch)
        with pytest.raises(WorkerLost, match=r"step: the simulator's process ended \(exit code 3\)") as error:
            worker.step([np.zeros(3)])
    assert "last words" in error.value.traceback
    assert "last words" in log.read_text()
    with pytest.raises(WorkerLost, match="closed"):
        worker.reset(0, 0)

    worker = Worker(LAUNCH)
    worker.make("eval_worlds:world", {"trouble": "hang", "at": 1})
    worker.reset(0, 0)
    worker._launch = replace(LAUNCH, answer_seconds=0.3)  # for the step that hangs alone
    with pytest.raises(WorkerLost, match=r"step: no answer within 0.3 s; the simulator was killed"):
        worker.step([np.zeros(3)])
    assert gone(worker.pid)

    worker = Worker(LAUNCH)
    os.kill(worker.pid, signal.SIGKILL)
    patient(monkeypatch)
    with pytest.raises(WorkerLost, match="signal SIGKILL"):
        worker.make("tabletop", {})


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        Worker(Launch(python=str(tmp_path / "python")))
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho wrong environment >&2\nexit 4\n")
    other.chmod(0o755)
    with pytest.raises(WorkerLost, match=r"start: .*exit code 4") as error:
        Worker(Launch(python=str(other)))
    assert "wrong environment" in error.value.traceback


def test_no_worker_outlives_its_evaluator(tmp_path: Path) -> None:
    """The evaluator is killed while its worker hangs in a step."""
    script = textwrap.dedent(f"""
        import threading, time
        from pathlib import Path
        import numpy as np
        from dit4dit.evaluation.workers import Launch, Worker
        worker = Worker(Launch(variables={{"PYTHONPATH": {str(TESTS)!r}, "HANGING": {str(tmp_path)!r}}}))
        worker.make("eval_worlds:world", {{"trouble": "hang", "at": 1}})
        worker.reset(0, 0)
        threading.Thread(target=worker.step, args=([np.zeros(3)],)).start()
        while not Path({str(tmp_path)!r}, str(worker.pid)).exists():
            time.sleep(0.01)
        print(worker.pid, flush=True)
        time.sleep(600)
    """)
    # from another folder, where the source tree is not taken for the package
    evaluator = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert evaluator.stdout is not None
    pid = int(evaluator.stdout.readline())
    assert not gone(pid, 0.1)
    evaluator.kill()
    evaluator.wait()
    ended = gone(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_only_its_user_can_reach_a_worker(tmp_path: Path) -> None:
    with Worker(LAUNCH) as worker:
        assert worker._folder.stat().st_mode & 0o077 == 0
    assert not worker._folder.exists()
    with Worker(LAUNCH, tmp_path / "log") as worker:  # an evaluator that is killed leaves nothing behind
        assert not worker._folder.exists()
        assert worker.make("tabletop", {})["facts"]["max_steps"] == 60


def test_the_file_is_python_3_8() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


@pytest.mark.slow
def test_it_runs_under_python_3_8(tmp_path: Path) -> None:
    python = shutil.which("python3.8") or ""
    if not python or subprocess.run([python, "--version"], capture_output=True).returncode:
        found = sorted(Path.home().glob(".pyenv/versions/3.8.*/bin/python"))
        if not found:
            pytest.skip("no Python 3.8 here")
        python = str(found[-1])
    subprocess.run([python, "-m", "venv", tmp_path / "old"], check=True)
    inside = str(tmp_path / "old/bin/python")
    subprocess.run([inside, "-m", "pip", "install", "-q", "numpy"], check=True, capture_output=True)
    with Worker(Launch(python=inside, variables=LAUNCH.variables)) as worker:
        assert worker.make("eval_worlds:world", {"goal": 6})["versions"]["python"].startswith("3.8")
        assert worker.reset(3, 0)["observation"]["image"].shape == (64, 64, 3)
        assert worker.step([np.ones(3, np.float32)] * 5)["success"] == [False, True]
