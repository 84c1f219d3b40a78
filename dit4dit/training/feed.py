"""From samples to batches on the device: who loads which sample, and when.

Step s uses the positions s G to s G + G - 1; rank r of W takes the r-th of the W equal stretches of each micro step.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit4dit.config import ModelConfig
from dit4dit.data.samples import Sample
from dit4dit.errors import DataError, Dit4DitError, InputError
from dit4dit.training.caches import LatentCache, PromptCache
from dit4dit.training.samples import MOST_ATTEMPTS, Raw, TrainingData, collate, pictures
from dit4dit.types import Batch, ClipLatents


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
