"""Progress of long work: a bar on a terminal, a line now and then elsewhere, and nothing at any other moment."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest

from dit4dit import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not as a fixture: pytest puts its own stream back before the test itself."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


@pytest.fixture
def now(monkeypatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def test_a_terminal_has_a_bar_with_count_and_words_and_no_thread(monkeypatch, capsys) -> None:
    stream, threads = terminal(monkeypatch), threading.active_count()
    with progress.bar("packs", 3, mininterval=0) as shown:
        shown.say("open the drawer")
        shown.update()
        shown.reach(3)
        assert threading.active_count() <= threads, "tqdm's own thread may draw while something is timed"
    drawn = stream.getvalue()
    assert "packs" in drawn
    assert "1/3" in drawn
    assert "3/3" in drawn
    assert "open the drawer" in drawn
    assert capsys.readouterr().out == ""


def on_screen(drawn: str) -> list[str]:
    """What a terminal shows of it in the end."""
    lines, at = [""], 0
    for letter in drawn:
        if letter == "\n":
            lines, at = [*lines, ""], 0
        elif letter == "\r":
            at = 0
        else:
            lines[-1] = lines[-1].ljust(at)[:at] + letter + lines[-1][at + 1 :]
            at += 1
    return [line.rstrip() for line in lines]


def test_a_log_line_stands_above_the_bar(monkeypatch) -> None:
    """Not behind it, as in "loading: 00:02WARNING ...": of a handler on standard error, and of who has set up none."""
    stream, last = terminal(monkeypatch), logging.lastResort
    logger = logging.Logger("of a library")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    monkeypatch.setitem(logging.Logger.manager.loggerDict, logger.name, logger)
    assert last is not None
    with progress.bar("packs", 2, mininterval=0, bar_format="{desc} {n}") as shown:
        shown.update()
        logger.warning("a library's words")
        assert logging.lastResort is not None
        logging.lastResort.handle(logging.LogRecord("x", logging.WARNING, "", 0, "ours", None, None))
    seen = on_screen(stream.getvalue())
    assert "a library's words" in seen
    assert "ours" in seen
    assert "packs 1" in seen
    # and everything is as it was
    assert handler.stream is stream
    assert logging.lastResort is last


def test_without_a_terminal_there_are_lines_now_and_then(now, capsys) -> None:
    with progress.bar("cases", 4) as shown:
        for done in range(4):
            shown.say(f"case {done}")
            now[0] += 20
            shown.update()
    with progress.bar("short", 2) as shown:
        shown.update()
    with progress.bar("bytes", unit="B", unit_scale=True) as shown:
        shown.update(5)
        now[0] += 31
        shown.update(2_000_000)
    found = capsys.readouterr()
    assert found.err.splitlines() == [
        "cases: 2 of 4, case 1, 00:40 left",
        "cases: 4 of 4, case 3, 00:00 left",
        "bytes: 2.00MB, 00:31 so far",
    ]
    assert found.out == ""


def test_work_that_cannot_be_counted_has_a_clock(monkeypatch) -> None:
    stream, drawn = terminal(monkeypatch), threading.Event()

    def write(text: str) -> int:
        if "loading runs/libero: 00:0" in text and threading.current_thread() is not threading.main_thread():
            drawn.set()
        return len(text)

    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(stream, "write", write)
    with progress.waiting("loading runs/libero"):
        assert drawn.wait(60)
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_a_clock_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    told = threading.Event()
    write = sys.stderr.write
    monkeypatch.setattr(sys.stderr, "write", lambda text: write(text) + bool(told.set()))
    with progress.waiting("parity") as shown:
        shown.say("features")
        assert told.wait(60)
    assert capsys.readouterr().err.startswith("parity: at work, features, 00:00 so far\n")


def test_a_bar_that_is_not_for_this_process_is_silent(monkeypatch) -> None:
    stream = terminal(monkeypatch)
    with progress.bar("packs", 3, active=False) as shown:
        shown.say("words")
        shown.update(3)
    assert stream.getvalue() == ""
