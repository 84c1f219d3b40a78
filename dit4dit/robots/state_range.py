"""States that can hardly be the robot's, such as degrees where radians were trained, get one warning a key; none is changed."""

from __future__ import annotations

import logging
import threading

import numpy as np
from numpy.typing import NDArray

from dit4dit.robots.embodiment import Array, Embodiment
from dit4dit.robots.statistics import Statistics
from dit4dit.robots.transforms import Chain

log = logging.getLogger("dit4dit.robots")
WIDTHS = 5.0
"""A value this many widths of the training data's range outside of it gets a warning."""
FLOOR, SHARE = 0.1, 0.01
"""The width of a value that never changed in training: 0.1, or 1 % of the value where that is more. Half a radian or metre, or
5 %, may be another pose, or a sensor; degrees, millimetres and other orders are beyond."""

_TELLING = threading.Lock()
"""Held while a warning is made; of all policies, so that a policy can be copied and pickled."""


class StateRange:
    """Bounds of one policy's states, and which keys have been told. Safe to call from several threads."""

    def __init__(self, robot: Embodiment, statistics: Statistics, chain: Chain) -> None:
        """statistics: with as many state values as the robot has. chain: how its state is encoded."""
        assert statistics.state is not None
        self._robot = robot
        self._low, self._high = statistics.state.min, statistics.state.max
        size = np.maximum(np.abs(self._low), np.abs(self._high))
        self._changes = self._high - self._low > 1e-6 * size
        self._width = np.where(self._changes, self._high - self._low, np.maximum(FLOOR, SHARE * size))
        most = float(np.finfo(np.float32).max)
        self._least = np.clip(self._low - WIDTHS * self._width, -most, most).astype(np.float32)
        self._most = np.clip(self._high + WIDTHS * self._width, -most, most).astype(np.float32)
        self._silent = False
        # what the ends of the range are encoded as, from where a normalised state is followed back: the chain's own inverse clips
        ends = chain.forward(np.stack([self._low, self._high]).astype(np.float32))[:, : robot.state_dim].astype(
            np.float64
        )
        self._start, way = ends[0], ends[1] - ends[0]
        self._slope = np.divide(self._high - self._low, way, out=np.zeros_like(way), where=way != 0)

    @classmethod
    def of(cls, robot: Embodiment, statistics: Statistics, chain: Chain | None) -> StateRange | None:
        """None where nothing can be said: no state, or no statistics of these values."""
        fits = statistics.state is not None and statistics.state.size == robot.state_dim > 0
        return cls(robot, statistics, chain) if chain is not None and fits else None

    def look(self, state: Array) -> None:
        """A raw state [d], finite."""
        if self._silent:
            return
        outside = (state < self._least) | (state > self._most)
        if outside.any():
            self._tell(state, outside)

    def look_encoded(self, states: Array) -> None:
        """Encoded and padded states [..., width]. Every sine and cosine is possible, so they get no warning."""
        if self._silent or self._robot.state_encoding == "sin_cos":
            return
        raw = self._low + (states[..., : len(self._low)] - self._start) * self._slope
        for state in raw.reshape(-1, len(self._low)):
            self.look(state)

    def _tell(self, state: Array, outside: NDArray[np.bool_]) -> None:
        with _TELLING:
            start = 0
            for key in self._robot.state:
                place = slice(start, start + key.dim)
                start += key.dim
                far = np.flatnonzero(outside[place]) + place.start
                if far.size and np.isfinite(self._most[place]).all():  # another thread may have been here
                    self._least[place], self._most[place] = -np.inf, np.inf
                    beyond = np.maximum(self._low - state, state - self._high)[far] / self._width[far]
                    worst = int(far[beyond.argmax()])
                    which = key.name if key.dim == 1 else f"{key.name}[{worst - place.start}]"
                    value = f"{state[worst]:.5g}, in the training data {self._range(worst, beyond.max())}"
                    log.warning(
                        "state %r: %s; %s. Said once for %r", which, value, self._advice(key.unit, state, far), key.name
                    )
            self._silent = not np.isfinite(self._most).any()

    def _range(self, place: int, widths: float) -> str:
        low, high = float(self._low[place]), float(self._high[place])
        if not self._changes[place]:
            return f"always {low:.5g}"
        return f"{low:.5g} to {high:.5g}: {widths:.0f} times that range outside of it"

    def _advice(self, unit: str | None, state: Array, far: NDArray[np.intp]) -> str:
        low, high, width = self._low[far], self._high[far], self._width[far]
        turns = unit in (None, "rad") and bool((np.maximum(-low, high) <= 2 * np.pi + 1e-3).all())
        radians = np.deg2rad(state[far].astype(np.float64))
        if turns and ((radians >= low - width) & (radians <= high + width)).all():
            return "degrees? As radians it would be where the training data are"
        return "look at its unit and at the order of the values"
