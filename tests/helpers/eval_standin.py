"""A policy that costs nothing, for tests of the evaluation: its actions are a function of the observation and the noise."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit4dit import ActionChunk
from dit4dit.engine import RequestShape
from dit4dit.errors import OutputError
from dit4dit.evaluation.plan import Episode, Plan
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.evaluation.workers import Launch
from dit4dit.robots import TABLETOP
from dit4dit.types import Noise

K = 4
ABOUT = {"checkpoint": "0" * 32, "path": "stand-in"}
LAUNCH = Launch(variables={"PYTHONPATH": str(Path(__file__).parent)})


class Asked(NamedTuple):
    """What it makes of a question."""

    observation: Any
    instruction: str
    noise: Noise
    guidance: Any
    kind: Any


class StandIn:
    """embodiment tabletop, chunks [K, 3]. Takes `seconds` per pass; writes NaN for the noise seeds in `broken`."""

    embodiment = TABLETOP

    def __init__(self, seconds: float = 0.0, broken: tuple[int, ...] = (), width: int | None = None) -> None:
        self.seconds, self.broken, self.width = seconds, broken, width
        self.sizes: list[int] = []
        self.guidances: list[Any] = []
        self.noises: list[tuple[int | None, int]] = []
        self.thread: int | None = None

    def request(self, observation: Any, instruction: str, *, noise: Any = None, guidance: Any = None) -> Any:
        views = tuple(picture.shape[:2] for picture in observation.images.values())
        shape = RequestShape(1, views, None, "bilinear", True, 1, getattr(guidance, "max_guidance", None))
        return Asked(observation, instruction, noise, guidance, (shape, True))

    def run(self, requests: Any) -> list[ActionChunk]:
        assert self.thread in (None, threading.get_ident()), "a policy is not shared between threads"
        self.thread = threading.get_ident()
        self.sizes.append(len(requests))
        self.guidances += [r.guidance for r in requests]
        self.noises += [(r.noise.seed, r.noise.chunk) for r in requests]
        time.sleep(self.seconds)
        if any(r.noise.seed in self.broken for r in requests):
            raise OutputError("actions: the model wrote NaN")
        return [self.chunk(r.observation, r.instruction, r.noise, i) for i, r in enumerate(requests)]

    def chunk(self, observation: Any, words: str, noise: Noise, row: int) -> ActionChunk:
        state = np.concatenate([observation.state[key] for key in ("x", "y", "grip")])
        drawn = noise.draw({"posterior": (1,), "latent": (1,), "action": (K, 3)})["action"]
        actions = 0.05 * (drawn + state) + 1e-5 * len(words)
        if self.width is not None:
            actions = actions + row * 1e-6
        return ActionChunk(actions.astype(np.float32), TABLETOP.action_names, 10.0, actions.astype(np.float32), noise)

    def warm_up(self, pictures: Any = None, *, batch: int = 1, max_guidance: float | None = None) -> None:
        pass

    def prepare(self, instruction: str) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


def make_plan(count: int = 6, launch: Launch = LAUNCH, tasks: int = 2, **options: Any) -> Plan:
    """`count` episodes of `eval_worlds.World` over some tasks; trouble is only in the first episode."""
    trouble = {name: options.pop(name) for name in ("trouble", "at", "once") if name in options}
    episodes = []
    for i in range(count):
        mine = {**options, **(trouble if i == 0 else {})}
        episodes.append(Episode("suite", f"task {i % tasks}", i // tasks, i, 100 + i, "eval_worlds:world", mine))
    return Plan("worlds", "tabletop", launch, tuple(episodes), {"count": count, "options": options})


def play(
    folder: Path,
    plan: Plan,
    *,
    policy: StandIn | None = None,
    resume: bool = False,
    on_episode: Any = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """`evaluate` with a stand-in."""
    chosen = Options(**{"batch": 2, "videos": "none", **options})
    more = {} if on_episode is None else {"on_episode": on_episode}
    return evaluate(policy or StandIn(), plan, chosen, folder, horizon=K, about_policy=ABOUT, resume=resume, **more)


def untimed(records: Any) -> list[dict[str, Any]]:
    """Records without what may differ from run to run."""
    return [{name: value for name, value in record.items() if name != "took"} for record in records]


def kill_plan() -> Plan:
    """Episodes that are long enough to be interrupted."""
    return make_plan(8, max_steps=12, goal=0.3, seconds=0.004)


def evaluator(folder: Path) -> None:
    """A process that begins or goes on with `kill_plan`; what it was told has ended goes to a file beside the folder."""

    def told(record: dict[str, Any]) -> None:
        with folder.with_suffix(".told").open("a") as file:
            file.write(f"{record['seed']}\n")
        # whoever kills this process finds it in the middle of the run, however late that comes
        if (folder / "episodes.jsonl").read_bytes().count(b"\n") >= 6:
            time.sleep(600)

    play(folder, kill_plan(), policy=StandIn(seconds=0.004), workers=2, resume=True, on_episode=told)
