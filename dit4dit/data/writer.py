"""Writes LeRobot data sets (v2.0, v2.1, v3.0) frame by frame, readable by lerobot and by `LeRobot`.

`info.json` is written last, by `close`: a folder without it is a recording that was cut off, not a data set. The episodes
that had ended are whole there: v2's where they belong, v3.0's that were not joined yet below `.recording`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit4dit.data import writer_meta
from dit4dit.data.layout import V2_DATA, V2_VIDEO, V3_DATA, V3_VIDEO, Version
from dit4dit.data.writer_episode import Episode, Feature, Moments, cameras, check_task, column_moments, frame_features
from dit4dit.data.writer_video import VideoCodec, VideoFile, join
from dit4dit.errors import InputError, require, shown

__all__ = ["VideoCodec", "VideoFile", "Writer"]

PARTS, PART_ROWS = ".recording", "rows.parquet"
"""Folder of episodes that are not where they belong yet, and the name of their rows in it."""


class Writer:
    """A data set being recorded, one frame at a time:

        with Writer(folder, 30) as writer:
            for episode in ...:
                for frame in ...:
                    writer.append({"observation.state": state, "action": action}, {"observation.images.top": image}, "open it")
                writer.end_episode()

    Images go straight to the encoders, so that a long episode takes no more memory than a short one; its numbers are kept
    until it ends. An ended episode is whole on disk: until `close`, below `.recording` or where it will stay.

    Args:
        root: new folder.
        fps: frames per second of everything.
        version: on-disk layout.
        modality: content of meta/modality.json, where the data set is to have one.
        episodes_per_file: episodes that share a parquet and a video file (v3.0).

    Raises:
        InputError: the folder has a data set or a recording, or an argument that no data set can have.
    """

    def __init__(
        self,
        root: str | Path,
        fps: float,
        *,
        version: Version = "v2.1",
        robot: str | None = None,
        modality: Mapping[str, Any] | None = None,
        codec: VideoCodec | None = None,
        episodes_per_file: int = 100,
        chunks_size: int = 1000,
    ) -> None:
        root = Path(root)
        if (root / "meta" / "info.json").exists():
            raise InputError(f"{root}: is a data set already; choose another folder")
        for name in ("meta", "data", "videos", PARTS):
            if (root / name).exists():
                raise InputError(f"{root}: has {name}, of a recording that was not closed; choose another folder")
        if version not in ("v2.0", "v2.1", "v3.0"):
            raise InputError(f"data set version: expected v2.0, v2.1 or v3.0, got {shown(version)}")
        if not 0 < fps < float("inf"):
            raise InputError(f"fps: expected more than 0, got {fps}")
        for option, value in (("episodes_per_file", episodes_per_file), ("chunks_size", chunks_size)):
            if value < 1:
                raise InputError(f"{option}: expected at least 1, got {value}")
        self.root, self.fps, self.version, self.robot = root, fps, version, robot
        self.modality = None if modality is None else json.dumps(modality, indent=1)
        self.codec = codec or VideoCodec()
        self.episodes_per_file, self.chunks_size = episodes_per_file, chunks_size
        self.features: dict[str, Feature] = {}
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.moments: list[dict[str, Moments]] = []
        """Statistics of each episode's features, as lerobot keeps them."""
        self.frames = 0
        self._open: Episode | None = None
        self._pending: list[Path] = []
        """Folders of the episodes that will share the next files (v3.0)."""
        self._pending_frames = 0
        self._closed = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard_episode()

    def append(self, columns: Mapping[str, ArrayLike], images: Mapping[str, NDArray[np.uint8]], task: str) -> None:
        """One frame of the episode at hand; the first one opens it.

        Args:
            columns: values, single or flat [d], such as "observation.state" and "action".
            images: feature, such as "observation.images.top" -> uint8 [H, W, 3], RGB.
            task: the instruction.

        Raises:
            InputError: a frame that no data set can hold, or of other features than the ones before. The episode is then as it
                was before the call.
        """
        if self._closed:
            raise InputError(f"{self.root}: is closed; record further episodes into another folder")
        if self._open is not None and self._open.broken:
            raise InputError(f"{self.root}: a frame of this episode was written in part; discard_episode()")
        arrays = {name: _native(np.asarray(x)) for name, x in columns.items()}
        found = frame_features(arrays, images, self.codec)
        known = self._open.features if self._open is not None else self.features
        if known and found != known:
            name = next(n for n in [*found, *known] if found.get(n) != known.get(n))
            which = "first frame" if self._open is not None and not self.episodes else "first episode"
            raise InputError(
                f"{name}: expected {_told(known.get(name))} as in the {which}, got {_told(found.get(name))}"
            )
        check_task(task)
        if self._open is None:
            self._open = Episode(self._folder(len(self.episodes)), self.fps, self.codec, found)
        self._open.append(arrays, images, task)

    def end_episode(self) -> None:
        """Keep the episode at hand.

        Raises:
            InputError: it has no frames, or one that was written in part.
        """
        episode = self._open
        if episode is None:
            raise InputError(f"{self.root}: the episode has no frames; append() some before end_episode()")
        if episode.broken:
            raise InputError(f"{self.root}: a frame of this episode was written in part; discard_episode()")
        episode.broken = True  # unless all that follows is done
        number, count = len(self.episodes), len(episode)
        tasks = dict(self.tasks)
        for words in episode.tasks:
            tasks.setdefault(words, len(tasks))
        rows = {
            **episode.columns(),
            "timestamp": (np.arange(count) / self.fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": self.frames + np.arange(count),
            "task_index": np.array([tasks[words] for words in episode.tasks]),
        }
        moments = {name: column_moments(x) for name, x in rows.items()} | episode.finish()
        require("pyarrow.parquet", "train").write_table(table(rows), episode.folder / PART_ROWS)
        place = self._place_v3 if self.version == "v3.0" else self._place_v2
        line = {"episode_index": number, "tasks": list(dict.fromkeys(episode.tasks)), "length": count}
        self.episodes.append({**line, **place(episode)})
        self.moments.append(moments)
        self.features, self.tasks, self.frames = episode.features, tasks, self.frames + count
        self._open = None

    def discard_episode(self) -> None:
        """Leave out the episode at hand, and all of its files; nothing where none is open."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def add(
        self,
        columns: Mapping[str, NDArray[Any]],
        images: Mapping[str, NDArray[np.uint8]],
        task: str | Sequence[str],
    ) -> None:
        """A whole episode: `append` for each of its n frames, then `end_episode`.

        Args:
            columns: flat columns [n, d] or [n].
            images: feature -> uint8 [n, H, W, 3], RGB.
            task: the instruction, or one for each of the n frames.

        Raises:
            InputError: no frames, lengths that differ, another episode is open, or what `append` refuses; nothing of it is kept.
        """
        if self._open is not None:
            raise InputError(f"{self.root}: {self._open_words()}")
        lengths = {name: len(values) for name, values in [*columns.items(), *images.items()]}
        count = next(iter(lengths.values()), 0)
        if count < 1 or set(lengths.values()) != {count}:
            raise InputError(
                f"{self.root}: an episode needs the same number of frames (>= 1) everywhere, got {lengths}"
            )
        tasks = [task] * count if isinstance(task, str) else list(task)
        if len(tasks) != count:
            raise InputError(f"{self.root}: expected one task, or {count}, got {len(tasks)}")
        try:
            for i, words in enumerate(tasks):
                self.append({n: x[i] for n, x in columns.items()}, {n: x[i] for n, x in images.items()}, words)
            self.end_episode()
        except BaseException:
            self.discard_episode()
            raise

    def close(self) -> None:
        """Write what describes the data set; without it, it is none.

        Raises:
            InputError: an episode is open, or there is none. Nothing is lost, as by a full disk: close again.
        """
        if self._closed:
            return
        if self._open is not None:
            raise InputError(f"{self.root}: {self._open_words()}, then close()")
        if not self.episodes:
            raise InputError(f"{self.root}: no episode was added")
        self._finish_files()
        meta = self.root / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        writer_meta.write(self)
        if self.modality is not None:
            (meta / "modality.json").write_text(self.modality + "\n")
        partial = self.root / PARTS / "info.json"
        partial.write_text(json.dumps(writer_meta.info(self), indent=4) + "\n")
        _move(partial, meta / "info.json")
        self._closed = True
        shutil.rmtree(self.root / PARTS)

    def _open_words(self) -> str:
        count = 0 if self._open is None else len(self._open)
        return (
            f"episode {len(self.episodes)} is open with {count} frames; keep it with end_episode() or discard_episode()"
        )

    def _folder(self, number: int) -> Path:
        """Where an episode is while it is recorded."""
        return self.root / PARTS / f"episode_{number:06d}"

    def _place_v2(self, episode: Episode) -> dict[str, Any]:
        number = len(self.episodes)
        where = {"episode_chunk": number // self.chunks_size, "episode_index": number}
        for name in episode.cameras:
            _move(episode.video(name), self.root / V2_VIDEO.format(**where, video_key=name))
        # last: lerobot reads every file of rows that is there, of an episode that was given up on the way too
        _move(episode.folder / PART_ROWS, self.root / V2_DATA.format(**where))
        episode.folder.rmdir()
        return {}

    def _place_v3(self, episode: Episode) -> dict[str, Any]:
        """The episode stays where it is until its file is full."""
        number, start = len(self.episodes), self._pending_frames
        if number % self.episodes_per_file == 0:
            self._finish_files()
            start = 0
        where = self._file(number)
        place: dict[str, Any] = {f"data/{key}": value for key, value in where.items()}
        place |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + len(episode)}
        for name in episode.cameras:
            place |= {f"videos/{name}/{key}": value for key, value in where.items()}
            place[f"videos/{name}/from_timestamp"] = start / self.fps
            place[f"videos/{name}/to_timestamp"] = (start + len(episode)) / self.fps
        self._pending.append(episode.folder)
        self._pending_frames = start + len(episode)
        return place

    def _file(self, number: int) -> dict[str, int]:
        """Which file an episode is in (v3.0)."""
        chunk, file = divmod(number // self.episodes_per_file, self.chunks_size)
        return {"chunk_index": chunk, "file_index": file}

    def _finish_files(self) -> None:
        """Join the episodes that wait for it (v3.0); each file appears whole."""
        if not self._pending:
            return
        parquet, pa = require("pyarrow.parquet", "train"), require("pyarrow", "train")
        first = len(self.episodes) - len(self._pending)
        where, partial = self._file(first), self.root / PARTS / "joined.mp4"
        rows = pa.concat_tables([parquet.read_table(folder / PART_ROWS) for folder in self._pending])
        parquet.write_table(rows, partial)
        _move(partial, self.root / V3_DATA.format(**where))
        for name in cameras(self.features):
            join([folder / f"{name}.mp4" for folder in self._pending], partial, self.fps)
            _move(partial, self.root / V3_VIDEO.format(**where, video_key=name))
        # forgotten before they are removed: a second try, after Ctrl-C, finds all of them or needs none
        done, self._pending, self._pending_frames = self._pending, [], 0
        for folder in done:
            shutil.rmtree(folder)


def _native(x: NDArray[Any]) -> NDArray[Any]:
    """In this machine's byte order, the only one that Arrow has: numbers from a network may come in another."""
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def _told(feature: Feature | None) -> str:
    return "none" if feature is None else f"{feature[0]} {list(feature[1])}"


def table(rows: Mapping[str, NDArray[Any]]) -> Any:
    """An Arrow table: columns [n, d] as lists; [n] and [n, 1] as single values: lerobot opens no v3.0 set with lists of one."""
    pa = require("pyarrow", "train")
    arrays = {}
    for name, x in rows.items():
        flat = pa.array(np.ascontiguousarray(x).reshape(-1))
        arrays[name] = flat if x.size == len(x) else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.table(arrays)
