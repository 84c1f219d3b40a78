"""Rows as other tools leave them: one that was not read is an error where it is asked for, never a zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strangers import (
    EPISODES,
    LENGTHS,
    accepted,
    assert_values,
    column,
    info,
    mixture,
    refused,
    rows,
)

from dit4dit.data.columns import open_columns
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.meta import read_meta
from dit4dit.data.modality import Slice
from dit4dit.errors import DataError


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


def test_a_value_that_is_missing_within_a_row(copy) -> None:
    root = copy("v3.0")
    file = root / "data/chunk-000/file-000.parquet"
    action = pq.read_table(file)["action"].to_pylist()
    action[15][6] = None
    column(file, "action", action, pa.list_(pa.float32(), 7))
    refused(root, f"{file}, row 15: column 'action': no value")
    info(root, lambda data: data["features"].update(grasped={"dtype": "bool", "shape": [2], "names": None}))
    column(file, "action", [[0.0] * 7] * len(action), pa.list_(pa.float32(), 7))
    column(file, "grasped", [[True, None if i == 3 else False] for i in range(len(action))])
    problem = LeRobot.open(root).columns.problems[0]
    assert (problem.row, problem.column, problem.message) == (3, "grasped", "column 'grasped': no value")


def test_a_column_that_is_there_twice(copy) -> None:
    root = copy("v2.1")
    file = root / "data/chunk-000/episode_000002.parquet"
    table = pq.read_table(file)
    pq.write_table(table.append_column("action", table["observation.state"]), file)
    refused(root, f"{file}: column 'action' is there twice; write the file with each column once")


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


def test_rows_of_two_episodes_that_are_mixed(copy) -> None:
    root = copy("v3.0")
    info(root, lambda data: [data["features"].pop(name) for name in ("frame_index", "index")])
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table.slice(0, 6), table.slice(12, 9), table.slice(6, 6), table.slice(21)]), file)
    message = "episode 0: expected 12 rows one after another, got 12 with others between (the file has 38)"
    refused(root, f"{file}: {message}")
    assert [problem.episode for problem in mixture(root, skip_bad=True).skipped] == [0]


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


def test_rows_that_are_counted_from_another_number_than_0(copy) -> None:
    """Of an episode whose first rows were cut off, perhaps without its video's: told, because images are found by row."""
    root = copy("v2.1")
    file = root / "data/chunk-000/episode_000001.parquet"
    assert pq.read_table(file)["index"].to_pylist()[0] == 12  # `index` counts over the data set
    column(file, "frame_index", [5 + i for i in range(9)])
    words = (
        "1 episodes begin with another frame_index than 0; their first row goes with the video's first frame nevertheless; the "
        f"first: {file}, row 0: 5"
    )
    assert [w for w in accepted(root)["warnings"] if "frame_index" in w] == [words]
    assert mixture(root).notes == (f"set: {words}",)


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
