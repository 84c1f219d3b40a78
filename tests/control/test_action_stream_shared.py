"""ActionStream in shared memory: a producer and a controller that are processes of their own, and how each of them ends."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stream_chunks import chunk, producer, unused_segment
from waiting import eventually

from dit4dit.control import ActionStream, Status, Switch
from dit4dit.errors import StreamError
from dit4dit.robots import G1, LIBERO, TABLETOP

FOREVER = 10**9
"""Milliseconds."""


@pytest.fixture
def segment() -> Iterator[str]:
    with unused_segment() as name:
        yield name


def test_a_controller_reads_what_another_process_publishes(segment: str) -> None:
    """Names, rates and chunks come from the segment; what the driver sends goes back; the e-stop reaches every reader."""
    tell = """
stream.at()
sys.stdin.readline()
f = stream.feedback()
print(f.driver, f.tick, f.chunk, f.status.name, *f.values, flush=True)
sys.stdin.readline()
print(stream.at().status.name, flush=True)
sys.stdin.read()
"""
    with producer(TABLETOP, segment, 0.0, tell) as process:
        stream = ActionStream.attach(segment, driver=True, embodiment=TABLETOP)
        assert (stream.robot, stream.names, stream.command_hz) == ("tabletop", ("x", "y", "grip"), 500.0)
        stream.start_at([0.1, 0.1, 0.0])
        now = time.monotonic_ns()
        assert stream.at(now).chunk == 1
        seen = stream.at(now + 2_000_000)
        process.stdin.write("\n")
        process.stdin.flush()
        driver, tick, number, status, *values = process.stdout.readline().split()
        assert (int(driver), int(tick), int(number), status) == (os.getpid(), 2, 1, seen.status.name)
        assert np.array_equal(np.array(values, float), seen.values)
        assert [*stream.feedback().values] == [*seen.values]
        other = ActionStream.attach(segment)
        other.estop()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ESTOP\n"
        assert stream.at().status is Status.ESTOP


def last_sign_of_life(segment: str, pid: int) -> int:
    """`Stamps` of layout.h, which begin at byte 6784: head, alive_at, loop_at, closed_at, producer."""
    _, alive_at, _, closed_at, producer = struct.unpack_from("<5q", Path("/dev/shm", segment[1:]).read_bytes(), 6784)
    assert (producer, closed_at) == (pid, 0)
    return alive_at


@pytest.mark.slow
def test_a_killed_producer_is_dead_and_another_one_goes_on(segment: str) -> None:
    """The first read at the last sign of life plus `dead_after_ms` says DEAD; the next producer continues the ids."""
    with producer(TABLETOP, segment, 1.0) as first:
        stream = ActionStream.attach(segment, driver=True)
        patient = ActionStream.attach(segment, dead_after_ms=FOREVER)
        assert stream.at().status in (Status.OK, Status.DRY)
        with pytest.raises(
            StreamError, match=f"^{segment}: process {first.pid} is its producer and lives; end it, or use"
        ):
            ActionStream(TABLETOP, shared=segment, interpolation="hold")
        with pytest.raises(StreamError, match=f"^{segment}: a producer is at work on it; close it first"):
            ActionStream.remove(segment)
        first.send_signal(signal.SIGKILL)
        first.wait()
    died = last_sign_of_life(segment, first.pid) + 50 * 10**6
    assert stream.at(died - 1).status is not Status.DEAD
    assert stream.at(died).status is Status.DEAD
    assert patient.at().status is not Status.DEAD  # it has not been silent for long enough
    with producer(TABLETOP, segment, 0.0) as second:
        command = stream.at()
        assert (command.chunk, command.status is Status.DEAD) == (2, False)
        second.stdin.close()  # ends in order: told at once, whatever dead_after_ms
        second.wait()
        assert second.returncode == 0
        assert patient.at().status is Status.DEAD


def test_another_robots_segment_is_replaced_unless_it_is_driven(segment: str) -> None:
    ActionStream(TABLETOP, shared=segment).close()
    refused = f"{segment}: a driver{{}} is at work on another layout: robot is 'tabletop', not 'libero'; end the driver"
    with ActionStream.attach(segment, driver=True) as driver:
        with pytest.raises(StreamError, match=refused.format("")):  # it has not read: nobody knows its process
            ActionStream(LIBERO, shared=segment)
        driver.at()
        with pytest.raises(StreamError, match=refused.format(rf" \(process {os.getpid()}\)")):
            ActionStream(LIBERO, shared=segment)
        assert driver.robot == "tabletop"
    with ActionStream(LIBERO, shared=segment):
        assert ActionStream.attach(segment).robot == "libero"


def test_what_a_controller_is_refused(segment: str) -> None:
    with ActionStream(G1, shared=segment):
        with pytest.raises(
            StreamError, match=r"expected 7 channels \(x, .* of robot 'libero', got 36 channels \(left_.* of 'g1'"
        ):
            ActionStream.attach(segment, embodiment=LIBERO)
        turned = replace(G1, action=G1.action[::-1])
        with pytest.raises(StreamError, match=r"expected 36 channels \(target_yaw, .*, got 36 channels \(left_arm.0, "):
            ActionStream.attach(segment, embodiment=turned)
        with pytest.raises(StreamError, match="bass"):
            ActionStream.attach(segment, group="bass")
        assert ActionStream.attach(segment, group="base", embodiment=G1).names[-1] == "target_yaw"
        with ActionStream.attach(segment, driver=True), pytest.raises(StreamError, match="driver"):
            ActionStream.attach(segment, driver=True)
        # its part is free again
        ActionStream.attach(segment, driver=True).close()
    place = Path("/dev/shm", segment[1:])
    foreign = bytearray(place.read_bytes())
    foreign[8] += 1
    place.unlink()
    place.write_bytes(foreign)
    with pytest.raises(StreamError, match=f"{segment}: version 2, this program wants 1"):
        ActionStream.attach(segment)
    place.write_bytes(b"somebody else's")
    for call in (ActionStream.attach, lambda name: ActionStream(G1, shared=name), ActionStream.remove):
        with pytest.raises(StreamError, match=f"{segment} is no segment of dit4dit"):
            call(segment)
    assert place.read_bytes() == b"somebody else's"


def test_another_users_segment_says_what_to_do(segment: str) -> None:
    """To nobody, in a child process, where this is root; else to this user, who then may not read it either."""
    ActionStream(G1, shared=segment).close()
    Path("/dev/shm", segment[1:]).chmod(0)
    said, tell = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            ActionStream.attach(segment)
        except StreamError as error:
            os.write(tell, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with os.fdopen(said) as message:
        wanted = f"run as that one, or let its group in, chmod g+rw /dev/shm{segment}"
        assert message.read() == f"{segment}: open: Permission denied; it belongs to another user: {wanted}"


ENDS = {
    "without a word": "",
    "with an error": "raise RuntimeError('the policy failed')",
    "by sys.exit": "sys.exit(3)",
    "with a thread that reads": """
import threading
threading.Thread(target=lambda: [stream.at() for _ in iter(int, 1)], daemon=True).start()
""",
    "with a reader alive": "keep = ActionStream.attach(name, driver=True); keep.at()",
    "in a cycle": "cycle = [stream]; cycle.append(cycle)",
}


@pytest.mark.parametrize("then", ENDS.values(), ids=ENDS)
def test_a_producers_interpreter_ends_in_order(segment: str, then: str) -> None:
    """However Python ends: no abort, no crash, and readers are told at once rather than after `dead_after_ms`."""
    with producer(TABLETOP, segment, 0.0, then) as process:
        process.wait()
    assert process.returncode == {"raise": 1, "sys.e": 3}.get(then[:5], 0)
    assert ActionStream.attach(segment, dead_after_ms=FOREVER).at().status is Status.DEAD


def test_a_forked_child_does_not_end_its_parents_stream(segment: str) -> None:
    """Neither by its exit nor by close; and it cannot publish in its parent's place."""
    then = """
import os
from dit4dit.errors import InputError
child = os.fork()
if child == 0:
    try:
        stream.publish(chunk(robot, [value] * robot.action_dim, time.monotonic_ns()))
    except InputError as error:
        assert "was forked from the producer's" in str(error), error
    else:
        os._exit(9)
    stream.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("alive", flush=True)
sys.stdin.read()
"""
    with producer(TABLETOP, segment, 0.0, then) as process:
        assert process.stdout.readline() == "alive\n"
        stream = ActionStream.attach(segment, dead_after_ms=FOREVER)
        assert stream.at().status is not Status.DEAD
        with pytest.raises(StreamError, match=f"process {process.pid} is its producer and lives"):
            ActionStream(TABLETOP, shared=segment)


def test_a_busy_producer_is_alive(segment: str) -> None:
    """Its sign of life comes from a thread that needs no GIL; its loop's does not."""
    busy = "10 ** 9_000_000 % 7"  # one operation that keeps the GIL for seconds
    with producer(TABLETOP, segment, 0.0, f"{busy}; sys.stdin.read()"):
        stream = ActionStream.attach(segment, dead_after_ms=2000)
        loop = ActionStream.attach(segment, dead_after_ms=2000, loop_dead_after_ms=100)
        eventually(lambda: loop.at().status is Status.DEAD)
        assert stream.at().status is not Status.DEAD


def test_libero_keeps_its_sum_across_processes(segment: str) -> None:
    rows = np.full((8, 7), 0.1, np.float32)
    rows[:, 6] = 1
    with ActionStream(LIBERO, shared=segment, command_hz=500, interpolation="linear", seam=Switch()) as stream:
        reading = ActionStream.attach(segment, driver=True, dead_after_ms=FOREVER)
        start = time.monotonic_ns()
        stream.publish(chunk(LIBERO, rows, start), now_ns=start)
        sent = np.stack([reading.at(start + i * 2_000_000).values for i in range(220)])
    assert np.abs(sent[:, :6].sum(axis=0) - 0.8).max() < 1e-6


def test_importing_control_brings_no_numpy(tmp_path: Path) -> None:
    code = "import sys, dit4dit.control; assert 'numpy' not in sys.modules; from dit4dit.control import Limits, Status"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
