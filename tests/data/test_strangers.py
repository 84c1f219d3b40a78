"""Meta folders as other tools leave them: what would be read as another number is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strangers import (
    CAMERAS,
    EPISODES,
    ROBOT,
    Change,
    accepted,
    column,
    info,
    lines,
    mixture,
    refused,
    rows,
    twice,
)

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.columns import open_columns
from dit4dit.data.meta import read_meta
from dit4dit.data.mixture import Mixture
from dit4dit.errors import DataError

# Two that claim the same.


@pytest.mark.parametrize("change", [{}, {"length": 17}])
def test_an_episode_that_is_listed_twice(copy, tmp_path: Path, change: dict[str, Any]) -> None:
    root = copy("v2.1")
    lines(root, "episodes", twice(change))
    refused(root, "episodes.jsonl, line 5: episode_index 1 is there already, in line 2")
    shutil.rmtree(root)
    root = copy("v3.0")
    rows(root / EPISODES, twice(change))
    refused(root, "file-000.parquet, row 4: episode_index 1 is there already, in row 1")
    rows(root / EPISODES, lambda items: items.pop())
    more = root / "meta/episodes/chunk-000/file-001.parquet"
    shutil.copy(root / EPISODES, more)
    refused(root, f"{more}, row 0: episode_index 0 is there already, in {root / EPISODES}, row 0")


def test_a_task_number_with_two_texts(copy) -> None:
    root = copy("v2.1")
    lines(root, "tasks", lambda items: items.append({"task_index": 1, "task": "stir"}))
    refused(root, "tasks.jsonl, line 3: task_index 1 is 'stir', and 'task 1' in line 2")
    shutil.rmtree(root)
    root = copy("v3.0")
    rows(root / "meta/tasks.parquet", lambda items: items.append({**items[0], "__index_level_0__": "stir"}))
    refused(root, "tasks.parquet, row 2: task_index 0 is 'stir', and 'task 0' in row 0")


def test_numbers_of_rows_beside_the_tasks_are_let_pass(copy) -> None:
    """pandas keeps the index of a table whose rows were chosen."""
    root = copy("v3.0")
    path = root / "meta/tasks.parquet"
    rows_of = pq.read_table(path).to_pylist()
    table = {"task_index": [0, 1], "task": [row["__index_level_0__"] for row in rows_of], "__index_level_0__": [3, 8]}
    pq.write_table(pa.table(table), path)
    accepted(root)
    assert mixture(root).instructions == ("task 0", "task 1")


def test_a_text_with_two_numbers_is_one_instruction(copy) -> None:
    root = copy("v2.1")
    lines(root, "tasks", lambda items: items.extend([{"task_index": 7, "task": "task 0"}, dict(items[0])]))
    column(root / "data/chunk-000/episode_000002.parquet", "task_index", [0] * 10 + [7] * 7)
    assert accepted(root)["tasks"] == {"task 0": 29, "task 1": 20}
    assert mixture(root).instructions == ("task 0", "task 1")


def shift(camera: str, row: int, **seconds: float) -> Change:
    def apply(items: list[dict[str, Any]]) -> None:
        for name, by in seconds.items():
            items[row][f"videos/{camera}/{name}"] += by

    return apply


def test_episodes_that_share_frames_of_a_video(copy, libero_episode) -> None:
    root = copy("v3.0")
    rows(root / EPISODES, shift(CAMERAS[1], 1, from_timestamp=-0.04))  # 0.4 of a frame: a rounding
    accepted(root)
    video = root / f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4"
    rows(root / EPISODES, shift(CAMERAS[1], 1, from_timestamp=-0.02))
    where = f"({root / EPISODES}, row 0 and row 1)"
    refused(root, f"{video}: episodes 0 and 1 share frame 11 of the video {where}; correct from_timestamp")
    rows(root / EPISODES, shift(CAMERAS[1], 1, from_timestamp=-0.14))
    refused(root, f"{video}: episodes 0 and 1 share the frames 10 to 11 of the video {where}; correct from_timestamp")
    made = mixture(root, skip_bad=True)
    assert [problem.episode for problem in made.skipped] == [0, 1]
    assert made.statistics["franka"]["num_transitions"] == 17 + 11


def test_an_episode_that_ends_in_the_next_ones_frames(copy) -> None:
    """By to_timestamp alone: nothing is read by it, but it or the length is wrong."""
    root = copy("v3.0")
    rows(root / EPISODES, shift(CAMERAS[0], 0, to_timestamp=0.05))  # half a frame
    accepted(root)
    rows(root / EPISODES, shift(CAMERAS[0], 0, to_timestamp=0.01))
    refused(root, "image/chunk-000/file-000.mp4: episodes 0 and 1 share frame 12 of the video")
    rows(root / EPISODES, shift(CAMERAS[0], 0, to_timestamp=3.0))  # over the next two
    refused(root, "episodes 0 and 1 share the frames 12 to 20 of the video", f"{EPISODES}, row 0 and row 1)")
    rows(root / EPISODES, shift(CAMERAS[0], 0, to_timestamp=-4.0))  # before it begins: of no use
    accepted(root)


def test_a_length_that_runs_into_the_next_episodes_frames(copy) -> None:
    root = copy("v3.0")
    table = pq.read_table(root / EPISODES)
    pq.write_table(table.drop_columns([f"videos/{camera}/to_timestamp" for camera in CAMERAS]), root / EPISODES)
    accepted(root)
    rows(root / EPISODES, lambda items: items[0].update(length=15))
    refused(root, "episode 0: expected 15 rows one after another, got 12")
    found = [problem for problem in open_columns(read_meta(root)).problems if problem.column == CAMERAS[0]]
    assert [problem.episode for problem in found] == [0, 1]
    assert all("episodes 0 and 1 share the frames 12 to 14 of the video" in problem.message for problem in found)


def test_episodes_that_share_rows(copy) -> None:
    root = copy("v3.0")
    rows(root / EPISODES, lambda items: items[2].update(dataset_from_index=20))
    refused(
        root, "row 2: episode 2 has the rows 20 to 38 of the data set, episode 1 12 to 21 (row 1): both claim row 20"
    )


@pytest.mark.parametrize(
    "key,template,message",
    [
        ("data_path", "data/all.parquet", "data/all.parquet would be data of episode 0 ("),
        ("video_path", "videos/{video_key}.mp4", "image.mp4 would be observation.images.image of episode 0 ("),
        (
            "video_path",
            "videos/{episode_index}.mp4",
            "0.mp4 would be observation.images.image of episode 0",
        ),
    ],
)
def test_before_v3_a_file_is_of_one_episode(copy, key: str, template: str, message: str) -> None:
    root = copy("v2.1")
    info(root, lambda data: data.update({key: template}))
    refused(root, str(root / "meta/info.json"), message, "episodes.jsonl, line 1", "data_path needs {episode_index}")


def test_two_cameras_in_one_file(copy) -> None:
    root = copy("v3.0")
    info(
        root,
        lambda data: data.update(
            video_path=f"videos/{CAMERAS[0]}/chunk-{{chunk_index:03d}}/file-{{file_index:03d}}.mp4"
        ),
    )
    refused(root, "is the video of observation.images.image and of observation.images.wrist_image; name {video_key}")


# Declared numbers are compared with what is there before anything is made of them.


def test_a_length_that_no_disk_could_hold(copy) -> None:
    root = copy("v2.1")
    lines(root, "episodes", lambda items: items[1].update(length=10**12))
    file = root / "data/chunk-000/episode_000001.parquet"
    refused(root, f"{file}: episode 1: expected 1000000000000 rows one after another, got 9 (the file has 9)")
    assert sum(path.stat().st_size for path in open_columns(read_meta(root)).folder.iterdir()) < 100_000
    assert mixture(root, skip_bad=True).statistics["franka"]["num_transitions"] == 40


@pytest.mark.parametrize("shape,message", [
    ([10**9], "column 'action': expected 1000000000 values, got 7"),
    ([2, 7], "'action' has dtype 'float32' and shape [2, 7] in info.json; expected flat numbers"),
])  # fmt: skip
def test_a_shape_that_the_rows_do_not_have(copy, tmp_path: Path, shape: list[int], message: str) -> None:
    root = copy("v2.1")
    info(root, lambda data: data["features"]["action"].update(shape=shape))
    if len(shape) == 2:
        with pytest.raises(DataError) as caught:
            mixture(root)
        assert message in str(caught.value)
        return
    errors = check(root, decode=False)["errors"]
    assert message in errors[0]["message"]
    assert errors[0]["file"].endswith("episode_000000.parquet")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "robots: {arm: {language: annotation.human.action.task_description, action_steps: 4, video: [image],"
        " state: [state], action: [action]}}"
    )
    with pytest.raises(DataError, match=r"expected 1000000000 values, got 7"):
        Mixture.open([Entry("set", "arm")], tmp_path, catalogue(mine))
    # the published robot takes 7 of them: no need to believe the rest
    refused(root, message)


def test_images_of_another_size_than_declared(copy) -> None:
    root = copy("v2.1")
    for shape in ([3, 24, 32], [24, 32, 3], [10**9, 32, 3], [24, 32 + 2, 3]):
        info(root, lambda data, shape=shape: data["features"][CAMERAS[1]].update(shape=shape, names=None))
        if {24, 32} <= {*shape}:
            accepted(root)
        else:
            file = root / f"videos/chunk-000/{CAMERAS[1]}/episode_000000.mp4"
            refused(root, f"{file}: the video has 24 x 32 pixels, info.json says {shape}")


def test_a_camera_that_is_not_used_hides_no_other_error(copy) -> None:
    """It spoils every episode of the set, and yet the gripper of all of them is looked at."""
    root = copy("v2.1")
    feature = {"dtype": "video", "shape": [24, 32, 3], "names": ["height", "width", "channels"]}
    info(root, lambda data: data["features"].update({"observation.images.extra": feature}))
    warnings = accepted(root)["warnings"]
    assert any(w.startswith("4 errors in what libero_franka does not use (observation.images.extra)") for w in warnings)
    for file in (root / "data").rglob("*.parquet"):
        action = [[*row[:6], 1 - 2 * row[6]] for row in pq.read_table(file)["action"].to_pylist()]
        column(file, "action", action, pa.list_(pa.float32(), 7))
    with pytest.raises(DataError) as caught:
        mixture(root)
    (error,) = check(root, robot=ROBOT, decode=False)["errors"]
    assert error["message"] in str(caught.value)
    assert "robosuite" in error["message"]


def test_totals_that_differ_are_told(copy) -> None:
    root = copy("v3.0")
    info(root, lambda data: data.update(total_episodes=5, total_frames="many"))
    expected = [
        f"{root}/meta/info.json: total_episodes is 5, the episodes that are listed give 4",
        f"{root}/meta/info.json: total_frames is 'many', the episodes that are listed give 49",
    ]
    assert [w for w in accepted(root)["warnings"] if "total_" in w] == expected
    assert list(mixture(root).notes) == [f"set: {words}" for words in expected]


BAD_NUMBERS = [
    ("length", -1, "line 2: length: expected 0 to 9223372036854775807, got -1"),
    ("length", True, "line 2: length: expected int, got True"),
    ("length", 9.0, "line 2: length: expected int, got 9.0"),
    ("length", 2**63, "line 2: length: expected 0 to 9223372036854775807, got 9223372036854775808"),
    ("length", 10**400, "got a number of more than 30 digits"),
    ("episode_index", -1, "line 2: episode_index: expected 0 to 9223372036854775807, got -1"),
    ("episode_index", 2**70, "line 2: episode_index: expected 0 to"),
    ("episode_index", False, "line 2: episode_index: expected int, got False"),
]


@pytest.mark.parametrize("key,value,message", BAD_NUMBERS)
def test_numbers_of_episodes_that_are_none(copy, key: str, value: object, message: str) -> None:
    root = copy("v2.1")
    lines(root, "episodes", lambda items: items[1].update({key: value}))
    refused(root, "meta/episodes.jsonl", message)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("length", -1, "row 1: length: expected 0 to"),
        ("data/file_index", -1, "row 1: data/file_index: expected 0 to"),
        (f"videos/{CAMERAS[0]}/from_timestamp", float("nan"), "from_timestamp: expected a finite number, got nan"),
        (f"videos/{CAMERAS[0]}/to_timestamp", float("inf"), "to_timestamp: expected a finite number, got inf"),
        ("length", None, "row 1: length is missing"),
    ],
)
def test_numbers_of_v3_episodes_that_are_none(copy, name: str, value: object, message: str) -> None:
    root = copy("v3.0")
    rows(root / EPISODES, lambda items: items[1].update({name: value}))
    refused(root, EPISODES, message)


@pytest.mark.parametrize(
    "change,message",
    [
        ('"fps": NaN', "fps: expected a finite number, got nan"),
        ('"fps": Infinity', "fps: expected a finite number, got inf"),
        ('"fps": 1' + "0" * 400, "fps: expected a finite number, got a number of more than 30 digits"),
        ('"fps": 1' + "0" * 5000, "info.json: not valid JSON"),
        ('"fps": 10, "x": ' + "[" * 100_000, "info.json: not valid JSON"),
        ('"fps": 10, "fps": 10', "info.json: the key 'fps' is there twice in one object"),
        ('"fps": -10', "fps: expected more than 0, got -10"),
        ('"fps": true', "fps: expected a number, got True"),
    ],
)
def test_numbers_of_info_that_are_none(copy, change: str, message: str) -> None:
    root = copy("v2.1")
    path = root / "meta/info.json"
    before = path.read_text()
    path.write_text(before.replace('"fps": 10', change, 1))
    assert path.read_text() != before
    refused(root, str(path), message)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_chunks_hold_at_least_one_episode(copy, size: object) -> None:
    root = copy("v2.1")
    info(root, lambda data: data.update(chunks_size=size))
    refused(root, "info.json: chunks_size: expected")


@pytest.mark.parametrize(
    "feature,message",
    [
        ({"dtype": "float32", "shape": 7}, "shape: expected a list of whole numbers, got 7"),
        ({"dtype": "float32", "shape": [-7]}, "shape: expected a list of whole numbers, got [-7]"),
        ({"dtype": "float32", "shape": [7.0]}, "shape: expected a list of whole numbers, got [7.0]"),
        ("float32", "'action': expected an object with dtype and shape, got 'float32'"),
    ],
)
def test_features_that_are_none(copy, feature: object, message: str) -> None:
    root = copy("v2.1")
    info(root, lambda data: data["features"].update(action=feature))
    refused(root, "info.json: features", message)


def test_a_key_that_is_there_twice(copy, tmp_path: Path) -> None:
    root = copy("v2.1")
    path = root / "meta/modality.json"
    modality = json.dumps(ROBOT.modality)
    path.write_text(modality.replace('"x": {"start": 0', '"x": {"start": 3, "end": 4}, "x": {"start": 0', 1))
    assert path.read_text() != modality
    refused(root, f"{path}: the key 'x' is there twice in one object")
    path.unlink()
    lines(root, "episodes", lambda items: None)
    file = root / "meta/episodes.jsonl"
    file.write_text(file.read_text().replace('"length": 9', '"length": 3, "length": 9'))
    refused(root, "episodes.jsonl, line 2: the key 'length' is there twice")


def test_the_check_command_says_it_in_one_line(copy, tmp_path: Path, capsys) -> None:
    from dit4dit import cli

    root = copy("v2.1")
    lines(root, "episodes", twice({}))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "check", str(root), "--no-decode", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    words = (
        f"  error: {root}/meta/episodes.jsonl, line 5: episode_index 1 is there already, in line 2; keep one of them"
    )
    assert words in capsys.readouterr().out.split("\n")
    (found,) = json.loads((tmp_path / "out/check.json").read_text())["datasets"]
    assert [error["message"] for error in found["errors"]] == [words.removeprefix("  error: ")]
