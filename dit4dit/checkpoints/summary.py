"""What is in a checkpoint: sizes, shapes, statistics, and the conventions a robot must keep to use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit4dit.checkpoints import checksums, weights
from dit4dit.checkpoints.checkpoint import HEAD, TEXT, TRANSFORMER, VAE, Checkpoint, is_own_format, local_folder
from dit4dit.checkpoints.robot import for_checkpoint, robot_of
from dit4dit.errors import ConfigError
from dit4dit.robots import Embodiment, statistics

PARTS = {"text encoder": TEXT, "VAE": VAE, "backbone": TRANSFORMER, "action head": HEAD}


def summarise(checkpoint: Checkpoint, embodiment: str | None) -> dict[str, Any]:
    """Sizes per part, shapes, statistics and conventions, ready for JSON; weights are mapped, not read.

    `problems` says why the weights or the robot would be refused.

    Raises:
        ConfigError: the checkpoint is not for `embodiment`.
    """
    model = checkpoint.model
    problems = weights.check(model, checkpoint.tensors, str(checkpoint.path))
    result: dict[str, Any] = {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "parts": part_sizes(checkpoint),
        "model": model.to_dict(),
        "statistics": _tags(checkpoint),
        "ignored_keys": list(checkpoint.ignored),
        "problems": problems,
    }
    try:
        robot = for_checkpoint(checkpoint, embodiment).embodiment
        result["statistics"] = _tags(checkpoint, robot)
    except ConfigError as error:
        if embodiment is not None:
            raise
        if robot_of(checkpoint) is not None and len(checkpoint.statistics) == 1:
            problems.append(str(error))  # there was nothing to choose
        return {**result, "embodiment": None, "conventions": None, "note": str(error)}
    shapes = {
        "frame": [3, model.image_size[0], model.image_size[1] * len(robot.views)],
        "features": [model.tokens(len(robot.views)), model.dit.width],
        "state": None if model.head.state_dim is None else [1, model.head.state_dim],
        "actions": [model.head.action_horizon, model.head.action_dim],
    }
    return {**result, "embodiment": robot.name, "shapes": shapes, "conventions": conventions(checkpoint, robot)}


def checkpoint_name(path: str | Path) -> str:
    """What records call a checkpoint: "RUN/step_N" of a run of ours, "RUN/steps_N_pytorch_model.pt" of a published one, the name
    of any other folder or file, a hub id as it is. Another run may have the same name; its `checkpoint_hash` differs.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return str(path)
    place = place.resolve()
    if place.name == "policy" and place.parents[1].name == "checkpoints":
        place = place.parent
    return f"{place.parents[1].name}/{place.name}" if place.parent.name == "checkpoints" else place.name


def verify_files(path: str | Path, progress: checksums.Progress) -> int | None:
    """How many files are what checksums.json of a folder says; None where it has none, as the published layout."""
    folder = local_folder(path)
    file = folder / checksums.FILE
    return checksums.verify(file, progress=progress) if is_own_format(folder) and file.is_file() else None


def part_sizes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors, parameters, bytes and dtypes of each part."""
    rows = []
    for name, prefix in PARTS.items():
        tensors = [checkpoint.tensors[n] for n in checkpoint.tensors if n.startswith(prefix)]
        rows.append(
            {
                "part": name,
                "tensors": len(tensors),
                "parameters": sum(math.prod(t.shape) for t in tensors),
                "bytes": sum(math.prod(t.shape) * t.element_size() for t in tensors),
                "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
            }
        )
    return rows


def _tags(checkpoint: Checkpoint, robot: Embodiment | None = None) -> dict[str, Any]:
    """Ranges per tag; the robot's training modes say which actions they scale, without a robot the file's mask does."""
    modes = [] if robot is None else [key.normalization for key in robot.action for _ in range(key.dim)]
    out = {}
    for tag in checkpoint.statistics:
        parsed = statistics.parse(checkpoint.statistics, tag, f"statistics of {checkpoint.path}")
        out[tag] = {
            "action": _ranges(parsed.action, modes),
            "state": None if parsed.state is None else _ranges(parsed.state),
        }
    return out


def _ranges(vector: statistics.VectorStats, modes: Sequence[str] = ()) -> list[dict[str, Any]]:
    scaled = [mode not in ("binary", "none") for mode in modes] if len(modes) == vector.size else vector.mask
    return [
        {
            "min": float(vector.min[i]),
            "max": float(vector.max[i]),
            "mean": float(vector.mean[i]),
            "std": float(vector.std[i]),
            "scaled": bool(scaled[i]),
        }
        for i in range(vector.size)
    ]


def conventions(checkpoint: Checkpoint, robot: Embodiment) -> dict[str, str]:
    """Everything that is silently wrong when it is mixed up, in words."""
    model = checkpoint.model
    height, width = model.image_size
    order = " | ".join(robot.views)
    encoding = {
        "sin_cos": "per key [sin(v), cos(v)], keys in this order, then zeros",
        "normalized": "normalised per key, keys in this order, then zeros",
    }[robot.state_encoding]
    state = ", ".join(f"{k.name}({k.dim})" for k in robot.state)
    report = {
        "views": f"{order}, left to right, each resized to {height} x {width} (filter {robot.resize})",
        "picture": f"uint8 RGB, 0..255, upright; joined to {height} x {width * len(robot.views)}, scaled to [-1, 1]",
        "state": f"{state}; {encoding} to {model.head.state_dim} values"
        if model.head.state_dim is not None
        else "not used: this model has no state token",
        "state normalisation": ", ".join(f"{k.name}: {k.normalization}" for k in robot.state)
        if robot.state_encoding == "normalized"
        else "none (sin/cos of the raw values)",
        "actions": ", ".join(f"{k.name}({k.dim})" for k in robot.action)
        + f"; the first {robot.action_dim} of the model's {model.head.action_dim} values",
        "action normalisation": ", ".join(f"{k.name}: {k.normalization}" for k in robot.action),
        "kinds of actions": ", ".join(f"{k.name}: {k.kind or 'not said'}" for k in robot.action),
        "gripper": "no rule" if robot.gripper is None else f"action {robot.gripper.index}: {robot.gripper.meaning}",
        "chunk": f"{model.head.action_horizon} actions at {robot.control_hz:g} Hz = "
        f"{model.head.action_horizon / robot.control_hz:.2f} s, {model.head.num_inference_timesteps} Euler steps",
        "frames": f"{model.frames} in training ({model.latent_frames} latent), 1 seen; features after block "
        f"{model.extract_layer} of {model.dit.num_layers}",
    }
    return report | {f"note {i + 1}": note for i, note in enumerate(robot.notes)}
