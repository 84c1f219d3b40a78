"""The numbers of a data set in memory-mapped arrays, made once per data set and shared by all workers and runs.

Making them reads every parquet file, so this is where damage is found: before training, each with its file and row. The cache
lies in `DIT4DIT_CACHE` (else ~/.cache/dit4dit) under a key made of the meta files and of every file's size and time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.cache import cache_root
from dit4dit.data.meta import EpisodeMeta, Meta, read_table
from dit4dit.data.modality import is_picture, width
from dit4dit.data.time_check import Unusual, check_videos, merged, uneven_timestamps, wrong_timestamps
from dit4dit.errors import DataError
from dit4dit.extras import require

FORMAT = 2
"""Part of the key: another layout of the cache is another number."""

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
class Columns:
    """See the module. Rows of all episodes one after another, in the order of `Meta.episodes`."""

    folder: Path
    files: Mapping[str, str]
    digests: Mapping[str, str]
    """Column -> hash of its values."""
    problems: tuple[Problem, ...]
    starts: tuple[int, ...]
    """First row of each episode."""
    unusual: tuple[Unusual, ...]

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would be the numbers themselves: the other process opens its own
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    @cached_property
    def _maps(self) -> dict[str, NDArray[Any]]:
        return {name: np.load(self.folder / file, mmap_mode="r") for name, file in self.files.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Column `name`, [rows, d], read-only."""
        return self._maps[name]


def cache_dir() -> Path:
    """Where caches of data go; `DIT4DIT_CACHE` chooses another place."""
    return cache_root() / "data"


def open_columns(meta: Meta, progress: Progress | None = None) -> Columns:
    """The columns of a data set, from the cache or read from its files.

    Raises:
        DataError: the cache cannot be written. Damage does not raise: it is listed in `problems`.
    """
    folder = cache_dir() / _key(meta)
    if not (folder / "index.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _build(meta, aside, progress)
                aside.rename(folder)
            except OSError:
                if not (folder / "index.json").is_file():  # or else another process was quicker
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error.strerror}); set DIT4DIT_CACHE to another folder"
            ) from None
    index = json.loads((folder / "index.json").read_text())
    problems = tuple(Problem(**problem) for problem in index["problems"])
    unusual = tuple(Unusual(**unusual) for unusual in index["unusual"])
    return Columns(folder, index["files"], index["digests"], problems, _starts(meta), unusual)


def _starts(meta: Meta) -> tuple[int, ...]:
    return tuple(int(x) for x in np.cumsum([0, *(episode.length for episode in meta.episodes)])[:-1])


def _key(meta: Meta) -> str:
    digest = hashlib.blake2b(f"{FORMAT}".encode(), digest_size=16)
    for path in sorted(path for path in (meta.root / "meta").rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(meta.root)).encode() + b"\0" + path.read_bytes())
    files = {episode.data for episode in meta.episodes}
    files |= {place.path for episode in meta.episodes for place in episode.videos.values()}
    for path in sorted(files):
        facts = path.stat() if path.is_file() else None
        size, time = (-1, -1) if facts is None else (facts.st_size, facts.st_mtime_ns)
        digest.update(f"{path.relative_to(meta.root)} {size} {time}\n".encode())
    return digest.hexdigest()


def _build(meta: Meta, folder: Path, progress: Progress | None) -> None:
    kinds = {n: _kind(n) for n, f in meta.features.items() if not is_picture(f) and _numeric(f) and width(f) > 0}
    files = {name: f"{i}.npy" for i, name in enumerate(kinds)}
    total = meta.frames
    out: dict[str, NDArray[Any]] = {}
    for name, kind in kinds.items():
        shape = (total, width(meta.features[name]))
        # an empty array cannot be mapped
        empty = total == 0
        path = folder / files[name]
        out[name] = np.zeros(shape, kind) if empty else np.lib.format.open_memmap(path, "w+", kind, shape)
        if empty:
            np.save(path, out[name])
    problems: list[Problem] = []
    unusual: list[Unusual] = []
    starts = dict(zip((episode.index for episode in meta.episodes), _starts(meta), strict=True))
    by_file = _group((episode.data, episode) for episode in meta.episodes)
    for done, (path, episodes) in enumerate(by_file.items()):
        if progress is not None:
            progress(path.name, done, len(by_file))
        problems += _read_file(meta, path, episodes, out, starts, unusual)
    for video, number, camera, why in check_videos(meta, progress, unusual):
        problems.append(Problem(str(video), None, number, camera, why))
    digests = {
        name: hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).hexdigest() for name, x in out.items()
    }
    del out
    order = {episode.index: i for i, episode in enumerate(meta.episodes)}
    problems.sort(key=lambda problem: order[problem.episode])
    index = {
        "files": files,
        "digests": digests,
        "problems": [asdict(problem) for problem in problems],
        "unusual": [asdict(unusual) for unusual in merged(unusual)],
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def _numeric(feature: Mapping[str, Any]) -> bool:
    return str(feature.get("dtype", "")).startswith(("float", "int", "uint", "bool"))


def _kind(name: str) -> type:
    if name == "timestamp":
        return np.float64
    return np.int64 if name == "index" or name.endswith("_index") or name.startswith("annotation.") else np.float32


def _group(pairs: Iterable[tuple[Path, EpisodeMeta]]) -> dict[Path, list[EpisodeMeta]]:
    out: dict[Path, list[EpisodeMeta]] = {}
    for path, episode in pairs:
        out.setdefault(path, []).append(episode)
    return out


def _read_file(
    meta: Meta,
    path: Path,
    episodes: list[EpisodeMeta],
    out: Mapping[str, NDArray[Any]],
    starts: Mapping[int, int],
    unusual: list[Unusual],
) -> list[Problem]:
    """Copy one parquet file's episodes into `out`; what is wrong with them. What is only unusual is added to `unusual`."""
    try:
        table = read_table(path, sorted({"episode_index", *out}))
        owner = _numbers(table["episode_index"], 1)[0][:, 0]
    except DataError as error:
        message = str(error).removeprefix(f"{path}: ")
        return [Problem(str(path), None, episode.index, None, message) for episode in episodes]
    problems = []
    arrays = {name: _numbers(table[name], width(meta.features[name])) for name in out}
    for episode in episodes:
        rows = np.flatnonzero(owner == episode.index)

        def add(message: str, row: int | None = None, column: str | None = None, number: int = episode.index) -> None:
            problems.append(Problem(str(path), row, number, column, message))

        if episode.length < 1:
            add(f"episode {episode.index} is empty (length {episode.length} in the meta folder); remove it")
            continue
        if len(rows) != episode.length or rows[-1] - rows[0] + 1 != len(rows):
            add(
                f"episode {episode.index}: expected {episode.length} rows one after another, got {len(rows)}; copy it again"
            )
            continue
        first = int(rows[0])
        for name, (values, bad) in arrays.items():
            at = next(((row, why) for row, why in bad if row is None or first <= row < first + episode.length), None)
            if at is not None:
                add(f"column {name!r}: {at[1]}", at[0], name)
                continue
            piece = values[first : first + episode.length]
            out[name][starts[episode.index] :][: episode.length] = piece
            wrong = _wrong_values(name, piece, meta)
            if wrong is not None:
                add(wrong[1], first + wrong[0], name)
            elif name == "timestamp":
                why = wrong_timestamps(piece[:, 0], meta.fps)
                if why is not None:
                    add(f"episode {episode.index}: {why}", None, name)
                else:
                    unusual += uneven_timestamps(piece[:, 0], meta.fps, path, first, episode.index)
    return problems


def _wrong_values(name: str, values: NDArray[Any], meta: Meta) -> tuple[int, str] | None:
    """First row of an episode's column with a value that cannot be, and why."""
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            return (
                row,
                f"column {name!r}: NaN or infinite value at position {int((~np.isfinite(values[row])).argmax())}",
            )
    if name == "task_index" or name.startswith("annotation."):
        unknown = ~np.isin(values[:, 0], list(meta.tasks))
        if unknown.any():
            row = int(unknown.argmax())
            return row, f"column {name!r}: unknown task index {int(values[row, 0])}; meta has {len(meta.tasks)} tasks"
    return None


def _numbers(column: Any, size: int) -> tuple[NDArray[Any], list[tuple[int | None, str]]]:
    """An Arrow column as [rows, size], and the rows that are none: (row or None for all, why)."""
    pa, compute = require("pyarrow", "train"), require("pyarrow.compute", "train")
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows at all
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    rows = len(column)
    nothing = np.zeros((rows, size))
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if listed else kind
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
        return nothing, [(None, f"expected numbers, got {kind}")]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        return nothing, [(row, "no value")]
    if listed:
        lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != size)
        if len(wrong):
            return nothing, [(int(row), f"expected {size} values, got {int(lengths[row])}") for row in wrong]
        flat = column.flatten()
        if flat.null_count:
            row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // size
            return nothing, [(row, "no value")]
    elif size != 1:
        return nothing, [(None, f"expected lists of {size} values, got single ones")]
    else:
        flat = column
    return flat.to_numpy(zero_copy_only=False).reshape(rows, size), []
