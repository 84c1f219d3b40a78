"""The policy's side of a stream: look, ask the policy for a chunk, publish it.

    python examples/python_controller/producer.py --name /dit4dit.tabletop
    python examples/python_controller/producer.py --name /dit4dit.tabletop --policy tabletop

The world is the built-in tabletop, ten steps a second. Its gripper goes where the driver of the stream (../cpp_controller or
controller.py) says that it has sent it, so the loop is closed: image, policy, stream, controller, world. Without a driver the
world stands still.

By default the chunks come from a script that knows where everything lies, so that this starts at once and needs no torch. With
--policy tabletop they come from the policy that ships with the package, from what the camera sees.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np

from dit4dit.control import ActionStream, Limits, Switch
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import HZ, ScriptedExpert, TabletopEnv, advance
from dit4dit.robots import TABLETOP
from dit4dit.types import ActionChunk, Noise, Observation

LIMITS = Path(__file__).with_name("limits.yaml")
STEP_NS = round(1e9 / HZ)
STEPS = 4
"""Steps of the world from one chunk to the next, of the 8 rows that a chunk has."""


class Policy(Protocol):
    """What a producer needs of a policy; `dit4dit.Policy` has it."""

    def infer(self, observation: Observation, instruction: str, *, observed_at_ns: int) -> ActionChunk: ...


class Script:
    """Chunks without weights: the world's own expert, played ahead on a copy of the scene."""

    ROWS = 8

    def __init__(self, world: TabletopEnv) -> None:
        self.world = world

    def infer(self, observation: Observation, instruction: str, *, observed_at_ns: int) -> ActionChunk:
        """The next 8 actions [8, 3]: x, y in metres, grip 0 or 1."""
        ahead = copy.copy(self.world)  # scenes are replaced, never changed
        expert, rows = ScriptedExpert(ahead), []
        for _ in range(self.ROWS):
            rows.append(expert.act())
            ahead.scene = advance(ahead.scene, rows[-1].astype(np.float64))
        actions = np.stack(rows)
        return ActionChunk(
            actions=actions,
            names=TABLETOP.action_names,
            control_hz=HZ,
            normalized=actions,
            noise=Noise.from_seed(0),
            observed_at_ns=observed_at_ns,
            computed_at_ns=time.monotonic_ns(),
        )


def load(path: str) -> Policy:
    """The policy of the folder, or with "tabletop" the one that ships with the package."""
    from dit4dit import Policy as Loaded  # it brings torch

    return Loaded.from_pretrained(tabletop_policy_dir() if path == "tabletop" else path)


class Play:
    """Episodes, one after the other, each until the named block lies on the named plate or 60 steps are over."""

    def __init__(self, world: TabletopEnv, policy: Policy, stream: ActionStream) -> None:
        self.world, self.policy, self.stream = world, policy, stream
        self.done = 0

    def publish(self) -> int:
        """One chunk for what the camera sees at this moment; returns the time that its row 0 is for."""
        seen = time.monotonic_ns()
        observation = TABLETOP.observe(self.world.observation())
        chunk = self.policy.infer(observation, self.world.instruction, observed_at_ns=seen)
        # A real world goes on while the policy computes, and row 0 is for when the camera looked: publish(chunk). This one steps
        # below, so it is still as it was seen.
        starts_at = time.monotonic_ns()
        self.stream.publish(chunk, starts_at_ns=starts_at)
        return starts_at

    def step(self) -> None:
        """The world goes on by 0.1 s under what the driver sent last; without a driver at work it stands still."""
        sent = self.stream.feedback()
        if sent is None or time.monotonic_ns() - sent.at_ns > STEP_NS or not np.isfinite(sent.values).all():
            return
        result = self.world.step(sent.values)
        if result.success or result.truncated:
            self.done += 1
            what = "done" if result.success else "not done"
            print(f"episode {self.done}: {self.world.instruction}: {what} after {result.steps} steps", flush=True)
            self.world.reset(self.world.seed + 1)

    def run(self, seconds: float) -> None:
        """Until so many seconds are over; 0: for ever."""
        end = time.monotonic() + (seconds or math.inf)
        while time.monotonic() < end:
            starts_at = self.publish()
            for row in range(STEPS):
                sleep_until(starts_at + (row + 0.5) * STEP_NS)  # in the middle of the time that the row is for
                self.step()
                self.stream.heartbeat()  # this loop lives, not only its process
            sleep_until(starts_at + STEPS * STEP_NS)


def sleep_until(moment_ns: float) -> None:
    time.sleep(max(0.0, moment_ns - time.monotonic_ns()) * 1e-9)


def end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lines)
    parser.add_argument("--name", default="/dit4dit.tabletop", help="of the stream; %(default)s")
    parser.add_argument("--policy", help="folder of a policy for the tabletop world, or: tabletop")
    parser.add_argument("--command-hz", type=float, default=1000.0, help="of the controller; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first layout; %(default)s")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so long; 0: at a signal")
    args = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    world = TabletopEnv(args.seed)
    policy = Script(world) if args.policy is None else load(args.policy)
    limits = Limits.of(TABLETOP).override(LIMITS)
    # hold, Switch: rows are targets of the world's servo, which jump; the limits make motion of them
    with ActionStream(
        TABLETOP,
        command_hz=args.command_hz,
        interpolation="hold",
        seam=Switch(),
        limits=limits,
        shared=args.name,
    ) as stream:
        print(f"{args.name}: {TABLETOP.name}, {args.command_hz:g} commands a second", flush=True)
        Play(world, policy, stream).run(args.seconds)


if __name__ == "__main__":
    main()
