"""Runs the parts of gpu_suite.py: processes with time limits, one result that is in its file after each, and all of their output.

Standard library only: it must run where nothing is installed yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_results import (
        FINISHED,
        add_tests,
        has_failed,
        merge,
        rank,
        read_json,
        same_gpu,
        summed_up,
        write_json,
    )
else:
    from gpu_results import FINISHED, add_tests, has_failed, merge, rank, read_json, same_gpu, summed_up, write_json

ROOT = Path(__file__).resolve().parents[1]
GRACE = 4
"""Seconds from the signal that ends a part to the one that kills it, where the part does not say another number."""
RESERVE = 6
"""Seconds before LIMIT at which the last part gets its signal: GRACE, and writing the result."""
LONGEST = 480
KEEP = 5
"""Seconds between two writings of the result while a part runs."""
LOG_BYTES = 15 << 20
"""The whole log; a part may take half of what is left, and of a longer one the middle is left out."""


@dataclass(frozen=True)
class Part:
    """One process to run.

    Attributes:
        name: its key in the result; a part that writes JSON has it under that name.
        command: what to run; "{json}", "{xml}" stand for its files, "{seconds}" for most of its time, "{result}" for the
            suite's own file with what has been written so far.
        least, most: seconds; it does not begin with less, and is ended after `most`.
        beside: runs at the same time as the part before it.
        gpu: left out without a GPU.
        stop: the signal that ends it. grace: seconds after which it is killed.
        needs: a part before it, of which it needs what that leaves in the scratch folder: it runs in the same call.
    """

    name: str
    command: tuple[str, ...]
    least: int
    most: int
    beside: bool = False
    gpu: bool = False
    stop: signal.Signals = signal.SIGTERM
    grace: int = GRACE
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Settings:
    """The environment of a call."""

    out: Path
    scratch: Path
    python: str = sys.executable
    device: str = "cuda"
    presets: tuple[str, ...] = ("robocasa_gr1", "libero")
    limit: float = 270
    bundle: Path | None = None
    build: bool = True
    measure: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def site(self) -> Path:
        """Where the wheels are unpacked: the machine's own packages stay as they are."""
        return self.scratch / "site"


class Suite:
    """One call: runs parts until its time is used up, and has the result in its file after each."""

    def __init__(self, settings: Settings, earlier: dict[str, Any] | None = None) -> None:
        """earlier: the result of a call before on the same GPU, whose finished parts are kept.

        ValueError: it is another GPU's; there is no GPU; OUT holds a result that would be overwritten.
        """
        self.settings, self.begin, self.earlier = settings, time.monotonic(), earlier
        self.machine: dict[str, Any] = {"gpu": gpu_name() if settings.on_gpu else None, "cpu": cpu_name()}
        if settings.on_gpu and self.machine["gpu"] is None:
            raise ValueError(
                f"DEVICE={settings.device}: nvidia-smi names no GPU; DEVICE=cpu PRESETS=tiny runs what needs none"
            )
        self.commit = commit()
        self.suite: dict[str, Any] = {"seconds": 0.0, "limit": settings.limit, "commit": self.commit, "parts": {}}
        self.result: dict[str, Any] = {"machine": self.machine, "suite": self.suite}
        self.json, self.log, self.xml = (
            settings.out / f"{machine_name(self.machine)}.{kind}" for kind in ("json", "log", "xml")
        )
        if earlier is not None:
            same_gpu(earlier, self.machine)
        elif self.json.exists():
            raise ValueError(f"{self.json}: is there already; give another folder, or --continue {self.json}")
        settings.out.mkdir(parents=True, exist_ok=True)

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def run(self, todo: Sequence[Part]) -> dict[str, Any]:
        """Each part in turn, those marked `beside` with the one before. What there is at the end, earlier calls' included."""
        self.write()
        needed = {part.needs for part in todo if not self._done(part)}
        for group in side_by_side([part for part in todo if part.name in needed or not self._done(part)]):
            running: list[Job] = []
            try:
                for part in group:
                    running += self._start(part)
                self._wait(running)
            finally:  # a signal too
                for job in running:
                    job.kill()
                    self._finish(job)
                self.write()
        return self.write()

    def _wait(self, running: Sequence[Job]) -> None:
        """Until all have ended; every few seconds the result takes in what they have so far."""
        kept = time.monotonic()
        while sum(job.running() for job in running):  # each is asked, as it ends what is out of time
            if time.monotonic() - kept > KEEP:
                for job in running:
                    self.suite["parts"][job.part.name] = {**job.record(), **self._fold(job)}
                self.write()
                kept = time.monotonic()
            time.sleep(0.05)

    def _done(self, part: Part) -> bool:
        """Whether an earlier call finished it. The package must be installed in each."""
        known = {} if self.earlier is None else self.earlier["suite"]["parts"]
        return part.name != "install" and rank(known.get(part.name, {})) == FINISHED

    def _start(self, part: Part) -> list[Job]:
        left = self.settings.limit - RESERVE - self.seconds()
        # what takes longer to end gets its signal earlier
        allowed = left - (part.grace - GRACE)
        if part.gpu and not self.settings.on_gpu:
            self.suite["parts"][part.name] = {"left_out": f"DEVICE={self.settings.device}: it needs a GPU"}
            return []
        if part.needs is not None and "left_out" in self.suite["parts"].get(part.needs, {"left_out": ""}):
            self.suite["parts"][part.name] = {"left_out": f"it needs {part.needs}, which did not run in this call"}
            return []
        if allowed < part.least:
            why = f"no time was left: {allowed:.0f} s of {self.settings.limit:.0f}, it needs {part.least}"
            self.suite["parts"][part.name] = {"left_out": why}
            return []
        most = min(float(part.most), allowed)
        print(f"== {part.name} ({self.seconds():.0f}s, at most {most:.0f}s)", flush=True)
        try:
            return [Job(part, self.settings, most, self.commit, self.json)]
        except OSError as error:
            self.suite["parts"][part.name] = {"command": " ".join(part.command), "exit_code": 127, "log": [str(error)]}
            return []

    def _finish(self, job: Job) -> None:
        part, record = job.part, {**job.record(), **self._fold(job)}
        if has_failed(record):
            record["log"] = job.text().splitlines()[-30:]
            print(f"FAILED ({record['exit_code']}): {part.name}", flush=True)
        self.suite["parts"][part.name] = record
        with self.log.open("a") as log:
            log.write(f"== {part.name}, exit code {record['exit_code']}, {record['seconds']} s: {record['command']}\n")
            log.write(job.text(max((LOG_BYTES - log.tell()) // 2, 20_000)) + "\n")
        if job.xml.is_file():
            self.result.setdefault("tests", {})[part.name] = add_tests(self.xml, job.xml, part.name)

    def _fold(self, job: Job) -> dict[str, Any]:
        """Take in what a part's file holds, which may be running still; what its record has of it."""
        found = read_json(job.json)
        if not isinstance(found, dict):
            return {}
        self.result[job.part.name] = found
        if isinstance(found.get("machine"), dict):  # versions, as the package sees them
            self.machine |= found["machine"]
        if found.get("cut"):
            return {"cut": found["cut"]}
        return {"complete": True} if job.timed_out and found.get("complete") is True else {}

    def write(self) -> dict[str, Any]:
        self.suite["seconds"] = round(self.seconds(), 1)
        whole = summed_up(self.result) if self.earlier is None else merge([self.earlier, self.result])
        write_json(self.json, whole)
        return whole


class Job:
    """A part that runs, in a process group of its own."""

    def __init__(self, part: Part, settings: Settings, most: float, of: str | None, result: Path) -> None:
        self.part, self.settings = part, settings
        self.json, self.xml = (settings.scratch / f"{part.name}.{kind}" for kind in ("json", "xml"))
        self.output = settings.scratch / f"{part.name}.log"
        places = {"{json}": str(self.json), "{xml}": str(self.xml), "{result}": str(result)}
        places["{seconds}"] = f"{settings.measure or 0.6 * most:g}"
        self.command = [places.get(word, word) for word in part.command]
        self.begin, self.most = time.monotonic(), most
        self.end = self.begin + most
        self.timed_out = self.killed = False
        self.seconds: float | None = None
        self.clocks = {"before": clocks() if settings.on_gpu else None}
        self.commit = of
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=settings.scratch,
                env={**environment_of(settings, of), **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare_process,
            )

    def running(self) -> bool:
        """Whether it runs still; it gets its signal when its time is over, and is killed when it does not end."""
        if self.killed or self.process.poll() is not None:
            self.seconds = self.seconds or time.monotonic() - self.begin
            return False
        if time.monotonic() >= self.end + self.part.grace:
            self.kill()
        elif time.monotonic() >= self.end and not self.timed_out:
            self.timed_out = True
            self.process.send_signal(self.part.stop)
        return True

    def kill(self) -> None:
        """The whole group, so that no child keeps the GPU."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # one that waits inside a driver does not die, and the others have their turn all the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)

    def text(self, most: int = 1 << 20) -> str:
        """What it printed; of more than `most` bytes the middle is left out."""
        data = self.output.read_bytes()
        if len(data) > most:
            data = data[: most // 2] + b"\n... %d bytes left out ...\n" % (len(data) - most) + data[-most // 2 :]
        return "\n".join(line.rpartition("\r")[2] for line in data.decode(errors="replace").splitlines())

    def exit_code(self) -> int | None:
        """None while it runs; -9 also where it was killed and did not die."""
        return -signal.SIGKILL if self.killed and self.process.returncode is None else self.process.returncode

    def record(self) -> dict[str, Any]:
        """How it went; "exit_code" is None while it runs."""
        if self.settings.on_gpu and self.process.returncode is not None:
            self.clocks["after"] = clocks()
        seconds = self.seconds or time.monotonic() - self.begin
        return {
            "command": plain(self.settings, [*(f"{k}={v}" for k, v in self.part.environment.items()), *self.command]),
            "exit_code": self.exit_code(),
            "seconds": round(seconds, 1),
            "limit": round(self.most, 1),
            "timed_out": self.timed_out,
            "commit": self.commit,
            "clocks": self.clocks,
        }


def prepare_process() -> None:
    """In a new process, on Linux: it ends with the suite, also where that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def environment_of(settings: Settings, of: str | None) -> dict[str, str]:
    """With the unpacked wheels first, and output as it comes."""
    path = os.pathsep.join(filter(None, [str(settings.site), os.environ.get("PYTHONPATH")]))
    given = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHON": settings.python}
    return {**given, **({"DIT4DIT_COMMIT": of} if of else {})}


def plain(settings: Settings, command: Sequence[str]) -> str:
    """A command without the paths of this machine, which say nothing elsewhere."""
    text = " ".join(command)
    for path, name in ((settings.scratch, "SCRATCH"), (settings.out, "OUT"), (ROOT, "."), (settings.python, "python")):
        text = text.replace(str(path), name)
    return text


def side_by_side(todo: Sequence[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    for part in todo:
        if group and not part.beside:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def clocks() -> dict[str, float] | None:
    """What nvidia-smi says of the first GPU: MHz, degrees, watts; None where it does not answer."""
    values = smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    try:
        return dict(zip(("sm_mhz", "memory_mhz", "celsius", "watts"), map(float, values), strict=True))
    except ValueError:
        return None


def smi(*names: str) -> list[str]:
    """nvidia-smi's answers about the first GPU; none where there is no such program."""
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=2, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in lines[0].split(",")] if lines else []


def gpu_name() -> str | None:
    return next(iter(smi("name")), None)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_name(machine: dict[str, Any]) -> str:
    """nvidia-h200, amd-epyc-2-cores-gpu-suite."""
    words = machine["gpu"] or f"{machine['cpu']} {os.cpu_count()} cores gpu suite"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def commit() -> str | None:
    """What DIT4DIT_COMMIT says, else the source's commit, "+" behind it where files differ; None where there is no git."""
    if given := os.environ.get("DIT4DIT_COMMIT"):
        return given
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
