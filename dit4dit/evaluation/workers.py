"""The evaluator's end of `sim_worker.py`: starts a simulator's process, asks it, and notices when it is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dit4dit.errors import ConfigError, SimulatorError, WorkerLost
from dit4dit.evaluation import sim_worker

SCRIPT = Path(sim_worker.__file__)
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "LP_NUM_THREADS"), "1"
)
"""A worker computes and renders with one thread: it is by workers that an evaluation is parallel."""
LOG_TAIL = 4000


@dataclass(frozen=True)
class Launch:
    """How a simulator's process is started.

    Attributes:
        python: interpreter of the simulator's environment; this one's where None.
        variables: environment variables on top of this process's (MUJOCO_GL, ...).
        start_seconds: until it has connected, and for each environment it makes.
        answer_seconds: for each other answer; a worker that takes longer counts as hung and is killed.
    """

    python: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 600.0
    answer_seconds: float = 120.0


class Worker:
    """One simulator's process. Not to be shared between threads; `close` (or leaving a `with` block) ends it.

    Every request raises SimulatorError where the simulator raised (the process goes on), and WorkerLost where the process has
    ended or gives no answer in time (it is killed, and this object is of no more use).
    """

    def __init__(self, launch: Launch, log: Path | None = None) -> None:
        """log: file that takes what the simulator prints, appended; a temporary one where None."""
        self._launch = launch
        self._folder = Path(tempfile.mkdtemp(prefix="dit4dit-sim-"))  # mode 0700: who can connect is who may
        self._log = log or self._folder / "log"
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with self._log.open("ab") as output, self._listen() as listener:
                self._process = self._start(output)
                self._connection = self._accept(listener)
            greeting = self._receive("start", launch.start_seconds)
        except BaseException:
            self.close()
            raise
        if greeting.get("protocol") != sim_worker.PROTOCOL:
            self.close()
            raise SimulatorError(f"simulator worker: expected protocol {sim_worker.PROTOCOL}, got {greeting}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def make(self, environment: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Make an environment in place of the one before -> {"facts": ..., "versions": ...}."""
        return self._ask("make", self._launch.start_seconds, environment=environment, options=dict(options))

    def reset(self, seed: int, trial: int, *, pictures: bool = False) -> dict[str, Any]:
        """Begin an episode -> {"observation", "instruction"}, with `pictures` also "picture" (uint8 [H, W, 3])."""
        return self._ask("reset", self._launch.answer_seconds, seed=seed, trial=trial, pictures=pictures)

    def step(self, commands: Sequence[Any], *, pictures: bool = False) -> dict[str, Any]:
        """Take the commands in turn until one ends the episode -> {"observation" after the last step taken, "success" [one per
        step taken], "done", "infos"}, with `pictures` also "pictures" [one per step taken].
        """
        return self._ask("step", self._launch.answer_seconds, commands=list(commands), pictures=pictures)

    def render(self) -> Any:
        """The picture for the video as it is now, uint8 [H, W, 3]."""
        return self._ask("render", self._launch.answer_seconds)

    def close(self) -> None:
        """End the process and everything it started."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """From any thread: end the process, so that the thread that waits for its answer gets WorkerLost."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._folder / "worker"))
        except OSError as error:
            listener.close()
            raise ConfigError(f"{self._folder}/worker: no socket there ({error}); set TMPDIR to a short path") from None
        listener.listen(1)
        return listener

    def _start(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        python = self._launch.python or sys.executable
        words = [python, str(SCRIPT), "--socket", str(self._folder / "worker")]
        variables = {**os.environ, **ONE_THREAD, **self._launch.variables}
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables,
                start_new_session=True,  # one group, so that a wrapper's children are ended with it
            )
        except OSError as error:
            raise ConfigError(
                f"{python}: cannot be started ({error.strerror}); give the simulator environment's Python"
            ) from None

    def _accept(self, listener: socket.socket) -> socket.socket:
        assert self._process is not None
        listener.settimeout(0.2)
        end = time.monotonic() + self._launch.start_seconds
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
        raise self._lost("start", self._launch.start_seconds)

    def _ask(self, request: str, seconds: float, **arguments: Any) -> Any:
        if self._connection is None:
            raise WorkerLost(f"{request}: this worker has been closed")
        try:
            sim_worker.send(self._connection, {"do": request, **arguments})
        except OSError:
            raise self._lost(request, seconds) from None
        answer = self._receive(request, seconds)
        if "error" in answer:
            error = answer["error"]
            raise SimulatorError(f"{request}: {error['type']}: {error['message']}", error["traceback"])
        return answer["ok"]

    def _receive(self, request: str, seconds: float) -> dict[str, Any]:
        assert self._connection is not None
        self._connection.settimeout(seconds)
        try:
            answer: dict[str, Any] = sim_worker.receive(self._connection)
        except (EOFError, OSError):
            raise self._lost(request, seconds) from None
        return answer

    def _lost(self, request: str, seconds: float) -> WorkerLost:
        """End the process; the error says whether it had ended by itself."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)  # a connection closes a moment before its process has ended
        code = self._process.poll()
        tail = self._log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
        self.close()
        if code is None:
            return WorkerLost(f"{request}: no answer within {seconds:g} s; the simulator was killed", tail)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerLost(f"{request}: the simulator's process ended ({how})", tail)
