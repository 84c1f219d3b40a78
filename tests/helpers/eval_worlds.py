"""Environments for tests of the evaluation; they run in workers, as "eval_worlds:name". NumPy and Python 3.8 only."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np


class World:
    """Counts its steps. The state is (seed, steps, sum of the commands); success once that sum reaches `goal`."""

    def __init__(self, max_steps=20, goal=1e9, trouble="", at=3, once=None, seconds=0.0, lasting=False, meet=None):
        """lasting: the episode goes on after a success. meet: [folder, N]: the first step ends when N worlds are in theirs.

        trouble: "raise", "die" or "hang" at step `at`; only where the file `once` is not there yet, which is then made.
        """
        self.lasting = lasting
        self.goal, self.trouble, self.at, self.once, self.seconds = goal, trouble, at, once, seconds
        self.meet = meet
        self.facts = {"max_steps": max_steps, "control_hz": 10.0, "action_names": ["x", "y", "grip"], "settle_steps": 0}

    def reset(self, seed, trial):
        self.seed, self.trial, self.steps, self.sum = seed, trial, 0, 0.0
        return self.observation(), "put the red block on the white plate"

    def observation(self):
        picture = np.full((64, 64, 3), (self.steps * 5 + self.seed) % 256, np.uint8)
        state = np.array([self.seed % 7 / 10, self.steps / 100, self.sum], np.float32)
        return {"image": picture, "state": state, "extra": {"numbers": [1, 2.5, None, True], "text": "ä"}}

    def step(self, command):
        self.steps += 1
        self.sum += float(np.sum(command))
        time.sleep(self.seconds)
        if self.meet and self.steps == 1:
            self.wait_for_others(Path(self.meet[0]), self.meet[1])
        if self.steps == self.at and self.trouble and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            self.break_down()
        success = self.sum >= self.goal
        info = {"steps": self.steps, "trial": self.trial}
        return self.observation(), success, success and not self.lasting, info

    def break_down(self):
        if self.trouble == "raise":
            raise ZeroDivisionError("the world is flat")
        if self.trouble == "die":
            sys.stderr.write("last words\n")
            os._exit(3)
        if self.trouble == "hang":
            if "HANGING" in os.environ:
                Path(os.environ["HANGING"], str(os.getpid())).touch()
            time.sleep(3600)

    def wait_for_others(self, folder, together):
        """Until `together` worlds have come; those that come later wait for as many again."""
        # counted before this world comes: others may come in between
        wanted = (len(list(folder.iterdir())) // together + 1) * together
        (folder / str(self.seed)).touch()
        end = time.monotonic() + 120
        while len(list(folder.iterdir())) < wanted:
            if time.monotonic() > end:
                raise TimeoutError("no other world is in a step")
            time.sleep(0.005)

    def render(self):
        return self.observation()["image"]

    def close(self):
        pass


def world(**options):
    return World(**options)


def unsendable():
    it = World()
    it.step = lambda command: ({}, False, False, {"what": object()})
    return it
