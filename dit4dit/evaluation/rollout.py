"""The one loop for every environment: players with a simulator each, one policy for all of them, one line per episode.

Each player is a thread with a worker process. It plays one episode after another, asks the policy for chunks (`batching`), turns
them into rows (`execution`), and sends its worker all rows up to the next chunk at once. So the policy computes for some players
while the simulators of others run.

An episode is a function of its seeds, the plan, the checkpoint and the options that run.json holds: two runs have the same lines
but for `took`. A simulator's exception, or a policy that writes NaN, makes the episode an error, which is neither a success nor a
failure; a worker that died or hangs is replaced and the episode begun again, `retries` times.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit4dit.errors import ConfigError, OutputError, SimulatorError, WorkerLost
from dit4dit.evaluation.batching import BatchedPolicy, Predictor
from dit4dit.evaluation.execution import Execution, Executor
from dit4dit.evaluation.plan import Episode, Plan
from dit4dit.evaluation.runs import Book, Record
from dit4dit.evaluation.video import Video
from dit4dit.evaluation.workers import Worker
from dit4dit.types import Noise

Videos = Literal["all", "failures", "none"]
END_SECONDS = 10.0


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


def evaluate(
    policy: Predictor,
    plan: Plan,
    options: Options,
    folder: Path,
    *,
    horizon: int,
    about_policy: Mapping[str, Any],
    resume: bool = False,
    on_episode: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Play the plan's episodes into `folder` (see `runs`) and return their records, in the plan's order.

    Args:
        horizon: rows of the policy's chunks.
        about_policy: `checkpoint`, its content's hash, and what else makes the policy what it is (`identity.describe`); a run
            that goes on must be told the same, but for `path`.
        resume: go on with the run that is there: finished episodes are kept, errors tried again.
        on_episode: called with each new record, from the players' threads, one at a time.

    Raises:
        ConfigError: the policy is for another robot, options that do not fit, or a folder with another run.
        KeyboardInterrupt: handed on once the workers have ended; the run can go on with `resume`.
    """
    if policy.embodiment.name != plan.embodiment:
        raise ConfigError(
            f"{plan.name}: needs a policy for embodiment {plan.embodiment!r}, got one for {policy.embodiment.name!r}; give "
            "another checkpoint, or --embodiment"
        )
    options.execution.check(horizon)
    server = BatchedPolicy(policy, options.batch)
    book = Book(folder, configuration(plan, options, about_policy), resume=resume)
    try:
        left = [episode for episode in plan.episodes if not book.finished(episode.key)]
        (folder / "videos").mkdir(exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        for half in (folder / "videos").glob(".*.mp4"):
            half.unlink()
        if left:
            _play_all(policy, plan, options, book, server, left, on_episode)
            book.config["row_independent"] = server.independent
            book.save_config()
        return [book.records[episode.key] for episode in plan.episodes]
    finally:
        book.close()


def configuration(plan: Plan, options: Options, about_policy: Mapping[str, Any]) -> dict[str, Any]:
    """run.json, but for its format's number."""
    import torch

    from dit4dit import __version__

    launch = plan.launch
    return {
        "benchmark": plan.name,
        "plan": dict(plan.about),
        "shard": list(plan.shard),
        "episodes": len(plan.episodes),
        "policy": dict(about_policy),
        "execution": asdict(options.execution),
        "batch": options.batch,
        "workers": options.workers,
        "retries": options.retries,
        "videos": options.videos,
        "launch": {
            "python": launch.python,
            "variables": dict(launch.variables),
            "answer_seconds": launch.answer_seconds,
        },
        "versions": {
            "dit4dit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def _play_all(
    policy: Predictor,
    plan: Plan,
    options: Options,
    book: Book,
    server: BatchedPolicy,
    left: list[Episode],
    on_episode: Callable[[Record], None],
) -> None:
    desk = Desk(left)
    count = min(options.workers, len(left))
    players = [Player(i, policy, plan, options, book, server, desk, on_episode) for i in range(count)]
    for player in players:
        player.start()
    try:
        server.serve(until=lambda: not any(player.is_alive() for player in players))
    finally:
        desk.close()
        server.close(Stopped())
        for player in players:
            player.end()
        for player in players:
            player.join(END_SECONDS)
    for player in players:
        if player.failure is not None:
            raise player.failure


class Stopped(Exception):
    """The run is being ended; what was in progress is dropped."""


class Desk:
    """Hands out episodes: to each player, if it can be, one that its environment can play already."""

    def __init__(self, episodes: list[Episode]) -> None:
        self._left, self._lock = list(episodes), threading.Lock()
        self._players: Counter[str] = Counter()  # of each world

    def take(self, world: str | None) -> Episode | None:
        """The next episode for a player whose environment is `world`; None when there are no more."""
        with self._lock:
            if world is not None:
                self._players[world] -= 1
            if not self._left:
                return None
            chosen = next((e for e in self._left if e.world == world), None)
            if chosen is None:  # begin with a world that fewest players are in
                chosen = min(self._left, key=lambda e: self._players[e.world])
            self._left.remove(chosen)
            self._players[chosen.world] += 1
            return chosen

    def close(self) -> None:
        """There are no more."""
        with self._lock:
            self._left.clear()


class Player(threading.Thread):
    """Plays episodes with a worker of its own until the desk has none.

    `failure`  what ended it early, if anything but `Stopped` did: a bug, or a mistake of the user's.
    """

    def __init__(
        self,
        number: int,
        policy: Predictor,
        plan: Plan,
        options: Options,
        book: Book,
        server: BatchedPolicy,
        desk: Desk,
        on_episode: Callable[[Record], None],
    ) -> None:
        super().__init__(name=f"player-{number}", daemon=True)
        self.failure: BaseException | None = None
        self._policy, self._plan, self._options, self._book = policy, plan, options, book
        self._server, self._desk, self._on_episode = server, desk, on_episode
        self._log = book.folder / "logs" / f"worker-{number}.log"
        self._worker: Worker | None = None
        self._world: str | None = None
        self._facts: dict[str, Any] = {}
        self._ended = False

    def run(self) -> None:
        try:
            while (episode := self._desk.take(self._world)) is not None:
                before = self._book.records.get(episode.key)
                record = self._record(episode)
                self._book.add(record)
                if before is not None and before["video"] not in (None, record["video"]):
                    (self._book.folder / before["video"]).unlink(missing_ok=True)  # of the error that is no longer one
                with _one_at_a_time:
                    self._on_episode(record)
        except Stopped:
            pass
        except BaseException as error:  # raised again by the main thread
            self.failure = error
            self._desk.close()
        finally:
            self._drop_worker()
            self._server.wake()

    def end(self) -> None:
        """From another thread: whatever the worker is doing, end it."""
        self._ended = True
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _record(self, episode: Episode) -> Record:
        """Play the episode, again where its worker is lost, and say what came of it."""
        started, start, attempts = datetime.now(timezone.utc), time.monotonic(), 1
        play, error = self._attempt(episode)
        while isinstance(error, WorkerLost) and attempts <= self._options.retries:
            play.discard()
            attempts += 1
            play, error = self._attempt(episode)
        if error is not None:
            play.close(None)
        config = self._book.config
        policy = dict(config["policy"])
        return {
            **play.record(error),
            "checkpoint": policy.pop("checkpoint"),
            "options": {"execution": config["execution"], "batch": config["batch"], **policy},
            "versions": {**config["versions"], "simulator": self._facts.get("versions")},
            "took": {
                "started": started.isoformat(timespec="seconds"),
                "seconds": time.monotonic() - start,
                "attempts": attempts,
                **play.took,
            },
        }

    def _attempt(self, episode: Episode) -> tuple[Play, SimulatorError | OutputError | None]:
        play = Play(episode, self._book.folder / "videos", self._options)
        try:
            self._ready(episode)
            assert self._worker is not None
            play.run(self._worker, self._facts, self._policy, self._server, self._plan.hold)
            return play, None
        except (SimulatorError, OutputError) as error:
            if isinstance(error, SimulatorError):
                self._drop_worker()  # nobody knows what state the simulator is in
            if self._ended:
                play.discard()
                raise Stopped from None
            return play, error
        except BaseException:
            play.discard()
            raise
        finally:
            self._server.leave()

    def _ready(self, episode: Episode) -> None:
        """A worker with the episode's environment."""
        if self._worker is None:
            self._worker = Worker(self._plan.launch, self._log)
            self._world = None
        if self._ended:
            raise Stopped
        if self._world != episode.world:
            made = self._worker.make(episode.environment, episode.options)
            self._facts = {**made["facts"], "versions": made["versions"]}
            self._world = episode.world

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = self._world = None


_one_at_a_time = threading.Lock()


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
        }

    def run(
        self,
        worker: Worker,
        facts: Mapping[str, Any],
        policy: Predictor,
        server: BatchedPolicy,
        hold: Callable[..., Any],
    ) -> None:
        """Play to the end."""
        filmed = self._options.videos != "none"
        start = worker.reset(self.episode.seed, self.episode.trial, pictures=filmed)
        observation, instruction = start["observation"], start["instruction"]
        self._facts["instruction"] = instruction
        if filmed:
            self._video = Video(self._half, facts["rate_hz"])
            self._video.add(start["picture"])
        policy.prepare(instruction).result()
        executor = Executor(self._options.execution, facts["rate_hz"], hold)
        successes: list[bool] = []
        at_chunk_ends = done = False
        while not done:
            self._ask(executor, observation, instruction, policy, server)
            rows = executor.upcoming(facts["max_steps"] - executor.steps)
            result = worker.step([policy.embodiment.command(row) for row in rows], pictures=filmed)
            observation, now = result["observation"], result["success"]
            executor.advance(len(now))
            successes += now
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
        }
        self.close(any(successes))

    def _ask(
        self, executor: Executor, observation: Any, instruction: str, policy: Predictor, server: BatchedPolicy
    ) -> None:
        """A new chunk where one is due."""
        if not executor.due:
            return
        seen, start = policy.embodiment.observe(observation), time.monotonic()
        answer = server.ask(seen, instruction, Noise.from_seed(self.episode.noise_seed, self._facts["chunks"]))
        self.took["answer_ms"].append(1e3 * (time.monotonic() - start))
        self.took["chunk_ms"].append(1e3 * answer.seconds)
        self._facts["chunks"] += 1
        executor.take(answer.chunk.actions, answer.seconds)

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
