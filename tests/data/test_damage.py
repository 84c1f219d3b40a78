"""Damaged data sets: one clear error each, naming file and row, or a counted skip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.columns import open_columns
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.meta import read_meta
from dit4dit.data.mixture import Mixture
from dit4dit.data.samples import Window
from dit4dit.errors import DataError
from dit4dit.presets import preset

LIBERO_CAMERAS = ("observation.images.image", "observation.images.wrist_image")
WINDOW = Window.for_model(preset("tiny").model)


def mixture(root: Path, **options) -> Mixture:
    return Mixture.open([Entry(root.name, "libero_franka")], root.parent, catalogue(), **options)


# Each spoils a copy of a v2.1 set with five episodes, and says what the message must name.

DATA = "data/chunk-000/episode_000002.parquet"
VIDEO = f"videos/chunk-000/{LIBERO_CAMERAS[1]}/episode_000002.mp4"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(column: str, change: Callable[[list], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        table = pq.read_table(path)
        values = table[column].to_pylist()
        change(values)
        kind = pa.list_(pa.float32()) if isinstance(values[0], list) else table.schema.field(column).type
        pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values, kind)), path)

    return apply


def put(row: int, value: object) -> Callable[[list], None]:
    return lambda values: values.__setitem__(row, value)


def spoil_nan(values: list) -> None:
    values[5][3] = float("nan")


def lines(change: Callable[[list[dict]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        items = [json.loads(line) for line in path.read_text().splitlines()]
        change(items)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))

    return apply


def set_fps(path: Path) -> None:
    path.write_text(path.read_text().replace('"fps": 10,', '"fps": 20,'))


DAMAGE = {
    "missing parquet": (DATA, Path.unlink, "no such file"),
    "truncated parquet": (DATA, truncate, "unreadable parquet"),
    "wrong shape": (DATA, edit("action", put(4, [1.0] * 6)), "row 4: column 'action': expected 7 values, got 6"),
    "NaN": (
        DATA,
        edit("observation.state", spoil_nan),
        "row 5: column 'observation.state': NaN or infinite value at position 3",
    ),
    "no value": (DATA, edit("action", put(3, None)), "row 3: column 'action': no value"),
    "unknown task index": (DATA, edit("task_index", put(6, 9)), "row 6: column 'task_index': unknown task index 9"),
    "short episode": (
        DATA,
        lambda p: pq.write_table(pq.read_table(p).slice(0, 10), p),
        "expected 17 rows one after another, got 10",
    ),
    "missing column": (
        DATA,
        lambda p: pq.write_table(pq.read_table(p).drop_columns(["action"]), p),
        "no column 'action'",
    ),
    "another rate": (
        DATA,
        edit("timestamp", lambda values: values.__setitem__(slice(None), [0.103 * i for i in range(len(values))])),
        "episode 2: column 'timestamp': the median step between rows is 0.103 s, info.json says 10 fps (0.1 s)",
    ),
    "missing mp4": (VIDEO, Path.unlink, "no such file"),
    "truncated mp4": (VIDEO, truncate, "unreadable video"),
    "empty episode": (
        "meta/episodes.jsonl",
        lines(lambda items: items[2].update(length=0)),
        "episode 2 is empty (length 0 in the meta folder)",
    ),
    "short video": (
        "meta/episodes.jsonl",
        lines(lambda items: items[2].update(length=18)),
        "expected 18 rows one after another, got 17",
    ),
}


@pytest.fixture
def spoiled(write_libero, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    def spoil(name: str) -> tuple[Path, Path]:
        root = write_libero(tmp_path / "set", lengths=(12, 9, 17, 11, 8))
        path = root / DAMAGE[name][0]
        DAMAGE[name][1](path)
        return root, path

    return spoil


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error_before_training_and_a_counted_skip_when_asked_for(name: str, spoiled) -> None:
    root, path = spoiled(name)
    where = root / DATA if path.suffix == ".jsonl" else path
    with pytest.raises(DataError) as caught:
        mixture(root)
    assert str(where) in str(caught.value)
    assert DAMAGE[name][2] in str(caught.value)

    made = mixture(root, skip_bad=True)
    assert {problem.episode for problem in made.skipped} == {2}
    assert made.notes[0].startswith("1 damaged episodes left out; the first: ")
    kept = made.episodes("train", 0.0, seed=0)[0]
    assert [made.recordings[0].data.meta.episodes[i].index for i in kept] == [0, 1, 3, 4]
    assert made.statistics["franka"]["num_trajectories"] == 4
    assert np.isfinite(made.statistics["franka"]["action"]["mean"]).all()


def test_the_instructions_of_a_mixture(libero_data: Path, write_libero, tmp_path: Path) -> None:
    assert mixture(libero_data / "v3.0").instructions == ("task 0", "task 1")
    root = write_libero(tmp_path / "set", lengths=(9, 8))
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    assert mixture(root, skip_bad=True).instructions == ("task 0",)


def test_damage_that_a_robot_does_not_read_does_not_stop_it(spoiled) -> None:
    root, _ = spoiled("truncated mp4")
    problems = LeRobot.open(root).columns.problems
    assert [(problem.episode, problem.column) for problem in problems] == [(2, LIBERO_CAMERAS[1])]
    assert LeRobot.open(root).problems({"action", LIBERO_CAMERAS[0]}) == []


def test_a_camera_that_a_robot_does_not_use_is_a_warning_of_its_check(spoiled, tmp_path: Path) -> None:
    """Opening the data set for that robot takes it; without a robot nobody knows what is used."""
    root, path = spoiled("truncated mp4")
    robots = tmp_path / "robots.yaml"
    robots.write_text(
        "robots: {arm: {video: [image], state: [state], action: [action], action_steps: 4,"
        " language: annotation.human.action.task_description}}"
    )
    known = catalogue(robots)
    assert Mixture.open([Entry("set", "arm")], tmp_path, known).notes == ()
    for decode in (True, False):
        found = check(root, robot=known.robot("arm"), decode=decode)
        assert found["errors"] == []
        (warning,) = [w for w in found["warnings"] if "does not use" in w]
        words = "1 errors in what arm does not use (observation.images.wrist_image), which training passes over; the first: "
        assert warning.startswith(f"{words}{path}: ")
        assert [error["column"] for error in check(root, decode=decode)["errors"]] == [LIBERO_CAMERAS[1]]


def test_another_rate_than_the_videos_is_an_error(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set", lengths=(9,))
    set_fps(root / "meta" / "info.json")
    with pytest.raises(DataError, match=r"the median step between rows is 0\.1 s, info\.json says 20 fps \(0\.05 s\)"):
        mixture(root)
    messages = [problem.message for problem in open_columns(read_meta(root)).problems]
    assert any("the video has 10 fps, info.json 20" in message for message in messages)


def test_another_rate_than_the_mixture_declares_is_an_error(libero_data: Path) -> None:
    entries = [Entry("v2.1", "libero_franka", fps=10)]
    assert Mixture.open(entries, libero_data, catalogue()).notes == ()
    with pytest.raises(DataError, match=r"info\.json: fps: the mixture declares 15, the data set has 10"):
        Mixture.open([Entry("v2.1", "libero_franka", fps=15)], libero_data, catalogue())


def test_mixed_rates_are_told(write_libero, libero_data: Path, tmp_path: Path, libero_episode) -> None:
    from dit4dit.data.writer import Writer

    with Writer(tmp_path / "fast", 25) as writer:
        writer.add(*libero_episode(0, 12), "go")
    entries = [Entry(str(tmp_path / "fast"), "libero_franka"), Entry(str(libero_data / "v3.0"), "libero_franka")]
    (note,) = Mixture.open(entries, Path(), catalogue()).notes
    assert note.startswith("mixed frame rates")
    assert "fast 25" in note
    assert "v3.0 10 fps" in note


@pytest.mark.parametrize(
    "file,change,message",
    [
        (
            "meta/info.json",
            lambda t: t.replace("v2.1", "v1.6"),
            "codebase_version: expected one of v2.0, v2.1, v3.0, got 'v1.6'",
        ),
        ("meta/info.json", lambda t: t.replace('"fps": 10,', '"fps": null,'), "fps: expected a number, got None"),
        ("meta/info.json", lambda t: t[:-20], "not valid JSON"),
        ("meta/tasks.jsonl", lambda t: t + "{", "tasks.jsonl, line 3: not valid JSON"),
        (
            "meta/episodes.jsonl",
            lambda t: t.replace('"length": 9', '"length": "9"'),
            "line 2: length: expected int, got '9'",
        ),
        ("meta/episodes.jsonl", lambda t: "", "no episodes"),
    ],
)
def test_a_damaged_meta_folder_is_named(write_libero, tmp_path: Path, file: str, change, message: str) -> None:
    root = write_libero(tmp_path / "set")
    before = (root / file).read_text()
    (root / file).write_text(change(before))
    assert (root / file).read_text() != before
    with pytest.raises(DataError) as caught:
        read_meta(root)
    assert message in str(caught.value)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize("file", ["meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"])
def test_a_damaged_v3_meta_folder_is_named(write_libero, tmp_path: Path, file: str) -> None:
    root = write_libero(tmp_path / "set", version="v3.0")
    truncate(root / file)
    with pytest.raises(DataError, match="unreadable parquet"):
        read_meta(root)
    (root / file).unlink()
    with pytest.raises(DataError, match=r"no such file|no parquet files"):
        read_meta(root)


def test_a_missing_v3_file_spoils_its_own_episodes_only(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set", version="v3.0")
    (root / "data/chunk-000/file-001.parquet").unlink()
    made = mixture(root, skip_bad=True)
    assert {problem.episode for problem in made.skipped} == {3}


def test_numbers_are_read_once_and_again_when_a_file_changes(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set")
    read: list[str] = []
    first = open_columns(read_meta(root), lambda what, done, of: read.append(what))
    assert len(read) == 4 + 8
    again = open_columns(read_meta(root), lambda what, done, of: pytest.fail("read again"))
    assert again.folder == first.folder
    found = again.read("action", 0)
    assert (type(found), type(found.base.base), found.flags.writeable) == (np.ndarray, np.memmap, False)
    edit("action", put(0, [9.0] * 7))(root / "data/chunk-000/episode_000000.parquet")
    changed = open_columns(read_meta(root))
    assert changed.folder != first.folder
    assert changed.read("action", 0)[0].tolist() == [9.0] * 7
    assert changed.digests["action"] != first.digests["action"]
    assert changed.digests["observation.state"] == first.digests["observation.state"]
