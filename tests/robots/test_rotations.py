"""Values that are to become another rotation and are none: an error with file and row, never a NaN in the statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.data.samples import Recording
from dit4dit.data.statistics import key_statistics
from dit4dit.errors import DataError
from dit4dit.robots.rotations import convert, no_rotation

NAN = float("nan")
RIGHT = [1.0, 0, 0, 0, 1, 0, 0, 0, 1]
ROTATIONS = {
    "quaternion": [[0.5, 0.5, 0.5, 0.5], [-3, 0, 0, 0], [0, 0.02, 0, 0]],
    "rotation_6d": [[1, 0, 0, 0, 1, 0], [0.1, 0, 0, 5, 0.1, 0]],
    "matrix": [RIGHT, [0, -1, 0, 1, 0, 0, 0, 0, 1.004]],
    "axis_angle": [[0, 0, 0], [9, 9, 9]],
    "euler_angles_rpy": [[0, 0, 0], [4, 0, 0]],
}
NONE = {
    "quaternion": [[0, 0, 0, 0], [1e-9, 0, 0, 0], [NAN, 0, 0, 1]],
    "rotation_6d": [[0] * 6, [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 2, 3, -2, -4, -6], [1, 0, 0, 0, NAN, 0]],
    "matrix": [
        [0] * 9,
        [1, 0, 0, 0, 1, 0, 0, 0, -1],
        [2, 0, 0, 0, 2, 0, 0, 0, 2],
        [1, 0, 0, 1, 0, 0, 0, 0, 1],
        [NAN] * 9,
    ],
    "axis_angle": [[0, float("inf"), 0]],
    "euler_angles_rpy": [[0, 0, NAN]],
}


@pytest.mark.parametrize("source", ROTATIONS)
def test_what_is_a_rotation_and_what_is_not(source: str) -> None:
    good = np.array(ROTATIONS[source], dtype=np.float32)
    assert no_rotation(good, source) is None
    for target in ("matrix", "rotation_6d", "quaternion", "axis_angle"):
        assert np.isfinite(convert(good, source, target)).all()
    for bad in NONE[source]:
        rows = np.vstack([good, [bad], good]).astype(np.float32)
        found = no_rotation(rows, source)
        assert found is not None
        assert found[0] == len(good)
        assert found[1].startswith("expected a rotation, got ")
        other = "matrix" if source != "matrix" else "quaternion"
        with pytest.raises(DataError, match=f"row {len(good)}: expected a rotation, got "):
            convert(rows, source, other)


@pytest.fixture
def turning(libero_data: Path, tmp_path: Path):
    """A data set and a robot whose state.turn, a quaternion, is to become a rotation_6d: (root, robots.yaml)."""

    def make(version: str) -> tuple[Path, Path]:
        root = Path(shutil.copytree(libero_data / version, tmp_path / "set"))
        turn = {"start": 2, "end": 6, "original_key": "observation.state", "rotation_type": "quaternion"}
        modality = {
            "state": {"turn": turn},
            "action": {"all": {"start": 0, "end": 7}},
            "video": {"top": {"original_key": "observation.images.image"}},
            "annotation": {"human.action.task_description": {"original_key": "task_index"}},
        }
        (root / "meta/modality.json").write_text(json.dumps(modality))
        own = tmp_path / "own.yaml"
        own.write_text(
            "robots: {arm: {language: annotation.human.action.task_description, action_steps: 4, video: [top],"
            " state: [turn], action: [all], target_rotations: {state.turn: rotation_6d}}}"
        )
        return root, own

    return make


def zero(path: Path, row: int) -> None:
    table = pq.read_table(path)
    values = table["observation.state"].to_pylist()
    values[row][2:6] = [0.0] * 4
    made = pa.array(values, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("observation.state"), "observation.state", made), path)


@pytest.mark.parametrize(
    "version,file,row", [("v2.1", "episode_000002.parquet", 5), ("v3.0", "file-000.parquet", 12 + 9 + 5)]
)
def test_a_zero_quaternion(turning, version: str, file: str, row: int) -> None:
    root, own = turning(version)
    known, path = catalogue(own), root / "data/chunk-000" / file
    entries = [Entry("set", "arm")]
    assert len(Mixture.open(entries, root.parent, known).statistics["new_embodiment"]["state"]["mean"]) == 6

    zero(path, row)
    message = "column 'observation.state', key 'turn': expected a rotation, got a quaternion of length 0: 0, 0, 0, 0"
    with pytest.raises(DataError) as caught:
        Mixture.open(entries, root.parent, known)
    assert str(caught.value).startswith(f"{path}, row {row}: {message}; `dit4dit data check` lists all")
    (error,) = check(root, robot=known.robot("arm"), decode=False)["errors"]
    assert (error["file"], error["row"], error["episode"], error["column"], error["message"]) == (
        str(path), row, 2, "observation.state", message
    )  # fmt: skip
    assert check(root, decode=False)["errors"] == []  # as numbers they are fine

    kept = Mixture.open(entries, root.parent, known, skip_bad=True)
    assert [problem.episode for problem in kept.skipped] == [2]
    found = kept.statistics["new_embodiment"]["state"]
    assert all(np.isfinite(values).all() for values in found.values())
    json.dumps(found, allow_nan=False)

    recording = Recording.of(LeRobot.open(root), known.robot("arm"))
    with pytest.raises(DataError, match="expected a rotation, got a quaternion of length 0"):
        key_statistics(recording.data, recording.state[0])
    with pytest.raises(DataError, match="expected a rotation"):
        recording.vector("state", 2, np.array([4, 5]))


def test_a_column_that_is_not_finite_has_no_statistics(turning) -> None:
    root, _ = turning("v2.1")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    values = table["action"].to_pylist()
    values[3][6] = NAN
    made = pa.array(values, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", made), path)
    from dit4dit.data.statistics import flat_statistics

    data = LeRobot.open(root)
    for _ in range(2):  # and nothing of it is kept
        with pytest.raises(DataError, match="column 'action': mean of position 6 is nan"):
            flat_statistics(data, "action")
    assert np.isfinite(flat_statistics(data, "action", without={1})["mean"]).all()
