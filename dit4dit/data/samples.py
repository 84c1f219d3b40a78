"""Training samples: what a robot would have seen at frame t of an episode, what came next, and what it did.

The published loader's sample (section "A training sample" of its code's description), made with the embodiment's own chains, the
ones that the policy runs: pictures by `ops.preprocess` with the bilinear filter, state encoded and padded, actions normalised
and padded. Past the end of an episode pictures and absolute actions repeat the last one, relative actions are zero before
normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit4dit.config import ModelConfig
from dit4dit.data.columns import Problem
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.modality import Slice, depth_map
from dit4dit.errors import ConfigError, DataError, shown
from dit4dit.ops.preprocess import preprocess
from dit4dit.robots.descriptions import Robot
from dit4dit.robots.embodiment import Embodiment
from dit4dit.robots.rotations import TARGETS, convert, no_rotation, zero_is_no_turn
from dit4dit.robots.transforms import Chain

if TYPE_CHECKING:
    from dit4dit.robots.statistics import Statistics

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """Which frames and actions a sample has, and how wide they are."""

    offsets: tuple[int, ...]
    """Frames of the clip, counted from t; the first is 0."""
    horizon: int
    image_size: tuple[int, int]
    action_dim: int
    state_dim: int | None
    mask_padded: bool = False
    """Leave time steps past the end of an episode out of the action loss; the published loader does not."""

    def __post_init__(self) -> None:
        if not self.offsets or self.offsets[0] != 0 or list(self.offsets) != sorted(set(self.offsets)):
            raise ConfigError(
                f"window: expected frames 0 and then rising numbers, got {self.offsets}; set video_delta_indices (training: "
                "--data.video_delta_indices) so"
            )

    @classmethod
    def for_model(
        cls, model: ModelConfig, *, video_delta_indices: Sequence[int] | None = None, action_video_freq_ratio: int = 1,
        mask_padded: bool = False,
    ) -> Window:  # fmt: skip
        """What `model` takes. Without `video_delta_indices` the clip spans the action chunk with equal steps.

        Raises:
            ConfigError: the indices give another number of frames than the model has, or K does not split into F - 1 steps.
        """
        head = model.head
        options = "(training: --data.video_delta_indices and --data.action_video_freq_ratio)"
        if video_delta_indices is None:
            if model.frames > 1 and head.action_horizon % (model.frames - 1):
                raise ConfigError(
                    f"window: {head.action_horizon} actions do not split into {model.frames - 1} equal steps of the clip; "
                    f"give video_delta_indices {options}"
                )
            if action_video_freq_ratio != 1:
                raise ConfigError(
                    f"window: action_video_freq_ratio {action_video_freq_ratio} thins out video_delta_indices, which are not "
                    f"given; give both {options}"
                )
            step = head.action_horizon // max(1, model.frames - 1)
            offsets = tuple(step * i for i in range(model.frames))
        else:
            if action_video_freq_ratio < 1:
                raise ConfigError(
                    f"window: action_video_freq_ratio: expected at least 1, got {action_video_freq_ratio}"
                )
            offsets = tuple(video_delta_indices[::action_video_freq_ratio])
        if len(offsets) != model.frames:
            raise ConfigError(
                f"window: the model takes {model.frames} frames, video_delta_indices give {len(offsets)}: {offsets}; give "
                f"as many {options}, or set the model's frames (training: --model.frames {len(offsets)})"
            )
        return cls(offsets, head.action_horizon, model.image_size, head.action_dim, head.state_dim, mask_padded)


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample.

    Attributes:
        video: joined views of the clip, float32 [F, 3, H, W] in [-1, 1]; frame 0 is the one that a policy sees. None where it
            was not asked for.
        lang: the instruction.
        actions: normalised, zero-padded actions [K, A_model].
        action_mask: True on real entries [K, A_model].
        state: encoded, padded state [1, state_dim]; None for a model without a state token.
    """

    video: Tensor | None
    lang: str
    actions: Tensor
    action_mask: Tensor
    state: Tensor | None


@dataclass(frozen=True)
class KeySource:
    """One key of a robot's state or action: where it is stored, and what its rotations become."""

    name: str
    where: Slice
    target: str | None

    @property
    def size(self) -> int:
        return self.where.size if self.target is None else TARGETS[self.target][0]

    @property
    def rotation(self) -> str | None:
        """How the values, once read, represent a rotation, where they do."""
        return self.where.rotation if self.target is None else self.target

    @property
    def says_what_it_is(self) -> bool:
        """Of an action: whether the data say if it is a target or a displacement, and zeros, if a displacement, move nothing."""
        return self.where.absolute is not None and (self.where.absolute or zero_is_no_turn(self.rotation))

    @property
    def converted(self) -> bool:
        return self.target is not None and self.target != self.where.rotation

    def read(self, values: Array) -> Array:
        """Stored values [..., where.size] -> what the robot calls this key [..., size]."""
        if self.target is None or not self.converted:
            return values
        assert self.where.rotation is not None
        return convert(values, self.where.rotation, self.target)


@dataclass(frozen=True, eq=False)
class Recording:
    """A data set seen as one robot's: the keys in the robot's order, resolved and checked once."""

    data: LeRobot
    robot: Robot
    embodiment: Embodiment
    state: tuple[KeySource, ...]
    action: tuple[KeySource, ...]
    cameras: tuple[str, ...]
    language: str

    @classmethod
    def of(cls, data: LeRobot, robot: Robot) -> Recording:
        """See `robot` in `data`.

        Raises:
            DataError: a key, camera or annotation that the robot needs is not there.
            ConfigError: the policy knows the robot, with other sizes.
        """
        modality = data.modality
        parts: dict[str, tuple[KeySource, ...]] = {}
        for part, keys in (("state", robot.state), ("action", robot.action)):
            sources = []
            for key in keys:
                where, target = modality.find(part, key), robot.target_rotations.get(f"{part}.{key}")
                if target is not None and where.rotation is None:
                    raise DataError(f"{modality.where}: {part}.{key}: needs its rotation_type, to become {target}")
                sources.append(KeySource(key, where, target))
            parts[part] = tuple(sources)
        cameras = tuple(modality.find("video", view) for view in robot.video)
        for view, camera in zip(robot.video, cameras, strict=True):
            depth = depth_map(data.meta.features[camera])
            if depth is not None:
                raise DataError(
                    f"{data.meta.info}: {shown(camera)} (view {view!r}) {depth}; robot {robot.name!r} takes colour images: "
                    "name another camera in modality.json"
                )
            if data.meta.features[camera].get("dtype") != "video":
                raise DataError(
                    f"{data.meta.info}: {shown(camera)} (view {view!r}): pictures stored inside parquet files are not "
                    "supported; "
                    "convert the data set to video"
                )
        sizes = {f"{part}.{source.name}": source.size for part, sources in parts.items() for source in sources}
        said = {source.name: bool(source.where.absolute) for source in parts["action"] if source.says_what_it_is}
        turns = {source.name: source.rotation for source in parts["action"] if source.rotation is not None}
        embodiment = robot.to_embodiment(sizes, data.fps, modality.where, said, turns)
        language = modality.find("annotation", robot.annotation)
        return cls(data, robot, embodiment, parts["state"], parts["action"], cameras, language)

    @property
    def columns(self) -> frozenset[str]:
        """Columns and cameras that samples read."""
        keys = {source.where.column for source in (*self.state, *self.action)}
        return frozenset({*keys, *self.cameras, self.language, "timestamp"})

    @cached_property
    def problems(self) -> list[Problem]:
        """What is wrong with episodes that samples would read."""
        return self.data.problems(self.columns) + self.no_rotations

    @cached_property
    def no_rotations(self) -> list[Problem]:
        """Values that are to become another rotation and are none."""
        found = []
        for source in [source for source in (*self.state, *self.action) if source.converted]:
            assert source.where.rotation is not None
            column = source.where.column
            spoilt = {problem.episode for problem in self.data.problems({column})}
            for i, episode in enumerate(self.data.meta.episodes):
                if episode.index in spoilt:
                    continue
                wrong = no_rotation(self.data.values(source.where, i), source.where.rotation)
                if wrong is not None:
                    why = f"column {shown(column)}, key {source.name!r}: {wrong[1]}"
                    row = (self.data.columns.file_rows[i] or 0) + wrong[0]
                    found.append(Problem(str(episode.data), row, episode.index, column, why))
        return found

    def vector(self, part: str, episode: int, frames: NDArray[np.int64]) -> Array:
        """The state or action vector at these frames of an episode in robot units, float32 [n, d]."""
        sources = self.state if part == "state" else self.action
        pieces = [source.read(self.data.values(source.where, episode)[frames]) for source in sources]
        return np.concatenate(pieces, axis=1) if pieces else np.zeros((len(frames), 0), np.float32)

    def length(self, episode: int) -> int:
        return self.data.meta.episodes[episode].length

    @property
    def relative(self) -> NDArray[np.bool_]:
        """True on action dimensions that are zero, not repeated, past the end of an episode."""
        return np.array([source.where.relative for source in self.action for _ in range(source.size)])


class SampleReader:
    """Samples of one recording for one model."""

    def __init__(self, recording: Recording, statistics: Statistics, window: Window) -> None:
        self.recording, self.window = recording, window
        robot = recording.embodiment
        self.action: Chain = robot.action_chain(statistics, window.action_dim)
        self.state: Chain | None = None if window.state_dim is None else robot.state_chain(statistics, window.state_dim)

    def read(self, episode: int, frame: int, *, video: bool = True) -> Sample:
        """The sample at `frame` of the episode at position `episode`; without `video` nothing is decoded.

        Raises:
            DataError: its video cannot be decoded.
        """
        recording, window = self.recording, self.window
        length = recording.length(episode)
        actions, valid = self._actions(episode, frame, length)
        mask = np.zeros((window.horizon, window.action_dim), dtype=bool)
        mask[:, : recording.embodiment.action_dim] = valid[:, None] | (not window.mask_padded)
        state = None
        if self.state is not None:
            now = recording.vector("state", episode, np.array([frame]))
            state = torch.from_numpy(self.state.forward(now))
        return Sample(
            video=self._clip(episode, frame, length) if video else None,
            lang=recording.data.task(recording.language, episode, frame),
            actions=torch.from_numpy(self.action.forward(actions)),
            action_mask=torch.from_numpy(mask),
            state=state,
        )

    def _clip(self, episode: int, frame: int, length: int) -> Tensor:
        recording, window = self.recording, self.window
        numbers = [min(frame + offset, length - 1) for offset in window.offsets]
        views = [torch.from_numpy(recording.data.pictures(camera, episode, numbers)) for camera in recording.cameras]
        return preprocess(views, window.image_size, "bilinear", torch.float32)

    def _actions(self, episode: int, frame: int, length: int) -> tuple[Array, NDArray[np.bool_]]:
        """Robot actions [K, d] from `frame` on, padded past the end; and which of them are real [K]."""
        steps = frame + np.arange(self.window.horizon)
        valid = steps < length
        actions = self.recording.vector("action", episode, np.minimum(steps, length - 1))
        actions[np.ix_(~valid, self.recording.relative)] = 0.0
        return actions, valid
