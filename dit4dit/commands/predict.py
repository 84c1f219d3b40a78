"""`dit4dit predict`: one chunk from images, a state file and an instruction."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import read_json
from dit4dit.policy.policy import Policy
from dit4dit.robots.embodiment import Embodiment
from dit4dit.tables import table
from dit4dit.types import ActionChunk, Observation

Picture = NDArray[np.uint8]
State = dict[str, Any]


def predict(policy: Policy, seen: tuple[list[Picture], State], instruction: str, seed: int) -> dict[str, Any]:
    """The chunk and how it came about, ready for JSON; "chunk" holds the `ActionChunk` itself. seen: what `read` gives."""
    observation = observe(policy, *seen)
    start = time.perf_counter()
    chunk = policy.infer(observation, instruction, seed=seed)
    seconds = time.perf_counter() - start
    return {
        "instruction": instruction,
        "embodiment": policy.embodiment.name,
        "seed": seed,
        "names": list(chunk.names),
        "control_hz": chunk.control_hz,
        "actions": chunk.actions.tolist(),
        "normalized": chunk.normalized.tolist(),
        "first_call_seconds": seconds,
        "device": str(policy.device),
        "chunk": chunk,
    }


def read(images: list[Path], state: Path | State | None) -> tuple[list[Picture], State]:
    """Images and a state (a JSON file or its content) from their files, which needs no policy: a mistake is found before one is
    loaded.
    """
    pictures = [read_picture(path) for path in images]
    if isinstance(state, Path):
        state = read_json(state, "give a JSON file, state key -> values", error=InputError, again="correct it")
    return pictures, state or {}


def check_views(robot: Embodiment, count: int) -> None:
    """InputError unless there is an image for each view of the robot."""
    if count != len(robot.views):
        raise InputError(
            f"--image: expected {len(robot.views)} ({', '.join(robot.views)}, in this order) for embodiment "
            f"{robot.name!r}, got {count}"
        )


def observe(policy: Policy, pictures: list[Picture], state: State) -> Observation:
    """Images, one per view in the embodiment's order, and a state as an observation."""
    check_views(policy.embodiment, len(pictures))
    return Observation(images=dict(zip(policy.embodiment.views, pictures, strict=True)), state=state)


def read_picture(path: Path) -> Picture:
    """An 8-bit RGB image, uint8 [H, W, 3]. Other modes are refused: nothing is guessed about alpha or 16 bits."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode != "RGB":
                raise InputError(f"{path}: expected an 8-bit RGB image, got mode {picture.mode}; convert it first")
            return np.asarray(picture)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give an image, with --image once per view") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from None


def show(result: dict[str, Any]) -> str:
    """The actions as a table, one row per time step."""
    chunk: ActionChunk = result["chunk"]
    rows = [[i, *(f"{value:+.4f}" for value in row)] for i, row in enumerate(chunk.actions)]
    head = f"{len(rows)} actions at {chunk.control_hz:g} Hz, seed {result['seed']}, embodiment {result['embodiment']}"
    return head + "\n" + table(["step", *chunk.names], rows, right=range(len(chunk.names) + 1))


def save(result: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    """Write the JSON file and the picture that were asked for."""
    if json_file:
        write_json(json_file, {key: value for key, value in result.items() if key != "chunk"})
    if plot:
        plot_chunk(result["chunk"], result["instruction"], plot)


def check_plot(path: Path | None) -> None:
    """InputError before anything is computed when the picture's ending is none that can be drawn."""
    endings = (".png", ".pdf", ".svg", ".jpg")
    if path is not None and path.suffix.lower() not in endings:
        raise InputError(f"--plot {path}: expected a file ending in {', '.join(endings)}")


def plot_chunk(chunk: ActionChunk, title: str, path: Path) -> None:
    """One small plot per action dimension against time in seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(chunk.names)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 1.8 * rows), sharex=True, squeeze=False)
    seconds = [i / chunk.control_hz for i in range(len(chunk.actions))]
    for axis in axes.flat[count:]:
        axis.axis("off")
    for i, (name, axis) in enumerate(zip(chunk.names, axes.flat, strict=False)):
        axis.plot(seconds, chunk.actions[:, i], marker=".", linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("seconds", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
