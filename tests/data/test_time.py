"""Time, one rule: frames are addressed by number, times only say where an episode begins, and every way to open a data set says
the same about them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from films import boxes, film, install_torchcodec, numbered, shown

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.data.sheet import describe
from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.errors import DataError

CAMERAS = ("observation.images.image", "observation.images.wrist_image")
VIDEO = "videos/{}/chunk-000/file-000.mp4"
OLD_VIDEO = "videos/chunk-000/{}/episode_00000{}.mp4"
ROWS = "data/chunk-000/file-000.parquet"
LENGTHS = (12, 9, 10)
MS30 = Fraction(1, 3000)
"""A hundred ticks are a frame at 30 fps."""

ARM = """
robots:
  arm: {video: [image], state: [state], action: [action], language: annotation.human.action.task_description, action_steps: 16,
        normalization: {action.action: min_max}}
"""
BESIDE = "from_timestamp is more than 0.1 frames away from the nearest frame of the video, which is taken"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, libero_episode):
    """Data sets with LIBERO's keys whose frames show their number, counted over the episodes. Not to be written to."""

    @cache
    def write(fps: float, lengths: tuple[int, ...], version: str) -> Path:
        root, count = tmp_path_factory.mktemp("recorded") / "set", 0
        with Writer(root, fps, version=version, codec=VideoCodec(options={"preset": "ultrafast"})) as writer:
            for i, length in enumerate(lengths):
                columns, _ = libero_episode(i, length)
                frames = np.stack([numbered((count + k) % 256) for k in range(length)])
                writer.add(columns, dict.fromkeys(CAMERAS, frames), "go")
                count += length
        return root

    return write


@pytest.fixture
def record(recorded, tmp_path: Path):
    """A copy of such a data set that a test may spoil."""

    def copy(fps: float = 30, lengths: Sequence[int] = LENGTHS, version: str = "v3.0") -> Path:
        return Path(shutil.copytree(recorded(fps, tuple(lengths), version), tmp_path / "set"))

    return copy


def set_starts(root: Path, starts: Sequence[float], camera: str | None = None) -> None:
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    for key in CAMERAS if camera is None else (camera,):
        name = f"videos/{key}/from_timestamp"
        table = table.set_column(table.column_names.index(name), name, pa.array(starts, pa.float64()))
        # nothing is read from it; left as it is, it would contradict
        table = table.drop_columns([n for n in table.column_names if n == f"videos/{key}/to_timestamp"])
    pq.write_table(table, path)


def set_fps(root: Path, fps: float) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"fps": fps}))


def set_timestamps(root: Path, change) -> None:
    """change(timestamps of one episode) -> new ones, as float32 as data sets have them."""
    table = pq.read_table(root / ROWS)
    times, owner = table["timestamp"].to_numpy(), table["episode_index"].to_numpy()
    new = np.concatenate([change(times[owner == i].astype(np.float64)) for i in np.unique(owner)])
    assert len(new) == len(times)
    column = pa.array(new, pa.float32())
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", column), root / ROWS)


published = cache(catalogue)


def verdict(root: Path) -> tuple[list[str], list[str]]:
    """Errors and warnings about a data set, which the full check, the one without decoding and opening a mixture agree on."""
    known = published()
    robot = known.robot("libero_franka")
    full, quick = check(root, robot=robot), check(root, robot=robot, decode=False)
    assert full["errors"] == quick["errors"]
    assert full["warnings"] == quick["warnings"]
    errors = [describe(error) for error in full["errors"]]
    about_time = [w for w in full["warnings"] if re.search("timestamp|more frames than", w)]
    if errors:
        with pytest.raises(DataError) as caught:
            Mixture.open([Entry(root.name, "libero_franka")], root.parent, known)
        assert str(caught.value).startswith(errors[0])
    else:
        notes = Mixture.open([Entry(root.name, "libero_franka")], root.parent, known).notes
        assert notes == tuple(f"{root.name}: {warning}" for warning in about_time)
    return errors, about_time


def read(root: Path, monkeypatch) -> list[list[int]]:
    """The numbers that the frames of each episode show, for which both cameras and both decoders agree."""
    install_torchcodec(monkeypatch)
    found = []
    for backend in ("pyav", "torchcodec"):
        data = LeRobot.open(root, backend=backend)
        lengths = [episode.length for episode in data.meta.episodes]
        for camera in CAMERAS:
            found.append([[shown(x) for x in data.pictures(camera, i, range(n))] for i, n in enumerate(lengths)])
            # frames that are asked for alone are the same ones
            assert [shown(data.pictures(camera, i, [n - 1])[0]) for i, n in enumerate(lengths)] == [
                x[-1] for x in found[-1]
            ]
    assert found == found[:1] * 4
    return found[0]


def counted(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    ends = first + np.cumsum(lengths)
    return [list(range(end - n, end)) for n, end in zip(lengths, ends.tolist(), strict=True)]


@pytest.mark.parametrize(
    "version,fps", [("v2.1", 30), ("v3.0", 30), ("v3.0", 29.97), ("v3.0", 30000 / 1001), ("v2.1", 12.5)]
)
def test_what_the_writer_writes_is_even(record, version: str, fps: float, monkeypatch) -> None:
    root = record(fps, version=version)
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch) == counted(LENGTHS)


def test_episodes_of_a_row_or_two_have_no_rate(record, monkeypatch) -> None:
    root = record(lengths=(1, 2, 9))
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch) == counted((1, 2, 9))


def test_a_video_that_runs_a_little_slower_than_declared_is_read_by_number(record, monkeypatch) -> None:
    """After 150 frames at 29.55 instead of 30 per second, start x fps is 2.25 frames too late."""
    lengths = (150, 30, 20)
    root = record(29.55, lengths)
    set_fps(root, 30)
    set_timestamps(root, lambda times: times * 29.55 / 30)
    assert LeRobot.open(root).meta.episodes[1].videos[CAMERAS[0]].start * 30 == pytest.approx(152.28, abs=0.01)
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch) == counted(lengths)


def test_starts_that_drift_from_the_videos_times_are_an_error(record) -> None:
    """Starts counted at 30 fps for a video of 29.55: the second episode would begin two frames too early."""
    root = record(29.55, (150, 30))
    set_fps(root, 30)
    set_timestamps(root, lambda times: times * 29.55 / 30)
    set_starts(root, [0.0, 150 / 30])
    errors, _ = verdict(root)
    message = (
        f"episodes 0 and 1 share the frames 148 to 149 of the video ({root}/meta/episodes/chunk-000/file-000.parquet, row 0 and "
        "row 1); correct from_timestamp, to_timestamp or length there"
    )
    assert errors == [f"{root / VIDEO.format(camera)}: {message}" for _ in range(2) for camera in CAMERAS]


@pytest.mark.parametrize("off", [0.05, -0.05])
def test_a_start_that_is_rounded_is_nothing(record, off: float, monkeypatch) -> None:
    root = record()
    set_starts(root, [0.0, (12 + off) / 30, 21 / 30])
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch) == counted(LENGTHS)


def test_a_start_before_the_first_frame_is_beside_it(record, monkeypatch) -> None:
    """It is not taken for 0: the same rounding in the middle of a file is told, too."""
    root = record()
    set_starts(root, [-0.3 / 30, 12 / 30, 21 / 30])
    video = root / VIDEO.format(CAMERAS[0])
    assert verdict(root) == (
        [],
        [f"{BESIDE}, 2 times; the worst: {video}, episode 0: 0.30 frames at -0.0100 s, frame 0"],
    )
    assert read(root, monkeypatch) == counted(LENGTHS)


@pytest.mark.parametrize("off", [0.3, -0.3, 0.49, -0.49])
def test_a_start_beside_a_frame_is_one_warning(record, off: float, monkeypatch) -> None:
    root = record()
    set_starts(root, [0.0, (12 + off) / 30, (21 + 0.2) / 30])
    video = root / VIDEO.format(CAMERAS[0])
    assert verdict(root) == (
        [],
        [
            f"{BESIDE}, 4 times; the worst: {video}, episode 1: {abs(off):.2f} frames at {(12 + off) / 30:.4f} s, frame 12"
        ],
    )
    assert read(root, monkeypatch) == counted(LENGTHS)


def test_a_warning_about_one_camera_is_for_those_who_use_it(record) -> None:
    root = record()
    set_starts(root, [0.0, 12.3 / 30, 20.8 / 30], CAMERAS[1])
    data = LeRobot.open(root)
    assert data.warnings([CAMERAS[0], "action", "timestamp"]) == []
    worst = f"{root / VIDEO.format(CAMERAS[1])}, episode 1: 0.30 frames at 0.4100 s, frame 12"
    assert data.warnings([CAMERAS[1]]) == data.warnings() == [f"{BESIDE}, 2 times; the worst: {worst}"]
    set_starts(root, [0.0, 12 / 30, 21.2 / 30], CAMERAS[0])
    data = LeRobot.open(root)
    (own,) = data.warnings([CAMERAS[0]])
    assert own == f"{BESIDE}: {root / VIDEO.format(CAMERAS[0])}, episode 2: 0.20 frames at 0.7067 s, frame 21"
    assert data.warnings([CAMERAS[1]]) == [f"{BESIDE}, 2 times; the worst: {worst}"]
    assert data.warnings() == [f"{BESIDE}, 3 times; the worst: {worst}"]
    arm = root.parent / "arm.yaml"
    arm.write_text(ARM)
    assert Mixture.open([Entry(root.name, "arm")], root.parent, catalogue(arm)).notes == (f"{root.name}: {own}",)


@pytest.mark.parametrize(
    "starts,message,episodes",
    [
        # 0.6 frames off is the neighbour, which is another episode's, or the frame behind which too few are left
        ([0.0, 11.4 / 30, 21 / 30], "episodes 0 and 1 share frame 11 of the video (", [0, 1]),
        ([0.0, 12.6 / 30, 21 / 30], "episodes 1 and 2 share frame 21 of the video (", [1, 2]),
        ([0.0, 12 / 30, 21.6 / 30], "episode 2 needs frames up to 31, the video has 31", [2]),
        (
            [0.0, 12 / 30, 30.6 / 30],
            "episode 2: no frame at 1.0200 s: the nearest, 30, is 0.0200 s away (0.60 frames, expected at most 0.5)",
            [2],
        ),
        ([-0.6 / 30, 12 / 30, 21 / 30], "episode 0: no frame at -0.0200 s: the nearest, 0, is 0.0200 s away", [0]),
        ([0.0, 12 / 30, 100.0], "episode 2: no frame at 100.0000 s: the nearest, 30, is 99.0000 s away", [2]),
    ],
)
def test_a_start_at_another_frame_is_an_error(record, starts: list, message: str, episodes: list) -> None:
    root = record()
    set_starts(root, starts)
    errors, _ = verdict(root)
    assert {error.partition(f"{message}")[0] for error in errors} == {f"{root / VIDEO.format(x)}: " for x in CAMERAS}
    assert [problem.episode for problem in LeRobot.open(root).columns.problems] == [
        i for i in episodes for _ in CAMERAS
    ]


def test_an_episode_within_another_shares_its_frames_though_a_third_lies_between() -> None:
    from dit4dit.data.meta import EpisodeMeta
    from dit4dit.data.time_check import _shared_frames

    def span(first: int, end: int, index: int) -> tuple[int, int, EpisodeMeta]:
        return first, end, EpisodeMeta(index, end - first, Path("data"), {})

    found = _shared_frames([span(0, 20, 5), span(3, 5, 6), span(10, 12, 7), span(20, 25, 8)])
    assert sorted(found) == [5, 6, 7]
    assert "episodes 5 and 7 share the frames 10 to 11 " in found[7]


PAUSE = [*(100 * i for i in range(15)), *(30_000 + 100 * i for i in range(16))]
FILMS = {
    "first time not zero": [4321 + 100 * i for i in range(31)],
    "first time not zero, and a pause within an episode": [777 + t for t in PAUSE],
    "a pause at the beginning of an episode": [100 * i + 90_000 * (i >= 21) for i in range(31)],
    "dropped frames": np.cumsum([0, *([100] * 4 + [200]) * 6]).tolist(),
    "ten seconds between all episodes": [100 * i + 30_000 * (i >= 12) + 30_000 * (i >= 21) for i in range(31)],
}


@pytest.mark.parametrize("name", FILMS)
def test_frames_are_counted_from_where_an_episode_begins(record, name: str, monkeypatch) -> None:
    root, ticks = record(), FILMS[name]
    for camera in CAMERAS:
        film(root / VIDEO.format(camera), ticks, MS30)
    set_starts(root, [(ticks[first] - ticks[0]) * float(MS30) for first in (0, 12, 21)])
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch) == counted(LENGTHS)


def test_a_file_of_its_own_is_counted_from_its_first_frame(record, monkeypatch) -> None:
    root = record(version="v2.1")
    for camera in CAMERAS:
        film(root / OLD_VIDEO.format(camera, 1), [555 + 100 * i + 60_000 * (i > 4) for i in range(9)], MS30)
    assert verdict(root) == ([], [])
    assert read(root, monkeypatch)[1] == list(range(9))


def test_frames_that_an_edit_list_hides_do_not_count(record) -> None:
    """A file that was cut without encoding it again: its index has frames that no player shows."""
    root = record(version="v2.1")
    for camera in CAMERAS:
        film(root / OLD_VIDEO.format(camera, 1), range(-700, 900, 100), MS30)
        film(root / OLD_VIDEO.format(camera, 0), range(-700, 400, 100), MS30)
    errors, _ = verdict(root)
    message = "episode 0 needs frames up to 11, the video has 4; copy it again"
    assert errors == [f"{root / OLD_VIDEO.format(camera, 0)}: {message}" for camera in CAMERAS]
    data = LeRobot.open(root)
    assert [shown(x) for x in data.pictures(CAMERAS[0], 1, range(9))] == list(range(7, 16))


@pytest.mark.parametrize("rate,wrong", [(30.57, False), (29.43, False), (30.7, True), (15, True)])
def test_a_video_of_another_rate_is_an_error(record, rate: float, wrong: bool, monkeypatch) -> None:
    root, base = record(), Fraction(1, 90_000)
    ticks = [round(i * 90_000 / rate) for i in range(31)]
    for camera in CAMERAS:
        film(root / VIDEO.format(camera), ticks, base)
    set_starts(root, [ticks[i] / 90_000 for i in (0, 12, 21)])
    errors, warnings = verdict(root)
    assert warnings == []
    assert len(errors) == (len(CAMERAS) * len(LENGTHS) if wrong else 0)
    for error in errors:
        found = re.search(
            r"file-000\.mp4: the video has (\S+) fps, info\.json 30; correct fps in info\.json, or encode", error
        )
        assert found is not None
        assert float(found[1]) == pytest.approx(rate, rel=1e-3)
    if not wrong:
        assert read(root, monkeypatch) == counted(LENGTHS)


UNEVEN = "column 'timestamp' is not even at the 30 fps of info.json (images are found by number, not by it)"
STAMPS = {
    # what is done to the seconds of each episode -> the warning about the worst: row, episode, step; None: nothing to say
    "milliseconds": (lambda t: np.round(t, 3), None),
    "seconds of a day in float32": (lambda t: t + 80_000, (3, (None, None, 0.039062))),
    "hundredths of a second": (lambda t: np.round(t, 2), (3, (None, None, 0.04))),
    "late from one row on": (lambda t: t + 0.01 * (np.arange(len(t)) >= 5) * (len(t) == 9), (1, (17, 1, 0.043333))),
    "one pause": (lambda t: t + 10 * (np.arange(len(t)) >= 6) * (len(t) == 9), (1, (18, 1, 10.033))),
    "a pause in each": (lambda t: t + len(t) * (np.arange(len(t)) >= 6), (3, (6, 0, 12.033))),
    "a clock set back": (lambda t: t - 5 * (np.arange(len(t)) >= 3) * (len(t) == 10), (1, (24, 2, -4.9667))),
    "29.97 for 30": (lambda t: t * 30 / 29.97, (3, (None, None, 0.033367))),
    "1.9 % slow": (lambda t: t * 1.019, (3, (None, None, 0.033967))),
}


@pytest.mark.parametrize("name", STAMPS)
def test_timestamps_address_nothing(record, name: str, monkeypatch) -> None:
    root = record()
    change, found = STAMPS[name]
    set_timestamps(root, change)
    errors, warnings = verdict(root)
    assert errors == []
    if found is None:
        assert warnings == []
    else:
        count, (row, episode, step) = found
        (warning,) = warnings
        assert warning.startswith(f"{UNEVEN}, {count} times; the worst: " if count > 1 else f"{UNEVEN}: ")
        place = re.search(
            r"parquet, row (\d+): (\S+) s after the row before, expected 0\.033333 s \(episode (\d)\)$", warning
        )
        assert place is not None
        assert float(place[2]) == pytest.approx(step, abs=2e-6 if step < 1 else 1e-3)
        assert row is None or (int(place[1]), int(place[3])) == (row, episode)
        assert str(root / ROWS) in warning
    assert read(root, monkeypatch) == counted(LENGTHS)


@pytest.mark.parametrize(
    "change,step",
    [
        (lambda t: t * 1.03, 0.034333),
        (lambda t: t / 1.03, 0.032362),
        (lambda t: t * 1.021, 0.034033),
        (lambda t: t * 0, 0),
        (lambda t: t * 1.03 + 10 * (np.arange(len(t)) >= 6), 0.034333),
        (lambda t: t * 1000, 33.333),
        (lambda t: -t, -0.033333),
    ],
)
def test_timestamps_of_another_rate_are_an_error(record, change, step: float) -> None:
    root = record()
    set_timestamps(root, change)
    errors, warnings = verdict(root)
    assert warnings == []
    assert len(errors) == len(LENGTHS)
    for i, error in enumerate(errors):
        found = re.fullmatch(
            rf"{root / ROWS}: episode {i}: column 'timestamp': the median step between rows is (\S+) s, info.json says 30 fps "
            r"\(0\.033333 s\); correct fps in info\.json, or record at one rate",
            error,
        )
        assert found is not None
        assert float(found[1]) == pytest.approx(step, rel=1e-4)


def test_two_frames_at_one_time_are_an_error(record) -> None:
    root = record(version="v2.1")
    path = root / OLD_VIDEO.format(CAMERAS[1], 1)
    film(path, [*range(0, 400, 100), *range(450, 950, 100)], MS30, options={"bf": "0"})
    data = bytearray(path.read_bytes())
    at = boxes(data, b"stts")
    runs = np.frombuffer(bytes(data[at + 8 : at + 32]), ">u4").reshape(-1, 2).tolist()
    assert [count for count, _ in runs] == [3, 1, 5]
    data[at + 20 : at + 24] = bytes(4)  # the fourth frame lasts for no time
    path.write_bytes(data)
    errors, _ = verdict(root)
    assert errors == [f"{path}: frames 3 and 4 have the same presentation time; encode it again"]


def test_the_commands_say_it_once(record, capsys, tmp_path: Path) -> None:
    from dit4dit.cli import main

    root, out = record(), tmp_path / "out"
    set_timestamps(root, STAMPS["one pause"][0])
    set_starts(root, [0.0, 12.3 / 30, 21 / 30])

    def said(*words: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert not stopped.value.code
        return capsys.readouterr().out

    for more in ([], ["--no-decode"]):
        lines = said("data", "check", root, "--out", out, *more)
        assert lines.count(f"warning: {UNEVEN}: ") == 1
        assert lines.count(f"warning: {BESIDE}, 2 times; the worst: ") == 1
        assert (out / "index.html").read_text().count("10.033 s after the row before") == 1
    lines = said("stats", root, "--robot", "libero_franka")
    assert (lines.count(UNEVEN), lines.count(BESIDE), lines.count("note: ")) == (1, 1, 2)
