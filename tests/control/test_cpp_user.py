"""A C++ user's journey with the installed package: find_package, build examples/cpp_controller, run it at 1 kHz by a producer in
Python; examples/python_controller too. Episodes, commands and exit codes are asserted, seconds are not.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import WAIT, eventually

from dit4dit.control.stream import Command, Status

EXAMPLES = Path(__file__).parents[2] / "examples"
PRODUCER = EXAMPLES / "python_controller" / "producer.py"
PATIENT = ("--dead-after", "5000")
"""The machine of a test may keep a thread from its core for longer than a robot could wait."""
IN_ORDER, NO_STREAM, MISUSE, REFUSED, DEAD = range(5)

needs_a_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++ on PATH"
)


class Started:
    """A process whose lines are read from files: nothing waits for a pipe."""

    def __init__(self, *command: str | Path, folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        folder.mkdir()
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen([*map(str, command)], stdout=out, stderr=err, cwd=folder)

    def has_said(self, words: str) -> bool:
        """Fails where it has ended without."""
        said = words in self.out.read_text() + self.err.read_text()
        assert said or self.process.poll() is None, self.err.read_text()
        return said

    def ended(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=WAIT)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def started(*command: str | Path, folder: Path) -> Iterator[Started]:
    one = Started(*command, folder=folder)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="module")
def cmake_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = [sys.executable, "-m", "dit4dit.control", "--cmake-dir"]
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.rstrip("\n"))


def configure(source: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(source), "-B", str(build), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def controller(cmake_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/cpp_controller, built as its README says, by a user whose own code is C++14."""
    build = tmp_path_factory.mktemp("cpp") / "build"
    options = (f"-Ddit4dit_DIR={cmake_dir}", "-DCMAKE_CXX_FLAGS=-Werror", "-DCMAKE_CXX_STANDARD=14")
    done = configure(EXAMPLES / "cpp_controller", build, *options)
    assert done.returncode == 0, done.stderr
    made = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return build / "controller"


@needs_a_compiler
@pytest.mark.parametrize(
    ("wanted", "options", "says"),
    [
        ("0.1 REQUIRED", ["-DCMAKE_PREFIX_PATH={site}"], "Configuring done"),
        ("REQUIRED", ["-Ddit4dit_DIR={cmake}"], "Configuring done"),
        ("9.9 REQUIRED", ["-Ddit4dit_DIR={cmake}"], 'compatible with requested version "9.9"'),
        ("REQUIRED", ["-Ddit4dit_DIR={cmake}", "-DCMAKE_SYSTEM_NAME=Generic"], "needs Linux"),
    ],
    ids=["by prefix", "any version", "another version", "another system"],
)
def test_find_package(wanted: str, options: list[str], says: str, cmake_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\n"
        "set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)\n"
        "project(user LANGUAGES CXX)\n"
        f"find_package(dit4dit {wanted})\n"
        f"find_package(dit4dit {wanted})\n"  # as subprojects do: each finds what it needs
        "get_target_property(found dit4dit::action_stream INTERFACE_INCLUDE_DIRECTORIES)\n"
        "if(NOT EXISTS ${found}/dit4dit/action_stream.h)\n  message(FATAL_ERROR ${found})\nendif()\n"
    )
    places = {"site": cmake_dir.parents[1], "cmake": cmake_dir}
    done = configure(source, tmp_path / "build", *(option.format(**places) for option in options))
    assert (done.returncode == 0) == (says == "Configuring done"), done.stderr
    assert says in " ".join((done.stdout + done.stderr).split())


@needs_a_compiler
@pytest.mark.slow
def test_wrong_words_and_no_stream(controller: Path, tmp_path: Path) -> None:
    for words in ([], ["/a", "/b"], ["/a", "--seconds"], ["/a", "--no-such"]):
        done = subprocess.run([controller, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == MISUSE
        assert done.stderr.startswith("usage: controller NAME")
    command = [controller, "/dit4dit.there-is-no-such-stream", "--wait", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT)
    assert done.returncode == NO_STREAM
    assert done.stderr.count("dit4dit.there-is-no-such-stream") == 2, "once while it waits, once at the end"


def check_followed(result: dict[str, Any]) -> None:
    """A controller's summary: commands came from several chunks, and none was outside the limits."""
    assert result["status"]["ok"] > 100, result
    assert result["chunks"] >= 3
    assert 0.01 < result["limit_used"] <= 1 + 1e-6
    assert result["at_rest"]
    assert result["age_ns"]["p50"] > 0


def plays(producer: Started, robot: Started) -> bool:
    """Whether two episodes are over, and in one of them the block lay on the plate; fails where the robot's side has ended."""
    assert robot.process.poll() is None, robot.err.read_text()
    return producer.has_said("episode 2: ") and producer.has_said(": done after ")


def producing(name: str, folder: Path, hz: int = 1000) -> contextlib.AbstractContextManager[Started]:
    return started(sys.executable, PRODUCER, "--name", name, "--command-hz", str(hz), folder=folder / "producer")


@needs_a_compiler
@pytest.mark.slow
def test_a_controller_follows_a_producer_and_outlives_it(controller: Path, segment_name: str, tmp_path: Path) -> None:
    """The controller is there first. Episodes in closed loop: a block lies on its plate. Then the producer is killed."""
    summary = tmp_path / "summary.json"
    command = (controller, segment_name, "--stop-when-dead", *PATIENT, "--wait", str(WAIT), "--json", summary)
    with started(*command, folder=tmp_path / "controller") as robot:
        eventually(lambda: robot.has_said("waiting: "))
        with producing(segment_name, tmp_path) as producer:
            eventually(lambda: plays(producer, robot))
            producer.process.kill()
            producer.ended()
        assert robot.ended() == DEAD, robot.err.read_text()
    said = robot.err.read_text()
    assert f"controller: {segment_name}: robot tabletop, 3 channels, 1000 Hz" in said
    assert said.index("controller: ok\n") < said.index("controller: dead\n")
    result = json.loads(summary.read_text())
    check_followed(result)
    assert result["period_ns"] == 1_000_000
    assert result["status"]["dead"] > 0
    assert result["status"]["estop"] == 0


@needs_a_compiler
@pytest.mark.slow
def test_estop_and_ending_in_order(controller: Path, segment_name: str, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    command = (controller, segment_name, *PATIENT, "--json", summary)
    with producing(segment_name, tmp_path) as producer, started(*command, folder=tmp_path / "controller") as robot:
        eventually(lambda: plays(producer, robot))
        robot.send(signal.SIGUSR1)
        eventually(lambda: robot.has_said("controller: estop\n"))
        clear = "import sys; from dit4dit.control import ActionStream; ActionStream.attach(sys.argv[1]).clear_estop()"
        subprocess.run([sys.executable, "-c", clear, segment_name], cwd=tmp_path, check=True)
        eventually(lambda: "controller: ok\n" in robot.err.read_text().partition("controller: estop\n")[2])
        robot.send(signal.SIGTERM)
        assert robot.ended() == IN_ORDER
        # its end is no e-stop: the next driver may come
        short = (controller, segment_name, *PATIENT, "--seconds", "0.5", "--json", tmp_path / "next.json")
        with started(*short, folder=tmp_path / "next") as following:
            assert following.ended() == IN_ORDER, following.err.read_text()
        producer.send(signal.SIGTERM)
        assert producer.ended() == IN_ORDER
    result = json.loads(summary.read_text())
    check_followed(result)
    assert result["status"]["dead"] == 0
    # how stop() shows, which comes last: of its own reader, not in the stream
    following_result = json.loads((tmp_path / "next.json").read_text())
    assert following_result["status"]["ok"] > 0
    assert following_result["status"]["estop"] > 0


@needs_a_compiler
@pytest.mark.slow
def test_what_a_faulty_stream_gives_does_not_reach_the_motors(
    faulty_include: Callable[[str, str, str], Path], segment_name: str, tmp_path: Path
) -> None:
    """The example's guard trusts nothing: with limiters that do nothing, the first step of the targets ends the controller."""
    include = faulty_include("reader_inl.h", "state.sent = state.limited ?", "state.sent = false ?")
    program = tmp_path / "unlimited"
    source = EXAMPLES / "cpp_controller" / "main.cpp"
    made = subprocess.run(["g++", "-std=c++17", f"-I{include}", source, "-o", program, "-pthread"], check=False)
    assert made.returncode == 0
    summary = tmp_path / "summary.json"
    with (
        producing(segment_name, tmp_path),
        started(
            program, segment_name, *PATIENT, "--wait", str(WAIT), "--json", summary, folder=tmp_path / "controller"
        ) as robot,
    ):
        assert robot.ended() == REFUSED
    assert re.search("controller: [xy]: a command was outside the limits and was not sent\n", robot.err.read_text())
    assert json.loads(summary.read_text())["limit_used"] > 1


@pytest.mark.slow
def test_the_python_controller_follows_too(segment_name: str, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    script = EXAMPLES / "python_controller" / "controller.py"
    command = (sys.executable, script, "--name", segment_name, "--stop-when-dead", *PATIENT, "--json", summary)
    with (
        producing(segment_name, tmp_path, hz=200) as producer,
        started(*command, folder=tmp_path / "controller") as robot,
    ):
        eventually(lambda: plays(producer, robot))
        producer.process.kill()
        producer.ended()
        assert robot.ended() == DEAD, robot.err.read_text()
    result = json.loads(summary.read_text())
    assert result["status"]["ok"] > 100
    assert result["status"]["dead"] > 0
    assert result["exit_code"] == DEAD


def test_a_dead_producers_rows_are_finished_before_the_python_controller_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at 10 Hz that are held: the robot rests within each of them for longer than it takes to count as at rest."""
    script = runpy.run_path(str(EXAMPLES / "python_controller" / "controller.py"))
    moment, rows = 0, []

    class Clock:
        monotonic_ns = staticmethod(lambda: moment)

        @staticmethod
        def sleep(seconds: float) -> None:
            nonlocal moment
            moment += round(seconds * 1e9)

    class Stream:
        command_hz = 100.0

        def start_at(self, pose: object) -> None:
            pass

        def at(self, now_ns: int) -> Command:
            row = now_ns // 100_000_000
            rows.append(row if row < 8 else -1)
            return Command(np.array([float(min(row, 7))]), 1, rows[-1], Status.DEAD, 0)

    run = script["Controller"].run
    monkeypatch.setitem(run.__globals__, "time", Clock)
    controller = script["Controller"](Stream(), script["Robot"](1), seconds=0.0, stop_when_dead=True)
    assert controller.run() == DEAD
    assert set(rows) == {*range(8), -1}


@needs_a_compiler
@pytest.mark.parametrize(
    ("commands", "says"),
    [
        (["1 0 0 0 0 0", "2 0.001 0.001 0.001 0.001 1"], ["sent still", "sent moving"]),
        (["1 0 0 0 0 1", "2 0 0 0 0 0"], ["sent still", "sent still"]),  # fingers do not count as motion
        (["1 0 0 0.003 0 0", "2 0 0 0.003 0 0"], ["sent moving", "sent moving"]),  # the same speed is motion
        (["1 nan 0 0 0 0"], ["position still"]),
        (["1 0 inf 0 0 0"], ["angle still"]),
        (["500 0.0021 0 0 0 0"], ["position moving"]),  # the first one too: from the pose, in one period
        (["1 0 0 0 0 0", "4001 1.0 0 0 0 0"], ["sent still", "sent moving"]),
        (["1 0 0 0 0 0", "4001 1.001 0 0 0 0"], ["sent still", "position moving"]),
        (["1 0 0 0 0 0", "4001 0 0 -0.501 0 0"], ["sent still", "velocity moving"]),
        (["1 0 0 0 0 0.5"], ["binary still"]),
        (["1 0 0 0 0 0", "2 0.0021 0 0 0 0"], ["sent still", "position moving"]),
        (["1 0 0 0 0 0", "2 0 0.0021 0 0 0"], ["sent still", "angle moving"]),
        # over pi, the short way
        (["1 0 0 0 0 0", "4001 0 3.141 0 0 0", "4002 0 -3.141 0 0 0"], ["sent still", "sent moving", "sent moving"]),
        (["1 0 0 0 0 0", "2 0 0 0.0041 0 0"], ["sent still", "velocity moving"]),
        (["1 0 0 0 0 0", "2 0 0 0 -0.0021 0"], ["sent still", "relative moving"]),
        (["1 0 0 0 0.0015 0", "2 0 0 0 -0.0015 0"], ["sent moving", "sent moving"]),  # displacements, not places
        (["1 0 0 0 0 0", "3 0.0039 0 0 0 0"], ["sent still", "sent moving"]),  # by the time that has passed
    ],
)
def test_the_examples_guard(commands: list[str], says: list[str], cpp: Callable[..., Path], cmake_dir: Path) -> None:
    guard = cpp("guard_program", f"-I{EXAMPLES / 'cpp_controller'}", include=cmake_dir.parent / "include")
    done = subprocess.run([guard], input="\n".join(commands), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:-1] == says


@needs_a_compiler
def test_the_examples_guard_lets_a_robot_come_in(cpp: Callable[..., Path], cmake_dir: Path) -> None:
    """Encoders say 1.01 where the limit is 1: the stream brings the robot in."""
    guard = cpp("guard_program", f"-I{EXAMPLES / 'cpp_controller'}", include=cmake_dir.parent / "include")
    commands = "1 1.009 0 0 0 0\n2 1.0095 0 0 0 0\n3 1.009 0 0 0 0\n3 -1.1 0 0 0 0"
    done = subprocess.run([guard, "1.01"], input=commands, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:-1] == ["sent moving", "position moving", "sent still", "position moving"]
