"""The numbers of a data set in memory-mapped arrays, made once per data set and shared by all workers and runs.

Making them reads every parquet file, so this is where damage is found: before training, each with its file and row. Rows are
appended as they are read: what could not be read is not there, rather than zero, and asking for it is an error. The cache
lies in `DIT4DIT_CACHE` (else ~/.cache/dit4dit) under a key made of the meta files and of every file's size and time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.files import read_table
from dit4dit.data.meta import EpisodeMeta, Meta
from dit4dit.data.modality import is_language, is_numeric, is_picture, width
from dit4dit.data.tables import Wrong, in_one_piece, language, not_finite, numbers, owners
from dit4dit.data.time_check import Unusual, check_videos, merged, uneven_timestamps, wrong_timestamps
from dit4dit.errors import DataError, listed, shown
from dit4dit.files.atomic import whole_folder
from dit4dit.files.cache import cache_root

FORMAT = 5
"""Part of the key: another layout of the cache is another number."""

ELSEWHERE = "set DIT4DIT_CACHE to another folder"
"""What to do where the cache cannot be written."""

Progress = Callable[[str, int, int], None]
"""Called with what is being read, how many files are done, and how many there are."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one episode."""

    file: str
    row: int | None
    """Row of the file, from 0; None where the whole file is meant."""
    episode: int
    column: str | None
    """The column or camera that is spoilt; None: the whole episode."""
    message: str

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.file}{row}: {self.message}"


@dataclass(frozen=True)
class Column:
    """One column of the cache: the rows of the episodes that it has, one after another."""

    file: str
    kind: str
    width: int
    digest: str
    """Hash of its values, and of which episodes they are of."""
    starts: NDArray[np.int64]
    """First row of each episode; -1 where it has none."""
    rows: int


@dataclass(frozen=True)
class Columns:
    """See the module. Episodes are addressed by their position in `Meta.episodes`."""

    folder: Path
    columns: Mapping[str, Column]
    episodes: tuple[EpisodeMeta, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    """What is unusual in the rows, and spoils nothing."""
    unusual: tuple[Unusual, ...]
    """What is unusual in times."""
    texts: Mapping[str, tuple[str, ...]]
    """Texts of the columns of instructions that hold such themselves: n is stored as -1 - n (`tables.language`)."""
    file_rows: tuple[int | None, ...]
    """The row of its parquet file at which each episode begins."""

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would be the numbers themselves: the other process opens its own
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    @cached_property
    def _maps(self) -> dict[str, NDArray[Any]]:
        return {name: self._map(name, column) for name, column in self.columns.items()}

    def _map(self, name: str, column: Column) -> NDArray[Any]:
        path, kind = self.folder / column.file, np.dtype(column.kind)
        wanted = column.rows * column.width * kind.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != wanted:
            raise DataError(
                f"{path}: expected {wanted} bytes of column {shown(name)}, got {size}; remove {self.folder}"
            )
        if wanted == 0:  # cannot be mapped
            return np.zeros((column.rows, column.width), kind)
        # as a plain array: every slice of a memmap costs microseconds, and a sample takes a dozen
        return np.asarray(np.memmap(path, kind, "r", shape=(column.rows, column.width)))

    @property
    def digests(self) -> dict[str, str]:
        """Column -> hash of its values."""
        return {name: column.digest for name, column in self.columns.items()}

    def read(self, name: str, episode: int) -> NDArray[Any]:
        """Column `name` of one episode, [length, d], read-only.

        Raises:
            DataError: the files do not have it; the message is the problem that was found.
        """
        start = int(self._column(name).starts[episode])
        if start < 0:
            index = self.episodes[episode].index
            raise DataError(str(next(p for p in self.problems if p.episode == index and p.column in (None, name))))
        return self._maps[name][start : start + self.episodes[episode].length]

    def gather(self, name: str, episodes: Collection[int]) -> NDArray[Any]:
        """Column `name` of several episodes, [rows, d]; see `read`."""
        starts = self._column(name).starts
        if len(episodes) == int((starts >= 0).sum()) and all(starts[i] >= 0 for i in episodes):
            return self._maps[name]
        return np.concatenate([self.read(name, i) for i in episodes])

    def _column(self, name: str) -> Column:
        if name not in self.columns:
            raise DataError(f"{self.folder}: no column {shown(name)}; it has: {listed(self.columns)}")
        return self.columns[name]


def cache_dir() -> Path:
    """Where caches of data go; `DIT4DIT_CACHE` chooses another place."""
    return cache_root() / "data"


def open_columns(meta: Meta, progress: Progress | None = None, instructions: Iterable[str] = ()) -> Columns:
    """The columns of a data set, from the cache or read from its files.

    Args:
        instructions: columns that hold instructions although they are named neither task_index nor annotation.*.

    Raises:
        DataError: the cache cannot be written. Damage does not raise: it is listed in `problems`.
    """
    spoken = frozenset(
        {*instructions, *(name for name, feature in meta.features.items() if is_language(name, feature))}
    )
    folder = cache_dir() / _key(meta, spoken)
    if not (folder / "index.json").is_file():
        try:
            with whole_folder(folder, DataError, ELSEWHERE) as partial_folder:
                _build(meta, spoken, partial_folder, progress)
        except DataError:
            if not (folder / "index.json").is_file():  # or else another process was quicker
                raise
    index = json.loads((folder / "index.json").read_text())
    # most columns have the rows of all episodes: one array of their places
    places = {
        missing: _places(meta, missing) for missing in {tuple(entry["missing"]) for entry in index["columns"].values()}
    }
    columns = {
        name: Column(entry["file"], entry["kind"], entry["width"], entry["digest"], *places[tuple(entry["missing"])])
        for name, entry in index["columns"].items()
    }
    texts = {name: tuple(of) for name, of in index["texts"].items()}
    problems = tuple(Problem(**problem) for problem in index["problems"])
    file_rows = tuple(index["file_rows"])
    unusual = tuple(Unusual(**one) for one in index["unusual"])
    return Columns(folder, columns, meta.episodes, problems, tuple(index["warnings"]), unusual, texts, file_rows)


def _places(meta: Meta, missing: Collection[int]) -> tuple[NDArray[np.int64], int]:
    """First row of each episode in a column that lacks those at the positions `missing` (-1), and the number of rows."""
    absent = set(missing)
    # a length of the meta folder may be anything, until its rows were read
    lengths = np.array(
        [0 if i in absent else episode.length for i, episode in enumerate(meta.episodes)], dtype=np.int64
    )
    order = [i for members in _by_data_file(meta).values() for i in members]
    ends = np.cumsum(lengths[order])
    starts = np.full(len(lengths), -1, dtype=np.int64)
    starts[order] = ends - lengths[order]
    starts[list(missing)] = -1
    return starts, int(ends[-1])


def _key(meta: Meta, spoken: Collection[str]) -> str:
    digest = hashlib.blake2b(f"{FORMAT} {sorted(spoken)}".encode(), digest_size=16)
    for path in sorted(path for path in (meta.root / "meta").rglob("*") if path.is_file()):
        name = path.relative_to(meta.root)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    files = {episode.data for episode in meta.episodes}
    files |= {place.path for episode in meta.episodes for place in episode.videos.values()}
    for path in sorted(files):
        facts = path.stat() if path.is_file() else None
        size, time = (-1, -1) if facts is None else (facts.st_size, facts.st_mtime_ns)
        digest.update(f"{path.relative_to(meta.root)} {size} {time}\n".encode())
    return digest.hexdigest()


def _build(meta: Meta, spoken: Collection[str], folder: Path, progress: Progress | None) -> None:
    with ExitStack() as files:
        sinks: dict[str, _Sink] = {}
        for name, feature in meta.features.items():
            if not is_picture(feature) and width(feature) > 0 and (is_numeric(feature) or name in spoken):
                file, kind = f"{len(sinks)}.bin", np.int64 if name in spoken else _kind(name)
                stream = files.enter_context((folder / file).open("wb"))
                sinks[name] = _Sink(file, stream, kind, width(feature), name in spoken)
        reading = _Reading(meta, sinks)
        by_file = _by_data_file(meta)
        for done, (path, members) in enumerate(by_file.items()):
            if progress is not None:
                progress(path.name, done, len(by_file))
            reading.file(path, members)
    problems = list(reading.problems)
    for video, number, camera, why in check_videos(meta, progress, reading.unusual):
        problems.append(Problem(str(video), None, number, camera, why))
    known = {(problem.episode, problem.column) for problem in problems}
    columns = {}
    for name, sink in sinks.items():
        missing = [i for i in range(len(meta.episodes)) if i not in sink.written]
        for i in missing:
            episode = meta.episodes[i]
            if not known & {(episode.index, None), (episode.index, name)}:  # what is missing has to be known as damage
                raise DataError(
                    f"{episode.data}: column {shown(name)} of episode {episode.index} was not read; report this"
                )
        entry = {"file": sink.file, "kind": np.dtype(sink.kind).name, "width": sink.width}
        columns[name] = {**entry, "digest": sink.digest.hexdigest(), "missing": missing}
    order = {episode.index: i for i, episode in enumerate(meta.episodes)}
    problems.sort(key=lambda problem: order[problem.episode])
    index = {
        "columns": columns,
        "texts": {name: list(sink.texts) for name, sink in sinks.items() if sink.texts},
        "problems": [asdict(problem) for problem in problems],
        "warnings": reading.warnings(),
        "unusual": [asdict(one) for one in merged(reading.unusual)],
        "file_rows": [reading.file_rows.get(i) for i in range(len(meta.episodes))],
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def _kind(name: str) -> type:
    if name == "timestamp":
        return np.float64
    return np.int64 if name == "index" or name.endswith("_index") else np.float32


def _by_data_file(meta: Meta) -> dict[Path, list[int]]:
    """Positions of the episodes of each parquet file, in the order in which they are read."""
    out: dict[Path, list[int]] = {}
    for i, episode in enumerate(meta.episodes):
        out.setdefault(episode.data, []).append(i)
    return out


@dataclass
class _Sink:
    """One column being written."""

    file: str
    stream: IO[bytes]
    kind: type
    width: int
    spoken: bool
    texts: dict[str, int] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.digest = hashlib.blake2b(f"{np.dtype(self.kind).name}\n".encode(), digest_size=16)

    def numbers(self, column: Any) -> NDArray[Any] | Wrong:
        return numbers(column, self.width, self.kind)

    def append(self, position: int, number: int, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).tobytes()
        self.stream.write(data)
        self.digest.update(f"{number} {len(values)}\n".encode() + data)
        self.written.add(position)


class _Reading:
    """Copies the rows of parquet files into sinks, and lists what is wrong with them."""

    def __init__(self, meta: Meta, sinks: Mapping[str, _Sink]) -> None:
        self.meta, self.sinks = meta, sinks
        self.places = {episode.index: episode.data for episode in meta.episodes}
        self.problems: list[Problem] = []
        self.unusual: list[Unusual] = []
        self.file_rows: dict[int, int] = {}
        self.strangers: list[str] = []
        self.late: list[str] = []
        self.unnumbered = 0

    def file(self, path: Path, members: list[int]) -> None:
        """The episodes at these positions, from their file."""
        episodes = [self.meta.episodes[i] for i in members]
        try:
            table = read_table(path, ["episode_index"], [name for name in self.sinks if name != "episode_index"])
            owner = owners(table["episode_index"])
        except DataError as error:
            message = str(error).removeprefix(f"{path}: ")
            self.problems += [Problem(str(path), None, episode.index, None, message) for episode in episodes]
            return
        found, first, count = np.unique(owner, return_index=True, return_counts=True)
        rows = {int(n): (int(start), int(k)) for n, start, k in zip(found, first, count, strict=True)}
        self._others(path, rows)
        pieces = {name: in_one_piece(table[name]) for name in self.sinks if name in table.column_names}
        for i, episode in zip(members, episodes, strict=True):
            start, length = rows.get(episode.index, (0, 0))
            if episode.length < 1:
                why = f"episode {episode.index} is empty (length {episode.length} in the meta folder); remove it"
            elif length != episode.length or not (owner[start : start + length] == episode.index).all():
                got = (
                    f"{length}{' with others between' if length == episode.length else ''} (the file has {len(owner)})"
                )
                why = f"episode {episode.index}: expected {episode.length} rows one after another, got {got}; copy it again"
            else:
                self.file_rows[i] = start
                read = {name: self._column(path, i, name, sink, pieces.get(name)) for name, sink in self.sinks.items()}
                self._order(path, i, [(name, read[name]) for name in ("frame_index", "index") if name in read])
                continue
            self.problems.append(Problem(str(path), None, episode.index, None, why))

    def _column(self, path: Path, i: int, name: str, sink: _Sink, column: Any) -> NDArray[Any] | None:
        """Copy one column of an episode; its values, where it has them."""
        episode, first = self.meta.episodes[i], self.file_rows[i]

        def add(row: int | None, why: str) -> None:
            row = None if row is None else first + row
            self.problems.append(Problem(str(path), row, episode.index, name, why))

        if column is None:
            add(None, f"no column {shown(name)}; info.json lists it")
            return None
        read = partial(language, tasks=self.meta.tasks.keys(), texts=sink.texts) if sink.spoken else sink.numbers
        values = read(column.slice(first, episode.length))
        if isinstance(values, Wrong):
            add(values.row, f"column {shown(name)}: {values.why}")
            return None
        sink.append(i, episode.index, values)
        wrong = not_finite(values)
        if wrong is not None:
            add(wrong.row, f"column {shown(name)}: {wrong.why}")
        elif name == "timestamp" and (why := wrong_timestamps(values[:, 0], self.meta.fps)) is not None:
            add(None, f"episode {episode.index}: {why}")
        elif name == "timestamp":
            self.unusual += uneven_timestamps(values[:, 0], self.meta.fps, path, first, episode.index)
        return values

    def _order(self, path: Path, i: int, counts: list[tuple[str, NDArray[Any] | None]]) -> None:
        """Rows that are out of order, or lost, are out of step with the video: the first column that counts rows tells."""
        for name, values in counts:
            if values is None or (len(values) > 1 and (values == values[0]).all()):
                continue
            other = np.flatnonzero(np.diff(values[:, 0]) != 1)
            if len(other):
                row = int(other[0]) + 1
                want, got = int(values[row - 1, 0]) + 1, int(values[row, 0])
                why = (
                    f"column {shown(name)}: expected {want} after {want - 1}, got {got}; rows are lost or out of order"
                )
                place = self.file_rows[i] + row
                self.problems.append(Problem(str(path), place, self.meta.episodes[i].index, None, why))
            elif name == "frame_index" and values[0, 0] != 0:
                self.late.append(f"{path}, row {self.file_rows[i]}: {int(values[0, 0])}")
            return
        if any(values is not None for _, values in counts):
            self.unnumbered += 1

    def _others(self, path: Path, rows: Mapping[int, tuple[int, int]]) -> None:
        """Rows of episodes that the meta folder places in another file, or does not list."""
        for index, (start, count) in rows.items():
            place = self.places.get(index)
            if place is None:
                self.strangers.append(f"{path}, row {start}: {count} rows of episode {index}")
            elif place != path:
                why = f"{count} rows of episode {index}, which the meta folder places in {place}; remove them from one of the two"
                self.problems.append(Problem(str(path), start, index, None, why))

    def warnings(self) -> list[str]:
        out = []
        if self.strangers:
            out.append(
                f"{len(self.strangers)} episodes have rows and are not listed in the meta folder, so nothing reads them; "
                f"the first: {self.strangers[0]}"
            )
        if self.late:
            out.append(
                f"{len(self.late)} episodes begin with another frame_index than 0; their first row goes with the video's first "
                f"frame nevertheless; the first: {self.late[0]}"
            )
        if self.unnumbered:
            out.append(
                f"{self.unnumbered} episodes have one value in all rows of frame_index and index: their order is not checked"
            )
        return out
