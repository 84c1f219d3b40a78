"""The meta folder of a LeRobot data set, v2.0, v2.1 or v3.0: which episodes there are, and in which files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dit4dit.data.files import fill, number, read_json, read_json_lines, read_rows, visible, whole, words
from dit4dit.data.modality import check_features, depth_map, is_picture
from dit4dit.errors import DataError, shown

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class VideoPlace:
    """Where one camera's pictures of one episode are."""

    path: Path
    start: float
    """Seconds from the start of the file to the first frame."""
    end: float | None = None
    """Seconds at which the meta folder has the episode end (v3.0). Nothing is read by it; no other episode may begin before."""


@dataclass(frozen=True)
class EpisodeMeta:
    """One episode: its number, its frames, and its files."""

    index: int
    length: int
    data: Path
    videos: Mapping[str, VideoPlace]
    """By camera; depth maps are none."""
    tasks: tuple[str, ...] = ()
    """The instructions that the meta folder lists for it; nothing but `data check` looks at them."""
    where: str = ""
    """The file, and the line or row, that lists it."""


@dataclass(frozen=True)
class Meta:
    """What the meta folder says."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Any]
    tasks: Mapping[int, str]
    episodes: tuple[EpisodeMeta, ...]
    warnings: tuple[str, ...] = ()
    """What is unusual, and spoils nothing."""

    @property
    def info(self) -> Path:
        return self.root / "meta" / "info.json"

    @property
    def frames(self) -> int:
        return sum(episode.length for episode in self.episodes)


@dataclass(frozen=True)
class _Listed:
    """One episode, and the rows of the data set that it claims: the first and the one after the last (v3.0)."""

    episode: EpisodeMeta
    rows: tuple[int, int] | None = None


def read_meta(root: Path) -> Meta:
    """The meta folder of the data set in `root`.

    Raises:
        DataError: no data set there, a version that is not known, a file that is damaged, named with its line, or two episodes
            with the same number, rows or files. Frames that two share are found in the videos (`time_check`).
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
    info = read_json(path)
    version = words(info, "codebase_version", str(path))
    if version not in VERSIONS:
        raise DataError(
            f"{path}: codebase_version: expected one of {', '.join(VERSIONS)}, got {shown(version)}; convert the data set"
        )
    fps, features = number(info, "fps", str(path)), check_features(info.get("features"), f"{path}: features")
    if not fps > 0:
        raise DataError(f"{path}: fps: expected more than 0, got {fps}")
    cameras = [
        name
        for name, feature in features.items()
        if is_picture(feature) and feature["dtype"] == "video" and depth_map(feature) is None
    ]
    words(info, "data_path", str(path))
    if cameras:
        words(info, "video_path", str(path))
    read = _read_v3 if version == "v3.0" else _read_v2
    tasks, listed = read(root, info, cameras)
    if not listed:
        raise DataError(f"{root}/meta: no episodes; record some, or copy the data set again")
    episodes = tuple(one.episode for one in listed)
    return Meta(root, version, fps, features, tasks, episodes, tuple(_other_totals(path, info, episodes)))


def _read_v2(root: Path, info: Mapping[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[_Listed]]:
    path = str(root / "meta" / "info.json")
    size = whole(info, "chunks_size", path, least=1)
    lines = read_json_lines(root / "meta" / "tasks.jsonl")
    tasks = _tasks((at, whole(line, "task_index", at), words(line, "task", at)) for at, line in lines)
    listed = []
    for at, line in read_json_lines(root / "meta" / "episodes.jsonl"):
        index, length = whole(line, "episode_index", at), whole(line, "length", at)
        where: dict[str, int | str] = {"episode_chunk": index // size, "episode_index": index}
        videos = {
            key: VideoPlace(fill(root, info["video_path"], {**where, "video_key": key}, f"{path}: video_path"), 0.0)
            for key in cameras
        }
        data = fill(root, info["data_path"], where, f"{path}: data_path")
        listed.append(_Listed(EpisodeMeta(index, length, data, videos, _texts(line.get("tasks")), at)))
    _once(listed)
    _own_files(listed, path)
    return tasks, listed


def _read_v3(root: Path, info: Mapping[str, Any], cameras: list[str]) -> tuple[dict[int, str], list[_Listed]]:
    files = visible(root / "meta" / "episodes", "*/*.parquet")
    if not files:
        raise DataError(f"{root}/meta/episodes: no parquet files; copy the data set again")
    path = str(root / "meta" / "info.json")
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    names += [f"videos/{key}/{part}" for key in cameras for part in ("chunk_index", "file_index", "from_timestamp")]
    more = ["tasks", "dataset_from_index", "dataset_to_index", *(f"videos/{key}/to_timestamp" for key in cameras)]
    listed = []
    for file in files:
        for row, line in enumerate(read_rows(file, names, more)):
            at = f"{file}, row {row}"
            for name in names:
                if line[name] is None:
                    raise DataError(f"{at}: {name} is missing; copy the data set again")
            listed.append(_v3_episode(root, info, cameras, at, line, path))
    _once(listed)
    _own_rows(listed)
    _own_videos(listed)
    return _v3_tasks(root / "meta" / "tasks.parquet"), sorted(listed, key=lambda one: one.episode.index)


def _v3_tasks(path: Path) -> dict[int, str]:
    rows = read_rows(path)
    columns = list(rows[0]) if rows else ["task_index", "task"]
    # pandas may have kept the numbers of rows too
    text = ["task"] if "task" in columns else [name for name in columns if name != "task_index"]
    if "task_index" not in columns or len(text) != 1:
        raise DataError(f"{path}: expected the columns task_index and task, got {', '.join(columns)}")
    found = []
    for i, row in enumerate(rows):
        at = f"{path}, row {i}"
        index, task = row["task_index"], row[text[0]]
        if not isinstance(index, int) or not isinstance(task, str):
            raise DataError(f"{at}: expected a number and a text, got {shown(index)} and {shown(task)}")
        found.append((at, whole(row, "task_index", at), task))
    return _tasks(found)


def _v3_episode(
    root: Path, info: Mapping[str, Any], cameras: list[str], at: str, line: Mapping[str, Any], path: str
) -> _Listed:
    def place(prefix: str) -> dict[str, int | str]:
        return {part: whole(line, f"{prefix}/{part}", at) for part in ("chunk_index", "file_index")}

    index, length = whole(line, "episode_index", at), whole(line, "length", at)
    videos = {}
    for key in cameras:
        file = fill(root, info["video_path"], {**place(f"videos/{key}"), "video_key": key}, f"{path}: video_path")
        start, end = f"videos/{key}/from_timestamp", f"videos/{key}/to_timestamp"
        until = None if line.get(end) is None else number(line, end, at)
        videos[key] = VideoPlace(file, number(line, start, at), until)
    data = fill(root, info["data_path"], place("data"), f"{path}: data_path")
    rows = None
    if line.get("dataset_from_index") is not None and line.get("dataset_to_index") is not None:
        rows = whole(line, "dataset_from_index", at), whole(line, "dataset_to_index", at)
    return _Listed(EpisodeMeta(index, length, data, videos, _texts(line.get("tasks")), at), rows)


def _tasks(rows: Iterable[tuple[str, int, str]]) -> dict[int, str]:
    """Number -> text; one text may have several numbers, one number only one text."""
    found: dict[int, tuple[str, str]] = {}
    for at, index, task in rows:
        first, text = found.setdefault(index, (at, task))
        if text != task:
            raise DataError(
                f"{at}: task_index {index} is {shown(task)}, and {shown(text)} in {beside(first, at)}; give each text "
                "its number"
            )
    return {index: text for index, (_, text) in found.items()}


def _once(listed: Sequence[_Listed]) -> None:
    """Each episode number once: of two, the rows of only one would be found."""
    seen: dict[int, str] = {}
    for episode in (one.episode for one in listed):
        first = seen.setdefault(episode.index, episode.where)
        if first != episode.where:
            raise DataError(
                f"{episode.where}: episode_index {episode.index} is there already, in {beside(first, episode.where)}; keep one "
                "of them"
            )


def _own_files(listed: Sequence[_Listed], path: str) -> None:
    """Before v3.0 each file is of one episode, and holds either its rows or the frames of one camera."""
    seen: dict[Path, tuple[str, EpisodeMeta]] = {}
    for one in (one.episode for one in listed):
        files = {"data": one.data, **{key: place.path for key, place in one.videos.items()}}
        for what, file in files.items():
            before, first = seen.setdefault(file, (what, one))
            if first is not one or before != what:
                raise DataError(
                    f"{path}: {file} would be {before} of episode {first.index} ({first.where}) and {what} of episode "
                    f"{one.index} ({beside(one.where, first.where)}); data_path needs {{episode_index}}, video_path "
                    "{video_key} too"
                )


def _own_rows(listed: Sequence[_Listed]) -> None:
    """No row of the data set belongs to two episodes."""
    spans = sorted(((one.rows, one.episode) for one in listed if one.rows is not None), key=lambda item: item[0])
    for (first, one), (second, other) in pairwise(spans):
        if second[0] < first[1]:
            raise DataError(
                f"{other.where}: episode {other.index} has the rows {second[0]} to {second[1]} of the data set, "
                f"episode {one.index} {first[0]} to {first[1]} ({beside(one.where, other.where)}): both claim row "
                f"{second[0]}; correct dataset_from_index and dataset_to_index"
            )


def _own_videos(listed: Sequence[_Listed]) -> None:
    """No file is the video of two cameras."""
    cameras: dict[Path, str] = {}
    for one in listed:
        for key, place in one.episode.videos.items():
            if cameras.setdefault(place.path, key) != key:
                raise DataError(
                    f"{place.path}: is the video of {cameras[place.path]} and of {key}; name {{video_key}} in video_path"
                )


def _other_totals(path: Path, info: Mapping[str, Any], episodes: Sequence[EpisodeMeta]) -> list[str]:
    counted = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    return [
        f"{path}: {key} is {shown(info[key])}, the episodes that are listed give {count}"
        for key, count in counted.items()
        if key in info and info[key] != count
    ]


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def beside(first: str, second: str) -> str:
    """`first` without the file, where `second` names the same one."""
    file, comma, place = first.rpartition(", ")
    return place if comma and second.startswith(f"{file}, ") else first
