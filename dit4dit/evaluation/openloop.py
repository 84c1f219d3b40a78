"""Open-loop evaluation: what would the policy have done at the recorded moments, and how far is it from what was done?

An episode is walked in steps of `every` frames. At each the policy sees the recorded pictures, state and instruction, and the
first `every` rows of its chunk, those that a robot would execute before it asks again, are compared with the recorded actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.catalogue import Catalogue
from dit4dit.data.samples import Recording
from dit4dit.errors import ConfigError, InputError
from dit4dit.robots.action_error import ActionError
from dit4dit.robots.descriptions import Robot, own_robot
from dit4dit.robots.embodiment import Array, Embodiment
from dit4dit.types import Noise, Observation

if TYPE_CHECKING:
    from dit4dit.policy.policy import Policy


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode's result.

    Attributes:
        index: the data set's own number. task: the first instruction.
        points: frames at which the policy was asked.
        rows: frames that are compared [n], rising.
        predicted, recorded: actions in robot units [n, d].
        units, normalized: errors per dimension [d], in robot units and as the model writes them.
    """

    index: int
    task: str
    length: int
    points: tuple[int, ...]
    rows: NDArray[np.int64]
    predicted: Array
    recorded: Array
    units: ActionError
    normalized: ActionError

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """A JSON line."""
        return {
            "episode": self.index,
            "task": self.task,
            "frames": self.length,
            "chunks": len(self.points),
            "actions": len(self.rows),
            **errors(self.units, self.normalized, names),
        }


def errors(units: ActionError, normalized: ActionError, names: Sequence[str]) -> dict[str, Any]:
    """{"robot_units": {"mse": {name: value}, "mae": ...}, "normalized": {..., "total": {"mse", "mae"}}}."""
    return {
        "robot_units": units.to_dict(names),
        "normalized": {**normalized.to_dict(names), "total": normalized.total},
    }


def choose_robot(known: Catalogue, named: str | None, implied: Embodiment | None) -> Robot:
    """The robot type that the data set is read as: the named one, or the only one of the checkpoint's embodiment, which may
    have come with the checkpoint.

    Raises:
        ConfigError: unknown, or none is named and the checkpoint's embodiment has no robot type.
    """
    if named is not None:
        return known.robot(named)
    if implied is not None and (own := own_robot(implied)) is not None:
        return own
    fitting = [robot for robot in known.robots.values() if implied is not None and robot.embodiment == implied.name]
    if len(fitting) != 1:
        which = (
            "does not say its robot"
            if implied is None
            else f"is for {implied.name!r}, which no single robot type names"
        )
        raise ConfigError(f"--robot: the checkpoint {which}; choose one of {', '.join(known.robots)}")
    return fitting[0]


def check_fits(recording: Recording, embodiment: Embodiment) -> None:
    """InputError unless the data set holds what the policy's robot sees and does, in the same order and sizes."""
    mine = recording.embodiment
    wanted: dict[str, tuple[Any, ...]] = {"views": embodiment.views}
    got: dict[str, tuple[Any, ...]] = {"views": mine.views}
    for part in ("state", "action"):
        wanted[part] = tuple((key.name, key.dim) for key in getattr(embodiment, part))
        got[part] = tuple((key.name, key.dim) for key in getattr(mine, part))
    for part, value in wanted.items():
        if got[part] != value:
            raise InputError(
                f"{recording.data.name}: read as robot {recording.robot.name!r}: {part}: the checkpoint's robot "
                f"{embodiment.name!r} wants {_words(value)}, the data set has {_words(got[part])}; choose another --robot or "
                "checkpoint"
            )


def _words(items: tuple[Any, ...]) -> str:
    return ", ".join(item if isinstance(item, str) else f"{item[0]} ({item[1]})" for item in items) or "nothing"


def choose_episodes(recording: Recording, wanted: Sequence[int]) -> list[int]:
    """Positions of the episodes with these numbers (all of them when empty), without the damaged ones that nobody named.

    Raises:
        InputError: there is no episode of that number, or it is damaged.
    """
    data = recording.data
    spoilt = {problem.episode: problem for problem in recording.problems}
    numbers = [episode.index for episode in data.meta.episodes]
    for number in wanted:
        if number not in numbers:
            raise InputError(
                f"--episodes {number}: {data.name} has no such episode; it has {numbers[0]} to {numbers[-1]}"
            )
        if number in spoilt:
            raise InputError(f"--episodes {number}: damaged: {spoilt[number]}")
    chosen = [i for i, number in enumerate(numbers) if number not in spoilt and (not wanted or number in wanted)]
    if not chosen:
        raise InputError(f"{data.name}: no episode without damage; dit4dit data check {data.name}")
    return chosen


def points_of(length: int, every: int) -> range:
    """Frames at which the policy is asked."""
    return range(0, length, every)


def evaluate(
    policy: Policy,
    recording: Recording,
    episodes: Sequence[int],
    *,
    every: int,
    seed: int,
    batch: int,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Episode]:
    """The episodes at these positions, one after another.

    Args:
        every: frames from one question to the next, 1 or more; rows past the chunk's end are not compared.
        seed: of the noise, which is the frame's own: an episode's result does not depend on which others are chosen.
        batch: questions in one pass. progress: told of questions as they are answered.
    """
    for episode in episodes:
        yield _one(policy, recording, episode, every, seed, batch, progress)


def _one(
    policy: Policy,
    recording: Recording,
    episode: int,
    every: int,
    seed: int,
    batch: int,
    progress: Callable[[int], object],
) -> Episode:
    data, length = recording.data, recording.length(episode)
    recorded = recording.vector("action", episode, np.arange(length))
    points = points_of(length, every)
    size = recording.embodiment.action_dim
    units, normalized = ActionError(size), ActionError(size)
    rows, predicted = [], []
    for start in range(0, len(points), batch):
        asked = points[start : start + batch]
        seen = [observe(recording, episode, frame) for frame in asked]
        words = [data.task(recording.language, episode, frame) for frame in asked]
        noise = [Noise.from_seed(seed, data.first_row(episode) + frame) for frame in asked]
        for frame, chunk in zip(asked, policy.infer_batch(seen, words, noise=noise), strict=True):
            count = min(every, len(chunk.actions), length - frame)
            truth = recorded[frame : frame + count]
            units.add(chunk.actions[:count], truth)
            normalized.add(chunk.normalized[:count, :size], policy.codec.action.forward(truth)[:, :size])
            rows.append(np.arange(frame, frame + count))
            predicted.append(chunk.actions[:count])
        progress(len(asked))
    at = np.concatenate(rows).astype(np.int64)
    return Episode(
        index=data.meta.episodes[episode].index,
        task=data.task(recording.language, episode, 0),
        length=length,
        points=tuple(points),
        rows=at,
        predicted=np.concatenate(predicted),
        recorded=recorded[at],
        units=units,
        normalized=normalized,
    )


def observe(recording: Recording, episode: int, frame: int) -> Observation:
    """What the robot saw and felt at a frame of an episode."""
    cameras = zip(recording.embodiment.views, recording.cameras, strict=True)
    images = {view: recording.data.pictures(camera, episode, [frame])[0] for view, camera in cameras}
    vector = recording.vector("state", episode, np.array([frame]))[0]
    cuts = np.cumsum([key.dim for key in recording.embodiment.state])[:-1]
    parts = np.split(vector, cuts) if recording.embodiment.state else []
    return Observation(
        images=images, state={key.name: part for key, part in zip(recording.embodiment.state, parts, strict=True)}
    )
