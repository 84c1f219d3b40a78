"""Data of the right sizes that mean nothing: a function of the seed, for benchmarks, memory plans and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit4dit.config import ModelConfig
from dit4dit.data.samples import Sample
from dit4dit.robots import embodiment
from dit4dit.robots import statistics as stats
from dit4dit.robots.action_error import ActionUnits
from dit4dit.training.caches import digest
from dit4dit.training.randomness import key

HELD_OUT = 4


@dataclass(frozen=True)
class RandomData:
    """`clips` samples, the last few of them held out."""

    model: ModelConfig
    embodiment: str
    clips: int = 64
    seed: int = 0
    instructions: Sequence[str] = ("open the drawer", "put the cup on the shelf", "push the red block left")

    @property
    def fingerprint(self) -> str:
        return digest("random", self.model.frames, self.picture_size, self.clips, self.seed)

    @property
    def clip_fingerprint(self) -> str:
        return self.fingerprint

    @property
    def picture_size(self) -> tuple[int, int]:
        height, width = self.model.image_size
        return height, width * len(embodiment(self.embodiment).views)

    @property
    def statistics(self) -> Mapping[str, Any]:
        robot = embodiment(self.embodiment)

        def vector(size: int) -> dict[str, list[float]]:
            low, high = {"min": -1.0, "q01": -1.0, "mean": 0.0}, {"std": 1.0, "max": 1.0, "q99": 1.0}
            return {name: [value] * size for name, value in {**low, **high}.items()}

        return {robot.tag: {"action": vector(robot.action_dim), "state": vector(robot.state_dim)}}

    @property
    def skip_bad(self) -> bool:
        return False

    def index(self, position: int, attempt: int = 0) -> int:
        return key(self.seed, "order", position) % (self.clips - HELD_OUT)

    def held_out(self) -> Sequence[int]:
        return range(self.clips - HELD_OUT, self.clips)

    @property
    def robots(self) -> Sequence[ActionUnits]:
        robot = embodiment(self.embodiment)
        statistics = stats.parse(self.statistics, robot.tag, "random data")
        return (ActionUnits(robot, robot.action_chain(statistics, self.model.head.action_dim)),)

    def robot(self, index: int) -> int:
        return 0

    def sample(self, index: int, *, video: bool = True) -> Sample:
        random = np.random.default_rng(key(self.seed, "sample", index))
        head, size = self.model.head, self.picture_size
        actions = random.standard_normal((head.action_horizon, head.action_dim), dtype=np.float32)
        mask = np.zeros(actions.shape, dtype=bool)
        # samples of unequal numbers of real entries, as data sets of several robots give
        mask[:, : head.action_dim - index % 2] = True
        state = None if head.state_dim is None else random.standard_normal((1, head.state_dim), dtype=np.float32)
        clip = random.random((self.model.frames, 3, *size), dtype=np.float32) * 2 - 1 if video else None
        return Sample(
            video=None if clip is None else torch.from_numpy(clip),
            lang=self.instructions[index % len(self.instructions)],
            actions=torch.from_numpy(actions),
            action_mask=torch.from_numpy(mask),
            state=None if state is None else torch.from_numpy(state),
        )
