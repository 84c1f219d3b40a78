"""An episode while it is recorded: its frames go straight to the encoders, its numbers and exact sums stay."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.writer_video import VideoCodec, VideoFile
from dit4dit.errors import InputError, shown

Moments = dict[str, Any]
"""min, max, mean, std and count of one feature, as lerobot keeps them."""
Feature = tuple[str, tuple[int, ...]]
"""dtype ("video" for a camera) and shape of one frame's value."""
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""What every data set has, and the writer counts by itself."""


def frame_features(
    columns: Mapping[str, NDArray[Any]], images: Mapping[str, Any], codec: VideoCodec
) -> dict[str, Feature]:
    """Name -> what it is, of one frame's values.

    Raises:
        InputError: a name or a value that no data set can hold.
    """
    found: dict[str, Feature] = {}
    for name in [*columns, *images]:
        if name in INDEX_FEATURES:
            raise InputError(f"{name}: the writer counts it by itself; leave it out")
        if name in columns and name in images:
            raise InputError(f"{name}: expected a column or an image, got both")
        if not name or name.startswith(".") or set(name) & set("/\\*"):
            raise InputError(f"{shown(name)}: expected a feature's name without / \\ * and a dot in front; rename it")
    for name, x in columns.items():
        if x.ndim > 1 or x.size < 1:
            raise InputError(f"{name}: expected a single value or flat ones [d], got shape {list(x.shape)}")
        if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
            raise InputError(f"{name}: expected numbers of at most 8 bytes, or true and false, got {x.dtype}")
        if not np.isfinite(x).all():
            raise InputError(f"{name}: has NaN or infinite values; check the sensor")
        found[name] = (str(x.dtype), (x.size,))
    for name, image in images.items():
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2:] != (3,):
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise InputError(f"{name}: expected uint8 [H, W, 3] a frame, got {got}")
        if 0 in image.shape or ("420" in codec.pixels and (image.shape[0] % 2 or image.shape[1] % 2)):
            raise InputError(
                f"{name}: expected an even height and width, as {codec.pixels} needs them, got {image.shape[0]} x "
                f"{image.shape[1]}; crop the images, or use VideoCodec(pixels='yuv444p')"
            )
        found[name] = ("video", image.shape)
    if not found:
        raise InputError("a frame needs at least one column or image, got none")
    return found


def check_task(task: Any) -> None:
    """InputError unless it is a text that files can hold."""
    try:
        task.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        raise InputError(f"task: expected a text, got {shown(task)}") from None


def cameras(features: Mapping[str, Feature]) -> tuple[str, ...]:
    """The features that are cameras."""
    return tuple(name for name, (dtype, _) in features.items() if dtype == "video")


class ImageSums:
    """Statistics of uint8 images per channel, in integers and so exact, whatever the number of frames."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """shape: [H, W, 3] of every image."""
        height, width, channels = shape
        self._pixels, self._frames = height * width, 0
        self._squares = np.empty((height, width * channels), np.uint16)
        # of each column of the image, so that one frame is one pass over rows
        self._sum, self._sum_of_squares = (np.zeros(width * channels, np.int64) for _ in range(2))
        self._min, self._max = np.full(width * channels, 255, np.uint8), np.zeros(width * channels, np.uint8)

    def add(self, image: NDArray[np.uint8]) -> None:
        """One image [H, W, 3]."""
        rows = image.reshape(len(image), -1)
        # a column's sum of squares fits 32 bits up to 66 051 rows: 255^2 fits 16
        np.multiply(rows, rows, out=self._squares, dtype=np.uint16)
        self._sum += rows.sum(axis=0, dtype=np.uint32)
        self._sum_of_squares += self._squares.sum(axis=0, dtype=np.uint32)
        np.minimum(self._min, rows.min(axis=0), out=self._min)
        np.maximum(self._max, rows.max(axis=0), out=self._max)
        self._frames += 1

    def moments(self) -> Moments:
        """In 0..1, shaped [3, 1, 1]."""
        count = self._frames * self._pixels
        sums = [int(x) for x in self._sum.reshape(-1, 3).sum(axis=0)]
        squares = [int(x) for x in self._sum_of_squares.reshape(-1, 3).sum(axis=0)]
        found = {
            "min": [int(x) / 255 for x in self._min.reshape(-1, 3).min(axis=0)],
            "max": [int(x) / 255 for x in self._max.reshape(-1, 3).max(axis=0)],
            "mean": [x / (255 * count) for x in sums],
            "std": [math.sqrt((count * q - x * x) / count**2) / 255 for x, q in zip(sums, squares, strict=True)],
        }
        return {name: [[[x]] for x in values] for name, values in found.items()} | {"count": [self._frames]}


def column_moments(x: NDArray[Any]) -> Moments:
    """Of a column [n] or [n, d]."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    return {k: getattr(flat, k)(axis=0).tolist() for k in ("min", "max", "mean", "std")} | {"count": [len(x)]}


class Episode:
    """The open episode.

    Attributes:
        folder: where its files are while it is open; nobody else's.
        features: what a frame has.
        tasks: the instruction of each frame.
        broken: a frame was taken in part (a full disk, Ctrl-C), so that the episode can only be discarded.
    """

    def __init__(self, folder: Path, fps: float, codec: VideoCodec, features: Mapping[str, Feature]) -> None:
        self.folder, self.features, self.broken = folder, dict(features), False
        self.tasks: list[str] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shapes = {name: self.features[name][1] for name in self.cameras}
        self._values = {name: bytearray() for name in self.features if name not in shapes}
        self._sums = {name: ImageSums(shape) for name, shape in shapes.items()}
        self._videos = {
            name: VideoFile(self.video(name), fps, (shape[0], shape[1]), codec) for name, shape in shapes.items()
        }

    @property
    def cameras(self) -> tuple[str, ...]:
        return cameras(self.features)

    def __len__(self) -> int:
        return len(self.tasks)

    def video(self, name: str) -> Path:
        """The file of one camera."""
        return self.folder / f"{name}.mp4"

    def append(self, columns: Mapping[str, NDArray[Any]], images: Mapping[str, NDArray[np.uint8]], task: str) -> None:
        """One frame that has the episode's features; an error on the way leaves the episode `broken`."""
        self.broken = True
        for name, x in columns.items():
            self._values[name] += x.tobytes()
        for name, image in images.items():
            image = np.ascontiguousarray(image)
            self._videos[name].append(image[None])
            self._sums[name].add(image)
        self.tasks.append(task)
        self.broken = False

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every column, [n, d]."""
        kinds = {name: self.features[name] for name in self._values}
        return {
            name: np.frombuffer(bytes(self._values[name]), dtype=dtype).reshape(len(self), *shape)
            for name, (dtype, shape) in kinds.items()
        }

    def finish(self) -> dict[str, Moments]:
        """Close the videos; statistics of the images."""
        for video in self._videos.values():
            video.close()
        return {name: sums.moments() for name, sums in self._sums.items()}

    def discard(self) -> None:
        """Leave nothing."""
        for video in self._videos.values():
            video.abandon()
        shutil.rmtree(self.folder)
