"""Everything that needs a GPU, in one call that ends by itself within LIMIT seconds.

benchmarks/gpu_suite.sh [OUT] [--continue FILE] [--only PART]...    run, on a machine with one GPU (PYTHON: the interpreter)
python -I benchmarks/gpu_suite.py merge OUT FILE FILE...            put the files of several calls on one card together
python -I benchmarks/gpu_suite.py parts                             list the parts with their seconds

Parts run in the order of their value, each in processes of its own: one that fails, hangs or takes the GPU with it costs
itself. A part begins only where its least useful time is left. At the end of its time it gets SIGTERM, which every benchmark
answers with its file (pytest gets SIGINT, and writes its XML), and then SIGKILL. The result is written anew after each part.

OUT (benchmarks/results) gets at most eight files: <machine>.json, <machine>.log (all that the parts printed), <machine>.xml
(the GPU tests), and one page a preset. Exit code 1 when a part failed. Standard library only: it must run where nothing is
installed yet. Nothing is downloaded.

Environment:
    LIMIT    seconds in all, at most 480 (270)
    DEVICE   cuda or cpu (cuda); DEVICE=cpu PRESETS=tiny runs what can be run without a GPU
    PRESETS  of which the first has all parts (robocasa_gr1 libero)
    BUNDLE   wheels that `make gpu-bundle` made (dist/gpu-bundle); without that folder the package is built here
    BUILD    0 takes the package that is installed (1)
    MEASURE  seconds that each benchmark may measure (0.6 of its part's)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE = 4
"""Seconds from the signal that ends a part to the one that kills it."""
RESERVE = 6
"""Seconds before LIMIT at which the last part is told to end: GRACE, and writing the result."""
LONGEST = 480
KEEP = 5
"""Seconds between two writings of the result while a part runs."""
LOG_BYTES = 700_000
"""What a part may put into the log; of a longer one the middle is left out."""


@dataclass(frozen=True)
class Part:
    """One process to run.

    Attributes:
        name: its key in the result; a part that writes JSON has it under that name.
        command: what to run; "{json}", "{xml}" stand for its files, "{seconds}" for most of its time.
        least, most: seconds; it does not begin with less, and is ended after `most`.
        beside: runs at the same time as the part before it.
        gpu: left out without a GPU.
        stop: the signal that ends it.
    """

    name: str
    command: tuple[str, ...]
    least: int
    most: int
    beside: bool = False
    gpu: bool = False
    stop: signal.Signals = signal.SIGTERM
    environment: dict[str, str] = field(default_factory=dict)


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


def parts(settings: Settings) -> list[Part]:
    """All parts, those of the most value first."""
    python, device = settings.python, settings.device
    dit4dit = (python, "-m", "dit4dit")
    first, *others = settings.presets

    def latency(preset: str, *options: str) -> tuple[str, ...]:
        if "--baseline" not in options:
            options = (*options, "--no-roofline")  # it takes seconds on the host, and is told with the ratio
        given = ("--preset", preset, "--device", device, *options, "--seconds", "{seconds}", "--json", "{json}")
        return (*dit4dit, "bench", "latency", *given)

    def page(preset: str) -> tuple[str, str]:
        return "--report", str(settings.out / f"latency_{preset}.html")

    def parity(fixture: str, *options: str) -> tuple[str, ...]:
        golden = str(ROOT / "tests" / "golden" / fixture)
        return (*dit4dit, "parity", golden, "--engine", "--device", device, "--json", "{json}", *options)

    def ops(*names: str) -> tuple[str, ...]:
        given = ("--sizes", "gr1", "--samples", "100", "--no-compile", "--device", device)
        return (*dit4dit, "bench", "ops", "--ops", *names, *given, "--seconds", "{seconds}", "--json", "{json}")

    def tests(marks: str, *options: str) -> tuple[str, ...]:
        # from another folder, where the source tree would be taken for the package
        given = (
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
            "-p",
            "no:cacheprovider",
            "-v",
            "-m",
            marks,
        )
        bounds = ("--timeout", "60", "--timeout-method", "thread", "--junitxml", "{xml}")
        return (python, "-m", "pytest", *given, *bounds, *options, str(ROOT / "tests"))

    # not loadfile: a test that kills its worker would be run again and again, and none behind it
    replaced = ("--dist", "worksteal", "--max-worker-restart", "40")
    own_process = ("self_attention", "action_ode")
    one_head = ("--head-dtype", "bfloat16", "--chunks", "10", "--engine-chunks", "300")
    both = ("--baseline", "--chunks", "20", "--engine-chunks", "100")
    return [
        *([install(settings)] if settings.build else []),
        Part("doctor", (*dit4dit, "doctor", "--json", "{json}"), 5, 30),
        Part("parity_gr1", parity("gr1_tiny"), 8, 28),
        Part("parity_libero", parity("libero_tiny"), 8, 28, beside=True),
        Part(
            "parity_one_launch",
            parity("gr1_tiny", "--head", "one_launch", "--dtype", "bfloat16"),
            8,
            28,
            beside=True,
            gpu=True,
        ),
        *(
            Part(f"latency_{p}", latency(p, "--chunks", "20", "--engine-chunks", "500", *page(p)), 15, most)
            for p, most in zip(settings.presets, (38, *(32 for _ in others)), strict=True)
        ),
        Part(
            f"profile_{first}",
            (*dit4dit, "bench", "profile", "--preset", first, "--device", device, "--json", "{json}"),
            12,
            22,
        ),
        Part(f"latency_library_{first}", latency(first, "--head", "library", *one_head), 12, 28),
        Part(f"latency_one_launch_{first}", latency(first, "--head", "one_launch", *one_head), 12, 28, gpu=True),
        Part(f"ratio_{first}", latency(first, *both, *page(first)), 20, 44),
        Part("ops", ops(*OTHER_OPS), 15, 40),
        *(Part(f"ops_{op}", ops(op), 10, 30) for op in own_process),
        Part(
            "gpu_tests",
            tests("gpu and not alone", "-n", "8", *replaced),
            20,
            90,
            gpu=True,
            stop=signal.SIGINT,
        ),
        Part(
            "gpu_tests_alone",
            tests("gpu and alone", "-n", "1", *replaced),
            20,
            60,
            gpu=True,
            stop=signal.SIGINT,
            environment={"DIT4DIT_LAUNCHES": "2000"},
        ),
        Part(f"latency_fp8_{first}", latency(first, "--quantization", "fp8", *one_head[2:]), 30, 60),
        *(Part(f"ratio_{p}", latency(p, *both, *page(p)), 20, 45) for p in others),
        Part(f"spaced_{first}", latency(first, "--at-hz", "30", "--chunks", "3", "--engine-chunks", "300"), 15, 40),
        Part(
            "tune",
            (
                *dit4dit,
                "tune",
                "--device",
                device,
                "--batch",
                "1",
                "--samples",
                "15",
                "--seconds",
                "{seconds}",
                "--out",
                str(settings.scratch / "tiles.json"),
                "--json",
                "{json}",
            ),
            20,
            90,
            gpu=True,
        ),
        Part(
            "options",
            (
                *dit4dit,
                "bench",
                "options",
                "--preset",
                first,
                "--seeds",
                "4",
                "--device",
                device,
                "--seconds",
                "{seconds}",
                "--json",
                "{json}",
            ),
            15,
            40,
        ),
        Part("sanitizer", ("bash", str(ROOT / "benchmarks" / "sanitize.sh")), 30, 90, gpu=True, environment=SANITIZER),
    ]


OTHER_OPS = [
    "adaln",
    "cross_attention",
    "euler_step",
    "linear_fp8",
    "linear_gated",
    "linear_gelu",
    "philox_normal",
    "preprocess",
    "qk_norm_rope",
    "rms_norm_silu",
    "unnormalize",
]
SANITIZER = {
    "LIMIT": "28",
    "TESTS": "tests/ops/test_preprocess.py tests/ops/test_action_ode.py tests/ops/test_self_attention.py",
}


def install(settings: Settings) -> Part:
    """The package into a folder of its own, from the wheels that were brought along, or built for the GPU that is here."""
    pip = (settings.python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(settings.site))
    if settings.bundle is not None:
        wheels = sorted(str(wheel) for wheel in settings.bundle.glob("*.whl"))
        return Part("install", (*pip, "--no-index", *wheels), 3, 12)
    definitions = "--config-settings=cmake.define.DIT4DIT_CUDA=AUTO"
    return Part("install", (*pip, "--no-build-isolation", definitions, str(ROOT)), 30, 120)


class Suite:
    """One call: runs parts until its time is used up, and has the result in its file after each."""

    def __init__(self, settings: Settings, earlier: dict[str, Any] | None = None) -> None:
        """earlier: the result of a call before on the same GPU, whose finished parts are kept.

        ValueError: it is another GPU's.
        """
        self.settings, self.begin = settings, time.monotonic()
        self.machine: dict[str, Any] = {"gpu": gpu_name() if settings.on_gpu else None, "cpu": cpu_name()}
        self.name = machine_name(self.machine)
        self.result: dict[str, Any] = {"machine": self.machine, "suite": {"limit": settings.limit, "parts": {}}}
        if earlier is not None:
            same_gpu(earlier, self.machine)
            self.result = earlier
        self.suite: dict[str, Any] = self.result["suite"]
        self.suite["limit"] = settings.limit
        self.failed = False
        settings.out.mkdir(parents=True, exist_ok=True)
        self.log = settings.out / f"{self.name}.log"
        if earlier is None:
            self.log.unlink(missing_ok=True)
        self.commit = commit()

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def run(self, todo: Sequence[Part]) -> None:
        """Each part in turn, those marked `beside` with the one before."""
        for group in side_by_side([part for part in todo if not self._done(part)]):
            running: list[Job] = []
            try:
                for part in group:
                    running += self._start(part)
                self._wait(running)
            finally:  # SIGTERM too
                for job in running:
                    job.kill()
                    self._finish(job)
                self.write()

    def _wait(self, running: Sequence[Job]) -> None:
        """Until all have ended; every few seconds the result takes in what they have so far."""
        kept = time.monotonic()
        while any(job.running() for job in running):
            if time.monotonic() - kept > KEEP:
                for job in running:
                    self.suite["parts"][job.part.name] = {**job.record(), **self._fold(job)}
                self.write()
                kept = time.monotonic()
            time.sleep(0.05)

    def _done(self, part: Part) -> bool:
        """Whether an earlier call finished it. The package must be installed in each."""
        return part.name != "install" and rank(self.suite["parts"].get(part.name, {})) == 4

    def _start(self, part: Part) -> list[Job]:
        left = self.settings.limit - RESERVE - self.seconds()
        if part.gpu and not self.settings.on_gpu:
            self.suite["parts"][part.name] = {"left_out": f"DEVICE={self.settings.device}: it needs a GPU"}
            return []
        if left < part.least:
            known = self.suite["parts"].get(part.name, {})
            if "exit_code" not in known:  # what an earlier call has of it is more than nothing
                why = f"no time was left: {left:.0f} s of {self.settings.limit:.0f}, it needs {part.least}"
                self.suite["parts"][part.name] = {"left_out": why}
            return []
        most = min(float(part.most), left)
        print(f"== {part.name} ({self.seconds():.0f}s, at most {most:.0f}s)", flush=True)
        try:
            return [Job(part, self.settings, most, self.commit)]
        except OSError as error:
            self.failed = True
            self.suite["parts"][part.name] = {"command": " ".join(part.command), "exit_code": 127, "log": [str(error)]}
            return []

    def _finish(self, job: Job) -> None:
        part, record = job.part, job.record()
        record |= self._fold(job)
        if record["exit_code"]:
            self.failed = True
            record["log"] = job.text().splitlines()[-30:]
            print(f"FAILED ({record['exit_code']}): {part.name}", flush=True)
        self.suite["parts"][part.name] = record
        with self.log.open("a") as log:
            log.write(f"== {part.name}, exit code {record['exit_code']}, {record['seconds']} s: {record['command']}\n")
            log.write(job.text() + "\n")
        if job.xml.is_file():
            self.result.setdefault("tests", {})[part.name] = add_tests(self.settings.out / f"{self.name}.xml", job.xml)

    def _fold(self, job: Job) -> dict[str, Any]:
        """Take in what a part's file holds, which may be running still; what stopped it."""
        found = read_json(job.json)
        if not isinstance(found, dict):
            return {}
        self.result[job.part.name] = found
        if isinstance(found.get("machine"), dict):  # versions, as the package sees them
            self.machine |= found["machine"]
            self.result["machine"] = self.machine
        return {"cut": found["cut"]} if found.get("cut") else {}

    def write(self) -> None:
        known = self.suite["parts"]
        self.suite |= {"seconds": round(self.seconds(), 1), "commit": self.commit}
        self.suite["failed"] = [name for name, part in known.items() if part.get("exit_code")]
        self.suite["left_out"] = [name for name, part in known.items() if "left_out" in part]
        write_json(self.settings.out / f"{self.name}.json", self.result)


class Job:
    """A part that runs, in a process group of its own."""

    def __init__(self, part: Part, settings: Settings, most: float, of: str | None) -> None:
        self.part, self.settings = part, settings
        self.json, self.xml = (settings.scratch / f"{part.name}.{kind}" for kind in ("json", "xml"))
        self.output = settings.scratch / f"{part.name}.log"
        places = {"{json}": str(self.json), "{xml}": str(self.xml), "{seconds}": f"{settings.measure or 0.6 * most:g}"}
        self.command = [places.get(word, word) for word in part.command]
        self.begin, self.most = time.monotonic(), most
        self.end = self.begin + most
        self.timed_out = False
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
                preexec_fn=die_with_parent,
            )

    def running(self) -> bool:
        """Whether it runs still; it is told to end when its time is over, and killed when it does not."""
        if self.process.poll() is not None:
            self.seconds = self.seconds or time.monotonic() - self.begin
            return False
        if time.monotonic() >= self.end + GRACE:
            self.kill()
        elif time.monotonic() >= self.end and not self.timed_out:
            self.timed_out = True
            self.process.send_signal(self.part.stop)
        return True

    def kill(self) -> None:
        """The whole group, so that no child keeps the GPU."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        data = self.output.read_bytes()
        if len(data) > LOG_BYTES:
            half = LOG_BYTES // 2
            data = data[:half] + b"\n... %d bytes left out ...\n" % (len(data) - LOG_BYTES) + data[-half:]
        return "\n".join(line.rpartition("\r")[2] for line in data.decode(errors="replace").splitlines())

    def record(self) -> dict[str, Any]:
        """How it went; "exit_code" is None while it runs."""
        if self.settings.on_gpu and self.process.returncode is not None:
            self.clocks["after"] = clocks()
        seconds = self.seconds or time.monotonic() - self.begin
        return {
            "command": plain(self.settings, [*(f"{k}={v}" for k, v in self.part.environment.items()), *self.command]),
            "exit_code": self.process.returncode,
            "seconds": round(seconds, 1),
            "limit": round(self.most, 1),
            "timed_out": self.timed_out,
            "commit": self.commit,
            "clocks": self.clocks,
        }


def die_with_parent() -> None:
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


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several calls on one card as one result: of each part the last finished run, else the last that has anything.

    ValueError: they are different GPUs'.
    """
    first, *others = results
    together: dict[str, Any] = json.loads(json.dumps(first))
    for other in others:
        same_gpu(together, other["machine"])
        known = together["suite"]["parts"]
        for name, part in other["suite"]["parts"].items():
            if rank(part) >= rank(known.get(name, {})):
                known[name] = part
                together.pop(name, None)
                if name in other:
                    together[name] = other[name]
                if name in other.get("tests", {}):
                    together.setdefault("tests", {})[name] = other["tests"][name]
        together["machine"] |= other["machine"]
        suite = together["suite"]
        suite["seconds"] = round(suite["seconds"] + other["suite"]["seconds"], 1)
        suite["commit"] = other["suite"]["commit"]
        suite["failed"] = [name for name, part in known.items() if part.get("exit_code")]
        suite["left_out"] = [name for name, part in known.items() if "left_out" in part]
    return together


def rank(part: dict[str, Any]) -> int:
    """What a record of a part is worth: nothing, left out, failed, cut, finished."""
    if not part:
        return 0
    if "left_out" in part:
        return 1
    if part.get("exit_code") != 0:
        return 2
    return 3 if part.get("cut") else 4


def same_gpu(result: dict[str, Any], machine: dict[str, Any]) -> None:
    had, has = result["machine"].get("gpu"), machine.get("gpu")
    if had != has:
        raise ValueError(f"expected results of one card, got {had or 'a CPU'} and {has or 'a CPU'}")


def add_tests(whole: Path, new: Path) -> dict[str, int]:
    """Add a run's suites to the one XML file; how many tests ended how."""
    root = ElementTree.parse(new).getroot()
    suites = list(root) if root.tag == "testsuites" else [root]
    together = ElementTree.parse(whole).getroot() if whole.is_file() else ElementTree.Element("testsuites")
    together.extend(suites)
    ElementTree.ElementTree(together).write(whole, encoding="utf-8", xml_declaration=True)
    kinds = ("tests", "failures", "errors", "skipped")
    return {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds}


def read_json(path: Path) -> Any:
    """What the file holds; None where there is none, or where its part was killed while writing."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, data: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)


def clocks() -> dict[str, float] | None:
    """What nvidia-smi says of the first GPU: MHz, degrees, watts; None where it does not answer."""
    names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    values = smi(*names)
    try:
        return dict(zip(names, map(float, values), strict=True))
    except ValueError:
        return None


def smi(*names: str) -> list[str]:
    """nvidia-smi's answers about the first GPU; none where there is no such program."""
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
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


def settings_of(out: Path, scratch: Path, environment: dict[str, str]) -> Settings:
    """ValueError: LIMIT is no number of seconds that a call may take."""
    limit = float(environment.get("LIMIT", 270))
    if not 0 < limit <= LONGEST:
        raise ValueError(f"LIMIT: expected seconds up to {LONGEST}, got {limit:g}")
    bundle = Path(environment.get("BUNDLE", ROOT / "dist" / "gpu-bundle")).resolve()
    return Settings(
        out=out.resolve(),
        scratch=scratch,
        device=environment.get("DEVICE", "cuda"),
        presets=tuple(environment.get("PRESETS", "robocasa_gr1 libero").split()),
        limit=limit,
        bundle=bundle if any(bundle.glob("*.whl")) else None,
        build=environment.get("BUILD", "1") == "1",
        measure=float(environment["MEASURE"]) if "MEASURE" in environment else None,
    )


def run(out: Path, before: Path | None, only: Sequence[str], make: Callable[[Settings], list[Part]] = parts) -> int:
    """Exit code 1 when a part failed."""
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        settings = settings_of(out, Path(scratch), dict(os.environ))
        todo = make(settings)
        unknown = sorted(set(only) - {part.name for part in todo})
        if unknown:
            raise ValueError(f"--only: no part {', '.join(unknown)}; known: {', '.join(part.name for part in todo)}")
        earlier = None if before is None else json.loads(before.read_text())
        suite = Suite(settings, earlier)
        signal.signal(signal.SIGTERM, terminate)
        suite.write()
        suite.run([part for part in todo if not only or part.name in (*only, "install")])
        suite.write()
        took, failed, left = suite.seconds(), suite.suite["failed"], suite.suite["left_out"]
        print(f"{took:.0f} s; failed: {', '.join(failed) or 'none'}; left out: {', '.join(left) or 'none'}")
        return 1 if suite.failed else 0


def terminate(number: int, frame: Any) -> None:
    """SIGTERM: the part that runs is ended, and the result written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="run the parts")
    running.add_argument("out", type=Path, nargs="?", default=ROOT / "benchmarks" / "results")
    running.add_argument(
        "--continue", type=Path, dest="before", metavar="FILE", help="keep what this result has finished"
    )
    running.add_argument(
        "--only", action="append", default=[], metavar="PART", help="this part; may be given several times"
    )
    merging = verbs.add_parser("merge", help="several results of one card as one")
    merging.add_argument("out", type=Path)
    merging.add_argument("files", type=Path, nargs="+")
    verbs.add_parser("parts", help="list the parts")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "run":
            return run(given.out, given.before, given.only)
        if given.verb == "merge":
            write_json(given.out, merge([json.loads(file.read_text()) for file in given.files]))
            return 0
        for part in parts(settings_of(Path("OUT"), Path("SCRATCH"), dict(os.environ))):
            print(f"{part.name:28} {part.least:4} to {part.most:4} s  {' '.join(part.command)}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
