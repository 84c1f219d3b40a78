"""Does the simulator keep the conventions that the checkpoint was trained with? Looked at before a run, in its first environment.

What can be seen from outside: the very picture that the policy gets, states and actions beside the checkpoint's statistics,
what fingers do when told to open and to close, and the rates. A contradiction stops the run; what is only unusual is told.
It cannot see whether a picture is mirrored, or a camera stands elsewhere: that is what the picture is written for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dit4dit.evaluation.plan import Episode, Plan
from dit4dit.evaluation.workers import Worker
from dit4dit.files.json_files import write_json
from dit4dit.robots import Embodiment
from dit4dit.robots.statistics import Statistics, VectorStats
from dit4dit.types import Noise, Observation

Row = NDArray[np.float32]
Verdict = Literal["ok", "unusual", "contradiction", "not tested"]
UNUSUAL, CONTRADICTION = 0.1, 1.0
"""How far outside the training data's range a value may lie, in widths of that range."""
STEPS, HELD = 10, 20
"""Steps in which fingers are told to open, and to close, and a robot to settle; and those that it is then held."""
AWAY = {"m": 0.05, "rad": 0.5}
"""A robot that is told to stay does not go further than this, unless it was told something else."""
DRIFT = {"m": 1e-3, "rad": 1e-2}
"""Once it has settled, a robot that is held does not move more than this."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: the verdict, in words why, and the numbers behind it."""

    name: str
    verdict: Verdict
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


def examine(
    policy: Any, plan: Plan, statistics: Statistics, folder: Path, *, data_fps: float | None = None
) -> list[Finding]:
    """Look at the first episode of the plan; conventions.json, policy_input.png and policy_views.png are written to `folder`.

    Args:
        policy: `Policy`. statistics: those that its codec is made from.
        data_fps: of the data that it was trained on, from their meta/info.json.

    Raises:
        SimulatorError, InputError: the simulator does not start, or gives something else than the embodiment expects.
    """
    episode, robot = plan.episodes[0], policy.embodiment
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with Worker(plan.launch, folder / "logs" / "conventions.log") as worker:
        facts = worker.make(episode.environment, episode.options)["facts"]
        first, instruction = _reset(worker, episode, robot)
        picture = policy_picture(policy, first)
        _save(folder / "policy_input.png", picture)
        _save(folder / "policy_views.png", side_by_side(robot.ordered_views(first.images)))
        chunk = policy.infer(first, instruction, noise=Noise.from_seed(episode.noise_seed, 0))
        later = _take(worker, robot, chunk.actions)
        findings = [
            rate(robot, facts, data_fps),
            *pictures(robot, first),
            Finding("instruction", "ok" if instruction.strip() else "contradiction", repr(instruction)),
            states(robot, statistics, [first, later]),
            actions(robot, statistics, chunk.actions),
            gripper_statistics(robot, statistics),
            fingers(robot, worker, episode),
            standing_still(robot, statistics, worker, episode),
        ]
    write_json(folder / "conventions.json", as_json(findings, episode, facts))
    return findings


def contradictions(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict == "contradiction"]


def as_json(findings: Sequence[Finding], episode: Episode, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "episode": list(episode.key),
        "facts": dict(facts),
        "findings": [{"name": f.name, "verdict": f.verdict, "text": f.text, **f.numbers} for f in findings],
    }


def policy_picture(policy: Any, observation: Observation) -> NDArray[np.uint8]:
    """What the policy sees, uint8 [H, views * W, 3]: turned, resized and joined, before it is scaled to [-1, 1]."""
    import torch

    from dit4dit.ops import preprocess

    views = [
        torch.from_numpy(np.ascontiguousarray(view))[None]
        for view in policy.embodiment.ordered_views(observation.images)
    ]
    frame = preprocess(views, policy.config.image_size, policy.embodiment.resize, torch.float32)
    return np.rint((frame[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)


def rate(robot: Embodiment, facts: Mapping[str, Any], data_fps: float | None) -> Finding:
    """Control steps per second: of the simulator, of the embodiment, and of the data."""
    here = float(facts["control_hz"])
    numbers = {"simulator_hz": here, "embodiment_hz": robot.control_hz, "data_fps": data_fps}
    if abs(here - robot.control_hz) > 0.01 * robot.control_hz:
        return Finding(
            "rate",
            "contradiction",
            f"the simulator runs at {here:g} Hz, the embodiment at {robot.control_hz:g}",
            numbers,
        )
    if data_fps is not None and abs(data_fps - here) > 0.01 * here:
        # LIBERO's published sets say 10 and were recorded at 20
        text = f"the data say {data_fps:g} frames per second, the simulator runs at {here:g}: one of them is wrong"
        return Finding("rate", "unusual", text, numbers)
    said = "" if data_fps is None else f", data {data_fps:g}"
    return Finding("rate", "ok", f"simulator {here:g} Hz, embodiment {robot.control_hz:g}{said}", numbers)


def pictures(robot: Embodiment, observation: Observation) -> list[Finding]:
    """A camera that draws nothing gives one colour, and no error."""
    views = dict(zip(robot.views, robot.ordered_views(observation.images), strict=True))
    out = []
    for name, view in views.items():
        contrast = float(view.std())
        size = f"{view.shape[1]} x {view.shape[0]}"
        verdict: Verdict = "ok" if contrast >= 2.0 else "contradiction"
        text = f"{size}, mean {view.mean():.0f}, contrast {contrast:.0f}" + " (one colour: nothing is drawn)" * (
            verdict != "ok"
        )
        out.append(Finding(f"picture {name}", verdict, text, {"mean": float(view.mean()), "contrast": contrast}))
    shown = list(views.values())
    if len(shown) > 1 and all(v.shape == shown[0].shape and np.array_equal(v, shown[0]) for v in shown[1:]):
        out.append(Finding("pictures", "contradiction", "all views are the same picture: is one camera sent twice?"))
    return out


def states(robot: Embodiment, statistics: Statistics, seen: Sequence[Observation]) -> Finding:
    """States of the first moments beside the range of the training data."""
    if statistics.state is None:
        return Finding("state", "not tested", "the checkpoint has no statistics of states")
    rows = np.stack([robot.state_vector(observation.state) for observation in seen])
    if rows.shape[1] != statistics.state.size:
        text = f"{rows.shape[1]} values, the checkpoint's statistics have {statistics.state.size}"
        return Finding("state", "contradiction", text)
    names = [key.name if key.dim == 1 else f"{key.name}.{i}" for key in robot.state for i in range(key.dim)]
    return _beside("state", rows, statistics.state, names)


def actions(robot: Embodiment, statistics: Statistics, rows: Row) -> Finding:
    """The first chunk beside what the robot or simulator takes; their statistics' range holds by construction."""
    clips = np.array([key.clip or np.inf for key in robot.action for _ in range(key.dim)])
    if not np.isfinite(clips).any():
        return _beside("action", rows, statistics.action, robot.action_names)
    largest = np.maximum(np.abs(statistics.action.min), np.abs(statistics.action.max))
    worst = int((largest / clips).argmax())
    most, limit = float(largest[worst]), float(clips[worst])
    numbers = {
        "largest_in_statistics": most,
        "simulator_clips_at": limit,
        "largest_of_chunk": float(np.abs(rows[:, worst]).max()),
    }
    text = f"the data's largest {robot.action_names[worst]} is {most:.3g}, the simulator clips at {limit:g}"
    verdict: Verdict = (
        "ok" if most <= limit * (1 + UNUSUAL) else "unusual" if most <= limit * (1 + CONTRADICTION) else "contradiction"
    )
    return Finding("action", verdict, text, numbers)


def gripper_statistics(robot: Embodiment, statistics: Statistics) -> Finding:
    """The model decides between 0 and 1; data whose gripper runs from -1 to 1, or in metres, have another convention."""
    if robot.gripper is None:
        return Finding("gripper data", "not tested", "this embodiment's model decides no gripper")
    low, high = (float(bound[robot.gripper.index]) for bound in (statistics.action.min, statistics.action.max))
    numbers = {"min": low, "max": high}
    if low < -UNUSUAL or high > 1 + UNUSUAL:
        text = f"the data's gripper action runs from {low:.3g} to {high:.3g}, the model's from 0 to 1: {robot.gripper.meaning}"
        return Finding("gripper data", "contradiction", text, numbers)
    if not low < robot.gripper.threshold <= high:
        never = robot.gripper.word(int(low < robot.gripper.threshold))
        text = f"the data's gripper action runs from {low:.3g} to {high:.3g}, so the policy would never {never}"
        text += f": {robot.gripper.meaning}"
        return Finding("gripper data", "contradiction", text, numbers)
    return Finding("gripper data", "ok", f"{low:.3g} to {high:.3g}", numbers)


def fingers(robot: Embodiment, worker: Worker, episode: Episode) -> Finding:
    """Tell the fingers to close, to open and to close, and watch them; nothing else is told to move."""
    gripper = robot.gripper
    if gripper is None:
        return Finding("fingers", "not tested", f"no gripper of {robot.name} is known that one action value opens")
    first, _ = _reset(worker, episode, robot)
    row = robot.still(first.state)
    measured = []
    for value in (gripper.close, gripper.open, gripper.close):
        row[gripper.index] = value
        seen = _take(worker, robot, np.repeat(row[None], STEPS, axis=0))
        measured.append(gripper.opening(seen.state))
    shut, opened, again = measured
    numbers = {"closed": shut, "opened": opened, "closed_again": again}
    text = f"opening {shut:.3f} after 'close', {opened:.3f} after 'open', {again:.3f} after 'close'"
    if opened > max(shut, again) + 1e-3:
        return Finding("fingers", "ok", text, numbers)
    wrong = "close when told to open" if opened < min(shut, again) - 1e-3 else "do not move"
    return Finding("fingers", "contradiction", f"they {wrong}: {text}", numbers)


def standing_still(robot: Embodiment, statistics: Statistics, worker: Worker, episode: Episode) -> Finding:
    """A robot that is told to stay where it is stays there; and the data's targets lie where it is."""
    units = {key.name: key.unit for key in robot.state if key.unit is not None}
    moved = {key.moves: key for key in robot.action if key.moves in units}
    if not moved or any(key.kind is None for key in robot.action):
        return Finding("standing still", "not tested", f"what the actions of {robot.name} move is not known")
    first, _ = _reset(worker, episode, robot)
    middle = (statistics.action.min + statistics.action.max) / 2
    row = robot.still(first.state, middle.astype(np.float32))
    settled = _take(worker, robot, np.repeat(row[None], STEPS, axis=0))
    after = _take(worker, robot, np.repeat(robot.hold(row)[None], HELD, axis=0))
    away = {name: _way(units[name], first.state[name], after.state[name]) for name in moved}
    drift = {name: _way(units[name], settled.state[name], after.state[name]) for name in moved}
    targets, outside = statistics.action, 0.0
    for name, key in moved.items():
        if key.kind in ("position", "angle"):
            place = robot.places[key.name]
            excess = _excess(np.asarray(first.state[name]), targets.min[place], targets.max[place])
            outside = max(outside, float(excess.max()))
    numbers = {"moved": away, "drift": drift, "outside_of_targets": outside}
    farthest = max(away, key=lambda name: away[name] / AWAY[units[name]])
    text = f"told to stay, {farthest} moves by {away[farthest]:.2g} {units[farthest]} in {STEPS + HELD} steps"
    if away[farthest] > AWAY[units[farthest]]:
        return Finding(
            "standing still", "contradiction", f"{text}: the simulator takes its actions for something else", numbers
        )
    if outside > CONTRADICTION:
        text += f"; but the first pose is {outside:.1f} widths outside the range of the data's targets"
        return Finding("standing still", "contradiction", text, numbers)
    drifting = [f"{name} {way:.2g} {units[name]}" for name, way in drift.items() if way > DRIFT[units[name]]]
    if drifting:
        text += f"; in the last {HELD} of them, settled and held, still {', '.join(drifting)}"
    return Finding("standing still", "unusual" if drifting or outside > UNUSUAL else "ok", text, numbers)


def _way(unit: str, here: Any, there: Any) -> float:
    """How far the farthest of a key's values went; an angle the short way round."""
    way = np.asarray(there, dtype=np.float64) - np.asarray(here, dtype=np.float64)
    if unit == "rad":
        way = (way + np.pi) % (2 * np.pi) - np.pi
    return float(np.abs(way).max())


def _reset(worker: Worker, episode: Episode, robot: Embodiment) -> tuple[Observation, str]:
    start = worker.reset(episode.seed, episode.trial)
    return robot.observe(start["observation"]), start["instruction"]


def _take(worker: Worker, robot: Embodiment, rows: Row) -> Observation:
    return robot.observe(worker.step([robot.command(row) for row in rows])["observation"])


def _excess(rows: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.float64]:
    """How far values [..., d] lie outside [low, high] [d], in widths of that range; 0 inside."""
    width = np.maximum(high - low, 1e-6)
    return np.asarray(np.maximum(np.maximum(low - rows, rows - high), 0.0) / width, dtype=np.float64)


def _beside(name: str, rows: NDArray[Any], stats: VectorStats, names: Sequence[str]) -> Finding:
    """Rows [N, d] beside the training data's range."""
    outside = _excess(rows, stats.min, stats.max).max(axis=0)
    worst = int(outside.argmax())
    table = {
        "names": list(names),
        "seen_min": rows.min(axis=0).tolist(),
        "seen_max": rows.max(axis=0).tolist(),
        "data_min": stats.min.tolist(),
        "data_max": stats.max.tolist(),
        "outside_in_widths": outside.tolist(),
    }
    if outside[worst] <= UNUSUAL:
        return Finding(name, "ok", f"all {len(names)} values within the data's range", table)
    verdict: Verdict = "unusual" if outside[worst] <= CONTRADICTION else "contradiction"
    several = int((outside > UNUSUAL).sum())
    text = (
        f"{names[worst]} is {rows[:, worst].min():.3g} to {rows[:, worst].max():.3g}, in the data {stats.min[worst]:.3g} to "
        f"{stats.max[worst]:.3g}" + f"; {several} values lie outside" * (several > 1)
    )
    return Finding(name, verdict, text, table)


def side_by_side(views: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Views of any size in one picture, as the simulator drew them and upright, on black."""
    height = max(view.shape[0] for view in views)
    padded = [np.pad(view, ((0, height - view.shape[0]), (0, 0), (0, 0))) for view in views]
    return np.concatenate(padded, axis=1)


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)
