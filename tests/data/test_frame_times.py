"""Presentation times from a video file's index and packets, without decoding: those of the frames that a decoder shows."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import boxes, film, shown

from dit4dit.data import frame_times
from dit4dit.data.frame_times import read_header
from dit4dit.errors import DataError

MS30 = Fraction(1, 3000)
"""A hundred ticks are a frame at 30 fps."""


def test_a_start_that_is_no_number_is_no_frame(tmp_path: Path) -> None:
    times = read_header(film(tmp_path / "v.mp4", range(40, 440, 40), Fraction(1, 400))).times
    assert [times.first_frame(x, 10) for x in (0, 0.1, 0.9)] == [(0, 0.0), (1, pytest.approx(0)), (9, pytest.approx(0))]
    assert times.first_frame(-0.04, 10) == (0, pytest.approx(0.4))
    assert times.first_frame(0.44, 10) == (4, pytest.approx(0.4))
    assert times.first_frame(0.46, 10) == (5, pytest.approx(0.4))
    assert times.first_frame(0.949, 10) == (9, pytest.approx(0.49))
    for start in (float("nan"), float("inf"), -0.06, 0.96):
        with pytest.raises(DataError, match=r"v\.mp4: no frame at \S+ s: the nearest, \d, is \S+ s away"):
            times.first_frame(start, 10)


def test_a_start_far_into_a_file_that_was_kept_as_float32(tmp_path: Path) -> None:
    """The rounding at 1e5 s is 0.12 frames at 30 fps."""
    ticks = np.arange(100) * 512 + 1_536_000_000  # 1e5 s at 15360 ticks a second
    times = frame_times.FrameTimes(tmp_path / "v.mp4", np.concatenate([[0], ticks]), Fraction(1, 15360))
    for number in range(100):
        first, gap = times.first_frame(float(np.float32(1e5 + number / 30)), 30)
        assert first == number + 1
        assert gap < 0.13


KINDS = {
    "B-frames": ("v.mp4", {}),
    "no B-frames": ("v.mp4", {"options": {"bf": "0"}}),
    "no B-frames, quick to start": ("v.mp4", {"options": {"bf": "0"}, "container": {"movflags": "faststart"}}),
    "B-frames, quick to start": ("v.mp4", {"container": {"movflags": "faststart"}}),
    "negative offsets": ("v.mp4", {"container": {"movflags": "negative_cts_offsets"}}),
    "av1": ("v.mp4", {"codec": "libsvtav1", "options": {"preset": "12"}}),
    "mov": ("v.mov", {}),
    "fragments": ("v.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "fragments, reordered late": ("v.mp4", {"key_frames": 12, "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "matroska": ("v.mkv", {}),
}


@pytest.mark.parametrize("first", [0, 1234, -250])
@pytest.mark.parametrize("name", KINDS)
def test_times_are_those_of_the_decoded_frames(name: str, first: int, tmp_path: Path, monkeypatch) -> None:
    import av

    file, options = KINDS[name]
    steps = np.random.default_rng(0).integers(50, 200, 40)
    path = film(tmp_path / file, (first + np.cumsum(steps) - steps[0]).tolist(), MS30, **options)
    indexed: list[object] = []
    inner = frame_times._indexed
    monkeypatch.setattr(frame_times, "_indexed", lambda *given: indexed.append(inner(*given)) or indexed[-1])
    times = read_header(path).times
    with av.open(str(path)) as container:
        decoded = [(frame.pts, shown(frame.to_ndarray(format="rgb24"))) for frame in container.decode(video=0)]
    assert times.ticks.tolist() == sorted(time for time, _ in decoded)
    assert [number for _, number in decoded] == list(range(40 - len(decoded), 40))
    # without reading the frames of an ordinary mp4 file
    assert (indexed[0] is not None) == (not name.startswith(("fragments", "matroska")))


def test_an_empty_packet_is_no_frame(tmp_path: Path) -> None:
    path = film(tmp_path / "v.mp4", range(0, 2000, 100), MS30, options={"bf": "0"})
    whole = read_header(path).times.ticks.tolist()
    data = bytearray(path.read_bytes())
    at = boxes(data, b"stsz") + 12 + 4 * 12
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    assert read_header(path).times.ticks.tolist() == whole[:12] + whole[13:]


def test_frames_without_times_are_an_error(tmp_path: Path) -> None:
    path = film(tmp_path / "v.h264", range(0, 2000, 100), MS30)
    with pytest.raises(DataError, match=r"v\.h264: holds frames without a presentation time; encode it again"):
        read_header(path)


def test_an_index_that_does_not_fit_the_packets_is_not_used(tmp_path: Path, monkeypatch) -> None:
    ticks = list(range(0, 4000, 100))
    path = film(tmp_path / "v.mp4", ticks, MS30)
    right = read_header(path).times.ticks.tolist()
    monkeypatch.setattr(frame_times, "_composition_offsets", lambda path, frames: np.arange(frames) % 3)
    assert read_header(path).times.ticks.tolist() == right
    monkeypatch.setattr(frame_times, "_composition_offsets", lambda path, frames: None)
    assert read_header(path).times.ticks.tolist() == right


def decoded(path: Path) -> list[int]:
    import av

    with av.open(str(path)) as container:
        return sorted(frame.pts for frame in container.decode(video=0))


def test_fragments_that_begin_like_an_ordinary_file(tmp_path: Path) -> None:
    """The first packets come in the order of display, at even times; later ones do not, and the index at the front is silent."""
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = film(tmp_path / "v.mp4", range(0, 4000, 100), MS30, key_frames=12, container=fragments)
    assert read_header(path).times.ticks.tolist() == decoded(path)


def test_offsets_for_other_frames_than_there_are(tmp_path: Path) -> None:
    path = film(tmp_path / "v.mp4", range(0, 4000, 100), MS30)
    data = bytearray(path.read_bytes())
    at = boxes(data, b"ctts") + 8
    count = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (count + 2).to_bytes(4, "big")
    path.write_bytes(data)
    assert frame_times._composition_offsets(path, 40) is None
    assert read_header(path).times.ticks.tolist() == decoded(path)


def test_a_file_of_other_boxes_has_no_index_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    for content in (
        b"",
        b"abc",
        b"\0\0\0\0moov",
        b"\0\0\0\1moov",
        b"\0\0\0\x10moov\0\0\0\x99trak",
        b"\0\0\0\x08free" * 3,
    ):
        path.write_bytes(content)
        assert frame_times._composition_offsets(path, 3) is None
