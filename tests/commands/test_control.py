"""`dit4dit control watch` on a terminal and without one: what is shown, and one line about everything that is no segment."""

from __future__ import annotations

import json
import os
import pty
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_chunks import chunk, unused_segment

from dit4dit.control import ActionStream
from dit4dit.control.watch import FOLDER, duration
from dit4dit.control.watch_text import Screen, show_list
from dit4dit.robots import G1


@pytest.fixture
def name() -> Iterator[str]:
    with unused_segment() as name:
        yield name


def stream(name: str) -> ActionStream:
    return ActionStream(G1, shared=name)


# -- what is no segment of ours --------------------------------------------------------------------

BYTES = 263_296
SPOILT: dict[str, tuple[Callable[[bytearray], bytes], str]] = {
    "empty": (lambda b: b"", "is no segment of dit4dit"),
    "short": (lambda b: bytes(b[:7]), "is no segment of dit4dit"),
    "magic": (lambda b: b"ELF\x7f" + bytes(b[4:]), "is no segment of dit4dit"),
    "zeros": (lambda b: bytes(len(b)), "is no segment of dit4dit"),
    "version": (lambda b: put(b, 8, "I", 7), "version 7, this program wants 1"),
    "header alone": (lambda b: bytes(b[:100]), "the file has 100 bytes"),
    "truncated": (lambda b: bytes(b[:-1]), "the file has"),
    "longer": (lambda b: bytes(b) + b"\0", "the file has"),
    "bytes": (lambda b: put(b, 12, "I", 99), "bytes is 99, this program wants"),
    "header_bytes": (lambda b: put(b, 16, "I", 99), "header_bytes is 99, this program wants"),
    "slots": (lambda b: put(b, 24, "I", 8), "slots is 8, this program wants 16"),
    "max_channels": (lambda b: put(b, 32, "I", 128), "max_channels is 128, this program wants 64"),
    "layout": (lambda b: put(b, 56 + 56, "I", 65), "65 channels, wanted 1 to 64"),
}


def put(data: bytearray, offset: int, form: str, value: int) -> bytes:
    struct.pack_into("<" + form, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize("how", SPOILT)
def test_a_foreign_segment_is_one_line(how: str, name: str, main) -> None:
    stream(name).close()
    file = FOLDER / name[1:]
    spoil, message = SPOILT[how]
    file.write_bytes(spoil(bytearray(file.read_bytes())))
    before = file.read_bytes()
    code, out, error = main("control", "watch", name, "--once")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"dit4dit control: error: {name}")
    assert message in error
    assert file.read_bytes() == before


def test_what_is_no_file_is_one_line(name: str, main) -> None:
    file = FOLDER / name[1:]
    file.mkdir()
    try:
        assert_one_line(main("control", "watch", name))
    finally:
        file.rmdir()
    os.mkfifo(file)
    assert_one_line(main("control", "watch", name))
    file.unlink()
    file.symlink_to("/etc/passwd")
    assert_one_line(main("control", "watch", name))


def assert_one_line(ended: tuple[int, str, str]) -> None:
    code, out, error = ended
    assert (code, out, error.count("\n")) == (2, "", 1)


def test_a_name_that_is_not_there_says_which_are(name: str, main) -> None:
    stream(name).close()
    code, out, error = main("control", "watch", name + "x", "--once")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"'{name}x': no such segment; did you mean '{name}'?; here are " in error


def test_a_name_that_no_segment_can_have(main) -> None:
    for bad in ("/a/b", "..", "/", "a" * 300):
        assert_one_line(main("control", "watch", bad, "--once"))


@pytest.mark.parametrize("form", ["/{}", "{}", "/dev/shm/{}"])
def test_the_slash_and_the_folder_may_be_given(form: str, name: str, main) -> None:
    stream(name).close()
    code, out, _ = main("control", "watch", form.format(name[1:]), "--once")
    assert code == 0
    assert out.startswith(f"{name}: ")


# -- the list --------------------------------------------------------------------------------------


def test_without_a_name_all_are_listed(name: str, main, tmp_path: Path) -> None:
    stream(name).close()
    other, foreign = FOLDER / f"{name[1:]}.old", FOLDER / f"{name[1:]}.foreign"
    try:
        other.write_bytes(put(bytearray((FOLDER / name[1:]).read_bytes()), 8, "I", 7))
        foreign.write_bytes(b"another program's")
        code, out, _ = main("control", "watch", "--json", tmp_path / "all.json")
    finally:
        other.unlink()
        foreign.unlink()
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.split()[0] == name]
    assert row.split()[1:] == [G1.name, "closed", "none", "0", "DEAD"]
    assert f"{name}.old: version 7, this program wants 1" in out
    assert "foreign" not in out
    found = {one["name"]: one for one in json.loads((tmp_path / "all.json").read_text())}
    assert found[name]["producer"]["state"] == "closed"
    assert "version 7" in found[f"{name}.old"]["error"]


def test_a_list_of_none_says_how_to_get_one() -> None:
    assert "ActionStream(..., shared=NAME)" in show_list([])


# -- live ------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """looks(a, b): between two looks a, then b is called; then comes Ctrl-C."""

    def between(*steps: Callable[[], object]) -> None:
        todo = iter((lambda: None, *steps))

        def sleep(seconds: float) -> None:
            step = next(todo, None)
            if step is None:
                raise KeyboardInterrupt
            step()

        monkeypatch.setattr(time, "sleep", sleep)

    return between


def test_it_looks_again_until_ctrl_c(name: str, main, looks, tmp_path: Path) -> None:
    out_file, seen = tmp_path / "seen.json", []
    with stream(name) as made:
        looks(
            lambda: seen.append(json.loads(out_file.read_text())["published"]),
            lambda: made.publish(chunk(G1, np.zeros((15, G1.action_dim)), time.monotonic_ns())),
            lambda: seen.append(json.loads(out_file.read_text())["published"]),
        )
        code, out, error = main("control", "watch", name, "--json", out_file)
    assert (code, error) == (0, "")
    blocks = out.strip().split(f"{name}: ")[1:]
    assert ["0 published" in block for block in blocks] == [True, True, False, False]
    assert "1 published" in blocks[-1]
    assert seen == [0, 1]


def test_a_segment_that_goes_and_comes_back_is_followed(name: str, main, looks) -> None:
    looks(
        lambda: ActionStream.remove(name),
        lambda: None,
        lambda: stream(name).close(),
    )
    stream(name).close()
    code, out, error = main("control", "watch", name)
    assert (code, error) == (0, "")
    shown = [block.splitlines()[0] for block in out.strip().split("\n\n") if name in block.splitlines()[0]]
    assert [f"{name}: " in line for line in shown] == [True, False, False, True]
    assert "no such segment" in shown[1]


@contextmanager
def terminal(lines: int, columns: int = 80) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A terminal's end to write to, and what has been written to it since it was last asked."""
    import fcntl
    import termios

    own, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read() -> str:
        data = b""
        while select.select([own], [], [], 0.2)[0]:
            data += os.read(own, 65536)
        return data.decode()

    with os.fdopen(other, "w") as out:
        yield out, read
    os.close(own)


def test_a_terminal_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(lines=10) as (out, read):
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.get_terminal_size(out.fileno()))
        screen = Screen(out)
        screen.draw("a\nb\nc")
        first = read()
        assert first.startswith("\x1b[J\x1b[?7l")
        assert first.endswith("\x1b[?7h\r\n"), "lines are cut by the terminal only while a block is drawn"
        screen.draw("d\ne")
        assert read().startswith("\x1b[3F\x1b[J"), "up by the lines of the block before, which is wiped"
        screen.draw("\n".join(f"line {i}" for i in range(30)))
        second = read()
        assert second.startswith("\x1b[2F\x1b[J")
        assert second.count("\n") == 9, "no more than the terminal has, or the block before scrolls away"
        assert "22 more lines" in second
        screen.draw("f")
        assert read().startswith("\x1b[9F\x1b[J")


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ms,text",
    [
        (0.04, "0.0 ms"),
        (9.94, "9.9 ms"),
        (9.96, "10 ms"),
        (999.4, "999 ms"),
        (999.6, "1.00 s"),
        (59_990.0, "59.99 s"),
        (59_999.0, "1 min 0 s"),
        (192_000.0, "3 min 12 s"),
        (3_599_600.0, "1 h 0 min"),
        (18_720_000.0, "5 h 12 min"),
        (-500.0, "-500 ms"),
    ],
)
def test_durations(ms: float, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(
    "words,message",
    [
        (["--every-ms", "0"], "--every-ms: expected at least 10, got 0"),
        (["--chunks", "0"], "--chunks: expected at least 1, got 0"),
        (["--dead-after-ms", "0"], "--dead-after-ms: expected milliseconds above 0, got 0.0"),
        (["--json", "/proc/no-such-folder/x"], "--json /proc/no-such-folder/x: cannot be written"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], message: str, name: str, main) -> None:
    code, _, error = main("control", "watch", name, *words)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
