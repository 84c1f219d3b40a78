"""What training asks of its data, and one micro batch of it on the CPU. Which sample stands at which position of a run is the
data's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit4dit.config import ModelConfig
from dit4dit.data.samples import Sample
from dit4dit.errors import InputError
from dit4dit.robots.action_error import ActionUnits

MOST_ATTEMPTS = 100
"""Replacements of one sample before the data are taken to be unreadable altogether."""


class TrainingData(Protocol):
    """What training asks of its data."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which sample stands at which position, and what it holds."""

    @property
    def clip_fingerprint(self) -> str:
        """A hash of what decides the pictures of the sample with a given index."""

    @property
    def instructions(self) -> Sequence[str]:
        """All distinct instructions, held-out episodes included."""

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Normalisation statistics as a checkpoint carries them, keyed by embodiment tag."""

    @property
    def clips(self) -> int:
        """Number of samples there are; each has an index below it."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the joined views."""

    @property
    def skip_bad(self) -> bool:
        """Whether a sample that cannot be read is replaced and counted, instead of ending the run."""

    def index(self, position: int, attempt: int = 0) -> int:
        """Index of the training sample at a position, which counts up without end; a pure function. `attempt` counts the
        replacements of one that cannot be read.
        """

    def held_out(self) -> Sequence[int]:
        """Indices of samples that are never trained on."""

    @property
    def robots(self) -> Sequence[ActionUnits]:
        """Every robot that there are samples of, with its way back to its own units."""

    def robot(self, index: int) -> int:
        """Which of them a sample is of."""

    def sample(self, index: int, *, video: bool = True) -> Sample:
        """The sample; without `video` nothing is decoded."""


@dataclass(frozen=True, eq=False)
class Raw:
    """One collated micro batch on the CPU; `positions` are its samples' numbers in the run."""

    positions: tuple[int, ...]
    indices: tuple[int, ...]
    instructions: tuple[str, ...]
    video: Tensor | None
    actions: Tensor
    action_mask: Tensor
    state: Tensor | None
    skipped: tuple[str, ...] = ()
    """What was wrong with samples that others stand for."""


def collate(
    positions: Sequence[int], indices: Sequence[int], samples: Sequence[Sample], skipped: Sequence[str] = ()
) -> Raw:
    """Samples -> one micro batch; InputError where their shapes differ."""

    def join(name: str) -> Tensor | None:
        values = [getattr(sample, name) for sample in samples]
        if all(value is None for value in values):
            return None
        shapes = {None if value is None else tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise InputError(f"samples {list(indices)}: {name}: expected one shape, got {', '.join(map(str, shapes))}")
        return torch.stack(values)

    actions, mask = join("actions"), join("action_mask")
    assert actions is not None
    assert mask is not None
    words = tuple(sample.lang for sample in samples)
    return Raw(tuple(positions), tuple(indices), words, join("video"), actions, mask, join("state"), tuple(skipped))


def pictures(raw: Raw, config: ModelConfig, device: torch.device) -> Tensor:
    """The micro batch's clips, float32 [B, F, 3, H, W] in [-1, 1]."""
    if raw.video is None or raw.video.shape[1] != config.frames:
        got = "none" if raw.video is None else list(raw.video.shape[1:])
        raise InputError(
            f"samples {list(raw.indices)}: video: expected [{config.frames}, 3, H, W], got {got}; set --model.frames"
        )
    return raw.video.to(device, non_blocking=True)
