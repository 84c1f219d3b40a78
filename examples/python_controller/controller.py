"""The robot's side of a stream in Python: one command per tick to the motors, as the stream's driver.

    python examples/python_controller/controller.py --name /dit4dit.tabletop

Python is good for some hundred commands a second where a late one does no harm; ../cpp_controller is the same loop in C++.

SIGINT, SIGTERM: bring the robot to rest, then end. Exit code 0: ended in order; 1: no stream; 4: with --stop-when-dead, the
policy's process died and the robot is at rest.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.control import ActionStream
from dit4dit.errors import Dit4DitError

AT_REST_S = 0.05  # no change for so long
TO_REST_S = 5.0  # it has so long to get there


class Robot:
    """The pretend robot, which does what it is sent, at once: put your own robot's interface here."""

    def __init__(self, dims: int) -> None:
        self.pose = np.zeros(dims)

    def measured(self) -> NDArray[np.float64]:
        """One value per channel, in the order of the stream's names."""
        return self.pose

    def send(self, values: NDArray[np.float64]) -> None:
        self.pose = values


def attach(name: str, wait_s: float, dead_after_ms: float) -> ActionStream:
    """The stream as its driver, tried again until the policy's side has made it; its error where that takes too long."""
    until, said = time.monotonic() + wait_s, ""
    while True:
        try:
            return ActionStream.attach(name, driver=True, dead_after_ms=dead_after_ms)
        except Dit4DitError as error:
            if str(error) != said:
                said = str(error)
                print(f"controller: waiting: {said}", file=sys.stderr)
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)


class Controller:
    """One tick after the other until there is a reason to end."""

    def __init__(self, stream: ActionStream, robot: Robot, *, seconds: float, stop_when_dead: bool) -> None:
        self.stream, self.robot = stream, robot
        self.seconds, self.stop_when_dead = seconds, stop_when_dead
        self.stopping = False
        self.statuses: Counter[str] = Counter()
        self.late_ns: deque[int] = deque(maxlen=60_000)
        self.age_ns: deque[int] = deque(maxlen=60_000)

    def stop(self, *_: object) -> None:
        """From the next tick on the robot is brought to rest. A signal's handler."""
        self.stopping = True

    def run(self) -> int:
        """The exit code."""
        period = round(1e9 / self.stream.command_hz)
        self.stream.start_at(self.robot.measured())  # the limits begin where the robot stands
        began = moved = due = time.monotonic_ns()
        stopped = 0
        while True:
            due = max(due + period, time.monotonic_ns())  # ticks that are over are not made up for
            time.sleep(max(0, due - time.monotonic_ns()) * 1e-9)
            now = time.monotonic_ns()
            if self.seconds and now - began >= self.seconds * 1e9:
                self.stopping = True
            if self.stopping and not stopped:
                self.stream.stop()
                stopped = now

            before = self.robot.measured()
            command = self.stream.at(now)
            # whatever the status, the values are what to send: the stream's rules have decided what happens without a chunk
            self.robot.send(command.values)
            self.note(command.status.name, now - due, command.age_ns)

            if not np.array_equal(before, command.values):
                moved = now
            at_rest = now - moved >= AT_REST_S * 1e9
            ended = (
                command.status.name == "DEAD" and command.row < 0
            )  # no row left that the robot waits for (on_dead: finish)
            if ended and self.stop_when_dead and at_rest:
                return 4
            if stopped and (at_rest or now - stopped >= TO_REST_S * 1e9):
                return 0

    def note(self, status: str, late_ns: int, age_ns: int) -> None:
        if self.statuses[status] == 0:
            print(f"controller: {status}", file=sys.stderr)
        self.statuses[status] += 1
        self.late_ns.append(late_ns)
        if status == "OK":
            self.age_ns.append(age_ns)

    def summary(self) -> dict[str, Any]:
        """Ticks by status, and how late the loop woke up and how old observations were, in ms."""
        return {
            "ticks": self.statuses.total(),
            "status": {name.lower(): count for name, count in self.statuses.items()},
            "wake_up_late_ms": quantiles_ms(self.late_ns),
            "age_ms": quantiles_ms(self.age_ns),
        }


def quantiles_ms(ns: Iterable[int]) -> dict[str, float]:
    values = np.array([*ns] or [0]) * 1e-6
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99)), "max": float(values.max())}


def main() -> int:
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lines)
    parser.add_argument("--name", default="/dit4dit.tabletop", help="of the stream; %(default)s")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so long; 0: at a signal")
    parser.add_argument(
        "--wait", type=float, default=30.0, help="seconds for the policy's side to be there; %(default)s"
    )
    parser.add_argument("--dead-after", type=float, default=50.0, help="ms without a sign of life; %(default)s")
    parser.add_argument("--stop-when-dead", action="store_true", help="end when the policy's process is dead")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    args = parser.parse_args()

    try:
        stream = attach(args.name, args.wait, args.dead_after)
    except Dit4DitError as error:
        print(f"controller: {error}", file=sys.stderr)
        return 1
    with stream:
        robot = Robot(len(stream.names))
        controller = Controller(stream, robot, seconds=args.seconds, stop_when_dead=args.stop_when_dead)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, controller.stop)
        code = controller.run()
    summary = {**controller.summary(), "exit_code": code}
    print("controller:", json.dumps(summary))
    if args.json is not None:
        args.json.write_text(json.dumps(summary))
    return code


if __name__ == "__main__":
    sys.exit(main())
