"""One episode: the policy's chunks become rows, the rows commands, and what happens becomes a record and a video."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dit4dit.control.execution import Execution, Executor
from dit4dit.errors import ConfigError, OutputError, SimulatorError
from dit4dit.evaluation.batching import BatchedPolicy, Predictor
from dit4dit.evaluation.plan import Episode
from dit4dit.evaluation.runs import Record
from dit4dit.evaluation.video import Video
from dit4dit.evaluation.workers import Worker
from dit4dit.types import Noise

Videos = Literal["all", "failures", "none"]


@dataclass(frozen=True)
class Options:
    """How a plan is run.

    Attributes:
        execution: which rows of the chunks are executed, and when.
        batch: rows of every pass through the policy, filled up where fewer requests are there.
        workers: simulators at a time; another number gives the same episodes.
        retries: how often an episode is begun again after its worker died or hung.
        videos: of which episodes videos are kept; errors count among the failures.
    """

    execution: Execution = field(default_factory=Execution)
    batch: int = 4
    workers: int = 1
    retries: int = 2
    videos: Videos = "all"

    def __post_init__(self) -> None:
        if self.workers < 1 or self.retries < 0:
            raise ConfigError(f"expected workers >= 1 and retries >= 0, got {self.workers} and {self.retries}")


class Play:
    """One attempt at one episode: the loop itself."""

    def __init__(self, episode: Episode, videos: Path, options: Options) -> None:
        self.episode, self._options = episode, options
        self.took: dict[str, Any] = {"chunk_ms": [], "answer_ms": []}
        name = re.sub(r"[^\w.+-]+", "_", f"{episode.suite}-{episode.task}-{episode.trial:03d}")
        self._name, self._videos = name, videos
        self._video: Video | None = None
        self._half = videos / f".{name}.mp4"
        self._file: Path | None = None
        self._facts: dict[str, Any] = {
            "instruction": None,
            "success": None,
            "success_at_end": None,
            "success_at_chunk_ends": None,
            "steps": 0,
            "chunks": 0,
            "held": 0,
            "delays": [],
            "actions_hash": None,
        }

    def run(self, worker: Worker, facts: Mapping[str, Any], policy: Predictor, server: BatchedPolicy) -> None:
        """Play to the end."""
        filmed = self._options.videos != "none"
        start = worker.reset(self.episode.seed, self.episode.trial, pictures=filmed)
        observation, instruction = start["observation"], start["instruction"]
        self._facts["instruction"] = instruction
        if filmed:
            self._video = Video(self._half, facts["control_hz"])
            self._video.add(start["picture"])
        policy.prepare(instruction).result()
        executor = Executor(self._options.execution, facts["control_hz"], policy.embodiment.hold)
        successes: list[bool] = []
        executed = hashlib.blake2b(digest_size=16)
        at_chunk_ends = done = False
        while not done:
            self._ask(executor, observation, instruction, policy, server)
            rows = executor.upcoming(facts["max_steps"] - executor.steps)
            result = worker.step([policy.embodiment.command(row) for row in rows], pictures=filmed)
            observation, now = result["observation"], result["success"]
            executor.advance(len(now))
            successes += now
            for row in rows[: len(now)]:
                executed.update(row.tobytes())
            if self._video is not None:
                for picture, success in zip(result["pictures"], now, strict=True):
                    self._video.add(picture, success)
            limit = executor.steps >= facts["max_steps"]
            at_chunk_ends = at_chunk_ends or (now[-1] and not limit)
            done = result["done"] or limit
            self._facts |= {"steps": executor.steps, "held": executor.held, "delays": executor.delays}
        self._facts |= {
            "success": any(successes),
            "success_at_end": successes[-1],
            "success_at_chunk_ends": at_chunk_ends,
            "actions_hash": executed.hexdigest(),
        }
        self.close(any(successes))

    def _ask(
        self, executor: Executor, observation: Any, instruction: str, policy: Predictor, server: BatchedPolicy
    ) -> None:
        """A new chunk where one is due."""
        if not executor.due:
            return
        seen, start = policy.embodiment.observe(observation), time.monotonic()
        noise = Noise.from_seed(self.episode.noise_seed, self._facts["chunks"])
        answer = server.ask(seen, instruction, noise, executor.guidance())
        self.took["answer_ms"].append(1e3 * (time.monotonic() - start))
        self.took["chunk_ms"].append(1e3 * answer.seconds)
        self._facts["chunks"] += 1
        executor.take(answer.chunk.actions, answer.seconds, answer.chunk.normalized)

    def record(self, error: SimulatorError | OutputError | None) -> Record:
        """What came of it, but for what the whole run has in common."""
        episode = self.episode
        named = {name: getattr(episode, name) for name in ("suite", "task", "trial", "seed", "noise_seed")}
        problem = None
        if error is not None:
            text = getattr(error, "traceback", "")  # an OutputError has none
            problem = {"type": type(error).__name__, "message": str(error), "traceback": text}
        video = None if self._file is None else f"videos/{self._file.name}"
        return {**named, **self._facts, "error": problem, "video": video}

    def close(self, success: bool | None) -> None:
        """Finish the video; success None: the episode ended in an error."""
        if self._video is None:
            return
        self._video.close(success)
        self._video = None
        if self._options.videos == "failures" and success:
            self._half.unlink()
            return
        ending = {True: "success", False: "failure", None: "error"}[success]
        self._file = self._half.with_name(f"{self._name}-{ending}.mp4")
        self._half.replace(self._file)

    def discard(self) -> None:
        """Leave no video behind."""
        if self._video is not None:
            self._video.close(None)
            self._video = None
            self._half.unlink(missing_ok=True)
