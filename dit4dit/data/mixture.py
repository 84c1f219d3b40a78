"""Several data sets as one source of samples: opened, checked, weighted, with their statistics and a split by episode."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dit4dit.data import gripper
from dit4dit.data.catalogue import Catalogue, Entry
from dit4dit.data.columns import Problem, Progress
from dit4dit.data.files import visible
from dit4dit.data.fit import check_views
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.samples import Recording, SampleReader, Window
from dit4dit.data.statistics import mixture_statistics
from dit4dit.data.video import Backend
from dit4dit.errors import ConfigError, DataError, shown
from dit4dit.robots import statistics as stats
from dit4dit.robots.embodiment import Kind

Split = Literal["train", "heldout"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """See the module.

    Attributes:
        names: the data sets, as their entries call them.
        weights: a data set is drawn with its weight, whatever its length.
        skipped: damaged episodes that are left out, because that was asked for.
    """

    names: tuple[str, ...]
    recordings: tuple[Recording, ...]
    weights: tuple[float, ...]
    skipped: tuple[Problem, ...] = ()
    without: tuple[frozenset[int], ...] = ()

    @classmethod
    def open(
        cls,
        entries: Sequence[Entry],
        root: str | Path,
        catalogue: Catalogue,
        *,
        skip_bad: bool = False,
        backend: Backend = "pyav",
        progress: Progress | None = None,
    ) -> Mixture:
        """Open the data sets of `entries`, folders below `root`; an entry with a * is all data sets that it matches.

        Raises:
            DataError: a damaged data set, with file and row (with `skip_bad` only where no episode is left), a frame rate
                that the entry does not declare, or a gripper whose values are not the robot's (`gripper.refuse`).
            ConfigError: an unknown robot, one that does not fit, or data sets that contradict each other about its actions.
        """
        root = Path(root)
        entries = [one for entry in entries for one in matching(entry, root)]
        recordings, skipped, without = [], [], []
        for entry in entries:
            recording = _open(entry, root, catalogue, backend, progress)
            problems = recording.problems
            if problems and not skip_bad:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise DataError(
                    f"{problems[0]}{more}; `dit4dit data check` lists all, skip_bad (--skip-bad; in training "
                    "--data.skip_bad true) leaves such episodes out"
                )
            spoilt = {problem.episode for problem in problems}
            episodes = recording.data.meta.episodes
            bad = frozenset(i for i, episode in enumerate(episodes) if episode.index in spoilt)
            if len(bad) == len(episodes):
                raise DataError(f"{recording.data.name}: no episode without damage; the first: {problems[0]}")
            recordings.append(recording)
            skipped += problems
            without.append(bad)
        gripper.refuse(recordings, without)
        names = tuple(entry.dataset for entry in entries)
        return cls(names, _agreed(recordings), tuple(e.weight for e in entries), tuple(skipped), tuple(without))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before training on this mixture."""
        rates = {name: recording.data.fps for name, recording in zip(self.names, self.recordings, strict=True)}
        out = []
        if len(set(rates.values())) > 1:
            listed = ", ".join(f"{name} {fps:g}" for name, fps in rates.items())
            out.append(f"mixed frame rates, so that a step lasts differently long: {listed} fps")
        robots = {recording.embodiment.tag: recording.embodiment for recording in self.recordings}
        for tag, robot in robots.items():
            if never_moved := robot.never_moved(stats.parse(self.statistics, tag, "statistics of the mixture")):
                out.append(never_moved)
        if self.skipped:
            out.append(f"{sum(map(len, self.without))} damaged episodes left out; the first: {self.skipped[0]}")
        for name, recording, bad in zip(self.names, self.recordings, self.without, strict=True):
            odd = [*recording.data.warnings(recording.columns), *gripper.notes(recording, bad)]
            out += [f"{name}: {warning}" for warning in odd]
        if apart := check_views(self.views):
            out.append(f"{apart}; for training make one mixture for each number")
        return tuple(out)

    @property
    def views(self) -> dict[str, int]:
        """Robot -> how many views it has."""
        return {recording.embodiment.name: len(recording.embodiment.views) for recording in self.recordings}

    @cached_property
    def instructions(self) -> tuple[str, ...]:
        """Every distinct instruction of the episodes that are used, sorted: what has to be embedded before the first step."""
        found: set[str] = set()
        for recording, bad in zip(self.recordings, self.without, strict=True):
            data = recording.data
            for i in range(len(data.meta.episodes)):
                if i not in bad:
                    found |= data.tasks(recording.language, i).keys()
        return tuple(sorted(found))

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Content of dataset_statistics.json, over all episodes that are used, held out or not."""
        return mixture_statistics(self.recordings, self.weights, self.without)

    def readers(self, window: Window) -> tuple[SampleReader, ...]:
        """One reader for each data set, normalising with the merged statistics of its embodiment's tag."""
        where = "statistics of the mixture"
        return tuple(
            SampleReader(recording, stats.parse(self.statistics, recording.embodiment.tag, where), window)
            for recording in self.recordings
        )

    def episodes(self, split: Split, fraction: float, seed: int) -> tuple[tuple[int, ...], ...]:
        """Positions of the episodes of one side of the split, for each data set.

        `fraction` of each data set's episodes (rounded, at least one and never all where there are two) is held out. Which ones
        is a function of `seed`, the data set's name and the episode's number: more episodes later do not reshuffle it.

        Raises:
            ConfigError: a fraction outside 0..1, or a side that has no episodes at all.
        """
        if not 0 <= fraction < 1:
            raise ConfigError(f"held-out fraction: expected 0 to below 1, got {fraction}")
        out = []
        for name, recording, bad in zip(self.names, self.recordings, self.without, strict=True):
            good = [i for i in range(len(recording.data.meta.episodes)) if i not in bad]
            count = min(max(1, round(fraction * len(good))), len(good) - 1) if fraction else 0
            ranked = sorted(good, key=lambda i: _rank(seed, name, recording.data.meta.episodes[i].index))
            held = set(ranked[:count])
            out.append(tuple(i for i in good if (i in held) == (split == "heldout")))
        if not any(out):
            raise ConfigError(
                f"no episodes for {split!r}: a held-out fraction of {fraction} takes two episodes of a set; give more, or "
                "hold none out (training: --data.holdout 0)"
            )
        return tuple(out)


def matching(entry: Entry, root: Path) -> list[Entry]:
    """The entry, or one for each data set that its pattern matches, by name; each has the entry's whole weight.

    Raises:
        DataError: a pattern that matches none.
    """
    place = root / entry.dataset
    if "*" not in entry.dataset or place.is_dir():
        if not place.exists() and not Path(entry.dataset).is_absolute():
            raise DataError(
                f"{place}: no such folder, wanted a data set with meta/info.json for robot {shown(entry.robot)}; put "
                "it there, or "
                "name the folder above it (training: --data.root, stats: --root)"
            )
        return [entry]
    # only the * is special
    pattern = re.sub(r"[?[]", r"[\g<0>]", entry.dataset)
    folders = sorted(info.parent.parent for info in visible(root, f"{pattern}/meta/info.json"))
    found = [folder.relative_to(root) if folder.is_relative_to(root) else folder for folder in folders]
    if not found:
        raise DataError(
            f"{root}: no data set matches {shown(entry.dataset)}, wanted folders with meta/info.json for robot "
            f"{shown(entry.robot)}; "
            "put them there, or name the folder above them (training: --data.root, stats: --root)"
        )
    return [replace(entry, dataset=str(path)) for path in found]


def _rank(seed: int, name: str, episode: int) -> bytes:
    return hashlib.blake2b(f"{seed} {name} {episode}".encode(), digest_size=8).digest()


def _open(entry: Entry, root: Path, catalogue: Catalogue, backend: Backend, progress: Progress | None) -> Recording:
    robot = catalogue.robot(entry.robot)
    modality = None if entry.modality is None else root / entry.modality
    data = LeRobot.open(
        root / entry.dataset, modality=modality, standard=robot.modality, backend=backend, progress=progress
    )
    if entry.fps is not None and abs(data.fps - entry.fps) > 1e-6 * entry.fps:
        raise DataError(
            f"{data.meta.info}: fps: the mixture declares {entry.fps:g}, the data set has {data.fps:g}; correct the wrong one"
        )
    return Recording.of(data, robot)


def _agreed(recordings: Sequence[Recording]) -> tuple[Recording, ...]:
    """The recordings, the actions of each tag (one robot, for the policy) with the kinds that any of its data sets says;
    ConfigError where two contradict.
    """
    said: dict[tuple[str, str], tuple[Kind, str]] = {}
    for recording in recordings:
        robot = recording.embodiment
        for key in robot.action:
            if key.kind is None:
                continue
            kind, where = said.setdefault((robot.tag, key.name), (key.kind, recording.data.modality.where))
            if kind != key.kind:
                raise ConfigError(
                    f"robot {robot.name!r}: action.{key.name} is {kind} in {where} and {key.kind} in "
                    f"{recording.data.modality.where}; one policy cannot learn both: give them to two robots with tags of their "
                    "own, or correct one"
                )
    out = []
    for recording in recordings:
        robot = recording.embodiment
        known = {name: kind for (of, name), (kind, _) in said.items() if of == robot.tag}
        if any(key.kind is None and key.name in known for key in robot.action):
            action = tuple(replace(key, kind=known.get(key.name)) for key in robot.action)
            recording = replace(recording, embodiment=replace(robot, action=action))
        out.append(recording)
    return tuple(out)
