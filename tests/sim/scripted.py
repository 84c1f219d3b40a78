"""Policies that know what to do because they are told where things are; they act through commands alone, like any other.

They look like a `Policy` to the evaluation: an embodiment, whose `observe` lets through what the script needs, `request`
and `run`.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from dit4dit.engine import RequestShape
from dit4dit.robots import GR1, LIBERO
from dit4dit.types import ActionChunk, Observation


class Scripted:
    """Base of the two: what the evaluation asks of a policy but never of a script."""

    def __init__(self, embodiment):
        self.embodiment = embodiment

    def warm_up(self, pictures=None, *, batch=1, max_guidance=None):
        pass

    def prepare(self, instruction):
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def request(self, observation, instruction, *, noise=None, guidance=None):
        views = tuple(observation.images[name].shape[:2] for name in self.embodiment.views)
        return SimpleNamespace(
            observation=observation, noise=noise, kind=(RequestShape(1, views, None, "bilinear", True, 1), True)
        )

    def run(self, requests):
        asked = [(r.observation, r.noise) for r in requests]
        return [self.chunk(np.asarray(self.act(o, n.seed, n.chunk), np.float32), n) for o, n in asked]

    def chunk(self, rows, noise):
        return ActionChunk(rows, self.embodiment.action_names, self.embodiment.control_hz, rows, noise)


class PickAndPlace(Scripted):
    """LIBERO: go above the object, down, close, up, above the target, down, open. One row a chunk, by where things are now."""

    SPEED = 0.05  # m that OSC_POSE moves for a command of 1
    HIGH, RELEASE = 0.35, 0.27  # m above the floor

    def __init__(self, thing, target):
        def observe(raw):
            places = {"hand": raw["robot0_eef_pos"], "thing": raw[f"{thing}_pos"], "target": raw[f"{target}_pos"]}
            return Observation(images=LIBERO.observe(raw).images, state=places)

        super().__init__(replace(LIBERO, observe=observe))
        self._phase = {}
        """Seed of an episode -> (phase, steps in it)."""

    def act(self, observation, seed, chunk):
        if chunk == 0:
            self._phase[seed] = (0, 0)
        phase, steps = self._phase[seed]
        goal, opened, arrived = self._aim(phase, steps, observation.state)
        self._phase[seed] = (phase + 1, 0) if arrived and phase < 6 else (phase, steps + 1)
        row = np.zeros(7)
        row[:3] = np.clip((goal - observation.state["hand"]) / self.SPEED, -1, 1)
        row[6] = opened
        return row[None]

    def _aim(self, phase, steps, places):
        """-> where the hand goes, whether it is open, whether this phase is over."""
        hand, thing, target = (np.asarray(places[name]) for name in ("hand", "thing", "target"))

        def near(goal):
            return float(np.linalg.norm(goal - hand)) < 0.012

        above, carried = thing + np.array([0, 0, 0.12]), target + (hand - thing)
        if phase == 0:
            return above, True, near(above)
        if phase == 1:
            return thing, True, near(thing)
        if phase == 2:
            return hand, False, steps >= 8
        if phase == 3:
            return np.array([*hand[:2], self.HIGH]), False, hand[2] > self.HIGH - 0.03
        if phase == 4:
            goal = np.array([*carried[:2], self.HIGH])
            return goal, False, near(goal)
        if phase == 5:
            return np.array([*target[:2], self.RELEASE - 0.01]), False, hand[2] < self.RELEASE
        return hand, True, False


class Push(Scripted):
    """GR1: three poses of right arm and waist, straight lines between them; the waist's turn sweeps the hand along the table."""

    LIFTED = (-0.605, -0.345, -0.236, -1.697, 0.012, 0.005, 0.006, 0.229, 0.445, 0.428)
    LOWERED = (-0.605, -0.345, -0.236, -1.097, 0.012, 0.005, 0.006, 0.229, 0.445, 0.428)
    SWEPT = (-0.605, -0.345, -0.236, -1.097, 0.012, 0.005, 0.006, 1.049, 0.445, 0.428)
    LEGS = ((LIFTED, 15), (LOWERED, 20), (SWEPT, 35))
    HORIZON = 16

    def __init__(self):
        super().__init__(GR1)
        self._start = {}

    def act(self, observation, seed, chunk, execute=12):
        if chunk == 0:
            self._start[seed] = {key: np.asarray(value) for key, value in observation.state.items()}
        start = self._start[seed]
        rows = []
        for step in range(chunk * execute, chunk * execute + self.HORIZON):
            moved = self._pose(np.concatenate([start["right_arm"], start["waist"]]), step + 1)
            hands = [start["left_hand"], start["right_hand"]]
            rows.append(np.concatenate([start["left_arm"], moved[:7], *hands, moved[7:]]))
        return rows

    def _pose(self, pose, step):
        for goal, steps in self.LEGS:
            if step < steps:
                return pose + (np.asarray(goal) - pose) * step / steps
            pose, step = np.asarray(goal, float), step - steps
        return pose
