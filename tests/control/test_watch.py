"""What `dit4dit control watch` finds in a segment: right about every producer, driver and status, and never a byte written."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from stream_chunks import S, chunk, producer, unused_segment
from waiting import WAIT

from dit4dit import ActionChunk
from dit4dit.control import ActionStream, Blend
from dit4dit.control import watch as module
from dit4dit.control.watch import FOLDER, Watch
from dit4dit.control.watch_text import show
from dit4dit.errors import StreamError
from dit4dit.robots import G1

PATIENT_MS = 1e9  # a producer that waits for the CPU is not to look dead


@pytest.fixture
def name() -> Iterator[str]:
    with unused_segment() as name:
        yield name


def stream(name: str, **options: Any) -> ActionStream:
    return ActionStream(G1, shared=name, command_hz=500, seam=Blend(rows=3), **options)


def plain(observed_at: int, rows: int = 15) -> ActionChunk:
    return chunk(G1, np.full((rows, G1.action_dim), 0.25), observed_at)


def look(name: str, **options: Any) -> dict[str, Any]:
    return Watch(name, **options).look()


def until(name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What is found as soon as it holds; what is found in the end, if it never does."""
    end = time.monotonic() + WAIT
    while not holds(found := look(name)) and time.monotonic() < end:
        time.sleep(0.01)
    return found


# -- a live one ------------------------------------------------------------------------------------


def test_a_live_segment_is_described_as_it_is(name: str) -> None:
    with stream(name, max_age_ms=5000) as made, ActionStream.attach(name, driver=True) as driver:
        observed = time.monotonic_ns() - S // 20
        made.publish(plain(observed))
        now = time.monotonic_ns()
        driver.at(now)
        command = driver.at(now + 2_000_000)
        found = until(name, lambda found: found["producer"]["state"] == "alive")
    assert (found["name"], found["robot"], found["published"]) == (name, G1.name, 1)
    assert [c["name"] for c in found["channels"]] == list(G1.action_names)
    assert [c["kind"] for c in found["channels"]] == list(G1.kinds)
    assert [g["name"] for g in found["groups"]] == [group.name for group in G1.channel_groups]
    assert {g["name"]: g["on_dry"] for g in found["groups"]}["base"] == "decay"
    assert {g["max_age_ms"] for g in found["groups"]} == {5000.0}
    assert (found["command_hz"], found["interpolation"], found["seam"]) == (
        500.0,
        "cubic",
        {"kind": "blend", "rows": 3.0},
    )
    producer = found["producer"]
    assert (producer["pid"], producer["count"], producer["state"]) == (os.getpid(), 1, "alive")
    assert producer["program"]
    assert 0 <= producer["alive_ms"] < 50
    (one,) = found["chunks"]
    assert (one["id"], one["rows"], one["control_hz"], one["observed_at_ns"]) == (1, 15, pytest.approx(30), observed)
    assert one["published_after_ms"] >= 50 > one["computed_after_ms"] == 0
    assert one["left_rows"] == pytest.approx(15 - (found["now_ns"] - observed) / (S / 30), abs=1e-3)
    assert found["status"] == "ok"
    sent = found["driver"]
    assert (sent["pid"], sent["tick"], sent["chunk"], sent["row"]) == (os.getpid(), 2, 1, command.row)
    assert (sent["state"], sent["status"]) == ("reads", "ok")
    assert list(sent["values"].values()) == command.values.tolist()
    assert not found["estop"]["latched"]


def test_the_text_says_the_same(name: str) -> None:
    with stream(name) as made, ActionStream.attach(name, driver=True) as driver:
        made.publish(plain(time.monotonic_ns() - S // 20))
        driver.at(time.monotonic_ns())
        found = until(name, lambda found: found["producer"]["state"] == "alive")
        text = show(found)
    lines = {line.split()[0]: line for line in reversed(text.splitlines()) if line.strip()}
    assert lines[f"{name}:"].startswith(f"{name}: {found['robot']}, ")
    assert "commands at 500 Hz, cubic interpolation, blend over 3 rows" in text
    assert "OK: row " in lines["status"]
    assert f"process {os.getpid()} (" in lines["producer"]
    assert "is alive; last stamp" in lines["producer"]
    assert "tick 1 " in lines["driver"]
    assert "of chunk 1, OK" in lines["driver"]
    assert lines["e-stop"].endswith("not latched")
    for channel in found["channels"]:
        assert channel["name"] in text
    assert text.index("status") < text.index("1 published") < text.index("on dry") < text.index("acceleration")


def test_only_the_newest_chunks_are_shown_and_all_are_found(name: str) -> None:
    with stream(name) as made:
        for i in range(20):
            made.publish(plain(time.monotonic_ns(), rows=1 + i))
        found = look(name)
    assert [one["id"] for one in found["chunks"]] == list(range(5, 21))
    assert [one["rows"] for one in found["chunks"]] == list(range(5, 21))
    shown = [
        line.split()[0]
        for line in show(found, chunks=3).splitlines()
        if line.startswith("  ") and line.split()[0].isdigit()
    ]
    assert shown == ["20", "19", "18"], "the newest first"


def test_the_drivers_rate_is_between_two_looks(name: str) -> None:
    with stream(name) as made, ActionStream.attach(name, driver=True) as driver:
        made.publish(plain(time.monotonic_ns()))
        now, watched = time.monotonic_ns(), Watch(name)
        assert watched.look()["driver"]["hz"] is None
        driver.at(now)
        assert watched.look()["driver"]["hz"] is None, "one tick has no rate"
        for i in range(1, 11):
            driver.at(now + i * 2_000_000)
        found = watched.look()
        assert found["driver"]["hz"] == pytest.approx(500)
        assert "at 500.0 Hz" in show(found)
        assert watched.look()["driver"]["hz"] is None, "it has not read since"
    with ActionStream.attach(name, driver=True) as driver:
        driver.at(now + S)
        assert watched.look()["driver"]["hz"] is None, "another driver begins to count anew"
    found = look(name)
    assert found["driver"]["state"] == "gone"
    assert " has ended: tick 1 " in show(found)


def test_two_drivers_have_no_rate_together() -> None:
    """The second one's ticks may be more than the first one's were."""
    assert module._rate((7, 100, 1 * S), (7, 150, 2 * S)) == 50
    assert module._rate((7, 100, 1 * S), (8, 150, 2 * S)) is None


def test_a_driver_that_has_not_read_and_one_that_reads_no_more(name: str) -> None:
    with stream(name):
        assert look(name)["driver"]["state"] == "none"
        with ActionStream.attach(name, driver=True) as driver:
            assert look(name)["driver"]["state"] == "waiting"
            assert "has not read yet" in show(look(name))
            driver.at(time.monotonic_ns() - 5 * S)
            found = look(name)
    assert found["driver"]["state"] == "silent"
    assert found["driver"]["tick_ms"] >= 5000
    assert "does not read: tick 1 5." in show(found)


def test_channels_that_are_not_the_drivers_have_no_value(name: str) -> None:
    with stream(name) as made, ActionStream.attach(name, driver=True, group="base") as driver:
        made.publish(plain(time.monotonic_ns()))
        driver.at(time.monotonic_ns())
        found = look(name)
    base = [c["name"] for c in found["channels"] if c["group"] == "base"]
    assert list(found["driver"]["values"]) == base
    row = next(line for line in show(found).splitlines() if line.startswith("left_arm"))
    assert row.endswith("-")


# -- every status ----------------------------------------------------------------------------------


def at(name: str, now: int) -> tuple[str, str]:
    """The status and the reason that are found at this time."""
    found = module.findings(name, {**module._snapshot(name), "now_ns": now}, PATIENT_MS)
    return found["status"], found["why"]


def test_status_and_reason_of_every_moment(name: str) -> None:
    rules: dict[str, Any] = {"max_age_ms": {"arms": 700}, "on_stale": {"arms": "hold"}, "on_dry": {"base": "decay"}}
    with stream(name, **rules) as made:
        now = time.monotonic_ns()
        assert at(name, now) == (
            "dry",
            "no chunk yet; arms: hold, hands: hold, torso: hold, base: let velocities fall to 0",
        )
        made.publish(plain(now - S), starts_at_ns=now + 40 * S, now_ns=now)
        status, why = at(name, now + S)
        assert (status, why.partition(";")[0]) == ("dry", "chunk 1 begins in 39.00 s")
        made.publish(plain(now, rows=30), now_ns=now + S // 10)
        assert at(name, now + S // 2) == ("ok", "row 15 of chunk 2 is due; its observation is 500 ms old")
        assert at(name, now + S * 7 // 10 + 1000) == (
            "stale",
            "the observation of chunk 2 is 700 ms old (arms allows 700 ms); readers hold",
        )
        made.publish(plain(now, rows=15), now_ns=now + S // 5)
        status, why = at(name, now + S * 6 // 10)
        assert (status, why.partition(";")[0]) == ("dry", "chunk 3 ended 100 ms ago")
        made.estop(now + S // 5)
        assert at(name, now + S * 6 // 10) == (
            "estop",
            f"latched 400 ms ago by process {os.getpid()}, until clear_estop(); the robot brakes and stays",
        )
        made.clear_estop()
        assert at(name, now + S * 6 // 10)[0] == "dry"
    assert at(name, now)[0] == "dead"
    assert at(name, now)[1].startswith("the producer has closed the stream; ")


@pytest.mark.parametrize("seed", range(20))
def test_the_status_is_the_one_that_a_reader_gets(seed: int, name: str) -> None:
    """Chunks of any length that begin at any time, observations of any age: at every moment the same word. Without e-stops, after
    which a reader that has seen one follows only what was observed later.
    """
    rng, seen = random.Random(seed), set()
    with stream(name, max_age_ms=rng.choice([None, 300, {"arms": 500, "base": 900}])) as made:
        now = begin = time.monotonic_ns()
        with ActionStream.attach(name, dead_after_ms=PATIENT_MS) as reader:
            for _ in range(60):
                now += rng.randrange(1, S // 4)
                if rng.random() < 0.5:
                    observed = max(begin, now - rng.randrange(S // 2))
                    starts = observed + rng.choice([0, 0, S // 5, -S // 3])
                    made.publish(plain(observed, rng.randint(1, 20)), starts_at_ns=starts, now_ns=now)
                    begin = observed
                for moment in (now, now + rng.randrange(S)):
                    wanted = reader.at(moment).status.name.lower()
                    assert at(name, moment)[0] == wanted, (moment - now, at(name, moment))
                    seen.add(wanted)
                    now = moment
    assert {"ok", "dry"} <= seen


@pytest.mark.parametrize("rule", ["hold", "decay", "finish"])
def test_what_readers_do_without_a_producer_is_in_the_status(rule: str, name: str) -> None:
    stream(name, on_dead=rule).close()
    says = {
        "hold": "readers hold",
        "decay": "readers let velocities fall to 0",
        "finish": "readers execute the rows that are left",
    }
    assert look(name)["why"] == f"the producer has closed the stream; {says[rule]}"


# -- producers that end ----------------------------------------------------------------------------

THEN = "sys.stdin.read(); stream.close(); print('closed', flush=True); time.sleep(600)"


@pytest.mark.slow
def test_a_producer_that_is_stopped_killed_and_followed_by_another(name: str) -> None:
    with producer(G1, name, 0.25, THEN) as process:
        found = until(name, lambda found: found["producer"]["state"] == "alive")
        assert (found["producer"]["state"], found["producer"]["pid"]) == ("alive", process.pid)
        process.send_signal(signal.SIGSTOP)
        found = until(name, lambda found: found["producer"]["state"] == "halted")
        assert (found["producer"]["state"], found["status"]) == ("halted", "dead")
        assert f"kill -CONT {process.pid}" in show(found)
        assert "no sign of life from the producer for 50 ms" in found["why"]
        process.send_signal(signal.SIGCONT)
        assert until(name, lambda found: found["producer"]["state"] == "alive")["producer"]["state"] == "alive"
        process.kill()
        process.wait()
        found = look(name)
        assert (found["producer"]["state"], found["status"]) == ("killed", "dead")
        assert f"process {process.pid} was killed or has crashed" in show(found)
        assert "was killed or has crashed" in found["why"]
    with producer(G1, name, 0.25, THEN) as process:
        found = until(name, lambda found: found["producer"]["state"] == "alive")
        assert (found["producer"]["pid"], found["producer"]["count"]) == (process.pid, 2)
        assert "the 2nd producer of this segment, is alive" in show(found)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        assert process.stdout.readline() == "closed\n"
        found = look(name)
        assert (found["producer"]["state"], found["status"]) == ("closed", "dead"), "its process goes on"
        assert f"process {process.pid}, the 2nd producer of this segment, stopped in order" in show(found)


def test_a_producer_that_does_not_stamp_and_was_not_stopped_waits_for_the_cpu(name: str) -> None:
    with stream(name):
        found = look(name, dead_after_ms=1e-6)
    assert (found["producer"]["state"], found["status"]) == ("late", "dead")
    assert "has its lock but does not stamp" in show(found)


def test_another_process_of_the_same_number_is_not_named(name: str) -> None:
    """A producer in a container of its own has a number there that may be anybody's here."""
    stream(name).close()
    assert module._process(1, name) == (None, False)
    with stream(name):
        assert module._process(os.getpid(), name)[0] is not None


# -- what it must not do ---------------------------------------------------------------------------


def test_nothing_is_written(name: str, main) -> None:
    with stream(name) as made, ActionStream.attach(name, driver=True) as driver:
        made.publish(plain(time.monotonic_ns()))
        driver.at(time.monotonic_ns())
    file = FOLDER / name[1:]
    before, facts = file.read_bytes(), file.stat()
    assert main("control", "watch", name, "--once")[0] == 0
    assert main("control", "watch")[0] == 0
    assert file.read_bytes() == before
    after = file.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
        facts.st_mtime_ns,
        facts.st_ctime_ns,
        facts.st_size,
    )


AS_A_READER = """
import os, sys
from dit4dit import _C
if os.geteuid() == 0:
    os.setuid(65534)
try:
    open("/dev/shm" + sys.argv[1], "r+b").close()
    sys.exit("it may write")
except PermissionError:
    print(_C.segment_snapshot(sys.argv[1])["robot"])
"""


def test_a_user_who_may_only_read_can_watch(name: str) -> None:
    stream(name).close()
    (FOLDER / name[1:]).chmod(0o444)
    done = subprocess.run([sys.executable, "-c", AS_A_READER, name], cwd=FOLDER, capture_output=True, text=True)
    assert done.stdout.strip() == G1.name, done.stderr


def test_it_takes_no_lock(name: str) -> None:
    stream(name).close()
    watched = Watch(name)
    watched.look()
    with stream(name) as made, ActionStream.attach(name, driver=True):
        watched.look()
        made.publish(plain(time.monotonic_ns()))
    assert watched.look()["producer"]["count"] == 2


def test_any_bytes_after_the_header_are_survived(name: str) -> None:
    """What strangers wrote into a segment is shown as numbers or refused in a line; nothing else may happen."""
    with stream(name) as made, ActionStream.attach(name, driver=True) as driver:
        made.publish(plain(time.monotonic_ns()))
        driver.at(time.monotonic_ns())
    file = FOLDER / name[1:]
    whole, rng = file.read_bytes(), random.Random(0)
    refused = list[str]()
    for i in range(300):
        data = bytearray(whole)
        end = (len(data), 8000, 400)[i % 3]  # the layout is in the first 7 KB, texts and counts at its beginning
        for _ in range(rng.choice((1, 30, 3000))):
            data[rng.randrange(56, end)] = rng.randrange(256)
        with file.open("r+b") as out:
            out.write(data)
        try:
            found = look(name)
            json.dumps(found)
            show(found)
        except StreamError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 300
    assert "\n" not in "".join(refused)


@pytest.mark.parametrize("field,value", [(40, v) for v in (0.0, -1.0, 1e-300, 1e300, math.inf, math.nan)] + [(48, 0)])
def test_a_chunk_that_no_producer_publishes_is_left_out(field: int, value: float, name: str) -> None:
    """Its period, a double at byte 40 of its slot, or its number of rows, at 48."""
    with stream(name) as made:
        made.publish(plain(time.monotonic_ns()))
    file = FOLDER / name[1:]
    (header_bytes,) = struct.unpack_from("<I", file.read_bytes(), 16)
    with file.open("r+b") as out:
        out.seek(header_bytes + field)
        out.write(struct.pack("<d" if field == 40 else "<q", value))
    found = look(name)
    assert (found["published"], found["chunks"]) == (1, [])
    assert "1 published" in show(found)
