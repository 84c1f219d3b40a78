"""Where a data set's files are: templates of info.json, and names that begin with a dot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from strangers import (
    CAMERAS,
    EPISODES,
    accepted,
    assert_values,
    info,
    refused,
)

from dit4dit.data.catalogue import Entry
from dit4dit.data.columns import open_columns
from dit4dit.data.files import fill
from dit4dit.data.meta import read_meta
from dit4dit.data.mixture import matching
from dit4dit.errors import DataError

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
