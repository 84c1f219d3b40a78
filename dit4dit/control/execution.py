"""From chunks to the rows that the robot executes: how many of a chunk, ensembling, and the latency that is acted out.

Time is counted in control steps. A chunk is asked for with the observation after step s; its row i is meant for step s + i.

Without latency the world stands still while the policy computes: a chunk is asked for every E steps (`execute`; where not given,
all K rows) and its rows 0..E-1 are executed.

With a latency of x ms the chunk comes d = ceil(x / control period) steps late, and what the robot does in the meantime is

  hold      it stands still: d rows of the embodiment's `hold`, then rows 0..E-1 of the chunk, whose motion was planned from
            where the robot still is; then the next chunk is asked for. One cycle takes d + E steps.
  continue  it goes on with the chunk before, at the rows meant for these steps; then rows d, d+1, ... of the new chunk, in place
            of the old ones. The next chunk is asked for max(E, d) steps after this one. Where d + E > K a chunk ends before the
            next one is there; the missing steps are held.

The first chunk of an episode has no latency: a robot does not set off before it has one. x is a number of ms, or for each chunk
the time that its pass through the policy took on this machine, which makes the episode depend on the machine.

Real-time chunking (`RealTime`) asks for each chunk but the first with a `Guidance`: the new chunk is to go on from the one
that is being executed. The left-over is the newest chunk, as the model wrote it, from the row meant for the step that is
asked at: row i of both is for the same step. Its delay is d, the rows that will have been executed before the new chunk takes
over: 0 without latency; ceil(x / control period) for a latency given; for a measured one the most that a chunk of this
episode has taken so far, the first not counted (it has the warm-up in it), 0 while there is none. What is executed is what is
said above: without latency E rows of each chunk, with a latency `continue`. It needs E < K, or nothing is left; with `hold`
no old row is executed while the new chunk is computed, and with ensembling the rows that are executed are no chunk's, so
neither goes with it. A chunk that is asked for when nothing is left has no guidance.

Ensembling averages what the last h chunks say for a step (those that reach that far), weighted by exp(alpha * cosine) of each
prediction and the newest one, normalised. Where chunks do not overlap (E = K) it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dit4dit.control.seams import Ensemble
from dit4dit.errors import ConfigError, InputError, shown
from dit4dit.types import MAX_GUIDANCE, Guidance, Schedule, check_strength

Row = NDArray[np.float32]
Waiting = Literal["hold", "continue"]


@dataclass(frozen=True)
class Latency:
    """ms: of every chunk; None takes what each chunk's pass took. waiting: what the robot does meanwhile."""

    ms: float | None
    waiting: Waiting = "hold"

    def __post_init__(self) -> None:
        if self.ms is not None and not 0.0 <= self.ms < math.inf:
            raise ConfigError(f"latency: expected milliseconds >= 0, got {shown(self.ms)}")

    def steps(self, seconds: float, control_hz: float) -> int:
        """d for a chunk whose pass took so long."""
        late = seconds if self.ms is None else self.ms / 1e3
        # a latency of exactly two periods is two steps, whatever its last bit
        return math.ceil(late * control_hz - 1e-6)


@dataclass(frozen=True)
class RealTime:
    """Real-time chunking: horizon, schedule and max_guidance as `Guidance` has them; a delay beyond the horizon counts as it."""

    horizon: int | None = None
    schedule: Schedule = "linear"
    max_guidance: float = MAX_GUIDANCE

    def __post_init__(self) -> None:
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(f"rtc: horizon: expected at least 1, got {self.horizon}")
        try:
            check_strength("rtc", self.schedule, self.max_guidance)
        except InputError as error:
            raise ConfigError(str(error)) from None

    def guidance(self, previous: Row, delay: int) -> Guidance:
        """For a left-over [n, A], n >= 1, of which `delay` rows will be executed if there are so many."""
        longest = len(previous) if self.horizon is None else min(self.horizon, len(previous))
        return Guidance(previous, min(delay, longest), longest, self.schedule, self.max_guidance)


@dataclass(frozen=True)
class Execution:
    """execute: rows of each chunk that are executed, all where None; ensemble, latency, rtc: none where None."""

    execute: int | None = None
    ensemble: Ensemble | None = None
    latency: Latency | None = None
    rtc: RealTime | None = None

    def __post_init__(self) -> None:
        if self.rtc is not None and self.ensemble is not None:
            raise ConfigError("rtc and ensemble: give one of them; an average of chunks is no chunk to go on from")
        if self.rtc is not None and self.latency is not None and self.latency.waiting == "hold":
            raise ConfigError("rtc: the robot goes on with the chunk before; give --while-waiting continue")

    def check(self, horizon: int) -> None:
        """ConfigError unless a chunk has as many rows."""
        if self.execute is not None and not 1 <= self.execute <= horizon:
            raise ConfigError(f"execute: expected 1 to {horizon}, the rows of a chunk, got {self.execute}")
        if self.rtc is not None and (self.execute or horizon) == horizon:
            raise ConfigError(
                f"rtc: expected --execute below {horizon}, the rows of a chunk, or none is left to go on from"
            )
        if self.rtc is not None and (self.rtc.horizon or 1) > horizon:
            raise ConfigError(f"rtc: horizon: expected 1 to {horizon}, the rows of a chunk, got {self.rtc.horizon}")


@dataclass(frozen=True)
class _Chunk:
    """rows [K, A] for the steps from `start` on, to be used from step `usable` on; normalized: as the model wrote them."""

    rows: Row
    start: int
    usable: int
    normalized: Row | None


class Executor:
    """One episode's way from chunks to rows.

    Attributes:
        steps: control steps so far. held: how many of them were held. delays: d of each chunk.
    """

    def __init__(self, execution: Execution, control_hz: float, hold: Callable[[Row], Row]) -> None:
        self._execution, self._rate, self._hold = execution, control_hz, hold
        self.steps = self.held = 0
        self.delays: list[int] = []
        self._chunks: list[_Chunk] = []
        self._due = 0
        self._held_until = 0
        self._last: Row | None = None
        self._planned: list[tuple[Row, bool]] = []

    @property
    def due(self) -> bool:
        """Whether a chunk is to be asked for now, before the next step."""
        return self.steps >= self._due

    def guidance(self) -> Guidance | None:
        """What the chunk for the observation of this moment is to keep to; None where there is nothing."""
        rtc, latency = self._execution.rtc, self._execution.latency
        if rtc is None or not self._chunks:
            return None
        newest = self._chunks[-1]
        assert newest.normalized is not None  # whoever plays with rtc gives them to `take`
        left = newest.normalized[self.steps - newest.start :]
        if not len(left):
            return None
        delay = max(self.delays[1:], default=0)  # 0 without latency
        if latency is not None and latency.ms is not None:
            delay = latency.steps(0.0, self._rate)
        return rtc.guidance(left, delay)

    def take(self, rows: Row, seconds: float, normalized: Row | None = None) -> None:
        """The chunk [K, A] for the observation of this moment, whose pass took `seconds`; `normalized` [K, A_model] for rtc."""
        now, latency = self.steps, self._execution.latency
        execute = self._execution.execute or len(rows)
        late = 0 if latency is None or not self._chunks else latency.steps(seconds, self._rate)
        self.delays.append(late)
        waits = latency is not None and latency.waiting == "hold"
        if waits:
            self._held_until = now + late
        self._chunks.append(_Chunk(rows, now + late if waits else now, now + late, normalized))
        self._due = now + (late + execute if waits else max(late, execute))
        keep = 1 if self._execution.ensemble is None else self._execution.ensemble.history
        self._chunks = self._chunks[-keep - 1 :]  # and the one that goes on until the newest is usable

    def upcoming(self, limit: int) -> list[Row]:
        """The rows [A] from now until the next chunk is due, at most `limit` (>= 1) of them, at least one."""
        self._planned, last = [], self._last
        for step in range(self.steps, min(self._due, self.steps + limit)):
            row = self._row(step)
            held = row is None
            last = self._still(last) if row is None else row
            self._planned.append((last, held))
        return [row for row, _ in self._planned]

    def advance(self, steps: int) -> None:
        """So many of the upcoming rows have been executed."""
        taken = self._planned[:steps]
        self.steps += len(taken)
        self.held += sum(held for _, held in taken)
        self._last = taken[-1][0]

    def _row(self, step: int) -> Row | None:
        """What the chunks say for this step; None where the robot is to hold."""
        if step < self._held_until:
            return None
        known = [c.rows[step - c.start] for c in self._chunks if c.usable <= step < c.start + len(c.rows)]
        if not known:
            return None
        ensemble = self._execution.ensemble
        return known[-1] if ensemble is None else average(known[-ensemble.history :], ensemble.alpha)

    def _still(self, last: Row | None) -> Row:
        assert last is not None  # the first chunk has no latency, so some row has been executed
        return self._hold(last)


def average(predictions: list[Row], alpha: float) -> Row:
    """Predictions of one step [A], oldest first -> their mean, weighted by agreement with the newest."""
    stacked = np.stack(predictions).astype(np.float64)
    newest = stacked[-1]
    norms = np.linalg.norm(stacked, axis=1) * np.linalg.norm(newest)
    cosine = stacked @ newest / (norms + 1e-7)  # the published guard against predictions that are all zero
    weights = np.exp(alpha * cosine)
    return np.asarray(weights / weights.sum() @ stacked, dtype=np.float32)
