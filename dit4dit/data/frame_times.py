"""Time, one rule: frames are addressed by number, in the order of display; times only say where an episode begins in its file.

The presentation times of a file's frames are read without decoding. The first frame of an episode is the one nearest to its
`from_timestamp`, both counted from the first frame of the file; from there on frames are counted, so neither a pause in the
video nor 29.97 frames per second where 30 are declared shifts anything. All readers, both decoders and the check of a data set
when it is opened use this table and this rule. The column `timestamp` addresses nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import DataError, require

LIMIT = 0.5
"""In frames: nothing this near to `from_timestamp` is an error. Above half a frame another frame would be nearer."""
UNUSUAL = 0.1
"""In frames: what is further from where it should be is worth a warning."""
OFF_RATE = 0.02
"""A rate that differs by more than this share is another rate: an error."""
UNUSUAL_RATE = 0.0005
"""A rate that differs by more than this share is worth a warning; 29.97 for 30 differs by 0.001."""
WINDOW = 30
"""Steps over which a rate is measured besides single ones: times rounded to 0.01 s, or kept as float32 seconds of a day, have
uneven single steps at the right rate.
"""
PROBED = 8
"""Packets that a table made from the index of an mp4 file is compared with."""


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """When each frame of a video file is shown.

    Attributes:
        path: the file.
        ticks: presentation times in the order of display, int64 [frames], as the decoder gives them.
        tick: seconds of one tick.
    """

    path: Path
    ticks: NDArray[np.int64]
    tick: Fraction

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds since the first frame, [frames]."""
        since: NDArray[np.float64] = (self.ticks - self.ticks[0]) * float(self.tick)
        return since

    def first_frame(self, start: float, fps: float) -> tuple[int, float]:
        """Number of the frame nearest to `start` (seconds since the first frame of the file), and how far away it is in frames.

        Args:
            fps: of the data set; it says how long a frame is.

        Raises:
            DataError: no frame within half a frame.
        """
        ticks, tick, wanted = self.ticks, float(self.tick), start / float(self.tick)
        after = bisect_left(ticks, wanted + int(ticks[0]))
        gaps = {n: abs(int(ticks[n] - ticks[0]) - wanted) * tick for n in (after - 1, after) if 0 <= n < len(ticks)}
        number = min(gaps, key=lambda n: gaps[n])
        gap = gaps[number]
        if not gap * fps <= LIMIT + 1e-6:  # a start that is not a number, too
            raise DataError(
                f"{self.path}: no frame at {start:.4f} s: the nearest, {number}, is {gap:.4f} s away ({gap * fps:.2f} frames, "
                f"expected at most {LIMIT:g}); correct from_timestamp in meta/episodes, or copy the video again"
            )
        return number, gap * fps

    def frames_until(self, end: float, fps: float) -> int:
        """How many frames begin before `end` (seconds since the first frame of the file) by more than half a frame."""
        return bisect_left(self.ticks, (end - (LIMIT + 1e-6) / fps) / float(self.tick) + int(self.ticks[0]))


@dataclass(frozen=True)
class VideoHeader:
    """What a file says about itself without decoding."""

    height: int
    width: int
    times: FrameTimes

    @property
    def frames(self) -> int:
        return len(self.times)


def read_header(path: Path) -> VideoHeader:
    """Header and presentation times of a video file.

    Raises:
        DataError: the file is missing, no video, shorter than its own index says (a copy that was cut off), or its frames have
            no times, or twice the same.
    """
    container = open_container(path)
    with container:
        stream = video_stream(container, path)
        codec = stream.codec_context
        return VideoHeader(codec.height, codec.width, frame_times(container, stream, path))


def typical_steps(times: NDArray[np.float64]) -> tuple[float, float]:
    """Median step of times [n >= 2], from one to the next and over `WINDOW` of them (or all, where there are fewer)."""
    count = min(WINDOW, len(times) - 1)
    return float(np.median(np.diff(times))), float(np.median(times[count:] - times[:-count])) / count


def wrong_rate(times: NDArray[np.float64], fps: float) -> float | None:
    """The median step of `times` where it is that of another rate than `fps`, seen from one to the next and over a second."""
    if len(times) < 2:
        return None
    steps = typical_steps(times)
    return steps[0] if all(abs(step * fps - 1) > OFF_RATE + 1e-6 for step in steps) else None


def largest_gap(times: NDArray[np.float64], fps: float) -> tuple[int, float] | None:
    """Where `times` are not even at `fps`: the row after the step that is furthest from 1 / fps, and that step in seconds."""
    if len(times) < 2:
        return None
    steps = np.diff(times) * fps
    furthest = int(np.abs(steps - 1).argmax())
    rate = float(steps.mean())
    rounding = float(np.abs(steps - rate).max()) / len(steps)
    even = abs(steps[furthest] - 1) <= UNUSUAL and abs(rate - 1) <= UNUSUAL_RATE + rounding
    return None if even else (furthest + 1, float(steps[furthest]) / fps)


def open_container(path: Path) -> Any:
    """The file opened by PyAV; DataError when it is missing or no video."""
    av = require("av", "train")
    if not path.is_file():
        raise DataError(f"{path}: no such file; copy the data set again")
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: unreadable video ({error}); copy it again") from None


def video_stream(container: Any, path: Path) -> Any:
    """The first video stream; DataError when there is none."""
    if not container.streams.video:
        container.close()
        raise DataError(f"{path}: holds no video stream; copy it again")
    return container.streams.video[0]


def frame_times(container: Any, stream: Any, path: Path) -> FrameTimes:
    """Times of the frames that a decoder shows (an edit list may hide some), from an open file at its beginning; DataError as in
    `read_header`.
    """
    entries = stream.index_entries
    end, size = max((entry.pos + entry.size for entry in entries), default=0), path.stat().st_size
    if end > size:
        raise DataError(f"{path}: truncated: its index reaches to byte {end}, the file has {size}; copy it again")
    av = require("av", "train")
    packets = (packet for packet in container.demux(stream) if packet.size)
    try:
        probed = [(packet.pts, packet.is_discard) for packet in islice(packets, PROBED)]
        whole = all(entry.size for entry in entries)  # an empty packet is none
        index = [(entry.timestamp, entry.is_discard) for entry in entries] if whole else []
        indexed = _indexed(index, probed, path)
        shown = indexed if indexed is not None else [*probed, *((packet.pts, packet.is_discard) for packet in packets)]
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: unreadable video ({error}); copy it again") from None
    if not all(discarded or time is not None for time, discarded in shown):
        raise DataError(f"{path}: holds frames without a presentation time; encode it again")
    ticks = np.sort(np.array([time for time, discarded in shown if not discarded], dtype=np.int64))
    if not len(ticks):
        raise DataError(f"{path}: holds no frames; copy it again")
    twice = np.flatnonzero(np.diff(ticks) == 0)
    if len(twice):
        raise DataError(
            f"{path}: frames {twice[0]} and {twice[0] + 1} have the same presentation time; encode it again"
        )
    return FrameTimes(path, ticks, stream.time_base)


def _indexed(
    entries: list[tuple[int, bool]], probed: list[tuple[int | None, bool]], path: Path
) -> list[tuple[int, bool]] | None:
    """Presentation times from the index alone, so that the frames of hundreds of megabytes are not read; None where it cannot be.

    The index has decoding times. What they lack, the composition offsets, is read from the file; what is the same for all
    frames (edit lists, negative offsets) comes from the first packet, and more packets prove the sums right.
    """
    offsets = _composition_offsets(path, len(entries))
    if offsets is None or not probed or probed[0][0] is None:
        return None
    decoding = np.array([time for time, _ in entries], dtype=np.int64)
    times = (decoding + offsets + (probed[0][0] - decoding[0] - offsets[0])).tolist()
    found = list(zip(times, (discarded for _, discarded in entries), strict=True))
    return found if found[: len(probed)] == probed else None


def _composition_offsets(path: Path, frames: int) -> NDArray[np.int64] | None:
    """Presentation minus decoding time of each frame of an mp4 file's video, in decoding order, up to a constant (ISO 14496-12,
    the box ctts); None for other files, for fragmented ones, and where the box does not fit `frames`.
    """
    moov = _moov(path)
    tables = [
        inner
        for kind, track in _boxes(moov)
        if kind == b"trak" and bytes(_find(track, b"mdia", b"hdlr")[8:12]) == b"vide"
        for inner in [_find(track, b"mdia", b"minf", b"stbl")]
    ]
    if len(tables) != 1 or not frames or _find(moov, b"mvex"):
        return None
    box = _find(tables[0], b"ctts")
    if not box:
        return np.zeros(frames, np.int64)
    runs = np.frombuffer(box[8 : 8 + len(box[8:]) // 8 * 8], ">i4").astype(np.int64).reshape(-1, 2)
    total = int(runs[:, 0].sum())
    return np.repeat(runs[:, 1], runs[:, 0]) if total == frames and (runs[:, 0] >= 0).all() else None


def _moov(path: Path) -> memoryview:
    """Content of an mp4 file's box moov; empty where there is none, whole."""
    end, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            size, header = int.from_bytes(head[:4], "big"), 8
            if size == 1:
                size, header = int.from_bytes(file.read(8), "big"), 16
            # in a file of another kind it says anything: no more than the file is read
            if not header <= size <= end - at:
                break
            if head[4:] == b"moov":
                return memoryview(file.read(size - header))
            at += size
            file.seek(at)
    return memoryview(b"")


def _boxes(data: memoryview) -> list[tuple[bytes, memoryview]]:
    """Kind and content of the boxes in `data`."""
    out, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:
            break
        out.append((bytes(data[at + 4 : at + 8]), data[at + 8 : at + size]))
        at += size
    return out


def _find(data: memoryview, *path: bytes) -> memoryview:
    """Content of the first box with this path of kinds; empty where there is none."""
    for kind in path:
        data = next((inner for name, inner in _boxes(data) if name == kind), memoryview(b""))
    return data
