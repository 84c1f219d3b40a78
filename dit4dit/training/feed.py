"""From samples to batches. Which sample stands at which position of a run is the data's business, who loads it is ours.

Step s uses the positions s G to s G + G - 1; rank r of W takes the r-th of the W equal stretches of each micro step.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit4dit.config import ModelConfig
from dit4dit.data.loader import MOST_ATTEMPTS
from dit4dit.errors import DataError, Dit4DitError, InputError
from dit4dit.robots.action_error import ActionUnits
from dit4dit.training.caches import LatentCache, PromptCache
from dit4dit.types import Batch, ClipLatents


class Sample(Protocol):
    """One training sample, as `dit4dit.data` gives it (tests and demos bring small ones of their own)."""

    @property
    def video(self) -> Tensor | None:
        """Joined views, float32 [F, 3, H, W] in [-1, 1]; None where it was not asked for."""

    @property
    def lang(self) -> str:
        """The task in words."""

    @property
    def actions(self) -> Tensor:
        """Normalised, zero-padded float32 [K, A_model]."""

    @property
    def action_mask(self) -> Tensor:
        """True on real entries [K, A_model]."""

    @property
    def state(self) -> Tensor | None:
        """Encoded, padded float32 [1, state_dim]; None for a model without a state token."""


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


def to_batch(
    raw: Raw, config: ModelConfig, device: torch.device, prompts: PromptCache, latents: LatentCache | None
) -> Batch:
    """The micro batch as the model takes it: pictures in [-1, 1] (or their latents), embeddings from the cache."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    head = config.head
    if raw.actions.shape[1:] != (head.action_horizon, head.action_dim):
        raise InputError(
            f"samples {list(raw.indices)}: actions: expected shape [{head.action_horizon}, {head.action_dim}], "
            f"got {list(raw.actions.shape[1:])}; set --model.head.action_horizon and --model.head.action_dim to the data's"
        )
    return Batch(
        video=pictures(raw, config, device) if latents is None else None,
        prompt_embeds=move(torch.stack([prompts[words] for words in raw.instructions])),
        actions=move(raw.actions),
        action_mask=move(raw.action_mask),
        state=None if raw.state is None else move(raw.state),
        latents=None if latents is None else _latents(latents, raw.indices, device),
    )


def pictures(raw: Raw, config: ModelConfig, device: torch.device) -> Tensor:
    """The micro batch's clips, float32 [B, F, 3, H, W] in [-1, 1]."""
    if raw.video is None or raw.video.shape[1] != config.frames:
        got = "none" if raw.video is None else list(raw.video.shape[1:])
        raise InputError(
            f"samples {list(raw.indices)}: video: expected [{config.frames}, 3, H, W], got {got}; set --model.frames"
        )
    return raw.video.to(device, non_blocking=True)


def _latents(cache: LatentCache, indices: Sequence[int], device: torch.device) -> ClipLatents:
    clips = [cache[index] for index in indices]
    stacked = {name: torch.stack([clip[name] for clip in clips]).to(device) for name in ("mean", "std", "clip")}
    return ClipLatents(**stacked)


@dataclass(frozen=True)
class Share:
    """Which positions this process takes.

    Attributes:
        rank, ranks: this process and how many there are. batch_size: per process and micro step.
        accumulate: micro steps per step.
    """

    rank: int
    ranks: int
    batch_size: int
    accumulate: int

    @property
    def global_batch(self) -> int:
        return self.ranks * self.batch_size * self.accumulate

    def positions(self, step: int, micro: int) -> range:
        """This rank's positions in one micro step."""
        start = step * self.global_batch + (micro * self.ranks + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class Feed:
    """Micro batches of a run from a given step on, loaded ahead by worker processes."""

    def __init__(
        self, data: TrainingData, share: Share, first: int, last: int, *, workers: int, video: bool, pin: bool
    ) -> None:
        """first, last: the steps, last excluded. video: decode pictures. pin: page-locked memory for a GPU."""
        steps = range(first, last)
        wanted = [list(share.positions(step, micro)) for step in steps for micro in range(share.accumulate)]
        self._loader = DataLoader(
            _Positions(data, video),
            batch_sampler=wanted,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_outlive_signals if workers else None,
            # without one of its own a loader draws from the global generator
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Generator[Raw, None, None]:
        batches = iter(self._loader)
        workers = list(getattr(batches, "_workers", ()))
        try:
            for made in batches:
                if isinstance(made, Dit4DitError):
                    raise made
                yield made
        finally:
            # torch asks them to end, and terminates those that do not answer; these ignore that, so one that hangs is killed
            if workers:
                batches._shutdown_workers()  # type: ignore[attr-defined]
            for worker in workers:
                worker.kill()


def _outlive_signals(worker: int) -> None:
    """What asks a run to end is sent to all of its processes; a worker ends with the run, which saves first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, eq=False)
class Loaded:
    """One sample from a worker, and why others before it could not be it."""

    position: int
    index: int
    sample: Sample
    skipped: tuple[str, ...]


class _Positions(Dataset[Loaded | Dit4DitError]):
    def __init__(self, data: TrainingData, video: bool) -> None:
        self.data, self.video = data, video

    def __getitem__(self, position: int) -> Loaded | Dit4DitError:
        """A user's error is handed over as it is: torch would bury it in a worker's traceback."""
        skipped: list[str] = []
        for attempt in range(MOST_ATTEMPTS):
            index = self.data.index(position, attempt)
            try:
                return Loaded(position, index, self.data.sample(index, video=self.video), tuple(skipped))
            except DataError as error:
                if not self.data.skip_bad:
                    return error
                skipped.append(str(error))
            except Dit4DitError as error:
                return error
        return DataError(f"{MOST_ATTEMPTS} samples in a row cannot be read; the last: {skipped[-1]}")


def _collate(rows: list[Loaded | Dit4DitError]) -> Raw | Dit4DitError:
    good: list[Loaded] = []
    for row in rows:
        if isinstance(row, Dit4DitError):
            return row
        good.append(row)
    skipped = [why for row in good for why in row.skipped]
    try:
        return collate([r.position for r in good], [r.index for r in good], [r.sample for r in good], skipped)
    except Dit4DitError as error:
        return error
