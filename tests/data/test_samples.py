"""What is in a sample: pictures, state, actions, masks, and what stands past the end of an episode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.check import check
from dit4dit.data.mixture import Mixture
from dit4dit.data.samples import SampleReader, Window
from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.errors import ConfigError, DataError
from dit4dit.presets import preset
from dit4dit.robots import GR1, LIBERO
from dit4dit.robots import statistics as stats
from dit4dit.robots.rotations import convert, from_euler, to_quaternion


def open_one(root: Path, robot: str, own: Path | None = None, **entry) -> Mixture:
    return Mixture.open([Entry(root.name, robot, **entry)], root.parent, catalogue(own))


def reader(root: Path, robot: str, window: Window, own: Path | None = None) -> SampleReader:
    return open_one(root, robot, own).readers(window)[0]


def window(**changes) -> Window:
    facts = {"offsets": (0, 2, 4, 6, 8), "horizon": 8, "image_size": (224, 224), "action_dim": 32, "state_dim": 64}
    return Window(**{**facts, **changes})


def test_a_libero_sample_number_by_number(libero_data: Path, libero_episode) -> None:
    made = open_one(libero_data / "v2.1", "libero_franka")
    sample = made.readers(window(action_dim=8, state_dim=16))[0].read(2, 5)
    columns, pictures = libero_episode(2, 17)
    assert sample.lang == "task 0"

    views = [torch.from_numpy(pictures[f"observation.images.{v}"][5:14:2]) for v in ("image", "wrist_image")]
    size = {"size": (224, 224), "mode": "bilinear", "antialias": False, "align_corners": False}
    joined = torch.cat([interpolate(v.permute(0, 3, 1, 2).float() / 255, **size) for v in views], dim=3)
    assert sample.video.shape == (5, 3, 224, 448)
    torch.testing.assert_close((sample.video + 1) / 2, joined, rtol=0, atol=1e-6)

    state = columns["observation.state"][5]
    want = np.stack([np.sin(state), np.cos(state)], axis=1).reshape(-1)
    np.testing.assert_allclose(sample.state[0].numpy(), want, atol=1e-6)

    low, high = (np.array(made.statistics["franka"]["action"][k]) for k in ("min", "max"))
    want = 2 * (columns["action"][5:13] - low) / (high - low) - 1
    want[:, 6] = columns["action"][5:13, 6]  # the gripper is not normalised
    np.testing.assert_allclose(sample.actions[:, :7].numpy(), want, atol=1e-5)
    assert (sample.actions[:, 7] == 0).all()
    assert sample.action_mask.tolist() == [[True] * 7 + [False]] * 8


def test_past_the_end_pictures_and_absolute_actions_repeat(libero_data: Path) -> None:
    made = reader(libero_data / "v2.1", "libero_franka", window())
    last, near = made.read(1, 8), made.read(1, 6)  # nine frames
    assert all(torch.equal(last.video[0], last.video[i]) for i in range(5))
    assert torch.equal(near.video[1], last.video[0])
    assert all(torch.equal(last.actions[0], last.actions[i]) for i in range(8))
    assert not torch.equal(near.actions[1], near.actions[2])
    assert near.action_mask[:, :7].all()


def test_padded_steps_can_be_masked(libero_data: Path) -> None:
    made = reader(libero_data / "v2.1", "libero_franka", window(mask_padded=True))
    assert made.read(1, 6).action_mask.any(dim=1).tolist() == [True] * 3 + [False] * 5
    assert made.read(1, 0).action_mask[:, :7].all()


def tabletop_data(root: Path) -> Path:
    rng = np.random.default_rng(0)
    columns = {"observation.state": rng.uniform(-0.2, 0.2, (10, 3)), "action": rng.uniform(0.01, 0.04, (10, 3))}
    columns["action"][:, 2] = 1
    with Writer(root, 10, codec=VideoCodec.lossless()) as writer:
        for _ in range(2):
            pictures = rng.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
            writer.add(
                {k: v.astype(np.float32) for k, v in columns.items()}, {"observation.images.top": pictures}, "go"
            )
    return root


def test_past_the_end_relative_actions_are_zero_before_normalisation(tmp_path: Path) -> None:
    own = tmp_path / "my.yaml"
    own.write_text(
        "robots:\n  moved:\n    video: [top]\n    state: [x]\n    action: [dx, dy, grip]\n"
        "    language: annotation.human.action.task_description\n    action_steps: 8\n"
        "    normalization: {action.dx: min_max, action.dy: min_max}\n"
        "    modality:\n      state: {x: {start: 0, end: 3}}\n"
        "      action: {dx: {start: 0, end: 1, absolute: false}, dy: {start: 1, end: 2, absolute: false}, "
        "grip: {start: 2, end: 3}}\n"
        "      video: {top: {original_key: observation.images.top}}\n"
        "      annotation: {human.action.task_description: {original_key: task_index}}\n"
    )
    made = open_one(tabletop_data(tmp_path / "t"), "moved", own)
    one = made.readers(Window.for_model(preset("tabletop").model))[0]
    sample = one.read(0, 7)
    back = one.action.inverse(np.clip(sample.actions.numpy(), -10, 10))
    (statistics,) = made.statistics.values()
    entry = statistics["action"]
    low, high = np.array(entry["min"][:2]), np.array(entry["max"][:2])
    zero = -(high + low) / (high - low)
    np.testing.assert_allclose(sample.actions[3:, :2].numpy(), np.tile(zero, (5, 1)), rtol=1e-5)
    assert (sample.actions[:, 2] == 1).all()  # the grip command is absolute: it stays closed
    assert (back[:3, 0] > 0).all()


def test_gr1_keys_come_from_modality_slices_in_the_robots_order(tmp_path: Path) -> None:
    """44 values on disk, 29 in the robot's order; the policy's own embodiment encodes them."""
    parts = {"left_arm": (0, 7), "left_hand": (7, 13), "right_arm": (22, 29), "right_hand": (29, 35), "waist": (41, 44)}
    slices = {key: {"start": a, "end": b} for key, (a, b) in parts.items()}
    modality = {
        "state": slices,
        "action": slices,
        "video": {"ego_view": {"original_key": "observation.images.ego_view"}},
        "annotation": {"human.coarse_action": {"original_key": "annotation.human.coarse_action"}},
    }
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(2, 20, 44))
    with Writer(tmp_path / "gr1", 20, modality=modality, codec=VideoCodec.lossless()) as writer:
        columns = {
            "observation.state": state,
            "action": action,
            "annotation.human.coarse_action": np.zeros(20, np.int64),
        }
        pictures = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        writer.add(columns, {"observation.images.ego_view": pictures}, "pick the bottle")
    one = reader(tmp_path / "gr1", "fourier_gr1_arms_waist", window(horizon=16, offsets=tuple(range(0, 17, 2))))
    assert one.recording.embodiment is GR1
    sample = one.read(0, 2)
    ordered = np.concatenate(
        [state[2, slice(*parts[k])] for k in ("left_arm", "right_arm", "left_hand", "right_hand", "waist")]
    )
    left = ordered[:7]
    np.testing.assert_allclose(sample.state[0, :14].numpy(), [*np.sin(left), *np.cos(left)], atol=1e-6)
    assert (sample.state[0, 58:] == 0).all()
    assert sample.action_mask.sum().item() == 16 * 29
    row = np.concatenate([action[2, slice(*parts[key.name])] for key in GR1.action])
    np.testing.assert_allclose(one.action.inverse(sample.actions.numpy())[0], row, atol=1e-5)


def test_a_robot_of_the_users_with_rotations_and_binary_grippers(tmp_path: Path) -> None:
    modality = {
        "state": {
            "eef_position": {"start": 0, "end": 3},
            "eef_rotation": {"start": 3, "end": 6, "rotation_type": "euler_angles_rpy"},
            "gripper_position": {"start": 6, "end": 7},
        },
        "action": {
            "eef_position_delta": {"start": 0, "end": 3, "absolute": False},
            "eef_rotation_delta": {"start": 3, "end": 6, "rotation_type": "euler_angles_rpy", "absolute": False},
            "gripper_position": {"start": 6, "end": 7},
        },
        "video": {v: {"original_key": v} for v in ("exterior_image_1", "exterior_image_2", "wrist_image")},
        "annotation": {"language.language_instruction": {"original_key": "task_index"}},
    }
    rng = np.random.default_rng(0)
    state, action = rng.uniform(-1, 1, (2, 12, 7)).astype(np.float32)
    action[:, 6] = np.linspace(0, 1, 12)
    with Writer(tmp_path / "droid", 15, modality=modality, codec=VideoCodec.lossless()) as writer:
        pictures = {v: rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8) for v in modality["video"]}
        writer.add({"observation.state": state, "action": action}, pictures, "go")
    one = reader(tmp_path / "droid", "oxe_droid", window(horizon=4, offsets=(0,), image_size=(16, 16)))
    robot = one.recording.embodiment
    assert (robot.name, robot.tag, robot.control_hz) == ("oxe_droid", "oxe_droid", 15.0)
    assert [key.dim for key in robot.state] == [3, 6, 1]
    sample = one.read(0, 10)
    assert sample.video.shape == (1, 3, 16, 48)
    matrix = from_euler(state[10, 3:6].astype(np.float64), "xyz")
    np.testing.assert_allclose(sample.state[0, 3:9].numpy(), matrix[:2].reshape(-1), atol=1e-6)
    np.testing.assert_allclose(
        sample.actions[0, 3:6].numpy(), convert(action[10, 3:6], "euler_angles_rpy", "axis_angle"), atol=1e-6
    )
    assert sample.actions[0, 6] == float(action[10, 6] > 0.5)
    assert (sample.actions[2:, :6] == 0).all()  # past the end, relative, not normalised
    assert robot.hold(np.arange(1, 8, dtype=np.float32)).tolist() == [0] * 6 + [7]


TURNED = {
    "video": ["top"],
    "action": ["turn", "grip"],
    "language": "annotation.human.action.task_description",
    "action_steps": 2,
}


def turned(folder: Path, name: str, absolute: bool | None, rotation: str | None = None) -> None:
    """A data set of a robot whose action `turn` has 4 values, with its own modality.json; the robot is in my.yaml beside it."""
    slot = {"start": 0, "end": 4, "rotation_type": rotation, "absolute": absolute}
    modality = {
        "action": {
            "turn": {key: value for key, value in slot.items() if value is not None},
            "grip": {"start": 4, "end": 5, "absolute": True},
        },
        "video": {"top": {"original_key": "top"}},
        "annotation": {"human.action.task_description": {"original_key": "task_index"}},
    }
    (folder / "my.yaml").write_text(json.dumps({"robots": {"turned": TURNED}}))
    with Writer(folder / name, 10, modality=modality, codec=VideoCodec.lossless()) as writer:
        writer.add({"action": np.full((4, 5), 0.5, np.float32)}, {"top": np.zeros((4, 16, 16, 3), np.uint8)}, "go")


@pytest.mark.parametrize(
    ("absolute", "rotation", "kind"),
    [
        (True, "quaternion", "position"),
        (False, "quaternion", None),
        (None, "quaternion", None),
        (False, None, "relative"),
        (None, None, None),
    ],
)
def test_what_an_action_asks_for_is_what_modality_says(tmp_path: Path, absolute, rotation, kind) -> None:
    turned(tmp_path, "set", absolute, rotation)
    (recording,) = open_one(tmp_path / "set", "turned", tmp_path / "my.yaml").recordings
    robot, last = recording.embodiment, np.arange(1, 6, dtype=np.float32)
    assert [key.kind for key in robot.action] == [kind, "position"]
    assert [key.rotation for key in robot.action] == [rotation, None]
    assert recording.relative.tolist() == [absolute is False] * 4 + [False]
    warned = [
        line for line in check(tmp_path / "set", robot=recording.robot)["warnings"] if "cannot be held: turn;" in line
    ]
    assert len(warned) == (kind is None)
    if kind is None:  # zeros are no quaternion
        with pytest.raises(ConfigError, match=r"meta/modality.json of its data .*needs a target_rotations: axis_angle"):
            robot.hold(last)
    else:
        assert robot.hold(last).tolist() == [*([1, 2, 3, 4] if absolute else [0] * 4), 5]


def test_data_sets_of_one_robot_agree_about_its_actions(tmp_path: Path) -> None:
    for name, absolute in (("silent", None), ("targets", True), ("more", True), ("deltas", False)):
        turned(tmp_path, name, absolute)

    def mixed(*names):
        return Mixture.open([Entry(name, "turned") for name in names], tmp_path, catalogue(tmp_path / "my.yaml"))

    made = mixed("silent", "targets", "more")
    assert [r.embodiment.action[0].kind for r in made.recordings] == ["position"] * 3
    with pytest.raises(ConfigError) as caught:
        mixed("silent", "targets", "deltas")
    said = str(caught.value)
    assert "robot 'turned': action.turn is position in" in said
    assert said.index("targets/meta/modality.json and relative in") < said.index(
        "deltas/meta/modality.json; one policy"
    )


def test_a_rotation_that_does_not_say_what_it_is_is_refused(write_libero, tmp_path: Path) -> None:
    own = tmp_path / "my.yaml"
    own.write_text(
        "robots:\n  turned:\n    video: [image]\n    state: [turn]\n    action: [action]\n"
        "    language: annotation.human.action.task_description\n    action_steps: 4\n"
        "    target_rotations: {state.turn: rotation_6d}\n"
        "    modality:\n      state: {turn: {start: 3, end: 6}}\n      action: {action: {start: 0, end: 7}}\n"
        "      video: {image: {original_key: observation.images.image}}\n"
        "      annotation: {human.action.task_description: {original_key: task_index}}\n"
    )
    root = write_libero(tmp_path / "set")
    with pytest.raises(DataError, match=r"state\.turn: needs its rotation_type, to become rotation_6d"):
        open_one(root, "turned", own)
    own.write_text(own.read_text().replace("end: 6}", "end: 6, rotation_type: axis_angle}"))
    assert [key.dim for key in open_one(root, "turned", own).recordings[0].embodiment.state] == [6]


def test_rotations_agree_with_one_another() -> None:
    rng = np.random.default_rng(0)
    euler = rng.uniform(-1.5, 1.5, (50, 3))
    matrix = from_euler(euler, "xyz")
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, 1, 2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-12)
    # intrinsic x, then y, then z: the first column of Rx Ry Rz is known in closed form
    a, b, c = euler.T
    first = [np.cos(b) * np.cos(c), np.cos(a) * np.sin(c) + np.sin(a) * np.sin(b) * np.cos(c)]
    np.testing.assert_allclose(matrix[:, :2, 0].T, first, atol=1e-12)
    for target in ("axis_angle", "quaternion", "rotation_6d", "matrix"):
        there = convert(euler, "euler_angles_rpy", target)
        np.testing.assert_allclose(convert(there, target, "matrix"), matrix.reshape(50, 9), atol=1e-5)
    half_turns = np.pi * np.eye(3)
    np.testing.assert_allclose(np.abs(convert(half_turns, "axis_angle", "axis_angle")), half_turns, atol=1e-6)
    np.testing.assert_allclose(
        np.abs(convert(convert(half_turns, "axis_angle", "quaternion"), "quaternion", "axis_angle")),
        half_turns,
        atol=1e-6,
    )
    any_angle = convert(rng.uniform(-3.1, 3.1, (200, 3)), "euler_angles_rpy", "quaternion")
    assert (any_angle[:, 0] >= 0).all()
    assert (np.linalg.norm(convert(any_angle, "quaternion", "axis_angle"), axis=1) <= np.pi + 1e-5).all()
    # two rows of a matrix, as a network writes them: longer, and not at right angles
    rows = matrix[:, :2].reshape(50, 6).copy()
    rows[:, 3:] = 3 * rows[:, 3:] + 0.5 * rows[:, :3]
    rows[:, :3] *= 2
    np.testing.assert_allclose(convert(rows, "rotation_6d", "matrix"), matrix.reshape(50, 9), atol=1e-5)
    tiny = np.full((1, 3), 1e-13)
    np.testing.assert_allclose(convert(tiny, "euler_angles_rpy", "axis_angle"), tiny, rtol=1e-3)
    assert convert(np.array([[4.0, 0, 0]]), "axis_angle", "axis_angle").tolist() == [[4, 0, 0]], "the same numbers"
    assert to_quaternion(np.eye(3)).tolist() == [1, 0, 0, 0]
    assert convert(np.zeros((1, 3)), "axis_angle", "rotation_6d").tolist() == [[1, 0, 0, 0, 1, 0]]


def test_an_unknown_rotation_is_refused(tmp_path: Path, write_libero) -> None:
    modality = {"state": {"x": {"start": 0, "end": 3, "rotation_type": "euler_angles_rrr"}}}
    root = write_libero(tmp_path / "set", modality=modality)
    with pytest.raises(ConfigError, match="rotation_type: expected one of"):
        open_one(root, "libero_franka")


def test_a_robot_that_does_not_fit_the_data_is_refused(libero_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no meta/modality\.json, and the robot's standard one does not fit"):
        open_one(libero_data / "v2.1", "tabletop")
    with pytest.raises(DataError, match="no state 'left_arm'"):
        open_one(libero_data / "v2.1", "fourier_gr1_arms_waist")
    modality = json.loads(json.dumps(catalogue().robot("libero_franka").modality))
    modality["state"]["x"]["end"] = 2
    (tmp_path / "m.json").write_text(json.dumps(modality))
    with pytest.raises(ConfigError, match=r"state\.x: robot 'libero_franka' has 1 values there, the data set 2"):
        open_one(libero_data / "v2.1", "libero_franka", modality=str(tmp_path / "m.json"))


@pytest.mark.parametrize("name,offsets", [("libero", (0, 2, 4, 6, 8)), ("robocasa_gr1", tuple(range(0, 17, 2)))])
def test_the_published_windows(name: str, offsets: tuple[int, ...]) -> None:
    model = preset(name).model
    deltas = list(range(model.head.action_horizon + 1))
    assert Window.for_model(model).offsets == offsets
    assert Window.for_model(model, video_delta_indices=deltas, action_video_freq_ratio=2).offsets == offsets


def test_windows_that_do_not_fit_the_model_are_refused() -> None:
    model = preset("unitree_g1").model
    with pytest.raises(ConfigError, match="50 actions do not split into 4 equal steps"):
        Window.for_model(model)
    published = Window.for_model(model, video_delta_indices=range(17), action_video_freq_ratio=4)
    assert published.offsets == (0, 4, 8, 12, 16)
    with pytest.raises(ConfigError, match="the model takes 5 frames, video_delta_indices give 17"):
        Window.for_model(model, video_delta_indices=range(17))
    with pytest.raises(ConfigError, match="expected frames 0 and then rising numbers"):
        window(offsets=(1, 2))


def test_training_and_serving_use_the_same_chain(libero_data: Path) -> None:
    made = open_one(libero_data / "v2.1", "libero_franka")
    one = made.readers(window())[0]
    assert one.recording.embodiment is LIBERO
    parsed = stats.parse(made.statistics, "franka", "here")
    want = LIBERO.action_chain(parsed, 32).forward(one.recording.vector("action", 0, np.arange(8)))
    np.testing.assert_array_equal(one.read(0, 0).actions.numpy(), want)
