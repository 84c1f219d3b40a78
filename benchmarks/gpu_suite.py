"""Everything that needs a GPU, in one call that ends by itself within LIMIT seconds.

benchmarks/gpu_suite.sh OUT [--continue FILE] [--only PART]...    run, on a machine with one GPU (PYTHON: the interpreter)
python -I benchmarks/gpu_suite.py merge OUT FILE FILE...            put the files of several calls on one card together
python -I benchmarks/gpu_suite.py parts                             list the parts with their seconds

Parts run in the order of their value, each in processes of its own: one that fails, hangs or takes the GPU with it costs
itself. A part begins only where its least useful time is left, and where a part that it needs has run in this call (a latency
with verdicts needs those of its `dit4dit tune`, which go with the call's scratch folder). At the end of its time it gets
SIGTERM, which every benchmark answers with its file (pytest gets SIGINT, and writes its XML), and then SIGKILL. The result is
written anew after each part.

OUT gets at most eight files: <machine>.json, <machine>.log (all that the parts printed), <machine>.xml
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
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_results import merge, read_result, write_json
    from benchmarks.gpu_runner import LONGEST, ROOT, Part, Settings, Suite
else:
    sys.path.append(str(Path(__file__).parent))  # which python -I leaves out
    from gpu_results import merge, read_result, write_json
    from gpu_runner import LONGEST, ROOT, Part, Settings, Suite

OWN_PROCESS = ("self_attention", "action_ode")
"""Ops that are timed in a process each: ours among them keep a whole GPU busy, or wait for each other's blocks."""
OTHER_OPS = (
    *(
        "adaln",
        "add_pad",
        "conv2d",
        "cross_attention",
        "euler_step",
        "linear",
        "linear_fp8",
        "linear_gelu",
        "norm_linear",
    ),
    *(
        "patch_tokens",
        "philox_normal",
        "posterior_patches",
        "preprocess",
        "qk_norm_rope",
        "rms_norm_silu",
        "state_token",
    ),
    "unnormalize",
)
BFLOAT16_HEAD, FLOAT32_HEAD = ("--head-dtype", "bfloat16"), ("--head-dtype", "float32")
"""The second is the published choice. Parts of one name time the same in every result, so both are said."""
ALONE = ("--chunks", "10", "--engine-chunks", "300")
BESIDE_PUBLISHED = ("--baseline", "--chunks", "20", "--engine-chunks", "100", *FLOAT32_HEAD)
MOST_PRESETS = 5
"""With a page each, and the result, the log and the XML: eight files, which is what some machines send back."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SANITIZED = ("preprocess", "action_ode", "self_attention")


class Commands:
    """What parts run. "{json}", "{xml}" and "{seconds}" are filled in by the runner."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dit4dit = (settings.python, "-m", "dit4dit")

    def on_device(self, *words: str) -> tuple[str, ...]:
        return (*self.dit4dit, *words, "--device", self.settings.device, "--json", "{json}")

    def parity(self, fixture: str, *options: str) -> tuple[str, ...]:
        return self.on_device("parity", str(ROOT / "tests" / "golden" / fixture), "--engine", *options)

    def latency(self, preset: str, *options: str, page: bool = False) -> tuple[str, ...]:
        if "--baseline" not in options:
            options = (*options, "--no-roofline")  # it takes seconds on the host; the ratio's part has it
        if "--tune" not in options:
            options = (*options, "--tune", "off")  # the defaults, whatever this machine has measured before
        if page:
            options = (*options, "--report", str(self.settings.out / f"latency_{preset}.html"))
        return self.on_device("bench", "latency", "--preset", preset, "--seconds", "{seconds}", *options)

    def ops(self, *names: str) -> tuple[str, ...]:
        given = ("--sizes", "gr1", "--samples", "100", "--no-compile", "--seconds", "{seconds}")
        return self.on_device("bench", "ops", "--ops", *names, *given)

    def tests(self, marks: str, processes: int) -> tuple[str, ...]:
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
        # one of them starts compile processes and a tuning one, each of which imports torch
        bounds = ("--timeout", "120", "--timeout-method", "thread", "--junitxml", "{xml}")
        # not loadfile: a test that kills its worker would be run again and again, and none behind it
        side_by_side = ("-n", str(processes), "--dist", "worksteal", "--max-worker-restart", "40")
        return (self.settings.python, "-m", "pytest", *given, *bounds, *side_by_side, str(ROOT / "tests"))


def parts(settings: Settings) -> list[Part]:
    """All parts, those of the most value first: seconds at least and at most, as they were on an H200."""
    installing = [install(settings)] if settings.build else []
    return [*installing, *first_parts(settings), *later_parts(settings)]


def first_parts(settings: Settings) -> list[Part]:
    """Is it right, how fast is it: up to the latency with verdicts they fit into a call of 270 s."""
    run = Commands(settings)
    first, *others = settings.presets
    one_launch = run.parity("gr1_tiny", "--head", "one_launch", "--dtype", "bfloat16")
    engine = ("--chunks", "20", "--engine-chunks", "500", *FLOAT32_HEAD)
    library = run.latency(first, "--head", "library", *BFLOAT16_HEAD, *ALONE)
    tune = run.on_device("tune", "--preset", first, *BFLOAT16_HEAD, "--seconds", "{seconds}")
    tuned = run.latency(first, "--head", "auto", *BFLOAT16_HEAD, "--tune", "cached", *ALONE)
    verdicts = {"DIT4DIT_CACHE": str(settings.scratch / "cache")}
    return [
        Part("doctor", (*run.dit4dit, "doctor", "--json", "{json}"), 5, 30),
        Part("parity_gr1", run.parity("gr1_tiny"), 8, 28),
        Part("parity_libero", run.parity("libero_tiny"), 8, 28, beside=True),
        Part("parity_one_launch", one_launch, 8, 28, beside=True, gpu=True),
        Part(f"latency_{first}", run.latency(first, *engine, page=True), 15, 38),
        Part(f"latency_library_{first}", library, 12, 28),
        Part(f"tune_{first}", tune, 30, 75, environment=verdicts),
        Part(f"latency_tuned_{first}", tuned, 12, 28, environment=verdicts, needs=f"tune_{first}"),
        Part(f"ratio_{first}", run.latency(first, *BESIDE_PUBLISHED, page=True), 20, 44),
        *(Part(f"latency_{preset}", run.latency(preset, *engine, page=True), 15, 32) for preset in others),
        Part(f"profile_{first}", run.on_device("bench", "profile", "--preset", first, *BFLOAT16_HEAD), 12, 24),
        Part(
            f"latency_one_launch_{first}",
            run.latency(first, "--head", "one_launch", *BFLOAT16_HEAD, *ALONE),
            12,
            32,
            gpu=True,
        ),
    ]


def later_parts(settings: Settings) -> list[Part]:
    """Why is it so fast, do all kernels do what they must, and what else there is."""
    run = Commands(settings)
    first, *others = settings.presets
    tiles = run.on_device("tune", "--tiles", "{seconds}", "--batch", "1", "--samples", "15")
    sanitize = ("bash", str(ROOT / "benchmarks" / "sanitize.sh"))
    sanitized = {"LIMIT": "60", "TESTS": " ".join(f"tests/ops/test_{op}.py" for op in SANITIZED)}
    # 100 000 launches, as everywhere else, take many minutes
    launches = {"DIT4DIT_LAUNCHES": "2000"}
    alone = run.tests("gpu and alone", 1)
    # pytest-xdist waits 10 s for a worker that is in the middle of a test before it writes the XML
    budget = (
        *run.dit4dit,
        "bench",
        "budget",
        "--head",
        "library",
        *BFLOAT16_HEAD,
        "--measured",
        "{result}",
        "--json",
        "{json}",
    )
    interrupt: dict[str, Any] = {"gpu": True, "stop": signal.SIGINT, "grace": 14}
    return [
        Part("ops", run.ops(*OTHER_OPS), 15, 40),
        # the head's parts are timed too, each with a head of its own
        *(Part(f"ops_{op}", run.ops(op), 10, 50 if op == "action_ode" else 30) for op in OWN_PROCESS),
        Part("gpu_tests", run.tests("gpu and not alone", 8), 20, 120, **interrupt),
        Part("gpu_tests_alone", alone, 20, 60, environment=launches, **interrupt),
        Part(f"latency_fp8_{first}", run.latency(first, "--quantization", "fp8", *FLOAT32_HEAD, *ALONE), 30, 60),
        *(Part(f"budget_{p}", (*budget, "--preset", p), 10, 40, gpu=True) for p in settings.presets),
        *(Part(f"ratio_{p}", run.latency(p, *BESIDE_PUBLISHED, page=True), 20, 45) for p in others),
        Part(f"spaced_{first}", run.latency(first, "--at-hz", "30", *FLOAT32_HEAD, *ALONE), 15, 40),
        Part("tiles", (*tiles, "--out", str(settings.scratch / "tiles.json")), 20, 90, gpu=True),
        Part(
            "options",
            run.on_device("bench", "options", "--preset", first, "--seeds", "4", "--seconds", "{seconds}"),
            15,
            40,
        ),
        Part("sanitizer", sanitize, 30, 190, gpu=True, environment=sanitized),
    ]


def install(settings: Settings) -> Part:
    """The package into a folder of its own, from the wheels that were brought along, or built for the GPU that is here."""
    pip = (settings.python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(settings.site))
    if settings.bundle is not None:
        wheels = sorted(str(wheel) for wheel in settings.bundle.glob("*.whl"))
        return Part("install", (*pip, "--no-index", *wheels), 3, 12)
    definitions = "--config-settings=cmake.define.DIT4DIT_CUDA=AUTO"
    return Part("install", (*pip, "--no-build-isolation", definitions, str(ROOT)), 30, 120)


def settings_of(out: Path, scratch: Path, environment: dict[str, str]) -> Settings:
    """ValueError: a variable of the environment has a value that it cannot have."""

    def seconds(name: str, default: float | None, most: float) -> float | None:
        given = environment.get(name)
        try:
            value = default if given is None else float(given)
        except ValueError:
            value = 0.0
        if value is not None and not 0 < value <= most:
            raise ValueError(f"{name}: expected seconds above 0, at most {most:g}, got {given!r}")
        return value

    def one_of(name: str, *known: str) -> str:
        value = environment.get(name, known[0])
        if value not in known:
            raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        return value

    presets = tuple(environment.get("PRESETS", "robocasa_gr1 libero").split())
    if not 1 <= len(presets) <= MOST_PRESETS or len(set(presets)) < len(presets):
        raise ValueError(f"PRESETS: expected 1 to {MOST_PRESETS} different ones, got {' '.join(presets) or 'none'}")
    wheels = Path(environment.get("BUNDLE", ROOT / "dist" / "gpu-bundle")).resolve()
    bundle = wheels if any(wheels.glob("*.whl")) else None
    if bundle is None and "BUNDLE" in environment:
        raise ValueError(f"BUNDLE: {wheels} holds no wheels; make gpu-bundle makes dist/gpu-bundle")
    return Settings(
        out=out.resolve(),
        scratch=scratch,
        device=one_of("DEVICE", "cuda", "cpu"),
        presets=presets,
        limit=seconds("LIMIT", 270, LONGEST) or 0.0,
        bundle=bundle,
        build=one_of("BUILD", "1", "0") == "1",
        measure=seconds("MEASURE", None, LONGEST),
    )


def run(out: Path, before: Path | None, only: Sequence[str], make: Callable[[Settings], list[Part]] = parts) -> int:
    """Exit code 1 when a part failed, of this call or of one before that is kept."""
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        settings = settings_of(out, Path(scratch), dict(os.environ))
        todo = make(settings)
        unknown = sorted(set(only) - {part.name for part in todo})
        if unknown:
            raise ValueError(f"--only: no part {', '.join(unknown)}; known: {', '.join(part.name for part in todo)}")
        suite = Suite(settings, None if before is None else read_result(before))
        wanted = {"install", *only, *(part.needs for part in todo if part.name in only)}
        whole = suite.run([part for part in todo if not only or part.name in wanted])["suite"]
    failed, left = (", ".join(whole[key]) or "none" for key in ("failed", "left_out"))
    print(f"{suite.seconds():.0f} s; failed: {failed}; left out: {left}")
    return 1 if whole["failed"] else 0


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends the suite: the part that runs is ended, and the result written. Afterwards the handlers are those before.

    Parts have the default of what is handled here: pytest gets its SIGINT also where the suite, in the background, ignored it.
    """
    before = {number: signal.signal(number, terminate) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def terminate(number: int, frame: Any) -> None:
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="run the parts")
    running.add_argument("out", type=Path, metavar="OUT", help="a folder without a result of this machine")
    running.add_argument(
        "--continue", type=Path, dest="before", metavar="FILE", help="keep what this result has finished"
    )
    running.add_argument(
        "--only", action="append", default=[], metavar="PART", help="this part; several times for more"
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
            write_json(given.out, merge([read_result(file) for file in given.files]))
            return 0
        for part in parts(settings_of(Path("OUT"), Path("SCRATCH"), dict(os.environ))):
            print(f"{part.name:28} {part.least:4} to {part.most:4} s  {' '.join(part.command)}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
