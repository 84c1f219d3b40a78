"""Exact statistics, how mixtures merge them, and the commands that show them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.data.statistics import NAMES, flat_statistics, merge
from dit4dit.errors import ConfigError
from dit4dit.robots import LIBERO
from dit4dit.robots import statistics as stats

LENGTHS = (12, 9, 17, 11)


def numpys(x: np.ndarray) -> dict[str, np.ndarray]:
    x = x.astype(np.float64)
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    return dict(zip(NAMES, (x.mean(0), x.std(0), x.min(0), x.max(0), q01, q99), strict=True))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_they_are_exact(libero_data: Path, libero_episode, version: str) -> None:
    whole = np.concatenate([libero_episode(i, n)[0]["action"] for i, n in enumerate(LENGTHS)])
    found = flat_statistics(LeRobot.open(libero_data / version), "action")
    for name, want in numpys(whole).items():
        np.testing.assert_allclose(found[name], want, rtol=1e-12, err_msg=name)


def test_episodes_can_be_left_out(libero_data: Path, libero_episode) -> None:
    rest = np.concatenate([libero_episode(i, LENGTHS[i])[0]["action"] for i in (0, 2, 3)])
    found = flat_statistics(LeRobot.open(libero_data / "v2.1"), "action", without={1})
    np.testing.assert_allclose(found["mean"], rest.astype(np.float64).mean(0), rtol=1e-12)


def test_they_are_cached_by_content(libero_data: Path, write_libero, tmp_path: Path, monkeypatch) -> None:
    from dit4dit.data import statistics

    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))  # where no other test has left what it computed
    first = flat_statistics(LeRobot.open(libero_data / "v2.1"), "action")
    copy = LeRobot.open(write_libero(tmp_path / "elsewhere", version="v3.0"))
    monkeypatch.setattr(statistics, "_exact", lambda values: pytest.fail("computed again"))
    again = flat_statistics(copy, "action")
    assert all(np.array_equal(first[name], again[name]) for name in NAMES)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        flat_statistics(copy, "action", without={0})


def test_merging_is_the_published_one() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.normal(i, 1 + i, (100 + 50 * i, 3)) for i in range(3)]
    weights = [1.0, 2.0, 5.0]
    found = merge([numpys(x) for x in sets], weights)
    w = np.array(weights) / 8
    mean = sum(wi * x.mean(0) for wi, x in zip(w, sets, strict=True))
    std = np.sqrt(sum(wi * (x.std(0) ** 2 + x.mean(0) ** 2) for wi, x in zip(w, sets, strict=True)) - mean**2)
    np.testing.assert_allclose(found["mean"], mean)
    np.testing.assert_allclose(found["std"], std)
    for name, outermost in (("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(found[name], outermost([getattr(x, name)(0) for x in sets], axis=0))
    np.testing.assert_allclose(found["q01"], np.min([np.quantile(x, 0.01, axis=0) for x in sets], axis=0))
    np.testing.assert_allclose(found["q99"], np.max([np.quantile(x, 0.99, axis=0) for x in sets], axis=0))
    # values that never move: rounding must not take the root of less than nothing
    still = merge([numpys(np.full((4, 3), [0.1, 1.1, 123.4]))] * 3, [3.0, 3.0, 1.0])
    np.testing.assert_allclose(still["std"], 0, atol=1e-5)
    # weights in proportion to the lengths: the pooled spread is that of all values together
    pooled = merge([numpys(x) for x in sets], [len(x) for x in sets])
    np.testing.assert_allclose(pooled["std"], np.concatenate(sets).std(0))


def test_a_mixture_of_one_set_twice_is_that_set(libero_data: Path) -> None:
    entries = [Entry("v2.1", "libero_franka"), Entry("v3.0", "libero_franka", weight=3.0)]
    both = Mixture.open(entries, libero_data, catalogue()).statistics["franka"]
    alone = Mixture.open(entries[:1], libero_data, catalogue()).statistics["franka"]
    for part in ("action", "state"):
        for name in NAMES:
            np.testing.assert_allclose(both[part][name], alone[part][name], rtol=1e-9, atol=1e-12)
    assert (alone["num_transitions"], alone["num_trajectories"]) == (49, 4)
    assert (both["num_transitions"], both["num_trajectories"]) == (98, 8)


@pytest.mark.parametrize("change", ["state: [x, z]", "action: [x, y]", "sin_cos_state: true"])
def test_one_tag_means_one_set_of_keys(libero_data: Path, tmp_path: Path, change: str) -> None:
    facts = {
        "tag": "arm",
        "video": ["primary_image"],
        "state": ["x", "y"],
        "action": ["x", "gripper"],
        "action_steps": 8,
    }
    facts |= {"language": "annotation.human.action.task_description", "sin_cos_state": False}
    facts["modality"] = catalogue().robot("libero_franka").modality
    says = facts | {"kinds": {"action.x": "relative"}}  # of the other nothing is said
    robots = {"one": facts, "same": says, "against": facts | {"kinds": {"action.x": "position"}}}
    robots["other"] = facts | yaml.safe_load(change)
    (tmp_path / "my.yaml").write_text(json.dumps({"robots": robots}))
    known = catalogue(tmp_path / "my.yaml")
    same = [Entry("v2.1", "one"), Entry("v3.0", "same")]
    mixed = Mixture.open(same, libero_data, known)
    assert set(mixed.statistics) == {"arm"}
    assert [recording.embodiment.action[0].kind for recording in mixed.recordings] == ["relative"] * 2
    with pytest.raises(
        ConfigError, match=r"'against': action.x is relative in .* and position in .* tags of their own"
    ):
        Mixture.open([*same, Entry("v3.0", "against")], libero_data, known)
    with pytest.raises(
        ConfigError, match="tag 'arm': robots 'one' and 'other' have other keys; give them tags of their"
    ):
        _ = Mixture.open([Entry("v2.1", "one"), Entry("v3.0", "other")], libero_data, known).statistics


def test_the_file_has_the_published_layout(golden_dir: Path, libero_data: Path) -> None:
    published = json.loads((golden_dir / "libero_tiny" / "dataset_statistics.json").read_text())
    ours = Mixture.open([Entry("v2.1", "libero_franka")], libero_data, catalogue()).statistics
    assert set(ours) == set(published) == {"franka"}
    for part in ("action", "state"):
        assert set(ours["franka"][part]) == set(published["franka"][part])
        assert {k: len(v) for k, v in ours["franka"][part].items()} == {
            k: len(v) for k, v in published["franka"][part].items()
        }
    assert ours["franka"]["action"]["mask"] == published["franka"]["action"]["mask"]
    parsed = stats.parse(ours, "franka", "here")
    assert LIBERO.action_chain(parsed, 8).forward(np.zeros((2, 7), np.float32)).shape == (2, 8)


def test_the_stats_command(main, libero_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "dataset_statistics.json"
    code, text, _ = main("stats", libero_data / "v2.1", libero_data / "v3.0", "--robot", "libero_franka", "--out", out)
    assert code == 0
    assert "franka: 98 frames of 8 episodes" in text
    assert stats.parse(json.loads(out.read_text()), "franka", "file").action.size == 7
    code, text, _ = main("stats", libero_data / "v3.0")
    assert code == 0
    assert "observation.state" in text
    code, _, error = main("stats", libero_data / "v3.0", "--robot", "libero_frank")
    assert (code, "did you mean 'libero_franka'" in error) == (2, True)
    code, _, error = main("stats")
    assert (code, "give data set folders, or --mixture" in error) == (2, True)


def test_a_recipes_model_is_held_against_the_data(main, libero_data: Path, tmp_path: Path) -> None:
    """In `stats` and `data check` as a training run would say it."""
    words = "embodiment 'libero': its actions have 7 values, the model takes at most 3 (head.action_dim)"
    both = ("--robot", "libero_franka", "--recipe")
    code, _, error = main("stats", libero_data / "v2.1", *both, "tabletop")
    assert (code, words in error, "--model.head.action_dim 7" in error) == (2, True, True)
    check = ("data", "check", libero_data / "v2.1", "--no-decode", "--out", tmp_path / "sheet")
    code, text, _ = main(*check, *both, "tabletop")
    assert (code, words in text, "4 episodes, 49 frames: 1 error" in text) == (1, True, True)
    (found,) = json.loads((tmp_path / "sheet" / "check.json").read_text())["datasets"]
    assert [error["file"] for error in found["errors"]] == [str(libero_data / "v2.1")]
    assert main("stats", libero_data / "v2.1", *both, "libero")[0] == 0
    assert main(*check, *both, "libero")[0] == 0
    for command, needs in (
        (("stats", libero_data / "v2.1"), "--recipe need --robot"),
        (check, "--recipe needs --robot"),
    ):
        code, _, error = main(*command, "--recipe", "libero")
        assert (code, needs in error) == (2, True)
    code, _, error = main(*check, *both, "libro")
    assert (code, "--recipe libro: unknown; did you mean 'libero'?" in error) == (2, True)


def test_one_robot_that_does_not_fit_costs_no_other_set_its_check(main, libero_data: Path, tmp_path: Path) -> None:
    """Sizes that the policy does not know are an error of that set."""
    from dit4dit.data import Writer

    wide = json.loads(json.dumps(catalogue().robots["libero_franka"].modality))
    wide["action"]["gripper"] = {**wide["action"]["gripper"], "start": 5}
    with Writer(tmp_path / "wide", 10, modality=wide) as writer:
        images = {f"observation.images.{name}": np.zeros((2, 16, 16, 3), np.uint8) for name in ("image", "wrist_image")}
        columns = {"observation.state": np.zeros((2, 8), np.float32), "action": np.zeros((2, 7), np.float32)}
        writer.add(columns, images, "go")
    sets = (tmp_path / "wide", libero_data / "v2.1")
    code, text, _ = main("data", "check", *sets, "--robot", "libero_franka", "--no-decode", "--out", tmp_path / "sheet")
    assert code == 1
    assert (
        "action.gripper: robot 'libero_franka' has 1 values there, the data set 2; choose another robot, or correct"
        in text
    )
    assert "4 episodes, 49 frames: ok" in text


def test_a_single_episode_is_worth_a_warning(libero_data: Path, write_libero, tmp_path: Path) -> None:
    """Training, which holds episodes out unless it is told otherwise, would not start."""
    from dit4dit.data.check import check

    robot = catalogue().robot("libero_franka")
    alone = check(write_libero(tmp_path / "one", lengths=(9,)), robot=robot, decode=False)
    assert [w for w in alone["warnings"] if "--data.holdout 0" in w]
    several = check(libero_data / "v2.1", robot=robot, decode=False)
    assert not [w for w in several["warnings"] if "--data.holdout 0" in w]


def test_the_stats_command_for_a_mixture_of_the_users(main, libero_data: Path, tmp_path: Path) -> None:
    own = tmp_path / "my.yaml"
    own.write_text("mixtures:\n  mine:\n    - {dataset: v2.1, robot: libero_franka, fps: 10}\n")
    code, text, _ = main("stats", "--mixture", "mine", "--root", libero_data, "--robots", own)
    assert code == 0
    assert "franka: 49 frames of 4 episodes" in text


def test_the_check_command(main, libero_data: Path, write_libero, tmp_path: Path) -> None:
    out = tmp_path / "sheet"
    code, text, _ = main("data", "check", libero_data / "v3.0", "--robot", "libero_franka", "--out", out)
    assert code == 0
    assert "4 episodes, 49 frames: ok" in text
    found = json.loads((out / "check.json").read_text())["datasets"][0]
    assert found["tasks"] == {"task 0": 29, "task 1": 20}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 * 2 + 2
    assert "task 1" in page

    root = write_libero(tmp_path / "set")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    code, text, _ = main("data", "check", root, tmp_path / "nothing", "--out", out)
    assert code == 1
    assert f"{root / 'data/chunk-000/episode_000001.parquet'}: no such file" in text
    assert "nothing: no LeRobot data set" in text
    assert "no such file" in (out / "index.html").read_text()


def test_one_file_of_many_episodes_is_told_once(main, write_libero, tmp_path: Path) -> None:
    root = write_libero(tmp_path / "set", version="v3.0")
    (root / "data/chunk-000/file-000.parquet").unlink()
    code, text, _ = main("data", "check", root, "--out", tmp_path / "sheet")
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("  error: ")]
    assert "file-000.parquet: no such file" in line
    assert line.endswith("(episode 0 and 2 more)")
    assert len(json.loads((tmp_path / "sheet" / "check.json").read_text())["datasets"][0]["errors"]) == 3


def test_the_check_decodes_what_headers_do_not_tell(write_libero, tmp_path: Path) -> None:
    from dit4dit.data.check import check

    root = write_libero(tmp_path / "set", lengths=(20, 20))
    path = root / "videos/chunk-000/observation.images.image/episode_000001.mp4"
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half - 8000 : half + 8000] = np.random.default_rng(0).integers(0, 256, 16000, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    assert check(root, decode=False)["errors"] == []
    (error,) = check(root)["errors"]
    assert (error["file"], error["episode"], error["column"]) == (str(path), 1, "observation.images.image")


def test_the_check_warns_of_what_is_allowed_and_odd(tmp_path: Path, libero_episode) -> None:
    from dit4dit.data.check import check
    from dit4dit.data.writer import Writer

    with Writer(tmp_path / "set", 10) as writer:
        for words in ("Open the drawer", "open  the drawer", " "):
            columns, pictures = libero_episode(0, 400)
            columns["action"][:, 2] = 1.0
            columns["action"][7, 3] = 1e4
            writer.add(columns, pictures, words)
    warnings = "\n".join(check(tmp_path / "set", decode=False)["warnings"])
    assert "action: constant at positions [2]" in warnings
    assert "action: outliers at positions [3]" in warnings
    assert "400 frames have an empty instruction" in warnings
    assert "differ only in case or spaces: 'open the drawer'" in warnings


def test_the_check_warns_of_videos_that_go_on(write_libero, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from dit4dit.data.check import check

    root = write_libero(tmp_path / "set")
    path = root / "data/chunk-000/episode_000002.parquet"
    pq.write_table(pq.read_table(path).slice(0, 16), path)
    (root / "meta/episodes.jsonl").write_text(
        (root / "meta/episodes.jsonl").read_text().replace('"length": 17', '"length": 16')
    )
    found = check(root, decode=False)
    assert found["errors"] == []
    video = root / "videos/chunk-000/observation.images.image/episode_000002.mp4"
    message = f"a video has more frames than its episode has rows, 2 times; the worst: {video}, episode 2: 1 more"
    assert message in found["warnings"]


def test_the_loader_benchmark(main, libero_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    words = (
        "--robot",
        "libero_franka",
        "--preset",
        "tiny",
        "--workers",
        "0",
        "1",
        "--batches",
        "2",
        "--batch-size",
        "2",
    )
    code, text, _ = main("bench", "loader", libero_data / "v2.1", *words, "--json", out)
    assert code == 0
    assert "samples/s" in text
    found = json.loads(out.read_text())
    assert [run["workers"] for run in found["runs"]] == [0, 1]
    assert 0 < found["share_of_time"]["decoding"] < 1
    assert found["machine"]["cpu"]


def test_a_missing_pyarrow_names_the_extra(libero_data: Path, monkeypatch) -> None:
    from dit4dit.data.files import read_table
    from dit4dit.errors import MissingExtra

    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Nothing(), *sys.meta_path])
    with pytest.raises(MissingExtra, match=r"pyarrow is not installed; pip install 'dit4dit\[train\]'"):
        read_table(libero_data / "v3.0" / "meta" / "tasks.parquet")


class _Nothing:
    """Stands for an environment without pyarrow."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
