"""Draws docs/action-stream.png: time stamps, seams and limits on real chunks.

    python docs/draw_action_stream.py [--out docs/action-stream.png] [--seed 1000003]

The policy that ships with the package plays the tabletop world at 10 Hz; its chunks are late by 150 ms. The world executes what
one stream commands; the other lines are what other settings make of the same chunks. Time is the drawing's own: nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from dit4dit import ActionChunk, Noise, Policy
from dit4dit.control import ActionStream, Blend, Limits, Switch
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import HZ, TabletopEnv
from dit4dit.robots import TABLETOP

DRAWING = Path(__file__).with_name("action-stream.png")
COMMAND_HZ = 500
LATENCY_NS = 150_000_000
EVERY = 4  # world steps from one observation to the next
STEPS = 26
START_NS = 1_000_000_000
BOUNDS = {"velocity": 0.8, "acceleration": 8.0, "jerk": 160.0}  # m/s, m/s2, m/s3: tight, so that they are seen at work
COLOURS = ("#b5482f", "#3b6fb6", "#2a7f62")


@dataclass
class Followed:
    """One setting of the stream and what it sent: x in metres, by command."""

    name: str
    stream: ActionStream
    sent: list[float]


def settings() -> list[Followed]:
    """Seams and limits that are compared; the last one moves the robot."""
    unlimited, limited = Limits.of(TABLETOP), Limits.of(TABLETOP).override({"x": BOUNDS, "y": BOUNDS})
    common: dict[str, Any] = {"command_hz": COMMAND_HZ, "interpolation": "cubic"}
    return [
        Followed("Switch()", ActionStream(TABLETOP, seam=Switch(), limits=unlimited, **common), []),
        Followed("Blend(rows=2)", ActionStream(TABLETOP, seam=Blend(rows=2), limits=unlimited, **common), []),
        Followed("Blend(rows=2), limited", ActionStream(TABLETOP, seam=Blend(rows=2), limits=limited, **common), []),
    ]


def play(seed: int) -> tuple[list[ActionChunk], list[Followed]]:
    """An episode's chunks, stamped in the drawing's time, and what each setting sent."""
    policy = Policy.from_pretrained(tabletop_policy_dir(), device="cpu")
    world = TabletopEnv(seed)
    frame = world.reset()
    observation, followed = frame.observation, settings()
    for one in followed:
        one.stream.start_at(np.array([*observation["state"][:2], 0.0], np.float64))
    chunks: list[ActionChunk] = []
    coming: list[tuple[int, ActionChunk]] = []
    tick_ns, step_ns = 1_000_000_000 // COMMAND_HZ, round(1e9 / HZ)
    for now in range(START_NS, START_NS + STEPS * step_ns, tick_ns):
        steps, within = divmod(now - START_NS, step_ns)
        if within == 0 and steps % EVERY == 0:
            seen, noise = TABLETOP.observe(observation), Noise(seed=seed, chunk=steps // EVERY)
            made = policy.infer(seen, frame.instruction, noise=noise, observed_at_ns=now)
            coming.append((now + LATENCY_NS, made))
        while coming and coming[0][0] <= now:
            at, made = coming.pop(0)
            chunk = ActionChunk(**{**vars(made), "computed_at_ns": at})
            chunks.append(chunk)
            for one in followed:
                one.stream.publish(chunk, now_ns=now)
        for one in followed:
            command = one.stream.at(now)
            one.sent.append(float(command.values[0]))
        if within == 0:
            observation = world.step(command.values).observation
    return chunks, followed


def differences(sent: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Velocity and acceleration as differences of what was sent."""
    velocity = np.diff(sent) * COMMAND_HZ
    return velocity, np.diff(velocity) * COMMAND_HZ


def draw(path: Path, chunks: list[ActionChunk], followed: list[Followed]) -> None:
    """Write the drawing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (stamps, place, speed, push) = plt.subplots(
        4, 1, figsize=(11, 10), sharex=True, height_ratios=(1.2, 2.2, 1.1, 1.1), layout="constrained"
    )
    for i, chunk in enumerate(chunks):
        assert chunk.observed_at_ns is not None
        assert chunk.computed_at_ns is not None
        seen, made = (seconds(stamp) for stamp in (chunk.observed_at_ns, chunk.computed_at_ns))
        rows = seen + np.arange(len(chunk.actions)) / chunk.control_hz
        colour = f"C{i % 10}"
        stamps.barh(i, made - seen, left=seen, color="#cccccc", height=0.6)
        stamps.plot(rows, np.full(len(rows), i), ".", color=colour, markersize=5)
        stamps.plot([made, rows[-1] + 1 / chunk.control_hz], [i, i], color=colour, linewidth=1)
        late = rows < made - 1e-9
        place.plot(rows[~late], chunk.actions[~late, 0], "o", color=colour, markersize=4)
        place.plot(rows[late], chunk.actions[late, 0], "x", color=colour, markersize=5)
        for axis in (place, speed, push):
            axis.axvline(made, color="#dddddd", linewidth=0.8, zorder=0)
    stamps.set_ylabel("chunk")
    stamps.invert_yaxis()
    stamps.set_title("grey: observed to published; dots: the times that rows are meant for", fontsize=9, loc="left")
    place.set_ylabel("x [m]")
    place.set_title(
        "rows of each chunk (x: their time had passed when it came) and what was sent", fontsize=9, loc="left"
    )
    for one, colour in zip(followed, COLOURS, strict=True):
        sent = np.array(one.sent)
        times = np.arange(len(sent)) / COMMAND_HZ
        velocity, acceleration = differences(sent)
        place.plot(times, sent, color=colour, linewidth=1.3, label=one.name)
        speed.plot(times[1:], velocity, color=colour, linewidth=1)
        push.plot(times[2:], acceleration, color=colour, linewidth=1)
    for axis, name, bound in ((speed, "velocity [m/s]", "velocity"), (push, "acceleration [m/s²]", "acceleration")):
        axis.set_ylabel(name)
        axis.set_ylim(-2.5 * BOUNDS[bound], 2.5 * BOUNDS[bound])
        for sign in (-1, 1):
            axis.axhline(sign * BOUNDS[bound], color=COLOURS[-1], linestyle="--", linewidth=0.8)
    speed.set_title("dashed: the bounds of the limited one; what leaves the axes is a jump", fontsize=9, loc="left")
    place.legend(fontsize=8, loc="center right")
    push.set_xlabel("s")
    push.set_xlim(0, (STEPS + 4) / HZ)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def seconds(stamp_ns: int) -> float:
    """A stamp on the drawing's axis."""
    return (stamp_ns - START_NS) / 1e9


def main(out: Path = DRAWING, seed: int = 1_000_003) -> None:
    """Play and draw."""
    chunks, followed = play(seed)
    draw(out, chunks, followed)


if __name__ == "__main__":
    tyro.cli(main)
