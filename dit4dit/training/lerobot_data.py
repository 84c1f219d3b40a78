"""LeRobot mixtures as `TrainingData`: the order is the data's own sampler, an index is a frame (every n-th), counted over all
data sets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit.config import ModelConfig, hashed_text
from dit4dit.data.catalogue import catalogue
from dit4dit.data.fit import check_fit, check_views
from dit4dit.data.mixture import Mixture, Split
from dit4dit.data.sampler import Draws
from dit4dit.data.samples import Recording, Sample, Window
from dit4dit.errors import ConfigError
from dit4dit.robots.action_error import ActionUnits
from dit4dit.training.caches import digest
from dit4dit.training.config import DataConfig
from dit4dit.training.logs import log

ENDS = 1 << 16


def video_digest(file: Path) -> str:
    """Of a video's size, beginning and end: one of them is its index, which has the size of every frame. A copy has the same."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        beginning = stream.read(ENDS)
        stream.seek(max(0, size - ENDS))
        return digest(size, hashlib.blake2b(beginning + stream.read()).hexdigest())


class LeRobotData:
    """See `dit4dit.training.samples.TrainingData`."""

    def __init__(
        self, mixture: Mixture, model: ModelConfig, config: DataConfig, seed: int, embodiment: str | None = None
    ) -> None:
        """seed: of the order of samples and of the split by episode. embodiment: what the checkpoints will say.

        Raises:
            ConfigError: robots of the mixture join their views to pictures of different sizes, or none is the embodiment.
        """
        self.mixture, self.skip_bad = mixture, config.skip_bad
        if apart := check_views(mixture.views):
            raise ConfigError(
                f"--data.mixture {config.mixture}: {apart}; make one mixture for each number, in a file for --data.robots"
            )
        for recording in mixture.recordings:
            check_fit(recording.embodiment, model)
        self.window = Window.for_model(
            model,
            video_delta_indices=config.video_delta_indices,
            action_video_freq_ratio=config.action_video_freq_ratio,
            mask_padded=config.mask_padding,
        )
        self.readers = mixture.readers(self.window)
        self._every = config.sample_every
        # damaged episodes that are left out have no samples
        lengths = [
            [0 if i in bad else self._samples(r, i) for i in range(len(r.data.meta.episodes))]
            for r, bad in zip(mixture.recordings, mixture.without, strict=True)
        ]
        # starts[d][e]: index of the first sample of episode e of data set d; the last entry is where the next data set begins
        ends = np.cumsum([0, *(sum(each) for each in lengths)])
        self._starts = [end + np.cumsum([0, *each]) for end, each in zip(ends, lengths, strict=False)]
        self._ends = ends[1:]
        self._train = self._draws("train", config.holdout, seed)
        self._episodes = mixture.episodes("heldout", config.holdout, seed) if config.holdout else ()
        robots = sorted({r.embodiment.name for r in mixture.recordings})
        if embodiment is not None and embodiment not in robots:
            raise ConfigError(
                f"embodiment: the checkpoints would carry {embodiment!r}, the mixture {config.mixture!r} is of "
                f"{', '.join(map(repr, robots))}; give --embodiment none, with which they carry the data's own"
            )
        height, width = model.image_size
        self._size = (height, width * next(iter(mixture.views.values())))

    @classmethod
    def open(cls, config: DataConfig, model: ModelConfig, seed: int, embodiment: str | None = None) -> LeRobotData:
        """Open the mixture that `config` names; DataError and ConfigError as `Mixture.open` has them."""
        known = catalogue(None if config.robots is None else Path(config.robots))
        if not config.mixture:
            raise ConfigError(
                f"--data.mixture: none given; choose one: {', '.join(known.mixtures)}, or one of --data.robots"
            )
        mixture = Mixture.open(known.mixture(config.mixture), Path(config.root), known, skip_bad=config.skip_bad)
        data = cls(mixture, model, config, seed, embodiment)
        for note in mixture.notes:
            log.warning("%s: %s", config.mixture, note)
        return data

    def _samples(self, recording: Recording, episode: int) -> int:
        return -(-recording.length(episode) // self._every)

    def _draws(self, split: Split, holdout: float, seed: int) -> Draws:
        episodes = self.mixture.episodes(split, holdout, seed)
        recordings = self.mixture.recordings
        lengths = [[self._samples(r, i) for i in chosen] for r, chosen in zip(recordings, episodes, strict=True)]
        return Draws(episodes, lengths, self.mixture.weights, seed)

    @property
    def fingerprint(self) -> str:
        """Of the order of samples and of the samples themselves."""
        window, statistics = hashed_text("Window", self.window), sorted(self.statistics.items())
        return digest(self._train.fingerprint, self.clip_fingerprint, window, statistics)

    @cached_property
    def clip_fingerprint(self) -> str:
        """Of the pictures: the files of all videos by name and content, and how clips are cut from them."""
        facts: list[object] = [self.window.offsets, self.window.image_size, self._every]
        for recording, bad in zip(self.mixture.recordings, self.mixture.without, strict=True):
            facts += [recording.cameras, recording.data.fps]
            root = recording.data.meta.root
            episodes = [episode for i, episode in enumerate(recording.data.meta.episodes) if i not in bad]
            files = sorted({e.videos[camera].path for e in episodes for camera in recording.cameras})
            with ThreadPoolExecutor(8) as pool:  # a shared file system answers slowly, but many at once
                for file, found in zip(files, pool.map(video_digest, files), strict=True):
                    # a pair's repr, as the first runs have it, on any system
                    facts.append(f"(PosixPath({file.relative_to(root).as_posix()!r}), {found!r})")
            facts += [(e.length, *(e.videos[camera].start for camera in recording.cameras)) for e in episodes]
        return digest(*facts)

    @cached_property
    def instructions(self) -> Sequence[str]:
        return self.mixture.instructions

    @property
    def statistics(self) -> Mapping[str, Any]:
        return self.mixture.statistics

    @property
    def clips(self) -> int:
        return int(self._ends[-1])

    @property
    def picture_size(self) -> tuple[int, int]:
        return self._size

    def index(self, position: int, attempt: int = 0) -> int:
        drawn = self._train.draw(position, attempt)
        return int(self._starts[drawn.dataset][drawn.episode]) + drawn.frame

    def held_out(self) -> Sequence[int]:
        samples: list[int] = []
        for starts, episodes in zip(self._starts, self._episodes, strict=False):
            for episode in episodes:
                samples += range(int(starts[episode]), int(starts[episode + 1]))
        return samples

    @cached_property
    def robots(self) -> Sequence[ActionUnits]:
        found = {r.recording.embodiment.name: ActionUnits(r.recording.embodiment, r.action) for r in self.readers}
        return tuple(found.values())

    def robot(self, index: int) -> int:
        dataset = int(np.searchsorted(self._ends, index, side="right"))
        names = [robot.embodiment.name for robot in self.robots]
        return names.index(self.readers[dataset].recording.embodiment.name)

    def sample(self, index: int, *, video: bool = True) -> Sample:
        dataset = int(np.searchsorted(self._ends, index, side="right"))
        starts = self._starts[dataset]
        episode = int(np.searchsorted(starts, index, side="right")) - 1
        return self.readers[dataset].read(episode, self._every * (index - int(starts[episode])), video=video)
