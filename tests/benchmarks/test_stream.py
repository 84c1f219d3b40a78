"""`dit4dit bench stream`: what is measured, counted and said. No test here is about how long anything takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dit4dit.benchmarks import stream, stream_producer, stream_report
from dit4dit.benchmarks.recording import Recording
from PIL import Image
from waiting import WAIT

from dit4dit.control import ActionStream, Blend, Limits
from dit4dit.control.watch import FOLDER, Watch
from dit4dit.errors import BackendError
from dit4dit.progress import bar
from dit4dit.robots.channels import UNLIMITED


def forbid_fifo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)


def times(late: list[int], age: list[int], chunk: list[int], missed: int = 0, **status: int) -> stream.Times:
    """A loop's ticks, in ms; an age of -1 is none."""
    arrays = [np.array(values, np.int64) * 1_000_000 for values in (late, age, [1] * len(late))]
    arrays[1][arrays[1] < 0] = -1
    return stream.Times(*arrays, np.array(chunk), missed, {**dict.fromkeys(stream.STATUSES, 0), **status})


def segments_of_benchmarks() -> set[str]:
    return {path.name for path in FOLDER.glob(f"dit4dit.bench.{os.getpid()}*")}


@pytest.mark.slow
def test_the_command_measures_every_read_and_every_loop(main, tmp_path: Path) -> None:
    out, report = tmp_path / "stream.json", tmp_path / "report"
    code, shown, error = main("bench", "stream", "--samples", 40, "--reads", 300, "--json", out, "--report", report)
    assert code == 0, error
    result = json.loads(out.read_text())
    assert (result["complete"], result["cut"]) == (True, None)
    assert result["machine"]["cores"] == result["busy"] == stream.cores()
    assert [read["what"] for read in result["reads"]] == list(stream.READS)
    for read in result["reads"]:
        assert read["ns"]["samples"] == 300
        assert 0 < read["ns"]["p50"] <= read["ns"]["p90"] <= read["ns"]["p99"] <= read["ns"]["max"]
        assert read["ns"]["p999"] is None, "300 reads show no p99.9"
    allowed = result["fifo"]["allowed"]
    cases = [case for case in stream.CASES if allowed or not case.fifo]
    assert [(loop["reader"], loop["load"], loop["fifo"]) for loop in result["loops"]] == cases
    for loop in result["loops"]:
        assert loop["ticks"] == loop["late_us"]["samples"] == loop["read_us"]["samples"] == 40
        assert sum(loop["statuses"].values()) == 40
        assert loop["late_us"]["p99"] is None
        assert 0 < loop["age_ms"]["p50"] <= loop["age_ms"]["max"]
        assert loop["chunks"] >= 1
        assert stream.name_of(loop) in shown
    assert ("SCHED_FIFO is not allowed here" in shown) == (not allowed)
    page = (report / "report.html").read_text()
    assert page.count("<img") == 2
    assert "2 rows x 23 of the newest chunk" in page
    for name in stream_report.IMAGES:
        assert Image.open(report / f"{name}.png").size[0] > 400
    assert segments_of_benchmarks() == set()


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where SCHED_FIFO is not allowed its loops are not there, and the text says so and what to do."""
    forbid_fifo(monkeypatch)
    monkeypatch.setattr(stream, "BLOCK", 10)
    ran = list[str]()

    def loop(name: str, ticks: int, priority: int) -> stream.Times:
        assert priority == 0
        ran.append(name)
        record.limit(1e-9)  # its time ends in the first block
        return times([1] * ticks, [1] * ticks, [1] * ticks, ok=ticks)

    monkeypatch.setattr(stream, "cpp_loop", loop)
    with Recording(None, 600) as record, bar("stream", active=False) as shown:
        stream.measure(30, 100, record=record, shown=shown)
    result = record.result
    assert len(ran) == 1
    assert [loop["ticks"] for loop in result["loops"]] == [10]
    assert result["cut"]["by"] == "seconds"
    assert result["cut"]["left"] == [
        "C++, idle, normal priority, ticks from 10 on",
        "Python, idle, normal priority",
        "C++, loaded, normal priority",
        "Python, loaded, normal priority",
    ]
    assert "SCHED_FIFO is not allowed here (Operation not permitted); give this user rtprio" in stream.show(result)
    assert segments_of_benchmarks() == set()


def test_no_loops_is_a_result_too(tmp_path: Path) -> None:
    with Recording(None) as record:
        record.result |= {
            "machine": stream.machine(),
            "load_before": 0.1,
            "tick_ms": 1.0,
            "chunk_every_ms": 50.0,
            "busy": 2,
            "fifo": {"allowed": True, "why": None, "priority": 50},
            "reads": [],
            "loops": [],
        }
    assert "wakes up late" not in stream.show(record.result)
    assert "<img" not in stream_report.write(tmp_path / "page.html", record.result).read_text()


def test_a_loop_in_numbers() -> None:
    first = times([1, 2, 3, 4], [5, 6, 1, 2], [7, 7, 8, 8], missed=1, ok=4)
    second = times([5, 6], [-1, 3], [0, 9], missed=2, ok=1, dry=1)
    found = stream._summary(stream.Case("Python", True, False), [first, second])
    assert (found["reader"], found["load"], found["fifo"]) == ("Python", True, False)
    assert (found["ticks"], found["missed"], found["chunks"]) == (6, 3, 3)
    assert found["statuses"] == {"ok": 5, "dry": 1}
    assert (found["late_us"]["p50"], found["late_us"]["max"]) == (3000, 6000)
    assert (found["age_ms"]["max"], found["age_ms"]["samples"]) == (6, 5), "a command without a chunk has no age"
    assert found["handover_ms"]["samples"] == 2, "the first chunk of a block was there before"
    assert (found["handover_ms"]["p50"], found["handover_ms"]["max"]) == (1, 3)
    assert found["late_us"]["p90"] is None
    assert found["late_us_beyond"] == [
        [1000, 1.0],
        [2000, 5 / 6],
        [3000, 4 / 6],
        [4000, 3 / 6],
        [5000, 2 / 6],
        [6000, 1 / 6],
    ]
    said = stream.notes({"loops": [found], "fifo": {"why": None}, "load_before": 0.0})
    assert said == [
        "Python, loaded, normal priority: 3 ticks left out because one before ended too late",
        "Python, loaded, normal priority: 1 commands DRY",
    ]


def test_the_loop_without_a_command_has_no_ages() -> None:
    found = stream._summary(stream.Case("C++", False, False), [times([1], [-1], [0], dry=1)])
    assert (found["age_ms"], found["handover_ms"], found["handover_ms_beyond"]) == (None, None, [])


@pytest.mark.parametrize("samples,known", [(999, False), (1000, True)])
def test_p999_needs_a_thousand(samples: int, known: bool) -> None:
    found = stream._quantiles(np.arange(samples))
    assert found is not None
    assert (found["p999"] is not None) == known
    assert found["samples"] == samples


def test_both_loops_see_the_same_stream() -> None:
    with stream.producer() as name:
        for run in (stream.cpp_loop, stream.python_loop):
            found, end = run(name, 60, 0), time.monotonic() + WAIT
            while found.chunk[-1] == found.chunk[0] and time.monotonic() < end:  # the producer waits for the CPU
                found = run(name, 60, 0)
            assert [len(found.late), len(found.age), len(found.took), len(found.chunk)] == [60] * 4
            assert sum(found.status.values()) == 60
            assert (found.late >= 0).all()
            assert (found.took > 0).all()
            assert (found.age > 0).all()
            assert (np.diff(found.chunk) >= 0).all()
            assert found.chunk[-1] > found.chunk[0] > 0
        seen = Watch(name).look()
        assert seen["driver"]["state"] == "gone"
        assert seen["driver"]["tick"] == 60
        assert seen["driver"]["chunk"] == found.chunk[-1]
        assert [channel["name"] for channel in seen["channels"]] == list(stream_producer.ROBOT.action_names)
    assert segments_of_benchmarks() == set()


def test_a_thread_that_does_not_get_its_priority_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit4dit import _C

    empty = dict.fromkeys(("late", "age", "took", "chunk"), b"")
    answer = {**empty, "missed": 0, "status": [0] * 6, "refused": "Operation not permitted"}
    monkeypatch.setattr(_C, "stream_bench_loop", lambda *_: answer)
    with pytest.raises(BackendError, match="SCHED_FIFO: Operation not permitted"):
        stream.cpp_loop("/x", 1, 50)


def test_the_scheduler_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: calls.append((pid, policy)))
    with pytest.raises(KeyboardInterrupt), stream.fifo(50):
        raise KeyboardInterrupt
    before = os.sched_getscheduler(0)
    assert calls == [(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK), (0, before | os.SCHED_RESET_ON_FORK)]
    with stream.fifo(0):
        assert len(calls) == 2


def test_what_is_timed_is_what_is_said_of_it() -> None:
    """The slow waves are inside the limits: a robot that has caught up with them is held back by none, but for
    micrometres where one chunk follows another.
    """
    now = time.monotonic_ns()
    commands = []
    for limits in (None, Limits(stream_producer.ROBOT, (UNLIMITED,) * 23)):
        with ActionStream(stream_producer.ROBOT, command_hz=1000, seam=Blend(rows=3), limits=limits) as made:
            given = []
            for tick in range(2500):
                if tick % 47 == 0:
                    made.publish(stream_producer.chunk(now + tick * 1_000_000), now_ns=now + tick * 1_000_000)
                given.append(made.at(now + tick * 1_000_000).values)
        commands.append(np.stack(given))
    limited, unlimited = commands
    assert np.abs(limited - unlimited)[2000:].max() < 1e-5
    assert np.ptp(limited[2000:], axis=0).min() > 0.02, "they move"


BESIDE = """
import os, sys
from dit4dit.benchmarks import stream
with stream.producer() as name, stream.busy(1):
    print(name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_what_runs_beside_it_ends_with_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BESIDE], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    try:
        end = time.monotonic() + WAIT
        while any(Path(f"/proc/{child}/environ").exists() and alive(child) for child in children):
            assert time.monotonic() < end, "they go on without it"
            time.sleep(0.05)
        assert Watch(name).look()["producer"]["state"] == "closed"
    finally:
        ActionStream.remove(name)


def alive(pid: str) -> bool:
    """Whether it runs: one that has ended and was not asked for is there still."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_producer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PRODUCE", "raise OSError('no room in /dev/shm')")
    with pytest.raises(BackendError, match="no room in /dev/shm"), stream.producer():
        pass
