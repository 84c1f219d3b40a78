"""A data set whose gripper means something else than the robot's: found in the data, before anything is trained on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grippers import fingers, pick_and_place

from dit4dit.data import gripper
from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.data.samples import Recording
from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.errors import DataError
from dit4dit.robots import LIBERO, TABLETOP

MODALITY = catalogue().robot("libero_franka").modality
GOLDEN = Path(__file__).parents[1] / "golden"
Change = Callable[[np.ndarray], np.ndarray]


def write(root: Path, commands: list[np.ndarray], openings: list[np.ndarray], fps: float = 20) -> Path:
    """A set with LIBERO's keys and these grippers; pictures are small."""
    with Writer(root, fps, codec=VideoCodec.lossless(), episodes_per_file=100) as writer:
        for number, (command, opening) in enumerate(zip(commands, openings, strict=True)):
            rng = np.random.default_rng(number)
            n = len(command)
            columns = {f"{k}": rng.normal(size=(n, d)) for k, d in (("observation.state", 8), ("action", 7))}
            columns["action"][:, 6] = command
            columns["observation.state"][:, 6], columns["observation.state"][:, 7] = opening / 2, -opening / 2
            views = {f"observation.images.{v}": np.zeros((n, 16, 16, 3), np.uint8) for v in ("image", "wrist_image")}
            writer.add({k: v.astype(np.float32) for k, v in columns.items()}, views, "pick it up")
    return root


COMMANDS = [pick_and_place(np.random.default_rng(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes as LIBERO has them, 20 Hz."""
    root = tmp_path_factory.mktemp("right") / "set"
    return write(root, COMMANDS, [fingers(command, held=0.03) for command in COMMANDS])


@pytest.fixture
def theirs(right: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same set with other commands: theirs(change, name="theirs")."""

    def copy(change: Change, name: str = "theirs") -> Path:
        root = Path(shutil.copytree(right, tmp_path / name))
        for file in sorted(root.rglob("*.parquet")):
            table = pq.read_table(file)
            rows = np.stack(table["action"].to_numpy())
            rows[:, 6] = change(rows[:, 6])
            kind = table.schema.field("action").type
            pq.write_table(
                table.set_column(table.column_names.index("action"), "action", pa.array(list(rows), kind)), file
            )
        return root

    return copy


# How others write LIBERO's 1 = open, 0 = close, and what is said of it.
WRONG: dict[str, tuple[Change, str]] = {
    "robosuite": (
        lambda c: 1 - 2 * c,
        "action.gripper: 57.1 % of 240 values lie outside -0.1..1.1 (seen -1 to 1); robot 'libero_franka' wants 0 = close and "
        "1 = open. Of robosuite's -1 = open and +1 = close make (1 - value) / 2; where -1 closes, (value + 1) / 2",
    ),
    "metres": (
        lambda c: 0.08 * c,
        "action.gripper: all 240 values lie below the threshold 0.5 (seen 0 to 0.08), so the policy would never open the "
        "gripper; robot 'libero_franka' wants 0 = close and 1 = open. Of an opening from 0 to 0.08 make value / 0.08",
    ),
    "per cent": (
        lambda c: 100 * c,
        "outside -0.1..1.1 (seen 0 to 100); robot 'libero_franka' wants 0 = close and 1 = open",
    ),
    "never closes": (np.ones_like, "so the policy would never close the gripper; robot 'libero_franka' wants"),
    "never opens": (np.zeros_like, "so the policy would never open the gripper; robot 'libero_franka' wants"),
    "reversed": (
        lambda c: 1 - c,
        "action.gripper: the fingers run against the command: 100 % of what they move in 4 movements opens while the command "
        "closes, or closes while it opens (correlation -0.9",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_others_write_is_found_and_the_way_to_convert_named(name: str, theirs) -> None:
    change, message = WRONG[name]
    root = theirs(change)
    (error,) = check(root, robot=catalogue().robot("libero_franka"), decode=False)["errors"]
    assert message in error["message"]
    with pytest.raises(DataError) as caught:
        Mixture.open([Entry("theirs", "libero_franka")], root.parent, catalogue())
    assert str(caught.value) == f"{root}: {error['message']}"


def test_every_door_refuses_it_and_names_the_set(theirs, tmp_path: Path, main) -> None:
    change, message = WRONG["robosuite"]
    root = theirs(change)
    assert np.mean(np.concatenate(COMMANDS)) == pytest.approx(137 / 240), "the share that is -1"
    out = tmp_path / "sheet"
    code, text, _ = main("data", "check", root, "--robot", "libero_franka", "--out", out, "--no-decode")
    assert code == 1
    assert "1 error" in text.splitlines()[0]
    assert message in text
    (error,) = json.loads((out / "check.json").read_text())["datasets"][0]["errors"]
    assert (error["file"], error["column"], error["episode"]) == (str(root), "action", None)
    assert "action.gripper" in (out / "index.html").read_text()

    code, text, error = main("stats", root, "--robot", "libero_franka", "--out", tmp_path / "statistics.json")
    assert code != 0
    assert message in error
    assert str(root) in error
    assert not (tmp_path / "statistics.json").exists()

    # without a robot nobody says what the column means
    assert main("data", "check", root, "--out", out, "--no-decode")[0] == 0
    assert main("stats", root)[0] == 0


def test_training_stops_before_anything_is_loaded(theirs, libero_data: Path, tmp_path: Path, main) -> None:
    """A mixture names the set; skip_bad leaves out damaged episodes, which this is not."""
    theirs(lambda c: 1 - 2 * c)
    (tmp_path / "ours").symlink_to(libero_data / "v2.1")
    (tmp_path / "my.yaml").write_text(
        "mixtures:\n  both:\n    - {dataset: ours, robot: libero_franka}\n    - {dataset: theirs, robot: libero_franka}\n"
    )
    words = ("--data.root", tmp_path, "--data.robots", tmp_path / "my.yaml", "--data.mixture", "both")
    words = ("train", "--recipe", "libero", *words, "--data.skip_bad", "true", "--run.out", tmp_path / "run")
    code, _, error = main(*words)
    assert code != 0
    assert f"{tmp_path / 'theirs'}: action.gripper: 57.1 % of 240 values" in error
    assert "ours" not in error
    assert not (tmp_path / "run").exists()


def test_what_is_right_passes(right: Path, theirs) -> None:
    assert check(right, robot=catalogue().robot("libero_franka"), decode=False)["errors"] == []
    Mixture.open([Entry("set", "libero_franka")], right.parent, catalogue())
    root = theirs(
        lambda c: np.convolve(c, [0.25, 0.5, 0.25], "same") * 1.05
    )  # 0 and 1, and what a filter makes of them
    Mixture.open([Entry("theirs", "libero_franka")], root.parent, catalogue())


def test_damaged_episodes_do_not_count(theirs) -> None:
    """Their rows are zeros in the cache, which would be commands to close."""
    root = theirs(np.ones_like)
    next(root.rglob("episode_000001.parquet")).unlink()
    messages = [
        error["message"] for error in check(root, robot=catalogue().robot("libero_franka"), decode=False)["errors"]
    ]
    assert messages[0].startswith("no such file")
    assert messages[1].startswith(
        "action.gripper: all 120 values lie above the threshold 0.5 (seen 1 to 1), so the policy would"
    )
    with pytest.raises(DataError, match="all 120 values lie above"):
        Mixture.open([Entry("theirs", "libero_franka")], root.parent, catalogue(), skip_bad=True)


@pytest.mark.parametrize("value, inside", [(-0.1, True), (1.1, True), (-0.11, False), (1.11, False)])
def test_the_bounds(theirs, value: float, inside: bool) -> None:
    def change(column: np.ndarray) -> np.ndarray:
        if column.tolist() == COMMANDS[1].tolist():
            column[3] = value  # in float32 a little more than the bound
        return column

    recording = Recording.of(LeRobot.open(theirs(change), standard=MODALITY), catalogue().robot("libero_franka"))
    found = gripper.findings(recording)
    assert bool(found) != inside
    if not inside:
        assert found[0].message.startswith(
            f"action.gripper: 0.417 % of 240 values lie outside -0.1..1.1 (seen {min(0, value):g}"
        )
    assert gripper.findings(recording, without={1}) == [], "an episode that is left out does not count"


def test_a_value_on_the_threshold_is_on_the_side_that_the_policy_sends_it_to() -> None:
    """At 0.5 a gripper of the embodiment is 1, a key of mode binary 0."""
    for values, decided, binary in (([0.0, 0.5], True, False), ([0.5, 1.0], False, True)):
        for rule, right in ((LIBERO.gripper, decided), (None, binary)):
            assert (gripper._range("action.grip", "robot", np.array(values), rule) is None) == right


def test_what_opens_is_the_embodiments() -> None:
    assert LIBERO.gripper.open == 1
    assert TABLETOP.gripper.open == 0
    for robot in (LIBERO, TABLETOP):
        words = robot.gripper.meaning
        assert f"-> 0 ({robot.gripper.word(0)}), else 1 ({robot.gripper.word(1)})" in words
        assert {key for key, _ in robot.gripper.fingers} <= {key.name for key in robot.state}


def test_the_tabletops_own_demonstrations_pass_and_reversed_ones_do_not(tmp_path: Path) -> None:
    """There 1 closes, and the opening is one number: the rule is the embodiment's, not LIBERO's."""
    from dit4dit.demo.demonstrations import demonstrate

    changes = {"right": lambda c: c, "reversed": lambda c: 1 - c, "signs": lambda c: 2 * c - 1, "open": np.zeros_like}
    for name, change in changes.items():
        with Writer(tmp_path / name, 10, codec=VideoCodec.lossless()) as writer:
            for number in range(2):
                demo = demonstrate(number)
                actions = demo.actions.astype(np.float32)
                actions[:, 2] = change(actions[:, 2])
                views = {"observation.images.top": demo.pictures[:, ::8, ::8]}
                writer.add({"observation.state": demo.states, "action": actions}, views, demo.instruction)
    Mixture.open([Entry("right", "tabletop")], tmp_path, catalogue())
    with pytest.raises(
        DataError, match=r"reversed: action.grip: the fingers run against .* wants 0 = open and 1 = close, and"
    ):
        Mixture.open([Entry("reversed", "tabletop")], tmp_path, catalogue())
    with pytest.raises(
        DataError, match=r"signs: action.grip: .*-1 = open and \+1 = close make \(value \+ 1\) / 2; where"
    ):
        Mixture.open([Entry("signs", "tabletop")], tmp_path, catalogue())
    with pytest.raises(DataError, match=r"open: action.grip: all .* so the policy would never close the gripper"):
        Mixture.open([Entry("open", "tabletop")], tmp_path, catalogue())


MINE = f"""
robots:
  my_arm:
    video: [primary_image]
    state: [x, gripper]
    action: [x, gripper]
    normalization: {{action.x: min_max, action.gripper: MODE, state.gripper: binary}}
    action_steps: 8
    language: annotation.human.action.task_description
    modality: {json.dumps(MODALITY)}
"""


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c, None),
        (lambda c: 1 - c, None),
        (lambda c: 0.3 + 0.4 * c, None),
        (
            lambda c: 2 * c - 1,
            "(seen -1 to 1); robot 'my_arm' wants 0 and 1 (mode binary: what is above 0.5 becomes 1, all else 0). Write "
            "(value + 1) / 2 for values of -1 and +1, or give the key the mode min_max",
        ),
        (
            lambda c: 0.08 * c,
            "action.gripper: all 240 values lie below the threshold 0.5 (seen 0 to 0.08), so the policy would always send 0; "
            "robot 'my_arm' wants 0 and 1 (mode binary: what is above 0.5 becomes 1, all else 0). Write value / 0.08, or give "
            "the key the mode min_max",
        ),
        (
            lambda c: 0.6 + 0.4 * c,
            "lie above the threshold 0.5 (seen 0.6 to 1), so the policy would always send 1; robot 'my_arm' wants 0 and 1 (mode "
            "binary: what is above 0.5 becomes 1, all else 0). Write (value - 0.6) / 0.4, or give the key the mode min_max",
        ),
        (lambda c: 0 * c + 0.02, "so the policy would always send 0; robot 'my_arm' wants 0 and 1"),
        (lambda c: 0 * c + 0.89, "so the policy would always send 1; robot 'my_arm' wants 0 and 1"),
    ],
)
def test_binary_keys_of_robots_from_yaml(change: Change, message: str | None, theirs, tmp_path: Path) -> None:
    """Training makes 0 and 1 of them, and 0 and 1 is what the robot would be sent: -1 would never come back."""
    root = theirs(change)
    for mode in ("binary", "min_max"):
        (tmp_path / "my.yaml").write_text(MINE.replace("MODE", mode))
        found = check(root, robot=catalogue(tmp_path / "my.yaml").robot("my_arm"), decode=False)
        if message is None or mode == "min_max":
            assert found["errors"] == []
        else:
            assert message in found["errors"][0]["message"]
        (warning,) = [text for text in found["warnings"] if text.startswith("state.gripper")]
        assert warning.endswith("(seen -0.04 to -0.015): the model sees a constant")


@pytest.mark.parametrize("value, what", [(0.0, 0), (1.0, 1), (0.009, 0), (0.91, 1)])
def test_a_gripper_that_is_never_used_is_only_told(value: float, what: int, theirs, tmp_path: Path) -> None:
    """Of a robot with two arms: what the policy sends is what the data hold."""
    root = theirs(lambda c: 0 * c + value)
    (tmp_path / "my.yaml").write_text(MINE.replace("MODE", "binary"))
    known = catalogue(tmp_path / "my.yaml")
    found = check(root, robot=known.robot("my_arm"), decode=False)
    assert found["errors"] == []
    note = f"action.gripper: mode binary, and all 240 values are about {what}: the policy would always send that"
    assert note in found["warnings"]
    notes = Mixture.open([Entry("theirs", "my_arm")], root.parent, known).notes
    assert f"theirs: {note}" in notes
    assert len([text for text in notes if "action.gripper" in text]) == 1
    next(root.rglob("episode_000001.parquet")).unlink()  # its rows are zeros in the cache
    (text,) = [
        text
        for text in Mixture.open([Entry("theirs", "my_arm")], root.parent, known, skip_bad=True).notes
        if "action.gripper" in text
    ]
    assert f"all 120 values are about {what}" in text


@pytest.mark.parametrize(
    "low, high, opens, closes",
    [
        (
            -1,
            1,
            "Of robosuite's -1 = open and +1 = close make (1 - value) / 2; where",
            "+1 = close make (value + 1) / 2; where",
        ),
        (
            0,
            0.08,
            "Of an opening from 0 to 0.08 make value / 0.08",
            "Of an opening from 0 to 0.08 make 1 - value / 0.08",
        ),
        (0.6, 1, "Of an opening from 0.6 to 1 make (value - 0.6) / 0.4", "from 0.6 to 1 make 1 - (value - 0.6) / 0.4"),
        (-100, 100, "Of an opening from -100 to 100 make (value + 100) / 200", "make 1 - (value + 100) / 200"),
        (-0.05, -0.0, "Of an opening from -0.05 to 0 make (value + 0.05) / 0.05", "make 1 - (value + 0.05) / 0.05"),
    ],
)
def test_the_way_to_convert_helps(low: float, high: float, opens: str, closes: str) -> None:
    """Made so, values of the whole range lie on both sides of the threshold."""
    values = np.linspace(low, high, 100)
    for rule, words in ((LIBERO.gripper, opens), (TABLETOP.gripper, closes)):
        text = gripper._range("action.grip", "robot", values, rule)
        assert words in text
        formula = text.split(" make ")[1].split(";")[0]
        assert gripper._range("action.grip", "robot", eval(formula, {"value": values}), rule) is None


def test_the_packages_test_data_are_as_others_write_them(libero_data: Path) -> None:
    for root in (GOLDEN / "lerobot_v3", libero_data / "v3.0"):
        recording = Recording.of(LeRobot.open(root, standard=MODALITY), catalogue().robot("libero_franka"))
        assert gripper.findings(recording) == []
        commands = np.concatenate(
            [recording.vector("action", i, np.arange(recording.length(i)))[:, 6] for i in range(3)]
        )
        assert set(commands.tolist()) == {0.0, 1.0}
