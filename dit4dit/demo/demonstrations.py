"""Demonstrations of the tabletop world as a LeRobot data set: the scripted expert on layouts for training.

What is executed is disturbed, what is recorded is what the expert intended (DART, Laskey et al. 2017): the data show how to come
back from errors without teaching them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.envs.tabletop import PLATE_COLOURS, TEST_SEEDS_FROM, Goal, ScriptedExpert, TabletopEnv
from dit4dit.errors import InputError
from dit4dit.robots.tabletop import TABLETOP

NOISE = (0.0, 0.02, 0.04, 0.06)
"""Standard deviations [m] of the disturbance, in turn."""
DETOURS = 0.6
"""How often per step the gripper is led elsewhere. Without, it is soon near the block that it is about to grasp, and where it is
tells the goal as well as the instruction does."""
GOALS_EACH = 3
"""Demonstrations of each layout, one for each block: what the picture alone cannot tell has to be taken from the instruction."""
EPISODES_PER_FILE = 50


@dataclass(frozen=True)
class Demonstration:
    """One episode, n steps: pictures uint8 [n, P, P, 3], states and actions float32 [n, 3], the instruction."""

    pictures: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    instruction: str
    success: bool


def demonstrate(number: int) -> Demonstration:
    """The expert on the layout `number // GOALS_EACH`, one block of it after the other, on either plate; first wording."""
    env = TabletopEnv(number // GOALS_EACH)
    plates = sorted(PLATE_COLOURS)
    goal = Goal(env.scene.blocks[number % GOALS_EACH].colour, plates[number % len(plates)])
    frame = env.reset(goal=goal)
    noise = NOISE[number // GOALS_EACH % len(NOISE)]
    expert = ScriptedExpert(env, noise=noise, detours=DETOURS, seed=number)
    observation = frame.observation
    pictures, states, actions = [], [], []
    while True:
        executed = expert.act()
        pictures.append(observation["image"])
        states.append(observation["state"])
        actions.append(expert.intended)
        result = env.step(executed)
        observation = result.observation
        if result.success or result.truncated:
            break
    return Demonstration(np.stack(pictures), np.stack(states), np.stack(actions), frame.instruction, result.success)


def record(
    root: Path,
    episodes: int,
    *,
    first_seed: int = 0,
    processes: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Write `episodes` demonstrations, by number (see `demonstrate`) from `first_seed` on, as a data set.

    Args:
        root: new folder.
        processes: that play; the data set does not depend on it.
        done: told of each episode.

    Returns:
        {"episodes", "frames", "solved" (share that was solved in time, disturbed as it was), "instructions"}

    Raises:
        InputError: layouts that are kept for testing, or no episode.
    """
    if episodes < 1 or first_seed < 0 or first_seed + episodes > TEST_SEEDS_FROM:
        raise InputError(
            f"demonstrations: expected at least 1 episode with seeds within 0..{TEST_SEEDS_FROM - 1}, got {episodes} from "
            f"{first_seed}"
        )
    frames, solved, words = 0, 0, set()
    # little compression work: the files are read once, for the latent cache
    codec = VideoCodec(gop=1, options={"preset": "ultrafast", "threads": "1"})
    with Writer(
        root, TABLETOP.control_hz, version="v3.0", robot="tabletop", codec=codec, episodes_per_file=EPISODES_PER_FILE
    ) as writer:
        for demo in _played(range(first_seed, first_seed + episodes), processes):
            columns = {"observation.state": demo.states, "action": demo.actions}
            writer.add(columns, {"observation.images.top": demo.pictures}, demo.instruction)
            frames, solved = frames + len(demo.actions), solved + demo.success
            words.add(demo.instruction)
            done(1)
    return {"episodes": episodes, "frames": frames, "solved": solved / episodes, "instructions": len(words)}


def _played(seeds: range, processes: int) -> Iterator[Demonstration]:
    if processes == 1:
        yield from map(demonstrate, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(demonstrate, seeds, chunksize=8)
