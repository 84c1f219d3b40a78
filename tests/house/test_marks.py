"""Which command runs a test: `make test`, `make test-all`, or `pytest -m long`; never two of them, never none.

The GPU tests are the same on every machine: images for GPUs bring torch, and not all that the package can use.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import absent
import pytest
from interpreting import interpreter_fault

ROOT = Path(__file__).parents[2]
TESTS = str(ROOT / "tests")
COSTS = ("kernels", "slow", "sim", "long", "gpu")


def expressions() -> dict[str, str]:
    """QUICK and REST of the Makefile; what pytest takes for -m is Python too."""
    found = dict(re.findall(r"^(QUICK|REST) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(found) == {"QUICK", "REST"}
    return found


@pytest.mark.parametrize("has", list(product([False, True], repeat=len(COSTS))))
def test_every_test_has_one_command(has: tuple[bool, ...]) -> None:
    marks = dict(zip(COSTS, has, strict=True))
    chosen = {name: bool(eval(expression, {}, marks)) for name, expression in expressions().items()}
    assert [*chosen.values(), marks["long"]].count(True) == 1, (marks, chosen)
    assert chosen["QUICK"] == (not any(has))


ABSENT = "accelerate av matplotlib msgpack peft pyarrow scipy torchcodec websockets"
"""Which none of the engine, its parity and its benchmarks needs."""


def run_without(packages: str, *command: str) -> str:
    """What a command of this environment writes, in a process where `packages` cannot be imported."""
    path = os.pathsep.join([f"{TESTS}/helpers", *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": path, absent.VARIABLE: packages},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def gpu_tests(without: str = "") -> list[str]:
    pytest_ = str(Path(sys.executable).parent / "pytest")
    text = run_without(
        without, pytest_, "-p", "absent", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "-q", TESTS
    )
    return [line for line in text.splitlines() if "::" in line]


@pytest.mark.slow
def test_gpu_tests_need_no_package_that_the_engine_does_not_need() -> None:
    everything = gpu_tests()
    assert len(everything) > 300
    assert gpu_tests(f"{ABSENT} diffusers") == everything


COMMANDS = [
    "doctor",
    f"parity {ROOT}/tests/golden/gr1_tiny --engine",
    "bench latency --preset tiny --chunks 1 --engine-chunks 2 --no-roofline",
    "bench ops --ops euler_step --samples 1 --no-compile",
    "tune --help",
]
ALL_OF_THEM = """
import absent, dit4dit.cli
for command in {commands!r}:
    try:
        dit4dit.cli.main(command.split())
    except SystemExit as end:
        assert not end.code, command
"""


@pytest.mark.slow
def test_what_a_gpu_is_tried_with_needs_no_more() -> None:
    run_without(ABSENT, sys.executable, "-c", ALL_OF_THEM.format(commands=COMMANDS))


@pytest.mark.parametrize(
    "triton,numpy,fails",
    [("3.6.0", "2.5.2", True), ("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.6", False)],
)
def test_which_triton_interprets_with_which_numpy(triton: str, numpy: str, fails: bool) -> None:
    assert (interpreter_fault(triton, numpy) is not None) == fails


def test_the_versions_of_development_interpret_and_the_package_asks_for_no_others() -> None:
    pinned = dict(re.findall(r"^(triton|numpy)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert interpreter_fault(**pinned) is None
    wanted = re.findall(r'^  "((?:numpy|triton)[^";]*)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wanted == ["numpy", "triton>=3.6"], "images for GPUs hold Triton 3.6 with the newest NumPy"
