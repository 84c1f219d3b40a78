"""A run's folder: run.json (the whole configuration), episodes.jsonl (a line per finished episode), videos, logs.

A line is appended and forced to disk when its episode ends, so that whatever is killed, no finished episode is lost; a last line
without its end is one that was being written, and counts as not there. An episode that ended in an error may be run again: of
several lines for one episode the last one holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dit4dit.errors import ConfigError, DataError, InputError, shown
from dit4dit.evaluation.plan import Key
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import read_json

FORMAT = 1
LOCK_SECONDS = 5.0
MAY_DIFFER = (
    "format",
    "workers",
    "videos",
    "retries",
    "machine",
    "versions",
    "row_independent",
    "launch",
    "policy.path",
)
"""Keys of run.json in which a run that goes on may differ: they do not change what an episode is."""
EXTENT = ("plan.episodes", "plan.suites", "plan.tasks", "plan.trials", "plan.seed")
"""Keys of run.json that say how many episodes of what; the seed is in each episode's key."""
Record = dict[str, Any]


def key_of(record: Record) -> Key:
    return record["suite"], record["task"], record["trial"]


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        config: run.json. records: the newest line of each episode, sorted by suite, task and trial.
    """

    folder: Path
    config: Mapping[str, Any]
    records: Sequence[Record]

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read it. DataError where the folder is no run or a line is damaged; a half-written last line is tolerated."""
        config = _read_config(folder)
        if config is None:
            raise DataError(f"{folder}: no run.json; expected the folder of a `dit4dit eval` run")
        records = {key_of(record): record for record in _read_lines(folder / "episodes.jsonl")}
        return cls(folder, config, [records[key] for key in sorted(records)])

    @property
    def outcomes(self) -> dict[tuple[str, str, int, int], bool]:
        """(suite, task, trial, seed) -> success, for episodes that ended without an error.

        With the seed, because trial 3 of another seed is another episode.
        """
        return {(*key_of(r), r["seed"]): r["success"] for r in self.records if r["error"] is None}

    @property
    def errors(self) -> list[Record]:
        return [record for record in self.records if record["error"] is not None]

    @property
    def missing(self) -> int:
        """Episodes of the plan that have no line yet."""
        return int(self.config["episodes"]) - len(self.records)


class Book:
    """A run being written. Only one process at a time can have it; threads may share it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        """Begin the run in `folder`, or go on with it where `resume` and there is one.

        Raises:
            ConfigError: there is a run and not `resume`, or it was started with another configuration, or another process is
                writing it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._lock = folder, threading.Lock()
        # unbuffered: after a write that failed, nothing is left that a later one would bring to disk
        self._file = (folder / "episodes.jsonl").open("a+b", buffering=0)
        if not _locked(self._file):
            self._file.close()
            raise ConfigError(f"{folder}: another evaluation is writing here; wait for it, or give another folder")
        try:
            expect_new(folder, resume)
            before = _read_config(folder)
            if before is not None:
                check_same(before, config, folder)
            self._drop_half_a_line()
            self.records = {key_of(record): record for record in _read_lines(folder / "episodes.jsonl")}
        except BaseException:
            self._file.close()
            raise
        self.config: dict[str, Any] = {"format": FORMAT, **config}
        self.save_config()

    def save_config(self) -> None:
        write_json(self.folder / "run.json", self.config)

    def finished(self, key: Key) -> bool:
        """Whether the episode has been played to its end, not to an error."""
        return key in self.records and self.records[key]["error"] is None

    def add(self, record: Record) -> None:
        """Append the record; it is on disk when this returns.

        Raises:
            InputError: it cannot be written, as on a full disk; nothing of it stays in the file.
        """
        left = memoryview((json.dumps(record) + "\n").encode())
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                self._file.truncate(end)
                raise InputError(
                    f"{self.folder / 'episodes.jsonl'}: cannot be written ({error.strerror}); make room, then go on with --resume"
                ) from None
            self.records[key_of(record)] = record

    def close(self) -> None:
        self._file.close()

    def _drop_half_a_line(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            self._file.truncate(whole)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """ConfigError naming the first key in which a run that goes on is another run than it was."""
    for key, (old, new) in differences(before, json.loads(json.dumps(now))).items():
        raise ConfigError(
            f"{folder}: the run there was started with {key} = {shown(old)}, now it is {shown(new)}; keep it, or "
            "start a new run in "
            "another folder"
        )


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> its two values, where two configurations stand for different runs."""
    a, b = _leaves(first), _leaves(second)
    keys = (k for k in sorted(a.keys() | b.keys()) if not (k in MAY_DIFFER or k.partition(".")[0] in MAY_DIFFER))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def other_worlds(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """`differences` because of which episodes of the same name and seed are not the same: of benchmark and plan, but for how
    many episodes of what there are.
    """
    found = differences(first.config, second.config)
    return {k: v for k, v in found.items() if k == "benchmark" or (k.startswith("plan.") and k not in EXTENT)}


def merge(folders: Iterable[Path], out: Path) -> Run:
    """The shards of one run as a run of their own.

    Raises:
        ConfigError: shards of different runs, not all of them or one twice, or `out` has a run already.
    """
    runs = [Run.open(folder) for folder in folders]
    if not runs:
        raise ConfigError("merge: give the folders of the shards")
    shared = [{k: v for k, v in run.config.items() if k not in ("shard", "episodes")} for run in runs]
    for run, config in zip(runs[1:], shared[1:], strict=True):
        for key, (first, other) in differences(shared[0], config).items():
            raise ConfigError(
                f"merge: {runs[0].folder} has {key} = {shown(first)}, {run.folder} {shown(other)}; expected the "
                "shards of one run"
            )
    if (out / "run.json").exists():
        raise ConfigError(f"merge: {out} has a run already; give a new folder")
    shards = sorted(tuple(run.config["shard"]) for run in runs)
    wanted = [(i + 1, shards[0][1]) for i in range(shards[0][1])]
    if shards != wanted:
        lists = (", ".join(f"{i}/{n}" for i, n in some) for some in (wanted, shards))
        raise ConfigError("merge: expected the shards {}; got {}".format(*lists))
    book = Book(
        out, {**runs[0].config, "shard": [1, 1], "episodes": sum(r.config["episodes"] for r in runs)}, resume=False
    )
    for run in runs:
        for record in run.records:
            video = record.get("video")
            book.add({**record, "video": video and os.path.relpath(run.folder / video, out)})
    book.close()
    return Run.open(out)


def _locked(file: IO[bytes]) -> bool:
    """Take the file for this process alone. An evaluator that was killed may leave a lock behind for a moment: with a child that
    it had begun to start and that has not become a worker yet.
    """
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def expect_new(folder: Path, resume: bool) -> None:
    """ConfigError for a folder that has a run, unless it is to be resumed."""
    if not resume and (folder / "run.json").exists():
        raise ConfigError(f"{folder}: has a run already; continue it with --resume, or give another folder")


def _read_config(folder: Path) -> dict[str, Any] | None:
    file = folder / "run.json"
    if not file.exists():
        return None
    config = read_json(file, error=DataError, again="choose another folder")
    if config.get("format") != FORMAT:
        raise DataError(f"{file}: expected format {FORMAT}, got {shown(config.get('format'))}")
    return config


def _read_lines(file: Path) -> list[Record]:
    if not file.exists():
        return []
    records = []
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last end of line was never finished
    for number, line in enumerate(lines, 1):
        try:
            record: Record = json.loads(line)
            key_of(record), record["seed"], record["error"], record["success"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}:{number}: expected an episode's JSON object ({error}); remove the line") from None
        records.append(record)
    return records


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        k: v for name, value in node.items() for k, v in _leaves(value, f"{prefix}.{name}" if prefix else name).items()
    }
