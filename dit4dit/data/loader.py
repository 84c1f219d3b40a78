"""Batches of samples from worker processes, in an order that depends on the sampler alone.

An unreadable sample stops the run with its file's name; with `skip_bad` another is drawn in its place, by a rule that depends on
the sample's number alone, and the loader counts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dit4dit.data.mixture import Mixture, Split
from dit4dit.data.sampler import Draws, Sampler
from dit4dit.data.samples import Sample, SampleReader, Samples, Window
from dit4dit.errors import ConfigError, DataError

MOST_ATTEMPTS = 100
"""Replacements of one sample before the data are taken to be unreadable altogether."""


@dataclass(frozen=True)
class Skip:
    """A sample that could not be read and was replaced."""

    number: int
    reason: str


Made = tuple[Sample, tuple[Skip, ...]]


class SampleDataset(Dataset[Made | str]):
    """Sample number -> sample, and what was skipped for it. Pickled or inherited by each worker."""

    def __init__(self, readers: Sequence[SampleReader], draws: Draws, skip_bad: bool) -> None:
        self.readers, self.draws, self.skip_bad = tuple(readers), draws, skip_bad

    def __getitem__(self, number: int) -> Made | str:
        """As `read`; a user's error comes as its message, because torch would bury it in a worker's traceback."""
        try:
            return self.read(number)
        except DataError as error:
            return str(error)

    def read(self, number: int) -> Made:
        """Sample `number` and what was skipped for it.

        Raises:
            DataError: it cannot be read, and is not to be skipped.
        """
        skips: list[Skip] = []
        for attempt in range(MOST_ATTEMPTS):
            drawn = self.draws.draw(number, attempt)
            try:
                return self.readers[drawn.dataset].read(drawn.episode, drawn.frame), tuple(skips)
            except DataError as error:
                if not self.skip_bad:
                    raise
                skips.append(Skip(number, str(error)))
        raise DataError(
            f"sample {number}: {MOST_ATTEMPTS} samples in a row cannot be read; the last: {skips[-1].reason}"
        )


class Loader:
    """Endless batches for one rank.

    Args:
        mixture, window: what to read, and what a sample holds.
        batch_size: samples of a batch on this rank.
        seed: of the order of samples and of the split.
        split, heldout: which side of the split by episode, and the fraction of episodes that is held out.
        epoch_size: samples of an epoch; the frames of the split when None.
        workers: processes that decode; 0 decodes in this one. The batches do not depend on it.
        prefetch: batches that each worker keeps ready.
        skip_bad: replace unreadable samples, and count them in `skipped`.
        pin_memory: page-locked batches, for copies to a GPU that do not wait.
    """

    def __init__(
        self,
        mixture: Mixture,
        window: Window,
        *,
        batch_size: int,
        seed: int = 0,
        split: Split = "train",
        heldout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        epoch_size: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        skip_bad: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ConfigError(f"loader: expected workers >= 0 and prefetch >= 1, got {workers} and {prefetch}")
        episodes = mixture.episodes(split, heldout, seed)
        lengths = [[r.length(i) for i in chosen] for r, chosen in zip(mixture.recordings, episodes, strict=True)]
        draws = Draws(episodes, lengths, mixture.weights, seed, epoch_size)
        self.sampler = Sampler(draws, batch_size=batch_size, rank=rank, world_size=world_size)
        self.dataset = SampleDataset(mixture.readers(window), draws, skip_bad)
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory
        self.skipped: list[Skip] = []
        """Samples that were replaced in the batches taken so far."""

    def __iter__(self) -> Iterator[Samples]:
        """Batches from the sampler's position on; a batch counts as taken when it is handed out.

        Raises:
            DataError: a sample cannot be read; with workers too.
        """
        if self.workers:
            for reader in self.dataset.readers:
                reader.recording.data.videos.close()
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.pin_memory,
        )
        for made in loader:
            if isinstance(made, str):
                raise DataError(made)
            samples, skips = made
            self.sampler.position += self.sampler.global_batch
            self.skipped += skips
            yield samples

    def state_dict(self) -> dict[str, Any]:
        """Position of the sampler, after the batch that was handed out last."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken; begin a new iteration afterwards. ConfigError: other data or seed."""
        self.sampler.load_state_dict(state)


def _collate(made: Sequence[Made | str]) -> tuple[Samples, tuple[Skip, ...]] | str:
    good: list[Made] = []
    for item in made:
        if isinstance(item, str):
            return item
        good.append(item)
    return Samples.collate([sample for sample, _ in good]), tuple(skip for _, skips in good for skip in skips)
