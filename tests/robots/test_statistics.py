"""dataset_statistics.json as strangers write it: what is read, what is refused, and what is only told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit.checkpoints import native
from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.robot import for_checkpoint
from dit4dit.data import statistics
from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.errors import CheckpointError, ConfigError, DataError
from dit4dit.files import json_files
from dit4dit.robots import EMBODIMENTS, LIBERO
from dit4dit.robots.statistics import parse, read_statistics

GOOD = {"mean": [0], "std": [1], "min": [0], "max": [1], "q01": [0], "q99": [1]}
TWO = {"mean": [0.5, 2], "std": [1, 0], "min": [0, 2], "max": [1, 2.5], "q01": [0, 2], "q99": [1, 2]}
LARGEST = float(np.finfo(np.float32).max)


def test_what_is_read() -> None:
    found = parse({"t": {"action": {**TWO, "mask": [1, False]}}}, "t", "f").action
    assert found.mean.tolist() == [0.5, 2.0]
    assert found.max.tolist() == [1.0, 2.5]
    assert (found.mask.tolist(), found.mask.dtype) == ([True, False], np.dtype(bool))
    assert parse({"t": {"action": TWO}}, "t", "f").action.mask.tolist() == [True, True]
    edge = parse({"t": {"action": {**GOOD, "min": [-LARGEST], "max": [LARGEST]}}}, "t", "f").action
    assert (edge.min[0], edge.max[0]) == (-LARGEST, LARGEST)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max": ["high"]}, "f: t.action.max: expected a list of numbers, got ['high']"),
        ({"max": ["1.0"]}, "f: t.action.max: expected a list of numbers, got ['1.0']"),
        ({"max": "1"}, "f: t.action.max: expected a list of numbers, got '1'"),
        ({"std": [True]}, "f: t.action.std: expected a list of numbers, got [True]"),
        ({"max": [None]}, "max: expected a list of numbers"),
        ({"max": [[1]]}, "max: expected a list of numbers, got [[1]]"),
        ({"max": [1, [2]]}, "max: expected a list of numbers, got [1, [2]]"),
        ({"max": {"0": 1}}, "max: expected a list of numbers"),
        ({"mean": 1.0}, "mean: expected a list of numbers"),
        ({"max": [1, 2]}, "max: expected 1 numbers as in mean, got 2"),
        ({"max": [float("inf")]}, "max: expected a finite number within float32 (+-3.4e+38) in dimension 0, got inf"),
        ({"mean": [float("nan")]}, "mean: expected a finite number within float32 (+-3.4e+38) in dimension 0, got nan"),
        ({"min": [-1e308], "max": [1e308]}, "min: expected a finite number within float32"),
        ({"max": [3.5e38]}, "max: expected a finite number within float32 (+-3.4e+38) in dimension 0, got 3.5e+38"),
        ({"max": [10**400]}, "max: expected a finite number within float32"),
        ({"std": [-1e-9]}, "std: expected at least 0 in dimension 0, got -1e-09"),
        ({"min": [2]}, "min is above max in dimension 0: 2 and 1; make the statistics again"),
        ({"q01": [2]}, "q01 is above q99 in dimension 0: 2 and 1"),
        ({"mask": [True, True]}, "mask: expected 1 values true or false (or 1 and 0), got [True, True]"),
        ({"mask": ["false"]}, "mask: expected 1 values true or false"),
        ({"mask": [2]}, "mask: expected 1 values true or false"),
        ({"mask": [0.0]}, "mask: expected 1 values true or false"),
        ({"mask": [[True]]}, "mask: expected 1 values true or false"),
        ({"mask": True}, "mask: expected 1 values true or false"),
        ({"mask": None}, "mask: expected 1 values true or false"),
    ],
)
def test_what_makes_a_number_wrong_is_refused(change, message) -> None:
    for part in ("action", "state"):
        whole = {"action": GOOD} | {part: {**GOOD, **change}}
        with pytest.raises(ConfigError) as caught:
            parse({"t": whole}, "t", "f")
        assert message.replace("t.action", f"t.{part}") in str(caught.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"f: t.action: missing 'q99'"):
        parse({"t": {"action": {k: v for k, v in GOOD.items() if k != "q99"}}}, "t", "f")
    with pytest.raises(ConfigError, match=r"expected an object with mean, std, min, max, q01 and q99, got \[1\]"):
        parse({"t": {"action": [1]}}, "t", "f")


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999", "-1e308"])
def test_what_python_reads_as_json_and_is_no_number(libero_run: Path, token: str) -> None:
    """Python's json writes and reads NaN and Infinity; 1e999 is JSON, and infinite where it is read."""
    file = libero_run / "dataset_statistics.json"
    data = json.loads(file.read_text())
    data["franka"]["action"]["min"][2] = 12345.5
    file.write_text(json.dumps(data).replace("12345.5", token))
    checkpoint = open_checkpoint(libero_run)
    with pytest.raises(ConfigError, match=rf"statistics of {libero_run}.*franka.action.min: .* in dimension 2, got "):
        for_checkpoint(checkpoint, None)


def test_a_number_of_thousands_of_digits_is_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "dataset_statistics.json"
    for text in ("1" * 5000, "[" * 100_000):
        file.write_text('{"t": ' + text + "}")
        with pytest.raises(CheckpointError, match="not valid JSON"):
            read_statistics(file)


def spoil(run: Path, **changes: float) -> Path:
    """The checkpoint with min = max = the value for the action dimensions of that name."""
    file = run / "dataset_statistics.json"
    data = json.loads(file.read_text())
    vector = data["franka"]["action"]
    for name, value in changes.items():
        for key in ("mean", "min", "max", "q01", "q99"):
            vector[key][LIBERO.action_names.index(name)] = value
        vector["std"][LIBERO.action_names.index(name)] = 0.0
    file.write_text(json.dumps(data))
    return run


def test_what_never_moved_is_that_constant_and_one_warning(libero_run: Path, caplog) -> None:
    checkpoint = open_checkpoint(spoil(libero_run, y=0.0, yaw=0.25, gripper=0.0))
    with caplog.at_level(logging.WARNING):
        codec = for_checkpoint(checkpoint, None)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"statistics of {checkpoint.path}: statistics 'franka': 2 of 7 action dimensions never moved in the data, and are always "
        "sent as the one value that they had: y = 0, yaw = 0.25"
    ), "the gripper's mode is none: statistics do not scale it"
    y = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    out = codec.action.inverse(y)
    assert out[:, 1].tolist() == [0.0] * 3
    assert out[:, 5].tolist() == [0.25] * 3
    assert (out[:, 6] == (y[:, 6] >= 0.5)).all()


def test_statistics_without_such_dimensions_are_not_remarked_on(libero_run: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        for_checkpoint(open_checkpoint(libero_run), None)
    assert caplog.records == []


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_statistics_that_are_all_zero_give_zeros(name: str) -> None:
    robot = EMBODIMENTS[name]
    entry = {
        part: {key: [0.0] * size for key in GOOD} | {"mask": [True] * size}
        for part, size in (("action", robot.action_dim), ("state", robot.state_dim))
    }
    found = parse({robot.tag: entry}, robot.tag, "f")
    scaled = np.array([key.normalization not in ("none", "binary") for key in robot.action for _ in range(key.dim)])
    assert f"{scaled.sum()} of {robot.action_dim} action dimensions never moved" in robot.never_moved(found)
    out = robot.action_chain(found, robot.action_dim).inverse(np.ones((2, robot.action_dim), np.float32))
    assert (out[:, scaled] == 0).all()


def test_nothing_that_is_no_number_is_written(libero_data: Path, tmp_path: Path) -> None:
    data = LeRobot.open(libero_data / "v2.1")
    with pytest.raises(DataError, match=r"v2\.1: column 'action': mean of position 3 is nan"):
        statistics._cached(data, "action", (), "spoilt", lambda x: np.where(np.arange(7) == 3, np.nan, x))
    with pytest.raises(ValueError, match="Out of range float"):
        native.write_json(tmp_path / "statistics.json", {"franka": {"action": {"mean": [float("nan")]}}})
    with pytest.raises(ValueError, match="Out of range float"):
        json_files.write_json(tmp_path / "statistics.json", {"franka": [float("inf")]}, allow_nan=False)
    assert list(tmp_path.iterdir()) == []


def test_what_hardly_ever_moved_is_told_as_that() -> None:
    """Mode q99 knows nothing of the hundredth that did: what is sent is the value of all others."""
    robot = replace(LIBERO, action=tuple(replace(key, normalization="q99") for key in LIBERO.action[:6]), gripper=None)
    entry = {name: [value] * 6 for name, value in zip(GOOD, (0, 1, -0.5, 0.5, -0.4, 0.4), strict=True)}
    entry |= {"q01": [0, -0.4, 0.25, *[-0.4] * 3], "q99": [0, 0.4, 0.25, *[0.4] * 3]}
    entry["min"][2] = entry["max"][2] = 0.25
    assert robot.never_moved(parse({"t": {"action": entry}}, "t", "f")) == (
        "statistics 't': 2 of 6 action dimensions hardly ever, or never, moved in the data, and are always sent as the one value "
        "that they had: x = 0 (of -0.5 to 0.5), z = 0.25"
    )


def test_a_mixture_says_what_never_moved(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set", lengths=(9, 9))
    for file in root.rglob("*.parquet"):
        table = pq.read_table(file)
        rows = np.stack(table["action"].to_numpy())
        rows[:, 2] = 0.5
        kind = table.schema.field("action").type
        pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(list(rows), kind)), file)
    (note,) = Mixture.open([Entry("set", "libero_franka")], tmp_path, catalogue()).notes
    assert note == (
        "statistics 'franka': 1 of 7 action dimensions never moved in the data, and are always sent as the one value that they "
        "had: z = 0.5"
    )
