"""Running `training_worker.py` in one or two processes from a test, and reading what it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).parent / "training_worker.py"
LOSSES = ("train/action_loss", "train/video_loss", "train/grad_norm")


class Run:
    """The processes of one run."""

    def __init__(
        self, out: Path, *words: object, ranks: int = 1, file_limit: int | None = None, script: Path | None = None
    ) -> None:
        """file_limit: largest file, in KB. script: another program, which gets no words."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.out, self.processes = out, []
        for rank in range(ranks):
            facts = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
            if ranks > 1:
                facts |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, str(WORKER), "--run.out", str(out), *map(str, words)]
            if script is not None:
                command = [sys.executable, str(script)]
                # an empty part would be the current folder, where the source tree may stand
                facts["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WORKER.parent), os.environ.get("PYTHONPATH")]))
            if file_limit is not None:
                command = ["bash", "-c", f'ulimit -f {file_limit}; exec "$@"', "-", *command]
            self.processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **facts}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )

    def wait(self) -> tuple[int, str]:
        """(largest exit code, all of stderr); a process that hangs fails the test."""
        ended = [process.communicate(timeout=600)[1] for process in self.processes]
        return max(abs(process.returncode) for process in self.processes), "\n".join(ended)

    def outputs(self) -> list[str]:
        """What each process printed, when all have ended well."""
        ended = [process.communicate(timeout=600) for process in self.processes]
        assert all(process.returncode == 0 for process in self.processes), ended
        return [out for out, _ in ended]

    def ok(self) -> Run:
        code, errors = self.wait()
        assert code == 0, errors
        return self

    def signal_after(self, step: int, number: int, delay: float = 0.0, *, loaders: bool = False) -> tuple[int, str]:
        """Send a signal to every process, with `loaders` to their data loaders' too, once the log has that step; (exit code,
        stderr).
        """
        deadline = time.monotonic() + 600
        while step not in losses(self.out) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in self.processes), self.wait()
            time.sleep(0.01)
        time.sleep(delay)
        for process in self.processes:
            # before their parent, which would end them
            for pid in children(process.pid) if loaders else ():
                os.kill(pid, number)
            os.kill(process.pid, number)
        return self.wait()

    def kill_after(self, step: int, delay: float) -> None:
        assert self.signal_after(step, signal.SIGKILL, delay)[0] == 9


def children(pid: int) -> list[int]:
    """A process's own children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lines(out: Path) -> list[dict[str, float]]:
    """What log.jsonl has; a line that is being written is left out."""
    file, found = out / "log.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def losses(out: Path) -> dict[int, tuple[float, ...]]:
    """Step -> losses and gradient norm, from log.jsonl."""
    trained = [line for line in lines(out) if LOSSES[-1] in line]
    return {line["step"]: tuple(line[name] for name in LOSSES if name in line) for line in trained}
