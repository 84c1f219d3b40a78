"""The control of a language policy: the tabletop world, told to do something else than what counts as success."""

from __future__ import annotations

from typing import Any

from dit4dit.envs.tabletop import INSTRUCTIONS, PLATE_COLOURS, Goal, Scene
from dit4dit.evaluation.sim_worker import Tabletop


def other_goal(scene: Scene, goal: Goal) -> Goal:
    """Another block that is on the table, and the other plate."""
    blocks = sorted(body.colour for body in scene.blocks)
    plates = list(PLATE_COLOURS)
    return Goal(
        blocks[(blocks.index(goal.block) + 1) % len(blocks)], plates[(plates.index(goal.plate) + 1) % len(plates)]
    )


class OtherWords(Tabletop):
    """The built-in world whose instruction names another goal than the one that is judged.

    A policy that listens to the words fails here; one that has only learned what usually is done does not.
    """

    def reset(self, seed: int, trial: int) -> Any:
        observation, words = super().reset(seed, trial)
        told = other_goal(self._env.scene, self._env.goal)
        paraphrase = next(i for i in range(len(INSTRUCTIONS)) if self._env.goal.instruction(i) == words)
        return observation, told.instruction(paraphrase)
