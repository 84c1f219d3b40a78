"""Segments in shared memory: who may have one, what is refused and left alone, and what becomes of a producer's when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cpp_checks import lines_of

Build = Callable[..., Path]
Plant = Callable[[str, str, str], Path]

SIZE = 270_656
FIELDS = {"magic": 0, "version": 8, "bytes": 12, "header_bytes": 16, "slot_bytes": 20, "slots": 24, "max_rows": 28}
FIELDS |= {"max_channels": 32, "max_groups": 36}


@pytest.fixture
def tool(cpp: Build) -> Path:
    return cpp("ring_tool")


def ask(tool: Path, *arguments: object) -> dict[str, int]:
    """What a command of ring_tool says: word -> number. Raises RuntimeError with the text of its error."""
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (0, 1), f"{done.returncode}: {done.stdout}{done.stderr}"
    assert not done.stderr, done.stderr
    if done.returncode:
        *_, last = done.stdout.splitlines()
        assert last.startswith("error: "), last
        raise RuntimeError(last[7:])
    return {key: int(number) for key, _, number in (line.rpartition(" ") for line in done.stdout.splitlines())}


@contextlib.contextmanager
def running(tool: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command of ring_tool that has said that it is ready; it is asked to end, or killed if it has been stopped."""
    with subprocess.Popen(
        [tool, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if line.startswith("error: "):
                raise RuntimeError(line[7:].strip())
            assert line.startswith("ready"), line
            yield process
            if process.poll() is None:
                process.communicate("end\n", timeout=60)
        finally:
            process.kill()


def file_of(name: str) -> Path:
    return Path("/dev/shm") / name[1:]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.002)


# -- one producer ----------------------------------------------------------------------------------


def test_a_segment_from_beginning_to_end(tool: Path, segment_name: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{segment_name}: there is no such segment; start the producer")):
        ask(tool, "open", segment_name, "watch")
    with running(tool, "produce", segment_name) as producer:
        seen = ask(tool, "open", segment_name, "watch")
        assert seen["head"] >= 3
        assert seen["producer"] == producer.pid
        assert (seen["producers"], seen["closed"], seen["producer_locked"], seen["driver_locked"]) == (1, 0, 1, 0)
        with pytest.raises(RuntimeError, match="a producer is at work on it; close it first"):
            ask(tool, "remove", segment_name)
    seen = ask(tool, "open", segment_name, "use")
    assert (seen["closed"], seen["producer_locked"]) == (1, 0)
    assert ask(tool, "create", segment_name) == {"ready": seen["head"] + 3}
    again = ask(tool, "open", segment_name, "watch")
    assert (again["head"], again["producers"], again["closed"]) == (seen["head"] + 3, 2, 1)
    assert file_of(segment_name).stat().st_size == SIZE
    ask(tool, "remove", segment_name)
    assert not file_of(segment_name).exists()
    ask(tool, "remove", segment_name)  # gone is gone


def test_a_second_live_producer_is_refused_with_the_pid_of_the_first(tool: Path, segment_name: str) -> None:
    with running(tool, "produce", segment_name) as producer:
        for layout in ("arms", "base"):
            with pytest.raises(RuntimeError, match=f"process {producer.pid} is its producer and lives"):
                ask(tool, "create", segment_name, layout)
        head = ask(tool, "open", segment_name, "watch")["head"]
        wait_until(lambda: ask(tool, "open", segment_name, "watch")["head"] > head, "the first one goes on")


@pytest.mark.parametrize("layouts", [("arms", "arms", "arms", "arms"), ("arms", "base", "long", "base")])
def test_of_many_that_begin_at_once_one_produces(tool: Path, segment_name: str, layouts: tuple[str, ...]) -> None:
    """On a new name, and on a dead producer's, of another layout or not."""
    for _ in range(5):
        started = [
            subprocess.Popen(
                [tool, "produce", segment_name, layout], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for layout in layouts
        ]
        try:
            lines = [process.stdout.readline() for process in started if process.stdout]
        finally:
            for process in started:
                process.kill()
                process.communicate()
        assert sorted(line.startswith("ready") for line in lines) == [False, False, False, True], lines
        assert all("is its producer and lives" in line for line in lines if not line.startswith("ready"))
    assert ask(tool, "open", segment_name, "watch")["producer_locked"] == 0


def test_one_driver(tool: Path, segment_name: str) -> None:
    ask(tool, "create", segment_name)
    with running(tool, "drive", segment_name):
        with pytest.raises(RuntimeError, match="the driver's lock is taken"):
            ask(tool, "drive", segment_name)
        assert ask(tool, "open", segment_name, "watch")["driver_locked"] == 1
        ask(tool, "create", segment_name)  # a producer may come and go under it
    assert ask(tool, "open", segment_name, "watch")["driver_locked"] == 0
    with running(tool, "drive", segment_name) as driver:
        driver.kill()
    assert ask(tool, "open", segment_name, "watch")["driver_locked"] == 0


# -- producers that die ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_producer_frees_the_segment(tool: Path, segment_name: str) -> None:
    with running(tool, "produce", segment_name) as producer:
        producer.kill()
        producer.wait()
        seen = ask(tool, "open", segment_name, "watch")
        assert (seen["closed"], seen["producer_locked"]) == (0, 0)
        assert ask(tool, "create", segment_name) == {"ready": seen["head"] + 3}


def kill_while_they_begin(program: Path, name: str) -> dict[str, int]:
    done = subprocess.run([program, name, "begin", "300", "1"], capture_output=True, text=True, check=True)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-DDIT4DIT_WITHOUT_TMPFILE",)])
def test_a_producer_killed_while_it_begins_leaves_a_segment_or_none(
    cpp: Build, segment_name: str, flags: tuple[str, ...]
) -> None:
    counts = kill_while_they_begin(cpp("ring_kill", *flags), segment_name)
    assert counts["wrong"] == 0
    assert min(counts["there"], counts["absent"]) >= 10, counts
    for left in Path("/dev/shm").glob(".dit4dit.*"):
        assert flags, left  # only where files without a name are unsupported
        left.unlink()


def test_a_segment_appears_at_once(cpp: Build, segment_name: str) -> None:
    lines_of(cpp("ring_checks"), "appears", segment_name)


@pytest.mark.long
def test_both_see_a_segment_that_is_named_before_it_is_complete(
    cpp: Build, segment_name: str, faulty_include: Plant
) -> None:
    right = "    held_[static_cast<int>(Role::producer)].store(true);\n    fill(layout);"
    fault = right.replace("fill(", 'give_name(file, ""); usleep(20000); fill(')
    include = faulty_include("segment.h", right, fault)
    with pytest.raises(AssertionError, match="not so"):
        lines_of(cpp("ring_checks", include=include), "appears", segment_name)
    file_of(segment_name).unlink(missing_ok=True)
    assert kill_while_they_begin(cpp("ring_kill", include=include), segment_name)["wrong"] > 0


@pytest.mark.slow
def test_a_stopped_producer_is_dead_to_readers_and_keeps_the_segment(tool: Path, segment_name: str) -> None:
    after = 50_000_000
    with running(tool, "produce", segment_name) as producer:
        os.kill(producer.pid, signal.SIGSTOP)
        os.waitpid(producer.pid, os.WUNTRACED)
        dead = ask(tool, "dead", segment_name, after)
        assert (dead["just before"], dead["at"]) == (0, 1)
        wait_until(lambda: ask(tool, "dead", segment_name, after)["by the clock"] == 1, "dead by the clock")
        with pytest.raises(RuntimeError, match=f"process {producer.pid} is its producer and lives"):
            ask(tool, "create", segment_name)
        os.kill(producer.pid, signal.SIGCONT)
        wait_until(lambda: ask(tool, "dead", segment_name, 10 * after)["by the clock"] == 0, "it stamps again")


def test_the_process_is_alive_while_its_loop_stands_still(tool: Path, segment_name: str) -> None:
    """The stamp comes from a thread of its own: this one's loop waits for its input."""
    after = 2_000_000_000
    with subprocess.Popen(
        [tool, "fork", segment_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waits:
        assert waits.stdout is not None
        while not waits.stdout.readline().startswith("child: ready"):
            pass
        stamps = {ask(tool, "dead", segment_name, after)["by the clock"] for _ in range(20)}
        waits.communicate("end\n")
    assert stamps == {0}


@pytest.mark.slow
def test_a_child_keeps_no_lock_and_cannot_publish(tool: Path, segment_name: str) -> None:
    with subprocess.Popen(
        [tool, "fork", segment_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        lines: list[str] = []
        while not {"child: ready 0", "parent: child"} <= {*lines, *(line.rpartition(" ")[0] for line in lines)}:
            lines.append(parent.stdout.readline().strip())
            assert lines[-1], lines
        child = int(next(line for line in lines if line.startswith("parent")).split()[-1])
        try:
            refused, did, took = [line[7:] for line in lines if line.startswith("child: ") and "ready" not in line]
            assert refused.startswith("this process was forked from the producer's")
            # the parent's stamps are untouched, its stream open, memory of one process works, and no lock is the child's to see
            assert did == "1 0 1 0 0"
            assert took.startswith("0 ")
            assert f"process {parent.pid} is its producer and lives" in took
            seen = ask(tool, "open", segment_name, "watch")
            assert (seen["producer_locked"], seen["closed"]) == (1, 0)
            parent.kill()
            parent.wait()
            os.kill(child, 0)  # lives
            assert ask(tool, "open", segment_name, "watch")["producer_locked"] == 0
            ask(tool, "create", segment_name)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    "header, right, fault",
    [
        ("descriptor.h", "for (const int fd : open_) ::close(fd);", ""),
        (
            "segment.h",
            'if (!map(Access::use, file)) return detail::failed(name_, "mmap", errno).text;\n    if (!open_for_locks(file))',
            "if (!open_for_locks(file) || !map(Access::use, file_.get()))",
        ),
    ],
    ids=["a descriptor", "a mapping"],
)
def test_the_fork_test_sees_a_lock_that_a_child_keeps(
    cpp: Build, tool: Path, segment_name: str, faulty_include: Plant, header: str, right: str, fault: str
) -> None:
    program = cpp("ring_tool", include=faulty_include(header, right, fault))
    with pytest.raises(AssertionError, match="assert 1 == 0"):
        test_a_child_keeps_no_lock_and_cannot_publish(program, segment_name)


# -- other layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, said", [("base", "robot is 'test', not 'another'"), ("long", "number of channels is 23, not 24")]
)
def test_another_layout_replaces_a_dead_producers_unless_a_driver_is_at_work(
    tool: Path, segment_name: str, layout: str, said: str
) -> None:
    ask(tool, "create", segment_name)
    before = file_of(segment_name).stat().st_ino
    with running(tool, "drive", segment_name) as driver:
        with pytest.raises(RuntimeError) as refused:
            ask(tool, "create", segment_name, layout)
        assert f"a driver (process {driver.pid}) is at work on another layout: {said}" in str(refused.value)
        assert file_of(segment_name).stat().st_ino == before
        assert ask(tool, "create", segment_name) == {"ready": 6}
    assert ask(tool, "create", segment_name, layout) == {"ready": 3}
    assert file_of(segment_name).stat().st_ino != before


# -- what is refused and left alone ----------------------------------------------------------------


def snapshot(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    content = path.read_bytes() if path.is_file() else None
    return content, found.st_ino, found.st_mode, found.st_mtime_ns, found.st_size


def assert_refused_and_untouched(tool: Path, name: str, said: str) -> None:
    before = snapshot(file_of(name))
    for command in (("open", name, "watch"), ("open", name, "use"), ("create", name), ("create", name, "base")):
        with pytest.raises(RuntimeError, match=said) as refused:
            ask(tool, *command)
        assert str(refused.value).startswith(name)
    assert snapshot(file_of(name)) == before


@pytest.fixture
def closed_segment(tool: Path, segment_name: str) -> str:
    ask(tool, "create", segment_name)
    return segment_name


@pytest.mark.parametrize("field", [field for field in FIELDS if field != "magic"])
def test_another_version_or_size_is_refused_with_which(tool: Path, closed_segment: str, field: str) -> None:
    path = file_of(closed_segment)
    content = bytearray(path.read_bytes())
    (value,) = struct.unpack_from("<I", content, FIELDS[field])
    struct.pack_into("<I", content, FIELDS[field], value + 1)
    path.write_bytes(content)
    assert_refused_and_untouched(tool, closed_segment, f"{field}(:| is)? {value + 1}, this program wants {value}")


def test_fields_of_the_header_lie_where_the_test_thinks(closed_segment: str) -> None:
    content = file_of(closed_segment).read_bytes()
    magic, version, size, header, slot, slots, rows, channels, groups = struct.unpack_from("<Q8I", content)
    assert magic.to_bytes(8, "little") == b"dit4dit\0"
    assert (version, size, slots, rows, channels, groups) == (1, SIZE, 16, 64, 64, 8)
    assert header + slots * slot == size == len(content)


@pytest.mark.parametrize("size", [0, 1, 8, 55, 56, 4096, SIZE - 1, SIZE + 1, SIZE + 4096])
def test_a_truncated_segment_is_refused(tool: Path, closed_segment: str, size: int) -> None:
    os.truncate(file_of(closed_segment), size)
    said = "is no segment of dit4dit" if size < 56 else f"the file has {size} bytes, its header says {SIZE}"
    assert_refused_and_untouched(tool, closed_segment, said)


def spoil_layout(content: bytearray) -> None:
    struct.pack_into("<I", content, 56 + 56, 65)  # channels


def spoil_magic(content: bytearray) -> None:
    content[0] ^= 1


@pytest.mark.parametrize(
    "spoil, said", [(spoil_layout, r"its layout is corrupt \(65 channels"), (spoil_magic, "is no segment of dit4dit")]
)
def test_a_spoilt_segment_is_refused(
    tool: Path, closed_segment: str, spoil: Callable[[bytearray], None], said: str
) -> None:
    path = file_of(closed_segment)
    content = bytearray(path.read_bytes())
    spoil(content)
    path.write_bytes(content)
    assert_refused_and_untouched(tool, closed_segment, said)


def make_text(path: Path) -> None:
    path.write_text("somebody else's\n" * 20_000)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    path.symlink_to("/dev/null")


NOT_OURS = r"is no segment of dit4dit|Is a directory|symbolic links"


@pytest.mark.parametrize("make", [make_text, make_pipe, make_folder, make_link])
def test_what_is_no_segment_is_refused(tool: Path, segment_name: str, make: Callable[[Path], None]) -> None:
    make(file_of(segment_name))
    assert_refused_and_untouched(tool, segment_name, NOT_OURS)
    with pytest.raises(RuntimeError, match=NOT_OURS):
        ask(tool, "remove", segment_name)
    assert file_of(segment_name).is_symlink() or file_of(segment_name).exists()


@pytest.mark.parametrize("name", ["", "/", "g1", "/a/b", "/.", "/..", "/.hidden", "/" + "x" * 200, "../shm/x"])
def test_bad_names(tool: Path, name: str) -> None:
    for command in (("open", name, "watch"), ("create", name), ("remove", name)):
        with pytest.raises(RuntimeError, match="is no name for a segment; wanted one such as"):
            ask(tool, *command)


# -- the file --------------------------------------------------------------------------------------


def test_watching_writes_nothing(tool: Path, closed_segment: str) -> None:
    path = file_of(closed_segment)
    before = snapshot(path)
    path.chmod(0o400)
    ask(tool, "open", closed_segment, "watch")
    path.chmod(0o600)
    assert snapshot(path) == before


def test_only_its_user_may_open_it_whatever_the_umask(tool: Path, segment_name: str) -> None:
    subprocess.run([tool, "create", segment_name], check=True, capture_output=True, umask=0)
    assert stat.S_IMODE(file_of(segment_name).stat().st_mode) == 0o600


@pytest.mark.parametrize("flags", [(), ("-DDIT4DIT_WITHOUT_TMPFILE",)])
def test_no_room_is_an_error_and_leaves_nothing(cpp: Build, segment_name: str, flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        [cpp("ring_tool", *flags), "create", segment_name],
        capture_output=True,
        text=True,
        check=False,
        restore_signals=False,  # Python ignores SIGXFSZ: the limit below is an error then, as a full /dev/shm is
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1, done
    assert done.stdout.startswith(f"error: {segment_name}: no room in /dev/shm: ")
    assert not file_of(segment_name).exists()
    assert not list(Path("/dev/shm").glob(".dit4dit.*"))


def test_where_there_are_no_files_without_a_name(cpp: Build, tool: Path, segment_name: str) -> None:
    old = cpp("ring_tool", "-DDIT4DIT_WITHOUT_TMPFILE")
    with running(old, "produce", segment_name) as producer:
        assert not list(Path("/dev/shm").glob(f".dit4dit.{producer.pid}.*"))
        for program in (old, tool):
            with pytest.raises(RuntimeError, match=f"process {producer.pid} is its producer and lives"):
                ask(program, "create", segment_name)
        assert ask(tool, "open", segment_name, "watch")["head"] >= 3
    assert file_of(segment_name).stat().st_nlink == 1
