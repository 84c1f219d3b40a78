"""LIBERO as a benchmark: the published protocol, episode by episode.

Five suites of 10 (libero_90: 90) tasks, 50 trials each, seed 7. An episode: `env.seed`, `env.reset`, initial state number
`trial`, 10 steps with the gripper open in which the objects come to rest, then the suite's number of steps, 8 of each chunk.

The published script seeds once a task, so where its trial k puts cabinet and stove (no initial state says that; they stand within
a centimetre or two) depends on the k resets before. Here each episode is seeded alone, with seed + trial, so that any worker can
play it in any order: trial 0 is the published one, later trials have the same initial states and the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

from dit4dit.errors import ConfigError, did_you_mean
from dit4dit.evaluation.plan import Episode, Plan, derived_seed
from dit4dit.evaluation.sim_worker import Libero
from dit4dit.evaluation.workers import Launch
from dit4dit.robots import LIBERO

TASKS = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}
PUBLISHED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""The suites that results are published for."""
TRIALS = 50
SEED = 7
EXECUTE = 8


def plan(
    launch: Launch,
    suites: Sequence[str] = PUBLISHED,
    tasks: Sequence[int] | None = None,
    trials: int = TRIALS,
    seed: int = SEED,
    *,
    max_steps: int | None = None,
    settle_steps: int = 10,
    camera: int = 256,
) -> Plan:
    """Every trial of every task of the suites.

    Args:
        launch: of LIBERO's own environment (`Simulator.launch`).
        tasks: their numbers, of each suite; all where None.
        trials: of each task, 1 to 50: as many initial states as LIBERO has.
        seed: trial k is placed with seed + k.
        max_steps: of an episode, after the settling steps; the suite's own where None.
        camera: height and width of both pictures.

    Raises:
        ConfigError: no such suite or task, or numbers out of range.
    """
    for suite in suites:
        if suite not in TASKS:
            raise ConfigError(f"--suite {suite}: unknown{did_you_mean(suite, list(TASKS))}; known: {', '.join(TASKS)}")
        for task in tasks or ():
            if not 0 <= task < TASKS[suite]:
                raise ConfigError(f"--tasks {task}: {suite} has tasks 0 to {TASKS[suite] - 1}")
    if len(set(suites)) != len(suites) or len(set(tasks or ())) != len(tasks or ()):
        raise ConfigError(f"--suite, --tasks: expected each once, got {', '.join(suites)} and {tasks}")
    if not 1 <= trials <= TRIALS:
        raise ConfigError(f"--trials: expected 1 to {TRIALS}, the initial states of a task, got {trials}")
    if seed < 0 or settle_steps < 0 or camera < 1 or (max_steps is not None and max_steps < 1):
        raise ConfigError(
            "expected --seed >= 0, --settle-steps >= 0, --camera >= 1 and --max-steps >= 1, got "
            f"{seed}, {settle_steps}, {camera} and {max_steps}"
        )
    episodes = []
    for suite in suites:
        limit = max_steps or Libero.MAX_STEPS[suite]
        for task in range(TASKS[suite]) if tasks is None else tasks:
            options = {"suite": suite, "task": task, "max_steps": limit, "settle_steps": settle_steps, "camera": camera}
            episodes += [
                Episode(suite, f"{task:02d}", k, seed + k, derived_seed(seed, suite, task, k), "libero", options)
                for k in range(trials)
            ]
    about = {
        "suites": list(suites),
        "tasks": None if tasks is None else list(tasks),
        "trials": trials,
        "seed": seed,
        "max_steps": max_steps,
        "settle_steps": settle_steps,
        "camera": camera,
    }
    return Plan("libero", LIBERO.name, launch, tuple(episodes), about)
