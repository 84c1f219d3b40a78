"""Frames of a video file by their number, exactly: the i-th frame in the order of display, whatever the codec reorders.

Numbers are turned into presentation times with a table read from the file's packets (nothing is decoded for it), never by
multiplying with the frame rate; a frame that comes out with another time than asked for is an error.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.frame_times import FrameTimes, frame_times, open_container, read_header, video_stream
from dit4dit.errors import ConfigError, DataError, require, said, shown

Backend = Literal["pyav", "torchcodec"]
Frames = NDArray[np.uint8]


class Decoder(Protocol):
    """Reads one file."""

    times: FrameTimes

    def frames(self, numbers: Sequence[int]) -> Frames:
        """uint8 [n, H, W, 3], RGB, in the order of `numbers` (which may repeat)."""
        ...


class PyAvDecoder:
    """PyAV, one thread: several workers decode at once, and one thread each is what keeps them out of each other's way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = open_container(path)
        self.stream = video_stream(self.container, path)
        self.stream.codec_context.thread_count = 1
        av = require("av", "train")
        # one for all frames: setting up the conversion costs more than converting
        self.reformatter = av.video.reformatter.VideoReformatter()
        # from PyAV 17 on it would otherwise start a thread for each core, in every open file of every worker
        self.one_thread = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
        self.times = frame_times(self.container, self.stream, path)

    def frames(self, numbers: Sequence[int]) -> Frames:
        ticks = _ticks(self.times, numbers)
        wanted = set(ticks)
        found: dict[int, Frames] = {}
        av = require("av", "train")
        try:
            self.container.seek(min(wanted), stream=self.stream, backward=True)
            for frame in self.container.decode(self.stream):
                if frame.pts in wanted and not frame.is_corrupt:
                    found[frame.pts] = self._rgb(frame)
                if frame.pts is not None and frame.pts >= max(wanted):
                    break
        except av.error.FFmpegError as error:
            raise DataError(
                f"{self.path}: frame {min(numbers)}: cannot be decoded ({error}); copy the file again"
            ) from None
        lost = [number for number, time in zip(numbers, ticks, strict=True) if time not in found]
        if lost:
            raise DataError(
                f"{self.path}: frame {lost[0]}: the decoder did not give it; the file is damaged, copy it again"
            )
        return np.stack([found[time] for time in ticks])

    def _rgb(self, frame: Any) -> Frames:
        picture: Frames = self.reformatter.reformat(frame, format="rgb24", **self.one_thread).to_ndarray()
        return picture

    def close(self) -> None:
        self.container.close()


class TorchcodecDecoder:
    """torchcodec, where it is installed: the same frames by number, from FFmpeg through torch's own bindings."""

    def __init__(self, path: Path) -> None:
        decoders = require("torchcodec.decoders", "torchcodec")
        self.path, self.times = path, read_header(path).times
        try:
            self.decoder = decoders.VideoDecoder(
                str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path}: unreadable video ({said(error)}); copy it again") from None

    def frames(self, numbers: Sequence[int]) -> Frames:
        ticks = _ticks(self.times, numbers)
        try:
            found = self.decoder.get_frames_at(indices=list(numbers))
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(
                f"{self.path}: frame {min(numbers)}: cannot be decoded ({said(error)}); copy the file "
                "again, or use the backend pyav"
            ) from None
        for number, time, got in zip(numbers, ticks, found.pts_seconds.tolist(), strict=True):
            wanted = float(time * self.times.tick)
            if abs(got - wanted) > float(self.times.tick) / 2:
                raise DataError(
                    f"{self.path}: frame {number}: torchcodec gave the one of {got:.4f} s, its time is {wanted:.4f} s; "
                    "use the backend pyav"
                )
        data: Frames = found.data.numpy()
        return data


def _ticks(times: FrameTimes, numbers: Sequence[int]) -> list[int]:
    """Presentation times of these frames; DataError for one that the video does not have."""
    for number in numbers:
        if not 0 <= number < len(times):
            raise DataError(f"{times.path}: frame {number}: the video has {len(times)} frames; copy it again")
    return [int(times.ticks[number]) for number in numbers]


class VideoReader:
    """Decoders of the files used last, opened when needed, by each process its own: neither pickling nor a fork hands them on."""

    def __init__(self, backend: Backend = "pyav", keep: int = 16) -> None:
        if backend not in ("pyav", "torchcodec"):
            raise ConfigError(f"video backend: expected pyav or torchcodec, got {shown(backend)}")
        self.backend: Backend = backend
        self.keep = keep
        self._open: OrderedDict[Path, Decoder] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def decoder(self, path: Path) -> Decoder:
        """The decoder of `path`; DataError when it is missing or no video."""
        if os.getpid() != self._process:  # after a fork parent and child would move one and the same position in a file
            self._open, self._process = OrderedDict(), os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        made: Decoder = PyAvDecoder(path) if self.backend == "pyav" else TorchcodecDecoder(path)
        self._open[path] = made
        if len(self._open) > self.keep:
            _, oldest = self._open.popitem(last=False)
            if isinstance(oldest, PyAvDecoder):
                oldest.close()
        return made
