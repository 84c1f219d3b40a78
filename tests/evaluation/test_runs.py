"""A run's folder: what is kept, what is refused, and how shards become one run."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_standin import make_plan, play, untimed

from dit4dit.cli import main
from dit4dit.control.execution import Execution
from dit4dit.errors import ConfigError, DataError, InputError
from dit4dit.evaluation import runs
from dit4dit.evaluation.runs import Book, Run, merge
from dit4dit.evaluation.video import Video

CONFIG = {
    "plan": {"seed": 1},
    "episodes": 3,
    "shard": [1, 1],
    "batch": 2,
    "workers": 1,
    "policy": {"checkpoint": "a", "path": "p"},
}


def record(trial: int, success: bool | None = True) -> dict[str, Any]:
    error = None if success is not None else {"type": "SimulatorError", "message": "", "traceback": ""}
    return {"suite": "s", "task": "t", "trial": trial, "seed": 7, "success": success, "error": error}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    book = Book(tmp_path / "run", CONFIG, resume=False)
    for trial in range(2):
        book.add(record(trial))
    book.close()
    return tmp_path / "run"


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_half_a_last_line_counts_as_not_there(folder: Path, cut: int) -> None:
    file = folder / "episodes.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps(record(2)).encode()[:cut])
    assert [r["trial"] for r in Run.open(folder).records] == [0, 1]
    book = Book(folder, CONFIG, resume=True)
    assert not book.finished(("s", "t", 2))
    book.add(record(2, False))
    book.close()
    run = Run.open(folder)
    assert run.outcomes == {("s", "t", 0, 7): True, ("s", "t", 1, 7): True, ("s", "t", 2, 7): False}
    assert run.missing == 0


def test_a_whole_line_without_its_end_is_run_again(folder: Path) -> None:
    file = folder / "episodes.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    assert len(Run.open(folder).records) == 1
    Book(folder, CONFIG, resume=True).close()
    assert file.read_bytes().count(b"\n") == 1


def test_a_damaged_line_is_named(folder: Path) -> None:
    file = folder / "episodes.jsonl"
    whole = file.read_text()
    without_seed = json.loads(whole.splitlines()[0])
    del without_seed["seed"]
    for line in ("{}", json.dumps(without_seed)):
        file.write_text(f"{line}\n{whole}")
        with pytest.raises(DataError, match=r"episodes.jsonl:1: expected an episode's JSON object"):
            Run.open(folder)


@pytest.mark.parametrize("text,message", [("{", "not valid JSON"), ("[]", "expected a JSON object, got list")])
def test_a_damaged_run_json_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(DataError, match=rf"run.json: {message}"):
        Run.open(folder)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_the_record_that_did_not_fit_and_is_said(folder: Path) -> None:
    book = Book(folder, CONFIG, resume=True)
    before = (folder / "episodes.jsonl").read_bytes()
    with room_for(len(before) + 20), pytest.raises(InputError, match=r"episodes\.jsonl: cannot be written .*--resume"):
        book.add(record(2))
    assert (folder / "episodes.jsonl").read_bytes() == before
    assert not book.finished(("s", "t", 2))
    book.add(record(3))  # of another player, after there is room again
    book.close()
    assert [r["trial"] for r in Run.open(folder).records] == [0, 1, 3]


def test_a_record_is_forced_to_disk_before_it_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book(folder, CONFIG, resume=True)
    seen = []

    def fsync(number: int) -> None:
        seen.append((os.fstat(number).st_ino, (folder / "episodes.jsonl").read_bytes().count(b"\n"), len(book.records)))

    monkeypatch.setattr(os, "fsync", fsync)
    book.add(record(2))
    book.close()
    assert seen == [((folder / "episodes.jsonl").stat().st_ino, 3, 2)]


def test_a_video_on_a_full_disk_is_said_once(tmp_path: Path) -> None:
    video = Video(tmp_path / "v.mp4", 10.0)
    pictures = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), np.uint8)
    with room_for(2000), pytest.raises(InputError, match=r"v\.mp4: the video cannot be written"):
        any(video.add(picture) for picture in pictures)
    video.close(None)  # as the loop does with what it drops


def test_errors_are_replaced_by_what_comes_later(folder: Path) -> None:
    book = Book(folder, CONFIG, resume=True)
    book.add(record(2, None))
    assert not book.finished(("s", "t", 2))
    assert len(Run.open(folder).errors) == 1
    assert set(Run.open(folder).outcomes) == {("s", "t", 0, 7), ("s", "t", 1, 7)}
    book.add(record(2, True))
    assert book.finished(("s", "t", 2))
    assert Run.open(folder).errors == []
    assert (folder / "episodes.jsonl").read_text().count("\n") == 4
    book.close()


@pytest.mark.parametrize(
    "change,key",
    [
        ({"batch": 3}, "batch = 2, now it is 3"),
        ({"plan": {"seed": 2}}, r"plan\.seed = 1, now it is 2"),
        ({"policy": {"checkpoint": "b", "path": "p"}}, r"policy\.checkpoint = 'a', now it is 'b'"),
        ({"shard": [1, 2]}, "shard"),
        ({"plan": {"seed": 1, "new": 4}}, r"plan\.new = None, now it is 4"),
    ],
)
def test_a_run_goes_on_as_it_was_started_or_not_at_all(folder: Path, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Book(folder, {**CONFIG, **change}, resume=True)
    elsewhere = {"workers": 7, "machine": {"cpu": "another"}, "policy": {"checkpoint": "a", "path": "elsewhere"}}
    Book(folder, {**CONFIG, **elsewhere}, resume=True).close()
    Book(folder, {**CONFIG, "shard": (1, 1)}, resume=True).close()  # a list in the file


def test_other_worlds_are_not_other_numbers_of_episodes() -> None:
    plan = {"seed": 1, "episodes": 5, "tasks": [0], "trials": 2, "suites": ["a"], "camera": 128}
    first = Run(Path("first"), {"benchmark": "x", "plan": plan, "batch": 1}, [])
    more = {"seed": 2, "episodes": 9, "tasks": [1], "trials": 3, "suites": ["b"], "camera": 128}
    assert runs.other_worlds(first, replace(first, config={"benchmark": "x", "plan": more, "batch": 2})) == {}
    other = {"benchmark": "y", "plan": {**more, "camera": 256}}
    assert runs.other_worlds(first, replace(first, config=other)) == {
        "benchmark": ("x", "y"),
        "plan.camera": (128, 256),
    }


def test_a_run_is_not_written_over_nor_by_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="has a run already; continue it with --resume"):
        Book(folder, CONFIG, resume=False)
    book = Book(folder, CONFIG, resume=True)
    with pytest.raises(ConfigError, match="another evaluation is writing here"):
        Book(folder, CONFIG, resume=True)
    monkeypatch.setattr(runs, "LOCK_SECONDS", 30.0)
    threading.Timer(0.2, book.close).start()
    Book(folder, CONFIG, resume=True).close()  # of an evaluator that is just ending


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run\.json"):
        Run.open(tmp_path)


def test_shards_merge_into_the_run_that_one_process_would_have_made(tmp_path: Path) -> None:
    plan = make_plan(7, goal=0.4)
    whole = play(tmp_path / "whole", plan, videos="all")
    for shard in ("1/3", "2/3", "3/3"):
        part = plan.part(shard)
        assert len(play(tmp_path / shard[0], part, videos="all")) == len(part.episodes) in (2, 3)
    merged = merge([tmp_path / name for name in "312"], tmp_path / "merged")
    assert merged.missing == 0
    plain = [{k: v for k, v in r.items() if k != "video"} for r in untimed(merged.records)]
    assert plain == [
        {k: v for k, v in r.items() if k != "video"} for r in sorted(untimed(whole), key=lambda r: r["task"])
    ]
    assert all((tmp_path / "merged" / r["video"]).is_file() for r in merged.records)
    with pytest.raises(ConfigError, match="expected the shards 1/3, 2/3, 3/3; got 1/3, 1/3"):
        merge([tmp_path / name for name in "11"], tmp_path / "other")
    with pytest.raises(ConfigError, match="expected the shards 1/3, 2/3, 3/3; got 1/3, 1/3, 2/3"):
        merge([tmp_path / name for name in "121"], tmp_path / "other")
    with pytest.raises(ConfigError, match=r"merge: .* has a run already; give a new folder"):
        merge([tmp_path / name for name in "123"], tmp_path / "merged")
    play(tmp_path / "4", make_plan(7, goal=0.5).part("1/3"))
    with pytest.raises(ConfigError, match=r"merge: .*plan\.options\.goal"):
        merge([tmp_path / name for name in "423"], tmp_path / "other")


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "-1/3"])
def test_shards_that_are_none_are_refused(shard: str) -> None:
    with pytest.raises(ConfigError, match="--shard"):
        make_plan(3).part(shard)


def test_compare_and_merge_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: Path | str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["eval", *map(str, words)])
        return int(end.value.code or 0)

    a, b = (play(tmp_path / name, make_plan(6, goal=goal)) for name, goal in (("a", 0.1), ("b", 0.5)))
    only_a = sum(x["success"] and not y["success"] for x, y in zip(a, b, strict=True))
    assert only_a > 0
    assert command("compare", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "c.json") == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["only_first"] == only_a
    assert found["difference"] < 0
    told = capsys.readouterr().out
    assert "6 episodes in both" in told
    assert "not the same episodes: plan.options.goal is 0.1 in" in told
    assert found["other_worlds"] == {"plan.options.goal": [0.1, 0.5]}
    play(tmp_path / "fewer", make_plan(6, goal=0.1).part("1/2"), execution=Execution(execute=3))
    assert command("compare", tmp_path / "a", tmp_path / "fewer") == 0
    told = capsys.readouterr().out
    assert "3 episodes in both" in told
    assert "not the same" not in told
    assert command("compare", tmp_path / "a", tmp_path / "nothing") == 2
    for i in (1, 2):
        play(tmp_path / f"s{i}", make_plan(4).part(f"{i}/2"))
    assert command("merge", tmp_path / "m", tmp_path / "s1", tmp_path / "s2") == 0
    assert "4 episodes, 0 missing, 0 errors" in capsys.readouterr().out
