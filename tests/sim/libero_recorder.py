"""LIBERO in its worker, with everything that crosses noted: "libero_recorder:make". Runs in LIBERO's own environment."""

from __future__ import annotations

import sys

import cv2
import numpy as np

KEYS = ("agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class Recorder:
    """Notes raw observations and commands; after `steps` steps they are in `file`, with what OpenCV makes of the pictures."""

    def __init__(self, file, steps, **options):
        # the worker is this process's main program
        self._env = sys.modules["__main__"].Libero(**options)
        self.facts = self._env.facts
        self._file, self._steps = file, steps

    def reset(self, seed, trial):
        observation, instruction = self._env.reset(seed, trial)
        self._seen, self._commands = [self._note(observation)], []
        return observation, instruction

    def step(self, command):
        result = self._env.step(command)
        self._seen.append(self._note(result[0]))
        self._commands.append(np.array(command))
        if len(self._commands) == self._steps:
            self._write()
        return result

    def render(self):
        return self._env.render()

    def close(self):
        self._env.close()

    def _note(self, observation):
        return {key: np.array(observation[key]) for key in KEYS}

    def _write(self):
        columns = {key: np.stack([seen[key] for seen in self._seen]) for key in KEYS}
        # turned by 180 degrees, then resized one by one, then joined: by OpenCV, not by the code under test
        views = [[np.ascontiguousarray(np.rot90(picture, 2)) for picture in columns[key]] for key in KEYS[:2]]
        small = [[cv2.resize(view, (224, 224), interpolation=cv2.INTER_AREA) for view in row] for row in views]
        joined = np.stack([np.hstack(pair) for pair in zip(*small, strict=True)])
        np.savez(self._file, commands=np.stack(self._commands), policy_pictures=joined, **columns)


def make(**options):
    return Recorder(**options)
