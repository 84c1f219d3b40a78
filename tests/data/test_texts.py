"""Instructions, keys and cameras as other tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strangers import (
    CAMERAS,
    LENGTHS,
    ROBOT,
    accepted,
    column,
    info,
    lines,
    mixture,
    refused,
)

from dit4dit.data.check import check
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.modality import from_features
from dit4dit.errors import DataError

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


def test_marks_that_json_need_not_escape_end_no_line(copy) -> None:
    """As lerobot writes them."""
    root = copy("v2.1")
    marked = "lift\u2028the\u2029green\x85cup"
    path = root / "meta/tasks.jsonl"
    items = [{"task_index": 0, "task": marked}, {"task_index": 1, "task": "task 1"}]
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5
    assert accepted(root)["tasks"] == {marked: 29, "task 1": 20}


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


def test_other_files_of_lines_are_cut_at_line_feeds_only(tmp_path: Path) -> None:
    """Instructions for `serve` and examples for `calibrate`; a log whose last line was not ended."""
    from dit4dit.commands.calibrate import read_examples
    from dit4dit.commands.shell import read_lines
    from dit4dit.training.logs import _cut

    path = tmp_path / "lines"
    path.write_text("\ufefflift\u2028it\r\n\nput\x85it\n", encoding="utf-8", newline="")
    assert read_lines(path) == ["lift\u2028it", "put\x85it"]
    examples = [json.dumps({"images": [], "instruction": f"go{c}on"}, ensure_ascii=False) for c in "\u2028\x85"]
    path.write_text("\ufeff" + "\r\n".join(examples), encoding="utf-8", newline="")
    assert [example.instruction for example in read_examples(path)] == ["go\u2028on", "go\x85on"]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert _cut(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


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
