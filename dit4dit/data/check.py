"""Looks at everything in a data set that could spoil a training run, decoding all of its pictures, and lists what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit.config import ModelConfig
from dit4dit.data import gripper
from dit4dit.data.columns import Problem, Progress
from dit4dit.data.fit import check_fit
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.modality import depth_map
from dit4dit.data.samples import Recording
from dit4dit.data.statistics import NAMES, flat_statistics
from dit4dit.errors import ConfigError, DataError, listed, shown
from dit4dit.robots.descriptions import Robot

BATCH = 64
"""Pictures decoded at once."""


def check(
    root: Path,
    *,
    robot: Robot | None = None,
    modality: Path | None = None,
    decode: bool = True,
    model: ModelConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything about the data set in `root`, ready for JSON: facts, `errors` (each with file, row and message), `warnings`.

    Args:
        robot: check that the data set holds what this robot needs, too; what is wrong with the rest is a warning.
        modality: a modality.json to use instead of the data set's own.
        decode: decode every image; without it only sizes, frame times and frame counts of the video files are read.
        model: check that it can take the robot's actions, state and images, too.
        progress: told how far it has come.

    Raises:
        DataError: there is no data set, or its meta folder is damaged. ConfigError: the policy knows the robot, with other sizes.
    """
    standard = None if robot is None else robot.modality
    data = LeRobot.open(root, modality=modality, standard=standard, progress=progress)
    found = list(data.columns.problems)
    recording = None
    if robot is not None:
        recording = Recording.of(data, robot)
        found += recording.no_rotations
    unfit = []
    if recording is not None and model is not None:
        try:
            check_fit(recording.embodiment, model)
        except ConfigError as error:
            unfit.append(whole(root, error))
    if decode:
        found += _decode(data, {(problem.episode, problem.column) for problem in found}, progress)
    # what no sample reads keeps no robot from training
    passed_over = [p for p in found if recording is not None and p.column and p.column not in recording.columns]
    errors = [p for p in found if recording is None or not p.column or p.column in recording.columns]
    without = _positions(data, found)
    good = [i for i in range(len(data.meta.episodes)) if i not in without]
    columns = _columns(data, without) if good else {}
    tasks = _tasks(data, good)
    wrong = [] if recording is None else gripper.findings(recording, _positions(data, errors))
    odd = [] if recording is None else gripper.notes(recording, _positions(data, errors))
    unread = _unread(recording, passed_over)
    return {
        "dataset": str(root),
        "version": data.meta.version,
        "robot": None if robot is None else robot.name,
        "modality": None if modality is None else str(modality),
        "fps": data.fps,
        "episodes": len(data.meta.episodes),
        "frames": data.meta.frames,
        "seconds": data.meta.frames / data.fps,
        "cameras": {
            name: list(f.get("shape", [])) for name, f in data.meta.features.items() if f.get("dtype") == "video"
        },
        "keys": {part: list(data.modality.part(part)) for part in ("state", "action", "video", "annotation")},
        "decoded": decode,
        "errors": [*unfit, *(asdict(problem) for problem in errors)]
        + [{"file": data.name, "row": None, "episode": None, **asdict(finding)} for finding in wrong],
        "warnings": [*data.warnings(), *_warnings(data, columns, tasks, recording, good), *odd, *unread],
        "columns": columns,
        "tasks": tasks,
    }


def _positions(data: LeRobot, problems: list[Problem]) -> frozenset[int]:
    """Of the episodes that have one of these problems."""
    spoilt = {problem.episode for problem in problems}
    return frozenset(i for i, episode in enumerate(data.meta.episodes) if episode.index in spoilt)


def _unread(recording: Recording | None, problems: list[Problem]) -> list[str]:
    """What is wrong with columns and cameras that a robot does not use."""
    if recording is None or not problems:
        return []
    columns = listed(sorted({str(problem.column) for problem in problems}), 8)
    return [
        f"{len(problems)} errors in what {recording.robot.name} does not use ({columns}), which training passes over; the "
        f"first: {problems[0]}"
    ]


def whole(root: Path, error: Exception) -> dict[str, Any]:
    """An entry of `errors` that is about the data set as a whole."""
    return {"file": str(root), "row": None, "episode": None, "column": None, "message": str(error)}


def _decode(data: LeRobot, known: set[tuple[int, str | None]], progress: Progress | None) -> list[Problem]:
    """Problems found by decoding every picture of the episodes that are not known to be damaged."""
    problems = []
    episodes = data.meta.episodes
    for i, episode in enumerate(episodes):
        if progress is not None:
            progress(f"decoding episode {episode.index}", i, len(episodes))
        for camera, place in episode.videos.items():
            if known & {(episode.index, None), (episode.index, camera)}:
                continue
            try:
                for first in range(0, episode.length, BATCH):
                    data.pictures(camera, i, range(first, min(first + BATCH, episode.length)))
            except DataError as error:
                why = str(error).removeprefix(f"{place.path}: ")
                problems.append(Problem(str(place.path), None, episode.index, camera, why))
    return problems


def _columns(data: LeRobot, without: frozenset[int]) -> dict[str, dict[str, list[float]]]:
    """Statistics of the columns that state and action are made of."""
    used = {where.column for part in ("state", "action") for where in data.modality.part(part).values()}
    out = {}
    for column in sorted(used & set(data.columns.digests)):
        vectors = flat_statistics(data, column, without)
        out[column] = {name: vectors[name].tolist() for name in NAMES}
    return out


def _tasks(data: LeRobot, good: list[int]) -> dict[str, int]:
    """Instruction -> frames that have it, over all annotations."""
    count: Counter[str] = Counter()
    for column in sorted(set(data.modality.annotation.values()) & set(data.columns.digests)):
        for i in good:
            count.update(data.tasks(column, i))
    return dict(count)


def _warnings(
    data: LeRobot,
    columns: Mapping[str, Mapping[str, list[float]]],
    tasks: Mapping[str, int],
    recording: Recording | None,
    good: list[int],
) -> list[str]:
    """What is allowed and still worth a look."""
    out = []
    for column, found in columns.items():
        low, high, q01, q99 = (np.asarray(found[name]) for name in ("min", "max", "q01", "q99"))
        if (low == high).any():
            out.append(
                f"{column}: constant at positions {np.flatnonzero(low == high).tolist()}; min_max maps them to 0"
            )
        spread = q99 - q01
        far = (np.maximum(high - q99, q01 - low) > 10 * spread) & (spread > 0)
        if far.any():
            out.append(
                f"{column}: outliers at positions {np.flatnonzero(far).tolist()}: beyond ten times the range of q01..q99"
            )
    out += _unusual_tasks(data, good, tasks)
    if recording is not None and len(data.meta.episodes) == 1:
        out.append("one episode: training can hold none out, and needs --data.holdout 0 where it is the only data set")
    if not (data.meta.root / "meta" / "modality.json").is_file():
        out.append(
            f"no meta/modality.json: keys are {'the standard ones of the robot' if recording else 'whole columns'}"
        )
    relative = [] if recording is None else [source.name for source in recording.action if source.where.relative]
    if relative:
        out.append(f"relative actions, zero past the end of an episode: {', '.join(relative)}")
    unsaid = [] if recording is None else [key.name for key in recording.embodiment.action if key.kind is None]
    if unsaid:
        out.append(
            f"nothing says if these actions are targets or displacements, so the robot cannot be held: {', '.join(unsaid)}; give "
            'them "absolute" in meta/modality.json, or `kinds` in the file of robots'
        )
    unused = [] if recording is None else _depth_maps(data)
    if recording is not None and unused:
        out.append(
            f"{len(unused)} depth cameras that {recording.robot.name} does not use are not looked at: {', '.join(unused)}"
        )
    return out


def _depth_maps(data: LeRobot) -> list[str]:
    features = data.meta.features.items()
    return [name for name, f in features if f.get("dtype") == "video" and depth_map(f) is not None]


def _unusual_tasks(data: LeRobot, good: list[int], tasks: Mapping[str, int]) -> list[str]:
    out = []
    blank = [words for words in tasks if not words.strip()]
    if blank:
        out.append(f"{sum(tasks[words] for words in blank)} frames have an empty instruction")
    digits = [words for words in tasks if words.strip().isdigit()]
    if digits:
        frames = sum(tasks[words] for words in digits)
        out.append(f"{frames} frames have a number for an instruction ({shown(digits[0])}), as a text")
    same = Counter(" ".join(words.lower().split()) for words in tasks)
    twice = [words for words, n in same.items() if n > 1]
    if twice:
        out.append(f"instructions that differ only in case or spaces: {shown(twice[0])}")
    if "task_index" in data.columns.digests:
        other = [i for i in good if (of := data.meta.episodes[i].tasks) and not {*data.tasks("task_index", i)} <= {*of}]
        if other:
            out.append(
                f"{len(other)} episodes have rows with another task than the meta folder lists for them; the first: episode "
                f"{data.meta.episodes[other[0]].index}"
            )
    return out
