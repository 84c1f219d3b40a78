"""The one loop for every environment: players with a simulator each, one policy for all of them, one line per episode.

Each player is a thread with a worker process. It plays one episode after another, asks the policy for chunks (`batching`), turns
them into rows (`execution`), and sends its worker all rows up to the next chunk at once. So the policy computes for some players
while the simulators of others run.

An episode is a function of its seeds, the plan, the checkpoint and the options that run.json holds: two runs have the same lines
but for `took`, down to a hash of every executed action. A simulator's exception, or a policy that writes NaN, makes the episode
an error, which is neither a success nor a failure; a worker that died or hangs is replaced and the episode begun again, `retries`
times. Where no environment could be made for the first episodes, two or as many as there are workers, none will be: the run ends.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from dit4dit import __version__
from dit4dit.errors import ConfigError, OutputError, SimulatorError, WorkerLost
from dit4dit.evaluation.batching import BatchedPolicy, Predictor
from dit4dit.evaluation.plan import Episode, Plan
from dit4dit.evaluation.play import Options, Play
from dit4dit.evaluation.runs import Book, Record
from dit4dit.evaluation.workers import Worker
from dit4dit.robots.embodiment import Embodiment
from dit4dit.tables import machine

END_SECONDS = 10.0
_one_at_a_time = threading.Lock()

__all__ = ["Desk", "Options", "Stopped", "configuration", "evaluate"]


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
        ConfigError: the policy is for another robot, options that do not fit, a robot that cannot be held while a chunk is late,
            or a folder with another run.
        KeyboardInterrupt: handed on once the workers have ended; the run can go on with `resume`.
    """
    check_robot(policy.embodiment, plan)
    options.execution.check(horizon)
    if options.execution.latency is not None:
        policy.embodiment.hold(np.zeros(policy.embodiment.action_dim, np.float32))  # or the run ends in its middle
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


def check_robot(robot: Embodiment, plan: Plan) -> None:
    """ConfigError unless a policy for this robot is one for the plan's."""
    if robot.name != plan.embodiment:
        raise ConfigError(
            f"{plan.name}: needs a policy for embodiment {plan.embodiment!r}, got one for {robot.name!r}; give "
            "another checkpoint, or --embodiment"
        )


def configuration(plan: Plan, options: Options, about_policy: Mapping[str, Any]) -> dict[str, Any]:
    """run.json, but for its format's number."""
    launch, here = plan.launch, machine()
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
            "python": here["python"],
            "torch": here["torch"],
            "numpy": np.__version__,
        },
        "machine": {"processor": here["cpu"], "cores": here["cores"]},
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
    count = min(options.workers, len(left))
    desk = Desk(left, count)
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

    def __init__(self, episodes: list[Episode], players: int = 1) -> None:
        self._left, self._lock = list(episodes), threading.Lock()
        self._hopeless = float(max(2, players))
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

    def made(self) -> None:
        """An environment could be made."""
        self._hopeless = math.inf

    def not_made(self) -> bool:
        """An environment could not be made, not in any attempt; True where so many could not, and none could, that none will."""
        with self._lock:
            self._hopeless -= 1
            return self._hopeless <= 0

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
            if not self._facts and self._desk.not_made():
                raise SimulatorError(
                    f"no environment could be made ({error}); mend the simulator, then go on with --resume"
                )
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
            play.run(self._worker, self._facts, self._policy, self._server)
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
            self._desk.made()

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = self._world = None
