"""Writes `lerobot_v3`: a small data set recorded by lerobot's own writer, and what lerobot's own reader makes of it.

    python make_lerobot_v3.py FOLDER

Run once, in an environment of its own with lerobot 0.4.4 (Python 3.11, torch 2.13 CPU, torchvision 0.25.0, PyAV 15.1). The
torchvision wheels are built for CUDA and their compiled operators do not load beside a CPU build of torch; lerobot needs only
their Python part, so the operators' names are declared here to let it be imported. Nothing of lerobot is changed.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

FPS, HEIGHT, WIDTH = 10, 24, 32
STATE = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
TASKS = ("put the red mug on the plate", "open the drawer")
EPISODES = ((13, 0), (9, 1), (17, 0))  # frames, task


def declare_torchvision_operators() -> torch.library.Library:
    spec = importlib.util.find_spec("torchvision")
    source = Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'register_meta\("(\w+)"\)|"torchvision::(\w+)"', source))):
        library.define(f"{''.join(name)}(Tensor x) -> Tensor")
    return library


def picture(episode: int, frame: int) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    blue = np.full_like(x, episode * 80 + frame * 7)
    return (np.stack([x * 8 + episode * 40 + frame * 9, y * 10 + frame * 13, blue], axis=-1) % 256).astype(np.uint8)


def gripper(length: int) -> tuple[np.ndarray, np.ndarray]:
    """LIBERO's: the command (1 = open), closed in the middle third, and two finger joints that follow at 2 cm a frame."""
    command = np.ones(length, np.float32)
    command[length // 3 : 2 * length // 3] = 0
    opening = np.empty(length)
    at = 0.08
    for frame in range(length):
        at += float(np.clip(0.08 * command[max(0, frame - 1)] - at, -0.02, 0.02))
        opening[frame] = at
    return command, np.stack([opening / 2, -opening / 2], axis=1).astype(np.float32)


def main(folder: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shutil.rmtree(folder, ignore_errors=True)
    video = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    features = dict.fromkeys(CAMERAS, video)
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": list(STATE)}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": [*STATE[:6], "gripper"]}
    made = LeRobotDataset.create(
        "org/golden", fps=FPS, root=folder, robot_type="franka", features=features, vcodec="h264"
    )
    rng = np.random.default_rng(0)
    for episode, (length, task) in enumerate(EPISODES):
        commands, fingers = gripper(length)
        for frame in range(length):
            seen = picture(episode, frame)
            state, action = rng.normal(size=8).astype(np.float32), rng.normal(size=7).astype(np.float32)
            action[6], state[6:] = commands[frame], fingers[frame]
            row = {CAMERAS[0]: seen, CAMERAS[1]: seen[::-1].copy(), "observation.state": state, "action": action}
            made.add_frame({**row, "task": TASKS[task]})
        made.save_episode(parallel_encoding=False)
    made.finalize()

    read = LeRobotDataset("org/golden", root=folder, video_backend="pyav")
    rows = [read[i] for i in range(len(read))]
    frames = {
        c: np.stack([np.rint(r[c].numpy().transpose(1, 2, 0) * 255) for r in rows[::5]]).astype(np.uint8)
        for c in CAMERAS
    }
    # every fifth picture: enough to see one that is off by one frame, and small
    numbers = {
        key: np.stack([r[key].numpy() for r in rows]) for key in ("observation.state", "action", "episode_index")
    }
    np.savez_compressed(folder / "expected.npz", **frames, **numbers, task=np.array([r["task"] for r in rows]))


if __name__ == "__main__":
    operators = declare_torchvision_operators()
    main(Path(sys.argv[1]))
