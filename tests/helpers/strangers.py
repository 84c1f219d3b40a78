"""Data sets spoilt as other tools leave them, and what training and `data check` have to say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.errors import DataError

CAMERAS = ("observation.images.image", "observation.images.wrist_image")
KNOWN = catalogue()
ROBOT = KNOWN.robot("libero_franka")
LENGTHS = (12, 9, 17, 11)
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
Change = Callable[[list[dict[str, Any]]], object]


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


def twice(change: dict[str, Any]) -> Change:
    return lambda items: items.append({**items[1], **change})
