"""Files that say which implementation was the fastest: whatever is in one, the right kernel runs, and one line says why not."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from verdict_files import ARGS, CPU, DEFAULT, OTHER, put, ran, verdict

from dit4dit import ops
from dit4dit.errors import InputError
from dit4dit.files.cache import cache_root
from dit4dit.ops import dispatch, verdicts
from dit4dit.ops.dispatch import Choices
from dit4dit.ops.explanation import survey
from dit4dit.ops.verdicts import Verdict, Verdicts, call_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this CPU's verdicts, which is not there yet."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_said", set())
    return verdicts.folder(CPU)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the logger of the ops has said."""
    caplog.set_level(logging.WARNING, logger="dit4dit.ops")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dit4dit.ops"]


def test_a_verdict_that_counts_decides_and_says_nothing(cache: Path, lines) -> None:
    assert ran() == DEFAULT
    path = verdicts.write(verdict(), cache)
    assert verdicts.read(path) == verdict()
    assert ran() == OTHER
    assert not lines()
    found = survey(CPU, dispatch.files())
    assert (found.counting, found.ignored, found.folder) == ((verdict(),), {}, str(cache))


WHOLE = json.dumps(verdict().data())
LARGE = json.dumps({**verdict().data(), "refused": {"cuda": "x" * verdicts.LARGEST}})
BROKEN: dict[str, Any] = {
    "empty": "",
    "cut": WHOLE[:-5],
    "binary": bytes(range(256)),
    "another encoding": WHOLE.encode("utf-16"),
    "deep": "[" * 100_000,
    "large": LARGE,
    "a list": "[]",
    "a number": "1",
    "a number of a million digits": "1" * 1_000_000,
    "nothing in it": "{}",
    "another format": {"format": 2},
    "op": {"op": 1},
    "call": {"call": None},
    "place": {"place": []},
    "place of a kind": {"place": {"device": {}}},
    "ms": {"ms": [1]},
    "ms of words": {"ms": {OTHER: "1"}},
    "ms of a bool": {"ms": {OTHER: True}},
    "ms not a number": {"ms": {OTHER: math.nan}},
    "ms without end": {"ms": {OTHER: math.inf}},
    "ms below 0": {"ms": {OTHER: -1}},
    "ms beyond a float": {"ms": {OTHER: 10**400}},
    "no ms of the chosen": {"ms": {DEFAULT: 1}},
    "chosen": {"chosen": [OTHER]},
    "refused": {"refused": {"cuda": 1}},
    "foreign": {"foreign": 3},
    "made": {"made": 2026},
    "escapes": {"default": "\x1b[2J"},
    "half a character": {"call": "\ud800"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_verdict_is_ignored_in_one_line(cache: Path, lines, what: str) -> None:
    content = BROKEN[what]
    path = put(cache, **content) if isinstance(content, dict) else put(cache, content)
    assert ran() == DEFAULT
    assert ran() == DEFAULT
    (line,) = lines()
    assert str(cache) in line
    assert line.endswith("run dit4dit tune")
    assert len(line) < len(str(cache)) + 400
    if what != "place of a kind":
        assert f"a file is not a verdict ({path.name}: " in line
    (count,) = survey(CPU, dispatch.files()).ignored.values()
    assert count == 1


def test_a_large_file_is_not_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse one of a terabyte: reading it would take all memory."""
    path = put(cache, "")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert "at most 1048576 bytes" in verdicts.read(path).detail


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder_there(path: Path) -> None:
    (path / "inside").mkdir(parents=True)


def device_there(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, loop, folder_there, device_there])
def test_what_is_no_file_is_ignored_and_not_waited_for(cache: Path, lines, make: Callable[[Path], None]) -> None:
    cache.mkdir(parents=True)
    make(cache / verdict().file)
    assert ran() == DEFAULT
    assert len(lines()) == 1
    assert sum(survey(CPU, dispatch.files()).ignored.values()) == 1


def test_a_pipe_with_a_verdict_in_it_is_none(cache: Path, lines) -> None:
    path = put(cache)
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    try:
        os.write(held, content)
        assert ran() == DEFAULT
    finally:
        os.close(held)
    assert "expected a file" in lines()[0]


def test_a_link_to_a_verdict_counts_and_one_to_nothing_is_nothing(cache: Path, tmp_path: Path, lines) -> None:
    path = put(cache)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert ran() == OTHER
    (tmp_path / "elsewhere.json").unlink()
    assert ran() == DEFAULT
    assert not lines()
    assert not survey(CPU, dispatch.files()).ignored


@pytest.mark.parametrize("where", ["file", "folder"])
def test_without_permission(cache: Path, lines, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Said by the system for root, too."""
    path = put(cache)
    name = "open" if where == "file" else "stat"
    real = getattr(os, name)

    def refused(at: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(str(at)) == (path if where == "file" else cache):
            raise PermissionError(13, "Permission denied", str(at))
        return real(at, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refused)
        assert ran() == DEFAULT
        assert ran() == DEFAULT
    (line,) = lines()
    assert "cannot be read" in line
    assert "Permission denied" in line
    assert ran() == OTHER


@pytest.mark.parametrize("level", ["folder", "verdicts", "cache"])
def test_a_file_in_the_place_of_a_folder(cache: Path, level: str) -> None:
    place = {"folder": cache, "verdicts": cache.parent, "cache": cache_root()}[level]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")
    assert ran() == DEFAULT
    assert sum(survey(CPU, dispatch.files()).ignored.values()) == 1
    with pytest.raises(InputError, match="set DIT4DIT_CACHE to a folder that can be written"):
        verdicts.write(verdict(), cache)


def test_no_place_for_a_cache(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a mere number."""

    def nowhere(cls: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIT4DIT_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    assert ran() == DEFAULT
    assert not lines()
    assert survey(CPU, dispatch.files()).folder == ""
    with pytest.raises(InputError, match="no home folder; set DIT4DIT_CACHE"):
        verdicts.folder(CPU)


def test_without_the_variable_verdicts_are_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT4DIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ran() == DEFAULT
    assert verdicts.write(verdict(), verdicts.folder(CPU)).is_relative_to(tmp_path / "home" / ".cache")
    assert ran() == OTHER


ELSEWHERE = {
    "device": ("NVIDIA H200", "made with device 'NVIDIA H200'"),
    "torch": ("2.9.0", "made with torch '2.9.0'"),
    "capability": ("NEON", "made with capability 'NEON'"),
    "kernels": ("0" * 32, "made by other kernels or tiles"),
    "driver": ("580.82.07", "made with driver '580.82.07', which is not here"),
    "interpreted": (0, "made with interpreted 0"),
}


@pytest.mark.parametrize("fact", ELSEWHERE)
def test_made_elsewhere(cache: Path, lines, fact: str) -> None:
    value, words = ELSEWHERE[fact]
    put(cache, place={**verdicts.place(CPU), fact: value})
    assert ran() == DEFAULT
    (line,) = lines()
    assert words in line
    assert list(survey(CPU, dispatch.files()).ignored.values()) == [1]


def test_another_fact_of_the_place_is_missing(cache: Path, lines) -> None:
    put(cache, place={name: value for name, value in verdicts.place(CPU).items() if name != "torch"})
    assert ran() == DEFAULT
    assert "made with torch None" in lines()[0]


@pytest.mark.parametrize("field", ["op", "call"])
def test_of_another_call_than_its_name_says(cache: Path, lines, field: str) -> None:
    put(cache, **{field: "linear"})
    assert ran() == DEFAULT
    assert "a file is of another call than its name says" in lines()[0]


def test_one_line_for_a_reason_however_many_files(cache: Path, lines) -> None:
    verdicts.write(verdict(place={"device": "another"}), cache)
    again = torch.float16
    other = verdict(place={"device": "another"}, call=call_text((*ARGS[:3], again, None, None)))
    verdicts.write(other, cache)
    with Choices(Verdicts(CPU)):
        ops.preprocess(*ARGS)
        ops.preprocess(*ARGS[:3], again)
    assert len(lines()) == 1


def test_what_a_verdict_names_and_is_not_here(cache: Path, lines) -> None:
    verdicts.write(verdict(chosen="gone", ms={"gone": 1.0}), cache)
    assert ran() == DEFAULT
    assert "there is no implementation 'gone' of preprocess here" in lines()[0]


def test_what_a_verdict_names_and_refuses(cache: Path, lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    verdicts.write(verdict(chosen="cuda", ms={"cuda": 1.0}), cache)
    assert ran() == DEFAULT
    assert lines() == ["preprocess: running 'cpp' because 'cuda' refused: views[0] is on cpu"]


PLUGIN = """
from dit4dit.ops import Implementation, register
from dit4dit.ops.preprocess import reference

def run(views, size, resize, dtype, channels, out):
    return reference(views, size, resize, dtype)

register("preprocess", Implementation("mine", lambda *_: None, run))
"""


def imported(file: Path) -> None:
    """The module of a user who registers an implementation of their own."""
    spec = importlib.util.spec_from_file_location("plugin_of_a_test", file)
    module = sys.modules["plugin_of_a_test"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN)
    imported(file)
    yield file
    del dispatch.find("preprocess").implementations["mine"], sys.modules["plugin_of_a_test"]


def test_an_implementation_of_others_counts_while_its_source_is_the_same(cache: Path, plugin: Path, lines) -> None:
    foreign = dispatch.foreign(dispatch.find("preprocess").implementations["mine"])
    assert foreign == str(plugin)
    mine = verdict(chosen="mine", ms={"mine": 1.0}, foreign=verdicts.file_hash(foreign))
    verdicts.write(mine, cache)
    assert ran() == "mine"
    assert survey(CPU, dispatch.files()).counting == (mine,)
    plugin.write_text(PLUGIN + "# changed")
    imported(plugin)
    assert ran() == DEFAULT
    (line,) = lines()
    assert "the source of 'mine' of preprocess has changed" in line
    assert "plugin.py" in line
    assert not survey(CPU, dispatch.files()).counting
    plugin.unlink()
    assert ran() == DEFAULT
    verdicts.write(replace(mine, foreign=verdicts.file_hash(foreign)), cache)
    assert ran() == DEFAULT, "what cannot be read may be anything"


def test_one_of_others_under_a_name_of_ours_and_one_of_ours_that_was_of_others(
    cache: Path, plugin: Path, lines
) -> None:
    verdicts.write(verdict(chosen="mine", ms={"mine": 1.0}), cache)
    assert ran() == DEFAULT
    verdicts.write(verdict(foreign=verdicts.file_hash(str(plugin))), cache)
    assert ran() == DEFAULT
    assert "'torch' of preprocess was not dit4dit's own" in lines()[1]


def test_two_processes_that_write_one_verdict_at_once(cache: Path) -> None:
    """Whatever is read meanwhile is one or the other, whole."""
    script = f"""
import sys
from dataclasses import replace
from pathlib import Path
from dit4dit.ops import verdicts
path = Path({str(cache / verdict().file)!r})
found = verdicts.read(path)
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    verdicts.write(replace(found, made="theirs " * (1 + 1000 * (i % 2))), path.parent)
"""
    path = verdicts.write(verdict(made="first"), cache)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        seen = set()
        while other.poll() is None:
            verdicts.write(verdict(made="ours"), cache)
            found = verdicts.read(path)
            assert isinstance(found, Verdict), found
            seen.add(found.made.split()[0])
    assert other.returncode == 0
    assert seen <= {"ours", "theirs"}
    assert "ours" in seen
    assert [one.name for one in cache.iterdir()] == [path.name], "no half of one is left"
    assert ran() == OTHER


def test_one_that_is_replaced_while_it_is_read_is_read_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = verdicts.write(verdict(), cache)
    real = os.fstat

    def replaced(descriptor: int) -> os.stat_result:
        verdicts.write(verdict(made="later"), cache)
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", replaced)
        assert verdicts.read(path) == verdict()
    assert verdicts.read(path) == verdict(made="later")


def test_a_folder_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    path = verdicts.write(verdict(), cache)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(InputError, match=r"not written \(Read-only file system\); set DIT4DIT_CACHE"):
        verdicts.write(verdict(made="later"), cache)
    assert [one.name for one in cache.iterdir()] == [path.name]
    assert ran() == OTHER, "what was there is still used"


def test_a_long_reason_is_cut(cache: Path) -> None:
    path = verdicts.write(verdict(refused={"cuda": "x" * 10 * verdicts.LARGEST}), cache)
    assert len(verdicts.read(path).refused["cuda"]) == verdicts.LONGEST_REASON
