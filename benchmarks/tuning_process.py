"""The parent's end of a child of `dit4dit tune` (`tuning_child`): it starts one, asks it, and ends it when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit4dit.benchmarks.failures import GPU_LOST
from dit4dit.benchmarks.tuning_child import SCRIPT

STOPPING = 1.0
"""Seconds from SIGTERM to SIGKILL; one that waits for a GPU does not see the first."""
DYING = 10.0
"""Seconds to wait for the end of one that is killed, or has closed its pipe: what waits inside of a driver does not die."""
STRAY = "wrote to its process's pipe, which is not its own"
ANSWERS = ({"impossible"}, {"reason", "refused", "unsound"}, {"rounds", "out", "unsound"})
"""Fields of the answers of a child (`tuning_child.Child`)."""
LONGEST = 1 << 20  # bytes of a message
LOG = 12  # lines kept of a process that did not start

At = Callable[[str, str], float]
"""Gets what comes next (an implementation or "", and the step), before it is begun; returns when it has to be over, by
`time.monotonic`."""


class Died(Exception):
    """A child that is gone; the message says how it ended."""


class Process:
    """One child, from its start until `end`."""

    def __init__(self, tasks: Path, log: Path, start: float, environment: Mapping[str, str]) -> None:
        """log: gets what is printed. start: seconds that the child has to become ready. Died: it does not."""
        self._buffer, self._lost = b"", ""
        self._read, write = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        try:
            script = SCRIPT.format(parent=os.getpid(), path=sys.path, pipe=write, tasks=str(tasks))
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", script],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, **environment},
                    pass_fds=[write],
                    start_new_session=True,  # Ctrl-C is the parent's, who ends it
                )
        except BaseException:
            os.close(self._read)
            raise
        finally:
            os.close(write)
        try:
            first = self._message(time.monotonic() + start, start)
            if "ready" not in first:
                raise Died(STRAY)
            self.place: dict[str, Any] = first["ready"]
        except BaseException:
            self.end()
            raise

    def ask(self, task: dict[str, Any], at: At, first: float) -> dict[str, Any]:
        """The answer to a task. first: seconds until it is begun. Died: the child is gone, and ended."""
        end, limit, token = time.monotonic() + first, first, secrets.token_hex(8)
        try:
            self._tell({**task, "token": token})
            while True:
                message = self._message(end, limit)
                if message.get("token") != token:
                    raise Died(STRAY)
                if "answer" in message:
                    answer: dict[str, Any] = message["answer"]
                    return answer
                if message.get("at") not in ("", task.get("name"), *task.get("names", ())):
                    raise Died(STRAY)
                begin = time.monotonic()
                end = at(message["at"], message["step"])
                limit = end - begin
                self._tell({"go": True})
        except Died:
            self.end()
            raise

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its messages have ended too, and they say more
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _message(self, end: float, limit: float) -> dict[str, Any]:
        """The next one. Died: there is none by `end`, or ever."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                message = _read(line)
                if "lost" not in message or self._lost:
                    return message
                self._lost = str(message["lost"])
                continue
            if len(self._buffer) > LONGEST:  # what writes without an end would never let a limit pass
                raise Died(STRAY)
            if not self._poll.poll(1000 * max(end - time.monotonic(), 0)):
                raise Died(f"hung: it was not done after {limit:.3g} s")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise Died(self._how_it_ended())
            self._buffer += data

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(DYING)
        except subprocess.TimeoutExpired:
            return "hung: its process closed the pipe and did not end"
        if code == GPU_LOST and self._lost:
            return self._lost
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"crashed: its process was ended by {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"

    def end(self) -> None:
        """End it, and what it has started."""
        if self._process.poll() is None:
            for number, wait in ((signal.SIGTERM, STOPPING), (signal.SIGKILL, DYING)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(wait)
                    break
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it has started lives in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._read >= 0:
            os.close(self._read)
            self._read = -1


def _read(line: bytes) -> dict[str, Any]:
    """A message. Died: it is none, so something else writes to the child's pipe."""
    try:
        message = json.loads(line)
        if isinstance(message, dict) and _known(message):
            found: dict[str, Any] = message
            return found
    except (ValueError, RecursionError):
        pass
    raise Died(STRAY)


def _known(message: dict[str, Any]) -> bool:
    """Whether it is of a kind that a child sends, with all that it has."""
    if "at" in message:
        return isinstance(message["at"], str) and isinstance(message.get("step"), str)
    if "answer" in message:
        return isinstance(message["answer"], dict) and any(keys <= message["answer"].keys() for keys in ANSWERS)
    return isinstance(message.get("ready"), dict) or isinstance(message.get("lost"), str)


def last_lines(log: Path) -> str:
    """What a process printed last."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(log.stat().st_size - (1 << 14), 0))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG:])
    return ""
