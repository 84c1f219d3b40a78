"""tests/control/cpp/limiter_program.cpp, built and run; and what the tests of the limiter give it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/control/cpp/limiter_program.cpp"
HEADERS = ROOT / "csrc/include"
EXACT = ("-O2", "-ffp-contract=off")
"""As the package is built: the same bits everywhere."""
SHORTEST, LONGEST = 0.2e-3, 20e-3
INFINITY = float("inf")


class Program:
    def __init__(self, folder: Path, *flags: str, headers: Path = HEADERS) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++")
        self.folder, self.path = folder, folder / "limiter_program"
        warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
        command = [
            compiler,
            "-std=c++17",
            *warnings,
            *(flags or EXACT),
            f"-I{headers}",
            str(SOURCE),
            "-o",
            str(self.path),
        ]
        subprocess.run(command, check=True)

    def __call__(self, limits: Any, pose: Any, targets: np.ndarray, dts: Any) -> np.ndarray:
        """limits [N, 5] or [5]: low, high, velocity, acceleration, jerk; pose [N] or one (NaN: no reset); targets [ticks, N] or
        [ticks]; dts as the targets or less -> sent, of the targets' shape."""
        wide = targets if targets.ndim == 2 else targets[:, None]
        ticks, lanes = wide.shape
        dts = np.asarray(dts, np.float64)
        dts = dts[:, None] if targets.ndim == 1 and dts.ndim == 1 else dts
        parts = [np.array([lanes, ticks]), np.broadcast_to(limits, (lanes, 5)), np.broadcast_to(pose, lanes)]
        parts += [wide, np.broadcast_to(dts, wide.shape)]
        source, sink = self.folder / "in.bin", self.folder / "out.bin"
        source.write_bytes(b"".join(np.ascontiguousarray(part, np.float64).tobytes() for part in parts))
        subprocess.run([self.path, "run", source, sink], check=True)
        return np.fromfile(sink).reshape(targets.shape)

    def stress(self, ticks: int, seed: int = 0) -> dict[str, float]:
        done = subprocess.run([self.path, "stress", str(ticks), str(seed)], check=True, capture_output=True, text=True)
        print(done.stderr, done.stdout)  # noqa: T201  # pytest shows it when the test fails
        return json.loads(done.stdout)


def differences(x: np.ndarray, dt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First, second and third divided differences of x [ticks, N] at ticks dt [ticks, N], each [ticks, N]. x[0] has been held
    before, at ticks like the first."""
    x = np.concatenate([x[:1]] * 3 + [x])
    dt = np.concatenate([dt[:1]] * 2 + [dt])
    v = np.diff(x, axis=0) / dt
    a = 2 * np.diff(v, axis=0) / (dt[1:] + dt[:-1])
    return v[2:], a[1:], 3 * np.diff(a, axis=0) / (dt[2:] + dt[1:-1] + dt[:-2])


def ticks(rng: np.random.Generator, number: int, lanes: int) -> np.ndarray:
    """Times between ticks [number, lanes]: constant, uniform, log-uniform, alternating, one law a lane."""
    shape, law, odd = (number, lanes), rng.integers(0, 4, lanes), np.arange(number)[:, None] % 2
    logs = np.log(SHORTEST), np.log(LONGEST)
    constant = np.broadcast_to(np.exp(rng.uniform(*logs, lanes)), shape)
    choices = [constant, rng.uniform(SHORTEST, LONGEST, shape), np.exp(rng.uniform(*logs, shape))]
    return np.select([law == 0, law == 1, law == 2], choices, np.where(odd, SHORTEST, LONGEST))


class Lanes(NamedTuple):
    limits: np.ndarray
    pose: np.ndarray
    targets: np.ndarray
    dts: np.ndarray
    range: np.ndarray


def lanes_of(rng: np.random.Generator, lanes: int, number: int, hostile: bool) -> Lanes:
    """Channels with random bounds and targets [number, lanes].

    Not hostile: steps, ramps, sines, and cubics through chunks at 10 to 50 rows a second with seams that jump; ticks of 1 to
    10 ms that vary by a tenth. Hostile: chunks with corners, white noise and walks too, NaN, poses that are outside or unknown,
    ticks of all kinds, some of them too short."""
    velocity = 10 ** rng.uniform(-1, 1.5, lanes)
    acceleration = velocity * 10 ** rng.uniform(-0.5, 2.5, lanes)
    jerk = acceleration * 10 ** rng.uniform(-0.5, 3, lanes)
    for bound, share in ((velocity, 0.1), (acceleration, 0.1), (jerk, 0.15)):
        bound[rng.random(lanes) < share] = INFINITY
    centre, size = rng.uniform(-1, 1, lanes), 10 ** rng.uniform(-2, 1, lanes)
    low = np.where(rng.random(lanes) < 0.5, centre - size * rng.random(lanes), -INFINITY)
    high = np.where(rng.random(lanes) < 0.5, centre + size * rng.random(lanes), INFINITY)
    limits = np.stack([low, high, velocity, acceleration, jerk], 1)
    pose = np.clip(centre + size * rng.uniform(-1, 1, lanes), low, high)
    dts = ticks(rng, number, lanes)
    if not hostile:
        dts = 10 ** rng.uniform(-3, -2, lanes) * rng.uniform(0.9, 1.1, (number, lanes))
    targets = centre + size * _targets(rng, dts, np.minimum(velocity, 1e3) / size, hostile)
    if hostile:
        limits[rng.random(lanes) < 0.01, 2 + rng.integers(0, 3)] = 0
        pose = np.where(rng.random(lanes) < 0.1, centre + size * rng.uniform(-2, 2, lanes), pose)
        pose[rng.random(lanes) < 0.05] = np.nan
        targets[rng.random(targets.shape) < 0.003] = np.nan
        dts = np.where(rng.random(dts.shape) < 0.003, 1e-5, dts)
    return Lanes(limits, pose, targets, dts, size)


def _targets(rng: np.random.Generator, dts: np.ndarray, pace: np.ndarray, hostile: bool) -> np.ndarray:
    """About -1..1; `pace` [N]: the bound of their velocity."""
    number, lanes = dts.shape
    time, columns = np.cumsum(dts, 0), np.arange(lanes)
    rate = rng.uniform(10, 50, lanes)
    row_time = np.arange(int(time[-1].max() * 50) + 4)[:, None] / rate
    rows = rng.uniform(-1, 1, lanes) + sum(
        rng.uniform(0, 0.5, lanes) * np.sin(rng.uniform(0.3, 4, lanes) * row_time) for _ in range(3)
    )
    place = np.floor(time * rate).astype(int)
    share = time * rate - place
    seam = rng.uniform(-0.1, 0.1, rows.shape)[place // 16, columns]
    p = [rows[np.maximum(place + k, 0), columns] for k in (-1, 0, 1, 2)]
    slopes = (p[2] - p[0]) / 2, (p[3] - p[1]) / 2
    turn = 3 * (p[2] - p[1]) - 2 * slopes[0] - slopes[1]
    cubic = p[1] + share * (slopes[0] + share * (turn + share * (slopes[0] + slopes[1] - 2 * (p[2] - p[1]))))
    noise = rng.uniform(-1.5, 1.5, (number, lanes))
    steps = noise[np.arange(number) // 37 * 37]
    ramps = rng.uniform(-1, 1, lanes) + pace * rng.uniform(-2, 2, lanes) * np.abs(time - time[number // 2])
    sines = np.sin(10 ** rng.uniform(-0.5, 1.5, lanes) * time)
    kinds = [cubic + seam, steps, ramps, sines]
    if hostile:
        kinds += [
            p[1] + share * (p[2] - p[1]),
            noise,
            rng.uniform(-1, 1, lanes) + np.cumsum(rng.uniform(-2, 2, (number, lanes)) * pace * dts, 0),
        ]
    kind = rng.integers(0, len(kinds), lanes)
    return np.select([kind == k for k in range(len(kinds))], kinds)
