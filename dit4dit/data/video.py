"""Frames of a video file by their number, exactly: the i-th frame in the order of display, whatever the codec reorders.

Numbers are turned into presentation times with a table read from the file's packets (nothing is decoded for it), never by
multiplying with the frame rate; a frame that comes out with another time than asked for is an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import ConfigError, DataError
from dit4dit.extras import require

Backend = Literal["pyav", "torchcodec"]
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoHeader:
    """What a file says about itself without decoding."""

    frames: int
    fps: float
    height: int
    width: int


class Decoder(Protocol):
    """Reads one file."""

    def first_frame(self, seconds: float) -> int:
        """Number of the frame shown at `seconds` from the start."""
        ...

    def frames(self, numbers: Sequence[int]) -> Frames:
        """uint8 [n, H, W, 3], RGB, in the order of `numbers` (which may repeat)."""
        ...


def read_header(path: Path) -> VideoHeader:
    """Header of an mp4 file.

    Raises:
        DataError: the file is missing, no video, or shorter than its own index says (a copy that was cut off).
    """
    container = _open(path)
    with container:
        stream = _stream(container, path)
        if stream.average_rate is None:
            raise DataError(f"{path}: the video does not say its frame rate; encode it again")
        entries = stream.index_entries
        count = len(entries)
        end = max((entry.pos + entry.size for entry in entries), default=0)
        size = path.stat().st_size
        if end > size:
            raise DataError(f"{path}: truncated: its index reaches to byte {end}, the file has {size}; copy it again")
        codec = stream.codec_context
        return VideoHeader(stream.frames or count, float(stream.average_rate), codec.height, codec.width)


class PyAvDecoder:
    """PyAV, one thread: several workers decode at once, and one thread each is what keeps them out of each other's way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = _open(path)
        self.stream = _stream(self.container, path)
        self.stream.codec_context.thread_count = 1
        av = require("av", "train")
        # one for all frames: setting up the conversion costs more than converting
        self.reformatter = av.video.reformatter.VideoReformatter()
        # from PyAV 17 on it would otherwise start a thread for each core, in every open file of every worker
        self.one_thread = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
        try:
            times = [packet.pts for packet in self.container.demux(self.stream) if packet.pts is not None]
        except av.error.FFmpegError as error:
            raise DataError(f"{path}: unreadable video ({error}); copy it again") from None
        self.times = np.sort(np.asarray(times, dtype=np.int64))
        """Presentation time of each frame, in ticks of the stream's time base."""

    def first_frame(self, seconds: float) -> int:
        ticks = (self.times - (self.times[0] if len(self.times) else 0)) * float(self.stream.time_base)
        if not len(ticks):
            raise DataError(f"{self.path}: holds no frames; copy it again")
        number = int(np.abs(ticks - seconds).argmin())
        gap = abs(float(ticks[number]) - seconds)
        if gap * float(self.stream.average_rate) > 0.25:
            raise DataError(f"{self.path}: no frame at {seconds:.4f} s: the nearest, {number}, is {gap:.4f} s away")
        return number

    def frames(self, numbers: Sequence[int]) -> Frames:
        for number in numbers:
            if not 0 <= number < len(self.times):
                raise DataError(f"{self.path}: frame {number}: the video has {len(self.times)} frames; copy it again")
        wanted = {int(self.times[number]) for number in numbers}
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
        lost = [number for number in numbers if int(self.times[number]) not in found]
        if lost:
            raise DataError(
                f"{self.path}: frame {lost[0]}: the decoder did not give it; the file is damaged, copy it again"
            )
        return np.stack([found[int(self.times[number])] for number in numbers])

    def _rgb(self, frame: Any) -> Frames:
        picture: Frames = self.reformatter.reformat(frame, format="rgb24", **self.one_thread).to_ndarray()
        return picture

    def close(self) -> None:
        self.container.close()


class TorchcodecDecoder:
    """torchcodec, where it is installed: the same frames by number, from FFmpeg through torch's own bindings."""

    def __init__(self, path: Path) -> None:
        decoders = require("torchcodec.decoders", "torchcodec")
        if not path.is_file():
            raise DataError(f"{path}: no such file; copy the data set again")
        self.path = path
        try:
            self.decoder = decoders.VideoDecoder(
                str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path}: unreadable video ({' '.join(str(error).split()):.200}); copy it again") from None

    def first_frame(self, seconds: float) -> int:
        rate = float(self.decoder.metadata.average_fps)
        number = round(seconds * rate)
        if abs(seconds * rate - number) > 0.25:
            raise DataError(f"{self.path}: no frame at {seconds:.4f} s at {rate:g} fps")
        return number

    def frames(self, numbers: Sequence[int]) -> Frames:
        try:
            data: Frames = self.decoder.get_frames_at(indices=list(numbers)).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(
                f"{self.path}: frame {min(numbers)}: cannot be decoded ({' '.join(str(error).split()):.200}); copy the file again"
            ) from None
        return data


class VideoReader:
    """Decoders of the files used last, opened when needed. Pickling leaves them behind."""

    def __init__(self, backend: Backend = "pyav", keep: int = 16) -> None:
        if backend not in ("pyav", "torchcodec"):
            raise ConfigError(f"video backend: expected pyav or torchcodec, got {backend!r}")
        self.backend: Backend = backend
        self.keep = keep
        self._open: OrderedDict[Path, Decoder] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def decoder(self, path: Path) -> Decoder:
        """The decoder of `path`; DataError when it is missing or no video."""
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

    def close(self) -> None:
        """Close all open files; they are opened again when needed. Do so before a fork: a child that inherits an open decoder
        hangs when it frees it, because the decoder's threads stayed in the parent.
        """
        for decoder in self._open.values():
            if isinstance(decoder, PyAvDecoder):
                decoder.close()
        self._open.clear()


def _open(path: Path) -> Any:
    av = require("av", "train")
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: unreadable video ({error}); copy it again") from None


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        container.close()
        raise DataError(f"{path}: holds no video stream; copy it again")
    return container.streams.video[0]
