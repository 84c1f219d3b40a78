"""The video files that `Writer` makes: encoded frame by frame, joined without encoding them again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError, require


@dataclass(frozen=True)
class VideoCodec:
    """How images are compressed. A key frame every `gop` frames is the price of reading any frame quickly."""

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
        """InputError for a codec that PyAV does not have."""
        av = require("av", "train")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self.container = av.open(str(path), mode="w")
        options = {"crf": str(codec.crf), "g": str(codec.gop), **codec.options}
        rate = frame_rate(fps)
        try:
            self.stream = self.container.add_stream(codec.name, rate=rate, options=options)
        except ValueError:  # UnknownCodecError is one
            raise InputError(f"codec {codec.name!r}: unknown to this PyAV; choose another, such as libx264") from None
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = codec.pixels
        self.stream.codec_context.time_base = 1 / rate

    def append(self, images: NDArray[np.uint8]) -> None:
        """uint8 [n, H, W, 3]."""
        av = require("av", "train")
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.count
            self._encode(frame)
            self.count += 1

    def close(self) -> None:
        """Write what the encoder has kept back, and the file's index."""
        self._encode(None)
        self.container.close()

    def abandon(self) -> None:
        """Close the file as it is: it will be deleted."""
        with suppress(require("av", "train").FFmpegError):
            self.container.close()

    def _encode(self, frame: Any) -> None:
        """None: what the encoder has kept back. The first call starts it."""
        with scheduling_kept() if self.count == 0 and self.stream.name == "libsvtav1" else nullcontext():
            packets = self.stream.encode(frame)
        self.container.mux(packets)


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a video file has them."""
    return Fraction(fps).limit_denominator(1001)


def join(parts: Sequence[Path], target: Path, fps: float) -> None:
    """One file of the frames of `parts`, which one codec made, in their order; nothing is decoded.

    Raises:
        InputError: the encoder described a part's stream in other words than the first one's.
    """
    av = require("av", "train")
    rate, before = frame_rate(fps), 0
    with av.open(str(target), mode="w") as out:
        stream, header, last = None, b"", None
        for part in parts:
            with av.open(str(part)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream, header = out.add_stream_from_template(video), bytes(video.codec_context.extradata or b"")
                if bytes(video.codec_context.extradata or b"") != header:
                    raise InputError(
                        f"{part}: its encoder settings are not those of {parts[0]}, so that one file cannot hold both; record "
                        "with episodes_per_file=1"
                    )
                shift = round(before / rate / video.time_base)
                for packet in source.demux(video):
                    if packet.pts is None:  # what demux ends with
                        continue
                    dts = packet.dts + shift
                    # an episode of one frame is decoded without the delay that reordering gives the one after it
                    last = dts if last is None else max(dts, last + 1)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, last, stream
                    out.mux(packet)
                before += video.frames
