"""Open-loop evaluation: errors against hand-made ones, the noise of each frame, refusals, and what the command writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dit4dit import Noise, Observation
from dit4dit.cli import main
from dit4dit.data.catalogue import catalogue
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.samples import Recording
from dit4dit.errors import ConfigError, InputError
from dit4dit.evaluation import openloop
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.action_error import ActionError

LIBERO_CAMERAS = ("observation.images.image", "observation.images.wrist_image")
LENGTHS = (12, 9, 17, 11)


@pytest.fixture(scope="module")
def recording(libero_data: Path) -> Recording:
    robot = catalogue().robot("libero_franka")
    return Recording.of(LeRobot.open(libero_data / "v2.1", standard=robot.modality), robot)


def evaluate(policy, recording: Recording, episodes, **options) -> list[openloop.Episode]:
    return list(openloop.evaluate(policy, recording, episodes, **{"every": 8, "seed": 3, "batch": 2, **options}))


def test_errors_add_up() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 5, 3, 2))
    mask = random.random((5, 3, 2)) < 0.6
    error, rest = ActionError(2), ActionError(2)
    error.add(a[:2], b[:2], mask[:2])
    rest.add(a[2:], b[2:], mask[2:])
    error += rest
    for d in range(2):
        wanted = (a - b)[..., d][mask[..., d]]
        assert error.mse[d] == pytest.approx((wanted**2).mean())
        assert error.mae[d] == pytest.approx(np.abs(wanted).mean())
    every = (a - b)[mask]
    assert error.total == pytest.approx({"mse": (every**2).mean(), "mae": np.abs(every).mean()})
    blank = ActionError(2)
    blank.add(a, b, np.zeros(a.shape, dtype=bool))
    assert blank.to_dict(("x", "y"))["mae"] == {"x": None, "y": None}


def test_the_policy_sees_what_was_recorded(libero_policy, recording: Recording, libero_episode) -> None:
    """Episode 2 by hand, from the arrays that were written: frames 0, 8 and 16 of 17; the last chunk has one row to compare."""
    (found,) = evaluate(libero_policy, recording, [2])
    columns, pictures = libero_episode(2, 17)
    keys = [key.name for key in libero_policy.embodiment.state]
    start, units, normalized = sum(LENGTHS[:2]), [], []
    for frame in (0, 8, 16):
        views = dict(zip(libero_policy.embodiment.views, (pictures[c][frame] for c in LIBERO_CAMERAS), strict=True))
        state = {key: columns["observation.state"][frame, i : i + 1] for i, key in enumerate(keys)}
        noise = Noise.from_seed(3, start + frame)
        chunk = libero_policy.infer(Observation(images=views, state=state), "task 0", noise=noise)
        truth = columns["action"][frame : frame + 8]
        units.append(chunk.actions[: len(truth)] - truth)
        normalized.append(chunk.normalized[: len(truth), :7] - libero_policy.codec.action.forward(truth)[:, :7])
    units, normalized = np.concatenate(units), np.concatenate(normalized)
    assert (found.points, list(found.rows)) == ((0, 8, 16), list(range(17)))
    assert (found.index, found.task, found.length) == (2, "task 0", 17)
    np.testing.assert_allclose(found.units.mse, (units**2).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.units.mae, np.abs(units).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.normalized.mae, np.abs(normalized).mean(axis=0), rtol=1e-3)
    np.testing.assert_array_equal(found.recorded, columns["action"])


def test_an_episode_does_not_depend_on_the_others_and_the_seed_matters(libero_policy, recording: Recording) -> None:
    alone = evaluate(libero_policy, recording, [1])[0]
    again = evaluate(libero_policy, recording, [0, 1])[1]
    np.testing.assert_array_equal(alone.predicted, again.predicted)
    assert not np.array_equal(evaluate(libero_policy, recording, [1], seed=4)[0].predicted, alone.predicted)


def test_only_rows_that_would_be_executed_are_compared(libero_policy, recording: Recording) -> None:
    often, rarely = (evaluate(libero_policy, recording, [0], every=every)[0] for every in (5, 11))
    assert (often.points, list(often.rows)) == ((0, 5, 10), list(range(12)))
    # a chunk has 8 rows: of frames 8 to 10 nothing is predicted
    assert (rarely.points, list(rarely.rows)) == ((0, 11), [*range(8), 11])
    assert often.units.sums[2].tolist() == [12] * 7


def test_episodes_are_chosen_by_number(recording: Recording) -> None:
    assert openloop.choose_episodes(recording, []) == [0, 1, 2, 3]
    assert openloop.choose_episodes(recording, [3, 1]) == [1, 3]
    with pytest.raises(InputError, match=r"--episodes 9: .* has no such episode; it has 0 to 3"):
        openloop.choose_episodes(recording, [9])


def test_damaged_episodes_are_left_out_unless_they_are_named(write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    robot = catalogue().robot("libero_franka")
    spoilt = Recording.of(LeRobot.open(root, standard=robot.modality), robot)
    assert openloop.choose_episodes(spoilt, []) == [0, 2, 3]
    with pytest.raises(InputError, match=r"--episodes 1: damaged: .*episode_000001\.parquet"):
        openloop.choose_episodes(spoilt, [1])


def test_a_data_set_of_another_robot_is_refused(gr1_policy, recording: Recording) -> None:
    with pytest.raises(
        InputError, match="views: the checkpoint's robot 'gr1' wants ego_view, the data set has primary_im"
    ):
        openloop.check_fits(recording, gr1_policy.embodiment)


def test_the_robot_is_the_checkpoints_or_must_be_named() -> None:
    known = catalogue()
    assert openloop.choose_robot(known, None, EMBODIMENTS["libero"]).name == "libero_franka"
    assert openloop.choose_robot(known, "oxe_bridge", EMBODIMENTS["libero"]).name == "oxe_bridge"
    with pytest.raises(ConfigError, match="--robot: the checkpoint does not say its robot; choose one of"):
        openloop.choose_robot(known, None, None)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["eval", "openloop", *map(str, words)])
    return int(end.value.code or 0)


def test_the_command(small_libero: Path, libero_data: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    out = tmp_path / "out"
    data = Path(shutil.copytree(libero_data / "v3.0", tmp_path / "data"))
    rows = data / "data/chunk-000/file-000.parquet"
    table = pq.read_table(rows)
    times = pa.array(np.asarray(table["timestamp"]) + 9 * (np.arange(len(table)) == 5), pa.float32())
    table = table.set_column(table.column_names.index("timestamp"), "timestamp", times)
    actions = np.stack(table["action"].to_numpy())
    actions[15, 6] = -1  # of episode 1, which is not looked at below
    actions = pa.array(list(actions), table.schema.field("action").type)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", actions), rows)
    words = [data, "--checkpoint", small_libero, "--device", "cpu", "--out", out]
    assert run(*words, "--episodes", 0, 2, "--plots", 1, "--seed", 3) == 0
    said = capsys.readouterr().out
    assert "MAE, robot units" in said
    assert said.count("note: column 'timestamp' is not even at the 10 fps of info.json") == 1
    assert said.count("note: action.gripper: 2.04 % of 49 values lie outside -0.1..1.1 (seen -1 to 1)") == 1
    assert "2 episodes, 5 chunks, one every 8 frames" in said
    summary = json.loads((out / "openloop.json").read_text())
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert [line["episode"] for line in lines] == [0, 2]
    assert (summary["actions"], summary["chunks"], summary["every"], summary["seed"]) == (29, 5, 8, 3)
    assert summary["policy"]["embodiment"] == "libero"
    for kind in ("mse", "mae"):
        for units in ("robot_units", "normalized"):
            mean = {
                n: (12 * lines[0][units][kind][n] + 17 * lines[1][units][kind][n]) / 29
                for n in summary[units][kind]
                if n != "total"
            }
            assert summary[units][kind] == pytest.approx(mean)
    assert list(summary["robot_units"]["mae"]) == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    (plot,) = (out / "plots").iterdir()
    assert plot.name == "episode_000000.png"
    assert len(np.unique(np.asarray(Image.open(plot).convert("RGB")).reshape(-1, 3), axis=0)) > 50
    page = (out / "index.html").read_text()
    assert "plots/episode_000000.png" in page
    assert "gripper" in page
    assert run(*words) == 2
    assert f"--out {out}: has a result already" in capsys.readouterr().err


def test_mistakes_are_one_line(small_libero: Path, libero_data: Path, tmp_path: Path, capsys) -> None:
    words = [libero_data / "v3.0", "--checkpoint", small_libero, "--device", "cpu", "--out", tmp_path / "out"]
    for more, message in (
        (("--robot", "fourier_gr1_arms_waist"), "no state 'left_arm'"),
        (("--robot", "libero_frank"), "did you mean 'libero_franka'?"),
        (("--every", 0), "--every: expected at least 1, got 0"),
        (("--episodes", 7), "--episodes 7: "),
    ):
        assert run(*words, *more) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert message in said
    assert not (tmp_path / "out").exists()


def test_a_robot_of_the_users_own(small_libero: Path, libero_data: Path, tmp_path: Path) -> None:
    """Its embodiment is made of its file and the data set; tag and sizes are the checkpoint's."""
    robots = tmp_path / "mine.yaml"
    keys = "[x, y, z, roll, pitch, yaw, {}gripper]"
    modality = json.dumps(catalogue().robot("libero_franka").modality)
    robots.write_text(
        "robots:\n  my_arm:\n    tag: franka\n    video: [primary_image, wrist_image]\n"
        f"    state: {keys.format('pad, ')}\n    action: {keys.format('')}\n    sin_cos_state: true\n    action_steps: 8\n"
        f"    language: annotation.human.action.task_description\n    modality: {modality}\n"
    )
    out = tmp_path / "out"
    words = [
        libero_data / "v2.0",
        "--checkpoint",
        small_libero,
        "--device",
        "cpu",
        "--robots",
        robots,
        "--robot",
        "my_arm",
    ]
    assert run(*words, "--out", out, "--episodes", 1) == 0
    assert json.loads((out / "openloop.json").read_text())["policy"]["embodiment"] == "my_arm"
