"""The meta folder of a LeRobot data set, v2.0, v2.1 or v3.0: which episodes there are, and in which files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit4dit.data.modality import is_picture
from dit4dit.errors import DataError
from dit4dit.extras import require

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class VideoPlace:
    """Where one camera's pictures of one episode are."""

    path: Path
    start: float
    """Seconds from the start of the file to the first frame."""


@dataclass(frozen=True)
class EpisodeMeta:
    """One episode: its number, its frames, and its files."""

    index: int
    length: int
    data: Path
    videos: Mapping[str, VideoPlace]


@dataclass(frozen=True)
class Meta:
    """What the meta folder says."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Any]
    tasks: Mapping[int, str]
    episodes: tuple[EpisodeMeta, ...]

    @property
    def info(self) -> Path:
        return self.root / "meta" / "info.json"

    @property
    def frames(self) -> int:
        return sum(episode.length for episode in self.episodes)


def read_meta(root: Path) -> Meta:
    """The meta folder of the data set in `root`.

    Raises:
        DataError: no data set there, a version that is not known, or a file that is damaged, named with its line.
    """
    path = root / "meta" / "info.json"
    if not path.is_file():
        if (root / "data").is_dir() or (root / ".recording").is_dir():
            raise DataError(
                f"{root}: no meta/info.json: a recording that was not closed, or a copy in part; record or copy it again"
            )
        raise DataError(
            f"{root}: no LeRobot data set (no meta/info.json); give the folder that holds meta, data and videos"
        )
    info = _json(path.read_text(encoding="utf-8"), str(path))
    version = _get(info, "codebase_version", str, path)
    if version not in VERSIONS:
        raise DataError(
            f"{path}: codebase_version: expected one of {', '.join(VERSIONS)}, got {version!r}; convert the data set"
        )
    fps, features = _get(info, "fps", (int, float), path), _get(info, "features", dict, path)
    if not fps > 0:
        raise DataError(f"{path}: fps: expected more than 0, got {fps}")
    cameras = [name for name, feature in features.items() if is_picture(feature) and feature["dtype"] == "video"]
    _get(info, "data_path", str, path)
    if cameras:
        _get(info, "video_path", str, path)
    read = _read_v3 if version == "v3.0" else _read_v2
    tasks, episodes = read(root, info, cameras)
    if not episodes:
        raise DataError(f"{root}/meta: no episodes; record some, or copy the data set again")
    return Meta(root, version, float(fps), features, tasks, tuple(episodes))


def _read_v2(root: Path, info: Mapping[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    path = root / "meta" / "info.json"
    size = _get(info, "chunks_size", int, path)
    listed = root / "meta" / "tasks.jsonl"
    tasks = {_get(line, "task_index", int, at): _get(line, "task", str, at) for at, line in _lines(listed)}
    episodes = []
    for at, line in _lines(root / "meta" / "episodes.jsonl"):
        number, length = _get(line, "episode_index", int, at), _get(line, "length", int, at)
        where = {"episode_chunk": number // size, "episode_index": number}
        videos = {key: VideoPlace(root / info["video_path"].format(**where, video_key=key), 0.0) for key in cameras}
        episodes.append(EpisodeMeta(number, length, root / info["data_path"].format(**where), videos))
    return tasks, episodes


def _read_v3(root: Path, info: Mapping[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    path = root / "meta" / "tasks.parquet"
    table = read_table(path)
    words = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(words) != 1:
        raise DataError(f"{path}: expected the columns task_index and task, got {', '.join(table.column_names)}")
    numbers, texts = table["task_index"].to_pylist(), table[words[0]].to_pylist()
    for row, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        if not isinstance(number, int) or not isinstance(text, str):
            raise DataError(f"{path}, row {row}: expected a number and a text, got {number!r} and {text!r:.60}")
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"{root}/meta/episodes: no parquet files; copy the data set again")
    episodes = []
    for file in files:
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        names += [f"videos/{key}/{part}" for key in cameras for part in ("chunk_index", "file_index", "from_timestamp")]
        for row, line in enumerate(read_table(file, names).to_pylist()):
            at = f"{file}, row {row}"
            for name in names:
                if line[name] is None:
                    raise DataError(f"{at}: {name} is missing; copy the data set again")
            data = {"chunk_index": line["data/chunk_index"], "file_index": line["data/file_index"]}
            videos = {key: _v3_video(root, info, key, line) for key in cameras}
            number, length = _get(line, "episode_index", int, at), _get(line, "length", int, at)
            episodes.append(EpisodeMeta(number, length, root / info["data_path"].format(**data), videos))
    return dict(zip(numbers, texts, strict=True)), sorted(episodes, key=lambda episode: episode.index)


def _v3_video(root: Path, info: Mapping[str, Any], key: str, line: Mapping[str, Any]) -> VideoPlace:
    where = {part: line[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index")}
    return VideoPlace(root / info["video_path"].format(**where, video_key=key), line[f"videos/{key}/from_timestamp"])


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A parquet file as an Arrow table; DataError when it is missing, damaged, or lacks one of `columns`."""
    parquet, pa = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            for name in columns or ():
                if name not in known:
                    raise DataError(f"{path}: no column {name!r}; it has: {', '.join(known)}")
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: unreadable parquet ({' '.join(str(error).split()):.120}); copy it again") from None


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [(f"{path}, line {i}", _json(line, f"{path}, line {i}")) for i, line in lines if line.strip()]


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}); copy the data set again") from None
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(data).__name__}")
    return data


def _get(data: Mapping[str, Any], key: str, kind: Any, where: Any) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "a number" if isinstance(kind, tuple) else kind.__name__
        raise DataError(f"{where}: {key}: expected {wanted}, got {value!r:.60}")
    return value
