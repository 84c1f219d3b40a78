"""A LeRobot data set to read from: v2.0, v2.1 or v3.0 (info.json tells), with or without GR00T's modality.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.columns import Columns, Problem, Progress, open_columns
from dit4dit.data.meta import EpisodeMeta, Meta, read_meta
from dit4dit.data.modality import Modality, Slice, from_features, parse, read_modality
from dit4dit.data.time_check import merged
from dit4dit.data.video import Backend, Frames, VideoReader
from dit4dit.errors import DataError


class LeRobot:
    """See the module. Episodes are addressed by their position in `meta.episodes`, frames from 0 within the episode.

    Picklable: a worker opens its own files and shares the memory-mapped numbers.
    """

    def __init__(self, meta: Meta, modality: Modality, columns: Columns, backend: Backend = "pyav") -> None:
        self.meta, self.modality, self.columns = meta, modality, columns
        self.videos = VideoReader(backend)

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        modality: str | Path | None = None,
        standard: Mapping[str, Any] | None = None,
        backend: Backend = "pyav",
        progress: Progress | None = None,
    ) -> LeRobot:
        """Open the data set in the folder `root`.

        Args:
            modality: a modality.json to use instead of the data set's own.
            standard: content of one to use when the data set has none; without it keys come whole from info.json.
            backend: pyav or torchcodec.
            progress: told how far reading the files for the first time has come.

        Raises:
            DataError: no data set, or a meta folder that is damaged. Damaged episodes are listed in `columns.problems`.
        """
        meta = read_meta(Path(root))
        found = _modality(meta, None if modality is None else Path(modality), standard)
        return cls(meta, found, open_columns(meta, progress, found.annotation.values()), backend)

    @property
    def name(self) -> str:
        return str(self.meta.root)

    @property
    def fps(self) -> float:
        return self.meta.fps

    def problems(self, columns: Collection[str]) -> list[Problem]:
        """What is wrong with episodes as a whole, or with one of these columns or cameras."""
        return [problem for problem in self.columns.problems if problem.column is None or problem.column in columns]

    def warnings(self, columns: Collection[str] | None = None) -> list[str]:
        """What is unusual and spoils nothing in these columns and cameras (all of them), once for each kind."""
        found = [one for one in self.columns.unusual if columns is None or one.column in columns]
        return [*self.meta.warnings, *self.columns.warnings, *(str(one) for one in merged(found, columns=True))]

    def first_row(self, episode: int) -> int:
        """How many rows the episodes before this one have, as the meta folder counts them."""
        return self._first_rows[episode]

    @cached_property
    def _first_rows(self) -> list[int]:
        return [0, *accumulate(episode.length for episode in self.meta.episodes)]

    def column(self, name: str, episode: int) -> NDArray[Any]:
        """A column of one episode, [length, d]; DataError where the files do not have it."""
        return self.columns.read(name, episode)

    def values(self, where: Slice, episode: int) -> NDArray[np.float32]:
        """One key of one episode, float32 [length, size]; DataError where the files do not have it as numbers."""
        if where.column in self.columns.texts:
            raise DataError(
                f"{self.name}: column {where.column!r} holds texts; expected numbers, for a state or an action"
            )
        found: NDArray[np.float32] = self.column(where.column, episode)[:, where.start : where.end].astype(
            np.float32, copy=False
        )
        return found

    def task(self, column: str, episode: int, frame: int) -> str:
        """The instruction of one frame."""
        return self._text(column, int(self.column(column, episode)[frame, 0]))

    def tasks(self, column: str, episode: int) -> dict[str, int]:
        """Instruction -> frames of an episode that have it."""
        out: dict[str, int] = {}
        for n, count in zip(*np.unique(self.column(column, episode), return_counts=True), strict=True):
            text = self._text(column, int(n))  # several task numbers may have one text
            out[text] = out.get(text, 0) + int(count)
        return out

    def _text(self, column: str, number: int) -> str:
        return self.columns.texts[column][-1 - number] if number < 0 else self.meta.tasks[number]

    def pictures(self, camera: str, episode: int, frames: Sequence[int]) -> Frames:
        """uint8 [n, H, W, 3] of these frames of an episode.

        Raises:
            DataError: the file is missing or damaged, or holds no such frame.
        """
        place = self.meta.episodes[episode].videos[camera]
        decoder = self.videos.decoder(place.path)
        first, _ = decoder.times.first_frame(place.start, self.fps)
        return decoder.frames([first + frame for frame in frames])

    def episode(self, episode: int) -> EpisodeMeta:
        return self.meta.episodes[episode]


def _modality(meta: Meta, named: Path | None, standard: Mapping[str, Any] | None) -> Modality:
    own = meta.root / "meta" / "modality.json"
    if named is not None or own.is_file():
        return read_modality(named or own, meta.features)
    if standard:
        where = f"{meta.root} has no meta/modality.json, and the robot's standard one does not fit"
        try:
            return parse(standard, meta.features, str(meta.info))
        except DataError as error:
            raise DataError(f"{where} ({error}); name one with --modality (of a mixture: modality)") from None
    return from_features(meta.features, str(meta.info))
