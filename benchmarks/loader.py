"""Throughput of training's loader: samples per second for several numbers of workers, and where one process spends its time.

Before anything is timed, the batches of every number of workers must be the same to the bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from numpy.typing import NDArray
from torch import Tensor

from dit4dit.config import ModelConfig
from dit4dit.data.catalogue import Catalogue, Entry
from dit4dit.data.lerobot import LeRobot
from dit4dit.data.mixture import Mixture
from dit4dit.data.writer import Writer
from dit4dit.progress import Bar
from dit4dit.training.config import DataConfig
from dit4dit.training.feed import Feed, Share
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.samples import Raw

MADE = {"episodes": 8, "frames": 120, "height": 256, "width": 256, "fps": 10}
"""The data set that is made when none is given: LIBERO's keys, two views, h264 with a key frame every second frame."""


def measure(
    datasets: Sequence[Path],
    robot: str | None,
    model: ModelConfig,
    *,
    known: Catalogue,
    modality: Path | None,
    workers: Sequence[int],
    batch_size: int,
    batches: int,
    record: Recording,
    shown: Bar,
) -> None:
    """Samples per second per number of workers, and shares of time in one process, with the machine they belong to, into
    `record`. shown: counts data, each number of workers and the shares as one each, and is written between two times alone.
    """
    result = record.result
    runs: list[dict[str, Any]] = []
    result |= {"machine": machine(), "batch_size": batch_size, "batches": batches, "runs": runs, "share_of_time": None}
    record.during("data")
    with tempfile.TemporaryDirectory() as scratch:
        made = not datasets
        shown.say("making data" if made else "reading data")
        with shown.ticking():
            if made:
                datasets, robot = [make(Path(scratch) / "made")], "libero_franka"
            assert robot is not None
            named = None if modality is None else str(modality.resolve())
            entries = [Entry(str(path), robot, modality=named) for path in datasets]
            mixture = Mixture.open(entries, Path(), known)
        data = LeRobotData(mixture, model, DataConfig(holdout=0.0), seed=0)
        window = data.window
        result["data"] = MADE if made else [str(path) for path in datasets]
        sizes = {"frames": len(window.offsets), "horizon": window.horizon, "image_size": window.image_size}
        result["window"] = sizes
        record.during("comparison")
        shown.say("comparing the workers' batches")
        _agree(data, workers, batch_size)
        for count in record.each([*workers, None], "workers", name=lambda n: "shares" if n is None else f"{n} workers"):
            shown.update()
            shown.say("shares of time" if count is None else f"{count} workers")
            if count is None:
                result["share_of_time"] = _shares(data, batch_size, batches)
                continue
            seconds = _time(data, batch_size, batches, count)
            runs.append({"workers": count, "seconds": seconds, "samples_per_second": batches * batch_size / seconds})
        if record.remaining() != 0.0:
            shown.update()


def make(root: Path, seed: int = 0) -> Path:
    """A data set with LIBERO's keys: smooth moving images, which compress as a camera's do, and random numbers, but for a
    gripper that closes in the second half of an episode (LIBERO's 1 = open) with both fingers.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: MADE["height"], : MADE["width"]]
    with Writer(root, MADE["fps"], version="v2.1") as writer:
        for episode in range(MADE["episodes"]):
            n = MADE["frames"]
            shift = 3.0 * np.arange(n)[:, None, None]
            waves = [128 + 100 * np.sin((x + shift) / (17 + 5 * c) + (y - shift) / (23 + episode)) for c in range(3)]
            pictures = (np.stack(waves, axis=-1) + rng.normal(0, 4, (n, *x.shape, 1))).clip(0, 255).astype(np.uint8)
            state, action = (rng.normal(size=(n, d)).astype(np.float32) for d in (8, 7))
            action[:, 6] = np.arange(n) < n // 2
            state[:, 6:] = np.outer(action[:, 6], (0.04, -0.04))
            views = {"observation.images.image": pictures, "observation.images.wrist_image": pictures[:, ::-1]}
            writer.add({"observation.state": state, "action": action}, views, f"task {episode % 2}")
    return root


def feed(data: LeRobotData, batch_size: int, batches: int, workers: int) -> Generator[Raw, None, None]:
    """So many batches of a run, from its first step on, as the only process of a training on a CPU loads them."""
    return iter(Feed(data, Share(0, 1, batch_size, 1), 0, batches, workers=workers, video=True, pin=False))


def _agree(data: LeRobotData, workers: Sequence[int], batch_size: int) -> None:
    first, *others = (list(feed(data, batch_size, 2, count)) for count in workers)
    for count, got in zip(workers[1:], others, strict=True):
        for a, b in zip(first, got, strict=True):
            # images, state, actions and their mask; positions, indices and instructions
            pairs = [(value, getattr(b, name)) for name, value in vars(a).items()]
            if not all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs):
                raise AssertionError(f"{count} workers give other batches than {workers[0]}: not timed")


def _time(data: LeRobotData, batch_size: int, batches: int, workers: int) -> float:
    """Seconds for `batches` batches, after as many as workers had ready when the clock started, and with more to load."""
    ahead = 2 * workers
    with closing(feed(data, batch_size, 1 + ahead + batches + ahead, workers)) as loaded:
        for _ in range(1 + ahead):
            next(loaded)
        start = time.perf_counter()
        for _ in range(batches):
            next(loaded)
        return time.perf_counter() - start


class _Clocked(LeRobot):
    """The same data set, adding up the seconds that decoding takes."""

    seconds = 0.0

    def pictures(self, camera: str, episode: int, frames: Sequence[int]) -> NDArray[np.uint8]:
        start = time.perf_counter()
        found = super().pictures(camera, episode, frames)
        self.seconds += time.perf_counter() - start
        return found


def _shares(data: LeRobotData, batch_size: int, batches: int) -> dict[str, float]:
    """Shares of one process's time: decoding, and the rest (resizing, numbers, stacking)."""
    clocked = []
    for reader in data.readers:
        own = reader.recording.data
        clocked.append(_Clocked(own.meta, own.modality, own.columns, own.videos.backend))
        reader.recording = replace(reader.recording, data=clocked[-1])
    loaded = feed(data, batch_size, 1 + batches, 0)
    next(loaded)
    before = sum(clock.seconds for clock in clocked)
    start = time.perf_counter()
    for _ in loaded:
        pass
    total = time.perf_counter() - start
    decoding = (sum(clock.seconds for clock in clocked) - before) / total
    return {"decoding": decoding, "the rest": 1 - decoding}
