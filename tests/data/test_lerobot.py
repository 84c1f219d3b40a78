"""Reading data sets: one that lerobot itself wrote, its twins in the other layouts, and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.layout import V2_DATA, V2_VIDEO
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.meta import read_meta
from dit4dit.data.mixture import Mixture
from dit4dit.data.modality import from_features
from dit4dit.data.samples import SampleReader, Window
from dit4dit.errors import ConfigError, DataError, InputError
from dit4dit.presets import preset

LIBERO_CAMERAS = ("observation.images.image", "observation.images.wrist_image")
GOLDEN = Path(__file__).parents[1] / "golden" / "lerobot_v3"
WINDOW = Window.for_model(preset("tiny").model)


def mixture(root: Path, robot: str = "libero_franka", **options) -> Mixture:
    return Mixture.open([Entry(root.name, robot)], root.parent, catalogue(), **options)


def readers(root: Path, **options) -> SampleReader:
    return mixture(root, **options).readers(WINDOW)[0]


def assert_same_samples(one: SampleReader, other: SampleReader) -> None:
    count = 0
    for episode, meta in enumerate(one.recording.data.meta.episodes):
        for frame in range(meta.length):
            a, b = one.read(episode, frame), other.read(episode, frame)
            assert a.lang == b.lang
            for name in ("video", "actions", "action_mask", "state"):
                assert torch.equal(getattr(a, name), getattr(b, name)), (name, episode, frame)
            count += 1
    assert count == one.recording.data.meta.frames == other.recording.data.meta.frames


def v21_twin(root: Path, target: Path, modality: dict | None = None, version: str = "v2.1") -> Path:
    """The same data set in the older layout: rows copied, video packets copied as they are, nothing encoded again."""
    import av

    source = read_meta(root)
    info = json.loads((root / "meta" / "info.json").read_text())
    info |= {"codebase_version": version, "data_path": V2_DATA, "video_path": V2_VIDEO}
    (target / "meta").mkdir(parents=True)
    lines = [json.dumps({"task_index": i, "task": words}) for i, words in source.tasks.items()]
    (target / "meta" / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"episode_index": e.index, "tasks": [], "length": e.length}) for e in source.episodes]
    (target / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    for episode in source.episodes:
        rows = pq.read_table(episode.data, filters=[("episode_index", "=", episode.index)])
        where = {"episode_chunk": 0, "episode_index": episode.index}
        (target / V2_DATA.format(**where)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, target / V2_DATA.format(**where))
        for camera, place in episode.videos.items():
            path = target / V2_VIDEO.format(**where, video_key=camera)
            path.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(place.path)) as old, av.open(str(path), "w") as new:
                stream = new.add_stream_from_template(old.streams.video[0])
                tick = float(old.streams.video[0].time_base)
                first, last = place.start, place.start + (episode.length - 0.5) / source.fps
                for packet in old.demux(video=0):
                    if packet.pts is not None and first - 1e-6 <= packet.pts * tick < last:
                        packet.pts, packet.dts = packet.pts - round(first / tick), packet.dts - round(first / tick)
                        packet.stream = stream
                        new.mux(packet)
    if modality is not None:
        (target / "meta" / "modality.json").write_text(json.dumps(modality))
    (target / "meta" / "info.json").write_text(json.dumps(info))
    return target


def test_what_lerobot_wrote_reads_as_lerobot_reads_it() -> None:
    data, expected = LeRobot.open(GOLDEN), np.load(GOLDEN / "expected.npz")
    assert (data.meta.version, data.fps, len(data.meta.episodes)) == ("v3.0", 10.0, 3)
    assert len({episode.data for episode in data.meta.episodes}) == 1  # several episodes in one file
    row = 0
    for i, episode in enumerate(data.meta.episodes):
        for column in ("observation.state", "action"):
            got = data.column(column, i)
            np.testing.assert_array_equal(got, expected[column][row : row + episode.length])
        for frame in range(episode.length):
            assert data.task("task_index", i, frame) == expected["task"][row]
            assert expected["episode_index"][row] == episode.index
            for camera in LIBERO_CAMERAS if row % 5 == 0 else ():
                got, want = data.pictures(camera, i, [frame])[0], expected[camera][row // 5]
                # FFmpeg's colour conversion may differ by a rounding from build to build; neighbours differ by ten and more
                assert np.abs(got.astype(int) - want).max() <= 2
            row += 1
    assert row == len(expected["action"]) == 39


def test_lerobots_own_its_older_twin_and_a_groot_style_one_give_identical_samples(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "v3")
    modality = json.loads(json.dumps(catalogue().robot("libero_franka").modality))
    groot = v21_twin(GOLDEN, tmp_path / "groot", modality, version="v2.0")
    original = readers(tmp_path / "v3")
    assert_same_samples(original, readers(v21_twin(GOLDEN, tmp_path / "v21")))
    assert_same_samples(original, readers(groot))
    assert "modality.json" in readers(groot).recording.data.modality.where


def test_the_writers_layouts_give_identical_samples_with_every_pixel(libero_data: Path, libero_episode) -> None:
    old = readers(libero_data / "v2.0")
    assert_same_samples(old, readers(libero_data / "v2.1"))
    assert_same_samples(old, readers(libero_data / "v3.0"))
    for i, length in enumerate((12, 9, 17, 11)):
        columns, pictures = libero_episode(i, length)
        data = old.recording.data
        np.testing.assert_array_equal(data.column("action", i), columns["action"])
        for camera, want in pictures.items():
            np.testing.assert_array_equal(data.pictures(camera, i, range(length)), want)
        assert data.task("task_index", i, 3) == f"task {i % 2}"


def test_v3_spreads_over_files(libero_data: Path) -> None:
    episodes = read_meta(libero_data / "v3.0").episodes
    assert [episode.data.name for episode in episodes] == ["file-000.parquet"] * 3 + ["file-001.parquet"]
    starts = [episode.videos[LIBERO_CAMERAS[0]].start for episode in episodes]
    np.testing.assert_allclose(starts, [0.0, 1.2, 2.1, 0.0])


def test_keys_come_whole_from_info_where_nothing_names_them(libero_data: Path) -> None:
    data = LeRobot.open(libero_data / "v3.0")
    assert {k: (s.column, s.start, s.end) for k, s in data.modality.state.items()} == {
        "state": ("observation.state", 0, 8)
    }
    assert list(data.modality.video) == ["image", "wrist_image"]
    named = LeRobot.open(GOLDEN).modality.action
    assert [(k, s.start, s.end) for k, s in named.items()][:2] == [("action", 0, 7), ("x", 0, 1)]


@pytest.mark.parametrize(
    "names,keys",
    [
        (["a", "b"], ["action", "a", "b"]),
        ({"motors": ["a", "b"]}, ["action", "a", "b"]),  # as older recorders wrote them
        ({"left": ["a"], "right": ["b"]}, ["action"]),
        (["a", "a"], ["action"]),
        (["a"], ["action"]),
        (None, ["action"]),
    ],
)
def test_names_of_single_values_are_keys_where_each_has_its_own(names: object, keys: list[str]) -> None:
    found = from_features({"action": {"dtype": "float32", "shape": [2], "names": names}}, "here").action
    places = [("action", 0, 2), ("action", 0, 1), ("action", 1, 2)]
    assert {k: (s.column, s.start, s.end) for k, s in found.items()} == dict(zip(keys, places, strict=False))


def test_a_modality_file_of_the_users_wins(libero_data: Path, tmp_path: Path) -> None:
    modality = {"state": {"all": {"start": 0, "end": 8}}, "video": {"top": {"original_key": LIBERO_CAMERAS[0]}}}
    path = tmp_path / "m.json"
    path.write_text(json.dumps(modality))
    data = LeRobot.open(libero_data / "v2.1", modality=path)
    assert list(data.modality.state) == ["all"]
    assert data.modality.find("video", "top") == LIBERO_CAMERAS[0]
    with pytest.raises(DataError, match="no video 'topp'; did you mean 'top'"):
        data.modality.find("video", "topp")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"state": {"x": {"start": 0, "end": 9}}}, "expected 0 <= start < end <= 8"),
        (
            {"state": {"x": {"start": 0, "end": 1, "original_key": "observation.stat"}}},
            "did you mean 'observation.state'",
        ),
        ({"state": {"x": {"start": 0, "end": 2, "rotation_type": "quaternion"}}}, "has 4 values, the slice 2"),
        ({"action": {"x": {"start": 0, "end": 2, "absolute": "no"}}}, "absolute: expected true or false"),
        ({"video": {"top": {"original_key": "front"}}}, "no feature 'front'"),
        ({"video": ["top"]}, "video: expected an object of objects"),
        ({"state": {"x": 3}}, "state: expected an object of objects"),
    ],
)
def test_mistakes_in_modality_files_are_named(libero_data: Path, tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(change))
    with pytest.raises((DataError, ConfigError)) as caught:
        LeRobot.open(libero_data / "v2.1", modality=path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_cache_that_cannot_be_written_says_what_to_do(libero_data: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set DIT4DIT_CACHE to another folder"):
        LeRobot.open(libero_data / "v2.1")


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path, write_libero, libero_episode) -> None:
    from dit4dit.data.writer import Writer

    columns, pictures = libero_episode(0, 5)
    with Writer(tmp_path / "a", 10) as writer:
        with pytest.raises(InputError, match="same number of frames"):
            writer.add({**columns, "action": columns["action"][:3]}, pictures, "go")
        with pytest.raises(InputError, match="expected one task, or 5, got 2"):
            writer.add(columns, pictures, ["go", "stop"])
        writer.add(columns, pictures, "go")
        with pytest.raises(InputError, match="as in the first episode"):
            writer.add({**columns, "action": columns["action"][:, :2]}, pictures, "go")
    with pytest.raises(InputError, match="is a data set already"):
        Writer(tmp_path / "a", 10)
    with pytest.raises(InputError, match="no episode was added"), Writer(tmp_path / "b", 10):
        pass
    assert not (tmp_path / "b" / "meta" / "info.json").exists()


def test_one_task_a_frame(tmp_path: Path, libero_episode) -> None:
    from dit4dit.data.writer import Writer

    for version in ("v2.1", "v3.0"):
        with Writer(tmp_path / version, 10, version=version) as writer:
            writer.add(*libero_episode(0, 4), ["a", "b", "b", "a"])
        data = LeRobot.open(tmp_path / version)
        assert [data.task("task_index", 0, i) for i in range(4)] == ["a", "b", "b", "a"]


def test_pictures_inside_parquet_are_refused_by_name(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set")
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][LIBERO_CAMERAS[0]]["dtype"] = "image"
    (root / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="pictures stored inside parquet files are not supported; convert"):
        mixture(root)
