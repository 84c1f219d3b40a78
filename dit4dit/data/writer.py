"""Writes LeRobot data sets (v2.0, v2.1, v3.0) from arrays: one episode after another, readable by lerobot and by `LeRobot`.

`info.json` is written last, by `close`: a folder without it is a recording that was cut off, not a data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError
from dit4dit.extras import require

Version = Literal["v2.0", "v2.1", "v3.0"]
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclass(frozen=True)
class VideoCodec:
    """How pictures are compressed. A key frame every `gop` frames is the price of reading any frame quickly."""

    name: str = "libx264"
    crf: int = 18
    gop: int = 2
    pixels: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def lossless(cls) -> VideoCodec:
        """Every pixel as it was given."""
        return cls(name="libx264rgb", crf=0, pixels="rgb24")


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """The calling thread keeps its scheduling policy, and threads that are started in between get it; others are left alone.

    For the start of SVT-AV1: as root it makes its caller and its own threads real-time (SCHED_FIFO, priority 99), for good.
    Children would inherit that, and other processes would wait for all of them.
    """
    if not hasattr(os, "sched_getscheduler"):  # only Linux has them
        yield
        return
    before, policy, parameter = _threads(), os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in {0} | (_threads() - before):  # 0 is the calling one
            with suppress(ProcessLookupError):  # it has ended
                if (os.sched_getscheduler(thread), os.sched_getparam(thread)) != (policy, parameter):
                    os.sched_setscheduler(thread, policy, parameter)


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


class VideoFile:
    """One mp4 file that frames are appended to."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int], codec: VideoCodec) -> None:
        av = require("av", "train")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self.container = av.open(str(path), mode="w")
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": str(codec.crf), "g": str(codec.gop), **codec.options}
        self.stream = self.container.add_stream(codec.name, rate=rate, options=options)
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = codec.pixels
        self.stream.codec_context.time_base = 1 / rate

    def append(self, pictures: NDArray[np.uint8]) -> None:
        """uint8 [n, H, W, 3]."""
        av = require("av", "train")
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.count
            self._encode(frame)
            self.count += 1

    def close(self) -> None:
        self._encode(None)
        self.container.close()

    def _encode(self, frame: Any) -> None:
        """None: what the encoder has kept back. The first call starts it."""
        with scheduling_kept() if self.count == 0 and self.stream.name == "libsvtav1" else nullcontext():
            packets = self.stream.encode(frame)
        self.container.mux(packets)


class Writer:
    """A data set being recorded.

    Args:
        root: new folder.
        fps: frames per second of everything.
        version: on-disk layout.
        modality: content of meta/modality.json, where the data set is to have one.
        episodes_per_file: episodes that share a parquet and a video file (v3.0).
    """

    def __init__(
        self,
        root: Path,
        fps: float,
        *,
        version: Version = "v2.1",
        robot: str | None = None,
        modality: Mapping[str, Any] | None = None,
        codec: VideoCodec | None = None,
        episodes_per_file: int = 100,
        chunks_size: int = 1000,
    ) -> None:
        if (root / "meta" / "info.json").exists():
            raise InputError(f"{root}: is a data set already; choose another folder")
        if version not in ("v2.0", "v2.1", "v3.0"):
            raise InputError(f"data set version: expected v2.0, v2.1 or v3.0, got {version!r}")
        self.root, self.fps, self.version, self.robot = root, fps, version, robot
        self.modality, self.codec = modality, codec or VideoCodec()
        self.episodes_per_file, self.chunks_size = episodes_per_file, chunks_size
        self.features: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.frames = 0
        self._moments: list[dict[str, dict[str, Any]]] = []
        self._rows: list[Any] = []
        self._videos: dict[str, VideoFile] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for video in self._videos.values():
                video.close()

    def add(
        self,
        columns: Mapping[str, NDArray[Any]],
        pictures: Mapping[str, NDArray[np.uint8]],
        task: str | Sequence[str],
    ) -> None:
        """Append one episode.

        Args:
            columns: flat columns [n, d] or [n], such as "observation.state" and "action".
            pictures: feature, such as "observation.images.top" -> uint8 [n, H, W, 3], RGB.
            task: the instruction, or one for each of the n frames.

        Raises:
            InputError: no frames, lengths that differ, or another set of features or shapes than in the first episode.
        """
        lengths = {name: len(values) for name, values in [*columns.items(), *pictures.items()]}
        count = next(iter(lengths.values()), 0)
        if count < 1 or set(lengths.values()) != {count}:
            raise InputError(
                f"{self.root}: an episode needs the same number of frames (>= 1) everywhere, got {lengths}"
            )
        tasks = [task] * count if isinstance(task, str) else list(task)
        if len(tasks) != count:
            raise InputError(f"{self.root}: expected one task, or {count}, got {len(tasks)}")
        columns = {name: np.asarray(x).reshape(count, -1) for name, x in columns.items()}
        self._check_features(columns, pictures)
        for words in tasks:
            self.tasks.setdefault(words, len(self.tasks))
        number = len(self.episodes)
        rows = {
            **columns,
            "timestamp": (np.arange(count) / self.fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": self.frames + np.arange(count),
            "task_index": np.array([self.tasks[words] for words in tasks]),
        }
        episode = {"episode_index": number, "tasks": list(dict.fromkeys(tasks)), "length": count}
        place = self._write_v3 if self.version == "v3.0" else self._write_v2
        self.episodes.append({**episode, **place(number, rows, pictures)})
        self._moments.append(_moments(rows, pictures))
        self.frames += count

    def close(self) -> None:
        """Write what describes the data set; without it, it is none.

        Raises:
            InputError: no episode was added.
        """
        if not self.episodes:
            raise InputError(f"{self.root}: no episode was added")
        self._finish_files()
        meta = self.root / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        from dit4dit.data import writer_meta

        writer_meta.write(self)
        if self.modality is not None:
            (meta / "modality.json").write_text(json.dumps(self.modality, indent=1) + "\n")
        (meta / "info.json").write_text(json.dumps(writer_meta.info(self), indent=4) + "\n")

    @property
    def moments(self) -> list[dict[str, dict[str, Any]]]:
        """Statistics of each episode's features, as lerobot keeps them."""
        return self._moments

    def _check_features(self, columns: Mapping[str, NDArray[Any]], pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        found: dict[str, dict[str, Any]] = {}
        for name, x in pictures.items():
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3:
                raise InputError(f"{name}: expected uint8 [n, H, W, 3], got {x.dtype} {list(x.shape)}")
            shape = list(x.shape[1:])
            found[name] = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
        for name, x in columns.items():
            found[name] = {"dtype": str(x.dtype), "shape": [x.shape[1]], "names": None}
        for name, dtype in INDEX_FEATURES.items():
            found[name] = {"dtype": dtype, "shape": [1], "names": None}
        self.features = self.features or found
        if found != self.features:
            wrong = next(n for n in [*found, *self.features] if found.get(n) != self.features.get(n))
            raise InputError(
                f"{wrong}: expected {self.features.get(wrong)} as in the first episode, got {found.get(wrong)}"
            )

    def _write_v2(self, number: int, rows: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
        where = {"episode_chunk": number // self.chunks_size, "episode_index": number}
        path = self.root / V2_DATA.format(**where)
        path.parent.mkdir(parents=True, exist_ok=True)
        require("pyarrow.parquet", "train").write_table(table(rows), path)
        for name, frames in pictures.items():
            target = self.root / V2_VIDEO.format(**where, video_key=name)
            video = VideoFile(target, self.fps, frames.shape[1:3], self.codec)
            video.append(frames)
            video.close()
        return {}

    def _write_v3(self, number: int, rows: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any]:
        if number % self.episodes_per_file == 0:
            self._finish_files()
        chunk, file = divmod(number // self.episodes_per_file, self.chunks_size)
        where = {"chunk_index": chunk, "file_index": file}
        place: dict[str, Any] = {f"data/{key}": value for key, value in where.items()}
        place |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + len(rows["index"])}
        self._rows.append((self.root / V3_DATA.format(**where), table(rows)))
        for name, frames in pictures.items():
            if name not in self._videos:
                path = self.root / V3_VIDEO.format(**where, video_key=name)
                self._videos[name] = VideoFile(path, self.fps, frames.shape[1:3], self.codec)
            video = self._videos[name]
            start = video.count
            video.append(frames)
            place |= {f"videos/{name}/{key}": value for key, value in where.items()}
            place[f"videos/{name}/from_timestamp"] = start / self.fps
            place[f"videos/{name}/to_timestamp"] = video.count / self.fps
        return place

    def _finish_files(self) -> None:
        for video in self._videos.values():
            video.close()
        if self._rows:
            path = self._rows[0][0]
            path.parent.mkdir(parents=True, exist_ok=True)
            tables = [rows for _, rows in self._rows]
            require("pyarrow.parquet", "train").write_table(require("pyarrow", "train").concat_tables(tables), path)
        self._videos, self._rows = {}, []


def table(rows: Mapping[str, NDArray[Any]]) -> Any:
    """An Arrow table: columns [n] as they are, [n, d] as lists of d."""
    pa = require("pyarrow", "train")
    arrays = {}
    for name, x in rows.items():
        flat = pa.array(np.ascontiguousarray(x).reshape(-1))
        arrays[name] = flat if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.table(arrays)


def _moments(rows: Mapping[str, NDArray[Any]], pictures: Mapping[str, NDArray[np.uint8]]) -> dict[str, dict[str, Any]]:
    """min, max, mean, std and count of each feature; pictures per channel in 0..1, shaped [3, 1, 1] as lerobot has them."""
    out = {}
    for name, x in rows.items():
        flat = x.reshape(len(x), -1).astype(np.float64)
        out[name] = {k: getattr(flat, k)(axis=0).tolist() for k in ("min", "max", "mean", "std")} | {"count": [len(x)]}
    for name, x in pictures.items():
        channels = {k: getattr(x, k)(axis=(0, 1, 2)) / 255.0 for k in ("min", "max", "mean", "std")}
        out[name] = {k: v.reshape(3, 1, 1).tolist() for k, v in channels.items()} | {"count": [len(x)]}
    return out
