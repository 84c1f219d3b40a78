"""What is wrong and what is only unusual about the times of a data set, by the rule of `dit4dit.data.frame_times`; nothing is
decoded for it. Opening a data set, `data check` and training get their verdict from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.frame_times import UNUSUAL, VideoHeader, largest_gap, read_header, wrong_rate
from dit4dit.data.meta import EpisodeMeta, Meta, beside
from dit4dit.errors import DataError

Span = tuple[int, int, EpisodeMeta]
"""First frame of an episode in its file, and the one after its last."""


@dataclass(frozen=True)
class Unusual:
    """What is allowed in some episodes and still worth a look, for one column or camera."""

    kind: str
    column: str
    count: int
    size: float
    """How unusual the worst of them is; for comparing."""
    worst: str

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.count} times; the worst: {self.worst}"
            if self.count > 1
            else f"{self.kind}: {self.worst}"
        )


def merged(unusual: Iterable[Unusual], *, columns: bool = False) -> list[Unusual]:
    """One for each kind and column (with `columns` for each kind): the worst, with the count of all."""
    out: dict[tuple[str, ...], Unusual] = {}
    for one in unusual:
        key = (one.kind,) if columns else (one.kind, one.column)
        other = out.get(key, one)
        count = one.count + (other.count if other is not one else 0)
        out[key] = replace(max(other, one, key=lambda x: x.size), count=count)
    return list(out.values())


def wrong_timestamps(times: NDArray[np.float64], fps: float) -> str | None:
    """Why an episode's column `timestamp` is that of another rate. Only that is an error: it addresses nothing."""
    step = wrong_rate(times, fps)
    if step is None:
        return None
    return (
        f"column 'timestamp': the median step between rows is {step:.5g} s, info.json says {fps:g} fps ({1 / fps:.5g} s); "
        "correct fps in info.json, or record at one rate"
    )


def uneven_timestamps(times: NDArray[np.float64], fps: float, path: Path, first: int, episode: int) -> list[Unusual]:
    """Jitter, pauses and rates that are nearly the declared one, in the rows of `path` from `first` on."""
    gap = largest_gap(times, fps)
    if gap is None:
        return []
    row, step = gap
    kind = f"column 'timestamp' is not even at the {fps:g} fps of info.json (images are found by number, not by it)"
    worst = (
        f"{path}, row {first + row}: {step:.5g} s after the row before, expected {1 / fps:.5g} s (episode {episode})"
    )
    return [Unusual(kind, "timestamp", 1, abs(step * fps - 1), worst)]


def check_videos(
    meta: Meta, progress: Callable[[str, int, int], None] | None, unusual: list[Unusual]
) -> list[tuple[Path, int, str, str]]:
    """What the video files tell without decoding, where each episode begins and ends in them included, with the numbers that
    readers use: (file, episode, camera, what is wrong). What is only unusual is added to `unusual`.
    """
    problems = []
    for key in sorted({key for episode in meta.episodes for key in episode.videos}):
        by_file: dict[Path, list[EpisodeMeta]] = {}
        for episode in meta.episodes:
            if episode.length > 0:
                by_file.setdefault(episode.videos[key].path, []).append(episode)
        for done, (path, episodes) in enumerate(by_file.items()):
            if progress is not None:
                progress(f"{key}/{path.name}", done, len(by_file))
            try:
                header = read_header(path)
                _check_header(header, key, meta)
            except DataError as error:
                whole = str(error).removeprefix(f"{path}: ")
                found = dict.fromkeys((episode.index for episode in episodes), whole)
            else:
                found = _wrong_places(header, episodes, key, meta, unusual)
            problems += [(path, index, key, why) for index, why in found.items()]
    return problems


def _check_header(header: VideoHeader, key: str, meta: Meta) -> None:
    step = wrong_rate(header.times.seconds, meta.fps)
    if step is not None:
        raise DataError(
            f"the video has {1 / step:g} fps, info.json {meta.fps:g}; correct fps in info.json, or encode the video again"
        )
    shape = list(meta.features[key].get("shape") or [])
    if len(shape) == 3 and sorted([header.height, header.width, 3]) != sorted(shape):
        raise DataError(f"the video has {header.height} x {header.width} pixels, info.json says {shape}")


def _wrong_places(
    header: VideoHeader, episodes: list[EpisodeMeta], key: str, meta: Meta, unusual: list[Unusual]
) -> dict[int, str]:
    """Episode number -> why it cannot be read from this video."""
    out: dict[int, str] = {}
    spans: list[Span] = []
    for episode in episodes:
        place = episode.videos[key]
        try:
            first, gap = header.times.first_frame(place.start, meta.fps)
        except DataError as error:
            out[episode.index] = f"episode {episode.index}: {str(error).removeprefix(f'{place.path}: ')}"
            continue
        end = first + episode.length
        if header.frames < end:
            out[episode.index] = (
                f"episode {episode.index} needs frames up to {end - 1}, the video has {header.frames}; copy it again"
            )
            continue
        claimed = 0 if place.end is None else header.times.frames_until(place.end, meta.fps)
        spans.append((first, max(end, claimed), episode))
        where = f"{place.path}, episode {episode.index}"
        if gap > UNUSUAL:
            kind = f"from_timestamp is more than {UNUSUAL:g} frames away from the nearest frame of the video, which is taken"
            unusual.append(
                Unusual(kind, key, 1, gap, f"{where}: {gap:.2f} frames at {place.start:.4f} s, frame {first}")
            )
        longer = header.frames - end
        if longer and meta.version != "v3.0":  # a file of its own: it is read as it is, and perhaps out of step
            kind = "a video has more frames than its episode has rows"
            unusual.append(Unusual(kind, key, 1, longer, f"{where}: {longer} more"))
    return out | _shared_frames(spans)


def _shared_frames(spans: list[Span]) -> dict[int, str]:
    """The episodes that share frames with another. Times that drift away from the video's own are seen here, at the first
    episode that would begin a frame too early.
    """
    out: dict[int, str] = {}
    last: Span | None = None
    for span in sorted(spans, key=lambda span: span[0]):
        if last is not None and span[0] < last[1]:
            one, other, end = last[2], span[2], min(last[1], span[1]) - 1
            frames = f"frame {end}" if end == span[0] else f"the frames {span[0]} to {end}"
            message = (
                f"episodes {one.index} and {other.index} share {frames} of the video ({one.where} and "
                f"{beside(other.where, one.where)}); correct from_timestamp, to_timestamp or length there"
            )
            out.setdefault(one.index, message)
            out[other.index] = message
        last = span if last is None or span[1] > last[1] else last
    return out
