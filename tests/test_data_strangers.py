"""Meta folders and rows as other tools leave them: what would be read as another number is refused by name, the rest is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit.data.check import check
from dit4dit.data.columns import open_columns
from dit4dit.data.files import fill
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.meta import read_meta
from dit4dit.data.mixture import Mixture, matching
from dit4dit.data.modality import Slice, from_features
from dit4dit.data.robots import Entry, catalogue
from dit4dit.errors import DataError

CAMERAS = ("observation.images.image", "observation.images.wrist_image")
KNOWN = catalogue()
ROBOT = KNOWN.robot("libero_franka")
LENGTHS = (12, 9, 17, 11)
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
Change = Callable[[list[dict[str, Any]]], object]


@pytest.fixture
def copy(libero_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    def of(version: str) -> Path:
        return Path(shutil.copytree(libero_data / version, tmp_path / "set"))

    return of


def mixture(root: Path, **options: Any) -> Mixture:
    return Mixture.open([Entry(root.name, "libero_franka")], root.parent, KNOWN, **options)


def refused(root: Path, *parts: str) -> None:
    """Training, `data check` and `data check --robot` say no, with every one of `parts`."""
    with pytest.raises(DataError) as caught:
        mixture(root)
    messages = [str(caught.value)]
    for robot in (None, ROBOT):
        try:
            errors = check(root, robot=robot, decode=False)["errors"]
        except DataError as error:
            messages.append(str(error))
        else:
            assert errors
            row = errors[0]["row"]
            messages.append(f"{errors[0]['file']}{'' if row is None else f', row {row}'}: {errors[0]['message']}")
    for part in parts:
        assert all(part in message for message in messages), (part, messages)
    assert all(str(root) in message and "\n" not in message and len(message) < 900 for message in messages)


def accepted(root: Path) -> dict[str, Any]:
    """Training and `data check` take it; what `data check --robot` found."""
    assert mixture(root).skipped == ()
    found = check(root, robot=ROBOT, decode=False)
    assert found["errors"] == []
    return found


def assert_values(root: Path, libero_episode, episodes: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    data = LeRobot.open(root)
    by_index = {episode.index: i for i, episode in enumerate(data.meta.episodes)}
    for index in episodes:
        for name, values in libero_episode(index, LENGTHS[index])[0].items():
            np.testing.assert_array_equal(data.column(name, by_index[index]), values)


def info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta/info.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def lines(root: Path, name: str, change: Change) -> None:
    path = root / "meta" / f"{name}.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    change(items)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def rows(path: Path, change: Change) -> None:
    """Change a parquet file's rows, keeping the types of its columns."""
    table = pq.read_table(path)
    items = table.to_pylist()
    change(items)
    pq.write_table(pa.Table.from_pylist(items, schema=table.schema), path)


def column(path: Path, name: str, values: list[Any], kind: pa.DataType | None = None) -> None:
    """Replace or add a column."""
    table = pq.read_table(path)
    made = pa.array(values, kind)
    i = table.column_names.index(name) if name in table.column_names else None
    pq.write_table(table.append_column(name, made) if i is None else table.set_column(i, name, made), path)


# Two that claim the same.


def twice(change: dict[str, Any]) -> Change:
    return lambda items: items.append({**items[1], **change})


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
    refused(root, "they share 0.6 frames")
    rows(root / EPISODES, shift(CAMERAS[1], 1, from_timestamp=-0.04))
    refused(
        root,
        f"{EPISODES}, row 1: episode 1 starts at 1.1000 s of {video}, where episode 0 (row 0) lasts until 1.2000 s",
    )
    refused(root, "they share 1.0 frames", CAMERAS[1])
    rows(root / EPISODES, shift(CAMERAS[1], 1, from_timestamp=0.1))
    rows(root / EPISODES, shift(CAMERAS[0], 0, to_timestamp=3.0))  # over the next two
    refused(root, "row 1: episode 1 starts at 1.2000 s", "episode 0 (row 0) lasts until 4.2000 s", "share 30.0 frames")


def test_a_length_that_runs_into_the_next_episodes_frames(copy) -> None:
    root = copy("v3.0")
    table = pq.read_table(root / EPISODES)
    pq.write_table(table.drop_columns([f"videos/{camera}/to_timestamp" for camera in CAMERAS]), root / EPISODES)
    accepted(root)
    rows(root / EPISODES, lambda items: items[0].update(length=15))
    refused(root, "row 1: episode 1 starts at 1.2000 s", "episode 0 (row 0)", "frames of observation.images.image")


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


# Rows. A row that was not read is an error where it is asked for, never a zero.


def test_rows_that_cannot_be_read_leave_their_neighbours_as_they_are(copy, libero_episode) -> None:
    """One file of three episodes, with a hole, a short and an overflowing row in the one in the middle."""
    root = copy("v3.0")
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    state, action = table["observation.state"].to_pylist(), table["action"].to_pylist()
    state[14], action[15] = None, [1.0] * 6
    column(file, "observation.state", state, pa.list_(pa.float32()))
    column(file, "action", action, pa.list_(pa.float32()))
    refused(root, f"{file}, row 1")
    problems = LeRobot.open(root).columns.problems
    assert [(p.row, p.episode, p.column, p.message) for p in problems] == [
        (14, 1, "observation.state", "column 'observation.state': no value"),
        (15, 1, "action", "column 'action': expected 7 values, got 6"),
    ]
    assert_values(root, libero_episode, (0, 2, 3))
    data = LeRobot.open(root)
    with pytest.raises(DataError, match=r"row 15: column 'action': expected 7 values, got 6"):
        data.column("action", 1)
    with pytest.raises(DataError, match=r"row 14: column 'observation.state': no value"):
        data.columns.gather("observation.state", [0, 1, 2, 3])
    np.testing.assert_array_equal(data.column("frame_index", 1)[:, 0], np.arange(9))  # this one is whole
    kept = mixture(root, skip_bad=True)
    whole = np.concatenate([libero_episode(i, LENGTHS[i])[0]["action"] for i in (0, 2, 3)]).astype(np.float64)
    np.testing.assert_allclose(kept.statistics["franka"]["action"]["min"], whole.min(axis=0))
    np.testing.assert_allclose(kept.statistics["franka"]["action"]["mean"], whole.mean(axis=0), rtol=1e-6)


def test_a_row_without_an_episode_number(copy) -> None:
    root = copy("v2.1")
    file = root / "data/chunk-000/episode_000000.parquet"
    column(file, "episode_index", [0] * 5 + [None] + [0] * 6)
    refused(root, f"{file}: row 5: column 'episode_index': no value")
    with pytest.raises(DataError, match="row 5: column 'episode_index'"):
        LeRobot.open(root).column("action", 0)


def test_an_episode_that_another_file_has_too(copy) -> None:
    root = copy("v3.0")
    first, second = (root / f"data/chunk-000/file-{i:03d}.parquet" for i in (0, 1))
    pq.write_table(pa.concat_tables([pq.read_table(second), pq.read_table(first).slice(12, 9)]), second)
    refused(root, f"{second}, row 11: 9 rows of episode 1, which the meta folder places in {first}")


def test_rows_of_an_episode_that_is_not_listed(copy, libero_episode) -> None:
    root = copy("v3.0")
    rows(root / EPISODES, lambda items: items.pop(1))
    info(root, lambda data: data.update(total_episodes=3, total_frames=40))
    warnings = accepted(root)["warnings"]
    first = root / "data/chunk-000/file-000.parquet"
    words = "1 episodes have rows and are not listed in the meta folder, so nothing reads them; the first: "
    assert [w for w in warnings if "not listed" in w] == [f"{words}{first}, row 12: 9 rows of episode 1"]
    assert any(words in note for note in mixture(root).notes)
    assert_values(root, libero_episode, (0, 2, 3))


def test_a_listed_episode_without_rows(copy) -> None:
    root = copy("v3.0")
    first = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(first).slice(0, 21), first)
    refused(root, f"{first}: episode 2: expected 17 rows one after another, got 0 (the file has 21)")
    with pytest.raises(DataError, match="expected 17 rows"):
        LeRobot.open(root).column("action", 2)


@pytest.mark.parametrize("name", ["frame_index", "index"])
def test_rows_out_of_order(copy, name: str) -> None:
    root = copy("v2.1")
    file = root / "data/chunk-000/episode_000002.parquet"
    if name == "index":  # which is asked where frame_index says nothing
        column(file, "frame_index", [0] * 17)
        accepted(root)
    before = pq.read_table(file)[name].to_pylist()
    want = before[3] + 1
    column(file, name, [*before[:4], before[5], before[4], *before[6:]])
    message = f"{file}, row 4: column {name!r}: expected {want} after {want - 1}, got {want + 1}; rows are lost or out of order"
    refused(root, message)
    column(file, name, [*before[:4], *(n + 1 for n in before[4:])])
    refused(root, message)


def test_rows_that_nothing_counts(copy) -> None:
    root = copy("v2.1")
    words = "1 episodes have one value in all rows of frame_index and index: their order is not checked"
    file = root / "data/chunk-000/episode_000002.parquet"
    before = pq.read_table(file)["index"].to_pylist()
    column(file, "index", [*before[:4], before[5], before[4], *before[6:]])
    assert words not in accepted(root)["warnings"]  # frame_index tells
    column(file, "index", [3] * 17)
    assert words not in accepted(root)["warnings"]
    column(file, "frame_index", [0] * 17)
    assert words in accepted(root)["warnings"]
    assert f"set: {words}" in mixture(root).notes


def test_rows_of_episodes_need_not_be_in_the_order_of_their_numbers(copy, libero_episode) -> None:
    """Files that hold episodes 0 and 2, 3 and 1."""
    root = copy("v3.0")
    first, second = (root / f"data/chunk-000/file-{i:03d}.parquet" for i in (0, 1))
    table, rest = pq.read_table(first), pq.read_table(second)
    pq.write_table(pa.concat_tables([table.slice(21, 17), table.slice(0, 12)]), first)
    pq.write_table(pa.concat_tables([rest, table.slice(12, 9)]), second)
    rows(root / EPISODES, lambda items: items[1].update({"data/file_index": 1}))
    accepted(root)
    assert_values(root, libero_episode)


@pytest.mark.parametrize(
    "name,values,message",
    [
        ("action", [[0.0] * 6 + [1e300]] * 12, "row 0: column 'action': 1e+300 at position 6 is beyond float32"),
        (
            "task_index",
            [0.0] * 3 + [0.5] * 9,
            "row 3: column 'task_index': expected a whole number of 64 bits, got 0.5",
        ),
        ("task_index", [0.0] * 3 + [float("nan")] * 9, "row 3: column 'task_index': expected a whole number"),
        ("index", np.full(12, 2**63, np.uint64), "row 0: column 'index': expected a whole number of 64 bits"),
        ("action", ["left"] * 12, "column 'action': expected numbers, got string"),
        ("action", [1.0] * 12, "column 'action': expected lists of 7 values, got single ones"),
    ],
)
def test_values_that_would_become_others(copy, name: str, values: Any, message: str) -> None:
    root = copy("v2.1")
    file = root / "data/chunk-000/episode_000000.parquet"
    column(file, name, values)
    if name == "index":
        info(root, lambda data: data["features"].pop("frame_index"))
        assert message in str(LeRobot.open(root).columns.problems[0])
    else:
        refused(root, str(file), message)


def test_the_same_bytes_in_another_shape_are_other_values(tmp_path: Path) -> None:
    """Statistics are kept under a hash of the values: zeros of two widths, or of other episodes, are not one."""
    digests = set()
    for width, lengths in ((2, {0: 6, 1: 6}), (4, {0: 3, 1: 3}), (2, {0: 4, 1: 8}), (2, {0: 6, 2: 6})):
        root = tmp_path / f"{len(digests)}"
        (root / "meta").mkdir(parents=True)
        (root / "data").mkdir()
        facts = {"codebase_version": "v2.1", "fps": 10, "chunks_size": 1000, "data_path": "data/{episode_index}"}
        features = {
            "action": {"dtype": "float32", "shape": [width]},
            "at_index": {"dtype": "int64", "shape": [width // 2]},
        }
        (root / "meta/info.json").write_text(json.dumps({**facts, "features": features}))
        (root / "meta/tasks.jsonl").write_text("")
        listed = [json.dumps({"episode_index": i, "length": n}) for i, n in lengths.items()]
        (root / "meta/episodes.jsonl").write_text("\n".join(listed))
        for i, n in lengths.items():
            counts = [[0] * (width // 2)] * n if width > 2 else [0] * n
            table = pa.table({"episode_index": [i] * n, "action": [[0.0] * width] * n, "at_index": counts})
            pq.write_table(table, root / f"data/{i}")
        digests |= set(LeRobot.open(root).columns.digests.values())
    assert len(digests) == 8


def test_what_was_not_read_and_is_no_known_damage_is_no_cache(copy, tmp_path: Path, monkeypatch) -> None:
    from dit4dit.data import columns

    whole = columns._Sink.append

    def lose(self, position: int, number: int, values: np.ndarray) -> None:
        if (position, self.width) != (2, 7):
            whole(self, position, number, values)

    root = copy("v2.1")
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns._Sink, "append", lose)
    with pytest.raises(DataError, match=r"episode_000002\.parquet: column 'action' of episode 2 was not read"):
        open_columns(read_meta(root))
    assert list((tmp_path / "cache/data").iterdir()) == []


def test_a_column_of_texts_is_no_state(copy, tmp_path: Path) -> None:
    root = copy("v2.1")
    name = "annotation.state"
    info(root, lambda data: data["features"].update({name: {"dtype": "int64", "shape": [1]}}))
    for i, n in enumerate(LENGTHS):
        column(root / f"data/chunk-000/episode_{i:06d}.parquet", name, ["open"] * n)
    data = LeRobot.open(root)
    assert data.task(name, 0, 0) == "open"
    with pytest.raises(DataError, match=r"column 'annotation\.state' holds texts; expected numbers"):
        data.values(Slice(name, 0, 1), 0)


def test_a_cache_that_lost_its_end_is_an_error(copy, tmp_path: Path, monkeypatch) -> None:
    root = copy("v2.1")
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    columns = open_columns(read_meta(root))
    file = columns.folder / columns.columns["action"].file
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"expected 1372 bytes of column 'action', got 1368; remove "):
        open_columns(read_meta(root)).read("action", 0)


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
        (f"videos/{CAMERAS[0]}/from_timestamp", -0.2, "from_timestamp: expected 0 or more, got -0.2"),
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


# Paths out of templates.


def test_templates_are_filled_as_the_format_says() -> None:
    root, values = Path("/set"), {"chunk_index": 7, "file_index": 1234, "video_key": "a.{file_index}"}
    made = fill(
        root,
        "v/{video_key}/chunk-{chunk_index:03d}/{file_index:01d}-{file_index:09d}-{chunk_index}.mp4",
        values,
        "here",
    )
    assert str(made) == "/set/v/a.{file_index}/chunk-007/1234-000001234-7.mp4"
    assert fill(root, ".hidden/{chunk_index:02d}", values, "here") == root / ".hidden/07"


@pytest.mark.parametrize(
    "template,message",
    [
        (
            "data/{anything}.parquet",
            "'{anything}' is no field of it; known: {episode_chunk}, {episode_index}, a number",
        ),
        ("data/{episode_index:1000000000}", "'{episode_index:1000000000}' is no field"),
        ("data/{episode_index:010d}", "'{episode_index:010d}' is no field"),
        ("data/{episode_index:00d}", "'{episode_index:00d}' is no field"),
        ("data/{episode_index:x}", "'{episode_index:x}' is no field"),
        ("data/{episode_index.__class__}", "'{episode_index.__class__}' is no field"),
        ("data/{episode_index[0]}", "is no field"),
        ("data/{episode_index!r}", "is no field"),
        ("data/{}", "'{}' is no field"),
        ("data/{0}", "'{0}' is no field"),
        ("data/{{episode_index}}", "is no field"),
        ("data/{episode_index", "is no field"),
        ("data/episode_index}", "'}' is no field"),
        ("data/{video_key}/{episode_index}", "'{video_key}' is no field"),
        ("../{episode_index}.parquet", "has a part '..'"),
        ("data/../../{episode_index}.parquet", "has a part '..'"),
        ("/etc/{episode_index}", "is an absolute path"),
        ("C:/{episode_index}", "is an absolute path, or another system's"),
        ("data\\{episode_index}", "is an absolute path, or another system's"),
        ("data/\0{episode_index}", "holds a zero byte"),
        ("data/\ud800{episode_index}", "data_path"),
        ("x" * 300 + "{episode_index}", "is too long for a path"),
        ("a/" * 2000 + "{episode_index}", "is too long for a path"),
        ("", "names no file"),
        ("./", "names no file"),
    ],
)
def test_templates_that_are_none(copy, template: str, message: str) -> None:
    root = copy("v2.1")
    info(root, lambda data: data.update(data_path=template))
    refused(root, "info.json: data_path", message)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_camera_whose_name_leaves_the_folder(copy, version: str) -> None:
    root = copy(version)
    info(root, lambda data: data["features"].update({"../../x": data["features"].pop(CAMERAS[1])}))
    if version == "v3.0":
        table = pq.read_table(root / EPISODES)
        pq.write_table(
            table.rename_columns([n.replace(CAMERAS[1], "../../x") for n in table.column_names]), root / EPISODES
        )
    refused(root, "info.json: video_path", "has a part '..'")


@pytest.mark.parametrize("key", ["video_key:03d", "chunk_index:1000000000", "anything"])
def test_v3_templates_that_are_none(copy, key: str) -> None:
    root = copy("v3.0")
    info(root, lambda data: data.update(video_path="videos/{" + key + "}/{chunk_index:03d}.mp4"))
    refused(
        root, "info.json: video_path", f"'{{{key}}}' is no field", "known: {chunk_index}, {file_index}, {video_key}"
    )


# Names that begin with a dot.


def test_what_other_programs_leave_behind_is_not_read(copy, libero_episode) -> None:
    root = copy("v3.0")
    before = open_columns(read_meta(root)).folder
    for path in (root / EPISODES, root / "data/chunk-000/file-000.parquet"):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7 a resource fork")
        shutil.copytree(path.parent, path.parent.with_name(".ipynb_checkpoints"))
    (root / "meta/.DS_Store").write_bytes(b"x")
    accepted(root)
    assert open_columns(read_meta(root)).folder == before
    assert_values(root, libero_episode)


def test_folders_above_the_set_and_such_as_are_named_may_begin_with_a_dot(
    libero_data, tmp_path, libero_episode
) -> None:
    root = tmp_path / ".cache" / ".sets" / "set"
    shutil.copytree(libero_data / "v3.0", root)
    accepted(root)
    (root / "data").rename(root / ".data")
    info(root, lambda data: data.update(data_path="." + data["data_path"]))
    accepted(root)
    assert_values(root, libero_episode)


def test_a_star_matches_no_dots(tmp_path: Path) -> None:
    for name in ("one", "two[1]", ".trash/one", ".trash/two", ".bin"):
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta/info.json").write_text("{}")

    def found(pattern: str) -> list[str]:
        return [entry.dataset for entry in matching(Entry(pattern, "libero_franka"), tmp_path)]

    assert found("*") == ["one", "two[1]"]
    assert found(".trash/*") == [".trash/one", ".trash/two"]
    assert found(".b*") == [".bin"]
    assert found("two[1]*") == ["two[1]"]
    assert found(str(tmp_path / "o*")) == ["one"]
    elsewhere = matching(Entry(str(tmp_path / "o*"), "libero_franka"), tmp_path / "two[1]")
    assert [entry.dataset for entry in elsewhere] == [str(tmp_path / "one")]
    with pytest.raises(DataError, match="no data set matches"):
        found("*/one")


# Texts.


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_every_character_of_a_task_that_the_writer_takes_is_read(tmp_path: Path, libero_episode, version: str) -> None:
    from dit4dit.data.writer import Writer

    tasks = [f"lift{letter}the \N{HOT BEVERAGE}" for letter in '\u2028\u2029\x85\x0b\x0c\x1c\r\n\t"\\']
    with Writer(tmp_path / "set", 10, version=version) as writer:
        writer.add(*libero_episode(0, len(tasks)), tasks)
    data = LeRobot.open(tmp_path / "set")
    assert [data.task("task_index", 0, i) for i in range(len(tasks))] == tasks
    assert set(accepted(tmp_path / "set")["tasks"]) == set(tasks)


def test_a_byte_order_mark_and_windows_line_ends_are_let_pass(copy) -> None:
    root = copy("v2.1")
    (root / "meta/modality.json").write_text(json.dumps(ROBOT.modality))
    for name in ("info.json", "modality.json", "tasks.jsonl", "episodes.jsonl"):
        path = root / "meta" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert accepted(root)["tasks"] == {"task 0": 29, "task 1": 20}


@pytest.mark.parametrize("name", ["info.json", "modality.json", "tasks.jsonl", "episodes.jsonl"])
def test_other_encodings_are_named(copy, name: str) -> None:
    root = copy("v2.1")
    (root / "meta/modality.json").write_text(json.dumps(ROBOT.modality))
    path = root / "meta" / name
    path.write_text(path.read_text(), encoding="utf-16")
    refused(root, f"{path}: not UTF-8 (invalid start byte at byte 0); save it as UTF-8")


def test_half_a_character_is_no_task(copy) -> None:
    root = copy("v2.1")
    path = root / "meta/tasks.jsonl"
    path.write_text(path.read_text().replace("task 1", "lift \\ud83d"))
    refused(root, "tasks.jsonl, line 2: task: holds half of a UTF-16 pair")


# Instructions in the rows themselves.

SPOKEN = "annotation.human.action.task_description"


def spoken(root: Path, dtype: str = "string", name: str = SPOKEN) -> None:
    """A data set in GR00T's way, whose instructions are in the column `name`."""
    modality = json.loads(json.dumps(ROBOT.modality))
    modality["annotation"] = {"human.action.task_description": {"original_key": name} if name != SPOKEN else {}}
    (root / "meta/modality.json").write_text(json.dumps(modality))
    info(root, lambda data: data["features"].update({name: {"dtype": dtype, "shape": [1], "names": None}}))


@pytest.mark.parametrize("dtype,name", [("string", SPOKEN), ("int64", SPOKEN), ("string", "language_instruction")])
def test_instructions_that_are_texts(copy, dtype: str, name: str) -> None:
    """Texts, one of them new in every file, and a file with task numbers among them."""
    root = copy("v2.1")
    spoken(root, dtype, name)
    kinds = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    for i, kind in enumerate(kinds):
        values = ["go"] * 4 + [f"part {i}"] * (LENGTHS[i] - 4)
        file = root / f"data/chunk-000/episode_{i:06d}.parquet"
        column(file, name, values, None if i == 2 else kind)
        if i == 2:
            table = pq.read_table(file)
            made = table[name].dictionary_encode()
            pq.write_table(table.set_column(table.column_names.index(name), name, made), file)
    column(root / "data/chunk-000/episode_000003.parquet", name, [1] * 11)
    found = accepted(root)
    assert found["tasks"] == {"go": 12, "part 0": 8, "part 1": 5, "part 2": 13, "task 1": 11}
    made = mixture(root)
    assert made.instructions == ("go", "part 0", "part 1", "part 2", "task 1")
    data = made.recordings[0].data
    assert [data.task(name, i, frame) for i, frame in ((0, 3), (0, 4), (1, 8), (2, 0), (2, 16), (3, 5))] == [
        "go", "part 0", "part 1", "go", "part 2", "task 1"
    ]  # fmt: skip


def test_instructions_that_are_missing_or_empty(copy) -> None:
    root = copy("v2.1")
    spoken(root)
    for i, n in enumerate(LENGTHS):
        column(root / f"data/chunk-000/episode_{i:06d}.parquet", SPOKEN, ["go"] * (n - 2) + ["", "3"])
    warnings = accepted(root)["warnings"]
    assert "4 frames have an empty instruction" in warnings
    assert "4 frames have a number for an instruction ('3'), as a text" in warnings
    file = root / "data/chunk-000/episode_000001.parquet"
    column(file, SPOKEN, ["go"] * 4 + [None] + ["go"] * 4)
    refused(root, f"{file}, row 4: column {SPOKEN!r}: no text")
    with pytest.raises(DataError, match=r"row 4: column 'annotation\.human\.action\.task_description': no text"):
        LeRobot.open(root).task(SPOKEN, 1, 0)
    column(file, SPOKEN, [0] * 8 + [7])
    refused(root, f"{file}, row 8: column {SPOKEN!r}: unknown task index 7; meta has 2 tasks")
    column(file, SPOKEN, [1.5] * 9)
    refused(root, f"{file}, row 0: column {SPOKEN!r}: expected a whole number")


def test_other_annotations_keep_what_they_hold(copy) -> None:
    """Task numbers under another name, and a true or false that is no instruction."""
    root = copy("v2.1")
    names = {"annotation.human.validity": ("bool", [True]), "annotation.human.coarse": ("int64", [1])}
    for name, (dtype, value) in names.items():
        info(root, lambda data, n=name, d=dtype: data["features"].update({n: {"dtype": d, "shape": [1]}}))
        for i, n in enumerate(LENGTHS):
            column(root / f"data/chunk-000/episode_{i:06d}.parquet", name, value * n)
    accepted(root)
    data = LeRobot.open(root)
    assert list(data.modality.annotation) == ["human.action.task_description", "human.coarse"]
    assert data.tasks("annotation.human.coarse", 2) == {"task 1": 17}
    assert (data.column("annotation.human.validity", 0) == 1.0).all()


@pytest.mark.parametrize("shape,dtype,original", [([3], "int64", None), ([24, 32, 3], "video", CAMERAS[0])])
def test_an_annotation_that_is_no_instruction(copy, shape: list[int], dtype: str, original: str | None) -> None:
    root = copy("v2.1")
    spoken(root, name=original or "annotation.many")
    info(root, lambda data: data["features"].update({original or "annotation.many": {"dtype": dtype, "shape": shape}}))
    refused(root, "modality.json: annotation.human.action.task_description", "expected one text or task number a frame")


def test_tasks_that_the_meta_folder_lists_for_an_episode_and_its_rows_do_not_have(copy) -> None:
    root = copy("v2.1")
    lines(root, "episodes", lambda items: items[1].update(tasks=["task 0"]))
    words = "1 episodes have rows with another task than the meta folder lists for them; the first: episode 1"
    assert words in accepted(root)["warnings"]


def test_a_key_that_two_columns_would_have_is_neithers() -> None:
    def feature(*names: str) -> dict[str, Any]:
        return {"dtype": "float32", "shape": [len(names)], "names": list(names)}

    picture = {"dtype": "video", "shape": [24, 32, 3]}
    features = {
        "observation.state": feature("x", "y", "arm", "state"),
        "observation.arm": feature("x", "z"),
        "observation.force": {"dtype": "float32", "shape": [2, 3]},
        "observation.note": {"dtype": "string", "shape": [1]},
        "action": feature("x", "action"),
        "action.action": feature("u", "v"),
        "observation.images.top": picture,
        "top": picture,
        "front": picture,
    }
    found = from_features(features, "here")
    places = {key: (where.column, where.start, where.end) for key, where in found.state.items()}
    state, arm = "observation.state", "observation.arm"
    assert places == {"state": (state, 0, 4), "arm": (arm, 0, 2), "y": (state, 1, 2), "z": (arm, 1, 2)}
    assert {key: where.column for key, where in found.action.items()} == {
        "x": "action", "u": "action.action", "v": "action.action"
    }  # fmt: skip
    assert found.video == {"front": "front"}


# Depth.


def depth(root: Path, camera: str, facts: dict[str, Any]) -> None:
    def change(data: dict[str, Any]) -> None:
        data["features"][camera] = {**data["features"].get(camera, {"dtype": "video", "shape": [24, 32, 3]}), **facts}

    info(root, change)


DEPTH = [
    {"info": {"video.is_depth_map": True}},
    {"info": {"is_depth_map": True}},
    {"video_info": {"video.is_depth_map": True}},
    {"shape": [24, 32, 1], "names": ["height", "width", "channels"]},
    {"shape": [1, 24, 32], "names": ["channel", "height", "width"]},
    {"shape": [24, 32, 1], "names": None},
    {"shape": [24, 32]},
]


@pytest.mark.parametrize("facts", DEPTH)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_depth_camera(copy, facts: dict[str, Any], version: str) -> None:
    """Not used: a warning with --robot, nothing without, and its files need not be there. Used: an error."""
    root = copy(version)
    depth(root, "observation.images.depth", facts)
    words = "1 depth cameras that libero_franka does not use are not looked at: observation.images.depth"
    assert words in accepted(root)["warnings"]
    plain = check(root, decode=True)
    assert plain["errors"] == []
    assert not any("depth" in warning for warning in plain["warnings"])
    depth(root, CAMERAS[1], {"info": None, **facts})
    with pytest.raises(DataError) as caught:
        mixture(root)
    assert str(root / "meta/info.json") in str(caught.value)
    assert f"{CAMERAS[1]!r} (view 'wrist_image') " in str(caught.value)
    assert "colour images" in str(caught.value)
    with pytest.raises(DataError, match="colour images"):
        check(root, robot=ROBOT, decode=False)
    assert check(root, decode=False)["errors"] == []


def test_three_channels_of_any_name_are_a_colour_image(copy) -> None:
    root = copy("v2.1")
    depth(root, CAMERAS[1], {"names": ["height", "width", "depth"], "info": {"video.is_depth_map": False}})
    assert not any("depth" in warning for warning in accepted(root)["warnings"])


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
