"""From chunks to one command per tick: an action stream in this process, or in shared memory for a controller in another one.

    with ActionStream(policy.embodiment, command_hz=500, seam=Blend(rows=3), shared="/dit4dit.g1") as stream:
        stream.publish(policy.infer(observation, "open the drawer", observed_at_ns=stamp))      # whenever there is a chunk

    stream = ActionStream.attach("/dit4dit.g1", driver=True)                                    # the robot's side
    stream.start_at(measured_pose)
    command = stream.at(time.monotonic_ns())                                                    # once per tick
    robot.send(command.values)

What a command is made of (kinds, seams, limits, rules) is computed by the C++ headers in csrc/include/dit4dit, which a controller
in C++ uses without Python. All times are ns of this machine's CLOCK_MONOTONIC, `time.monotonic_ns()`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit4dit.control.limits import Limits, check_robot
from dit4dit.control.seams import Blend, Seam
from dit4dit.control.stream_layout import (
    LEAST_HZ,
    MOST_HZ,
    Groups,
    Interpolation,
    check_limits,
    check_mixing,
    ns_of,
    positive,
    seam_of,
)
from dit4dit.errors import ConfigError, InputError, StreamError, shown
from dit4dit.robots.channels import Rule
from dit4dit.robots.embodiment import Embodiment, numbers

MOST_ROWS = 64
SEAM = Blend(rows=3)
WALL_CLOCK_NS = 10**18
"""`time.time_ns()` is above it since 2001; CLOCK_MONOTONIC after 31 years without a restart."""


class Status(Enum):
    """Why a command is what it is; of several reasons the last one in this order."""

    OK = 0
    CONTENDED = 1
    """The newest chunk could not be copied in four tries: the rows that the reader holds."""
    DRY = 2
    """No chunk has a row for this moment."""
    STALE = 3
    """The observation is older than `max_age_ms`."""
    DEAD = 4
    """The producer's process, or its loop, is."""
    ESTOP = 5
    """Somebody called `estop` (or this reader's owner `stop`)."""


@dataclass(frozen=True, eq=False)
class Command:
    """What to send in this tick.

    Attributes:
        values: float64 [A], in the order of `ActionStream.names`, in robot units. NaN for a position, angle or binary channel
            before the first chunk where no `start_at` said a pose.
        chunk: number of the chunk that governs, from 1; 0: none yet. row: of it; -1: none.
        age_ns: time since its observation; -1 before the first chunk.
    """

    values: NDArray[np.float64]
    chunk: int
    row: int
    status: Status
    age_ns: int

    @property
    def age_ms(self) -> float:
        return self.age_ns / 1e6


@dataclass(frozen=True, eq=False)
class StreamFeedback:
    """What the driver, the one reader that moves the robot, sent last.

    Attributes:
        driver: its process id. tick: its reads so far. at_ns: time of that read.
        chunk, row, status: of the command. values: float64, all channels of the robot; NaN for those that are not the driver's.
    """

    driver: int
    tick: int
    at_ns: int
    chunk: int
    row: int
    status: Status
    values: NDArray[np.float64]


@runtime_checkable
class StampedChunk(Protocol):
    """What `publish` takes: `dit4dit.ActionChunk`, or the client's `Chunk`."""

    @property
    def actions(self) -> NDArray[np.float32]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def control_hz(self) -> float: ...
    @property
    def observed_at_ns(self) -> int | None: ...
    @property
    def computed_at_ns(self) -> int | None: ...


class ActionStream:
    """Publish chunks, read commands. `attach` makes one that only reads, of a stream in shared memory.

    Attributes:
        robot: its name. names: of the channels that `at` gives [A]. command_hz: ticks per second that it is meant for.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        command_hz: float = 500.0,
        interpolation: Interpolation = "cubic",
        seam: Seam = SEAM,
        limits: Limits | None = None,
        on_dry: Rule | Mapping[str, Rule] | None = None,
        on_stale: Rule | Mapping[str, Rule] | None = None,
        on_dead: Rule | Mapping[str, Rule] | None = None,
        max_age_ms: float | Mapping[str, float] | None = None,
        decay_ms: float | Mapping[str, float] = 500.0,
        dead_after_ms: float = 50.0,
        loop_dead_after_ms: float | None = None,
        shared: str | None = None,
    ) -> None:
        """Make a stream and become its producer.

        Args:
            command_hz: ticks per second, 1 to 20000; ticks may come at any time, displacements are those of one period.
            interpolation: between rows: "hold" sends the row that has begun.
            limits: bounds of what is sent; the robot's own where None.
            on_dry, on_stale, on_dead: what groups of channels do without a chunk to follow: one rule for all, or group -> rule;
                the robot's own where not given.
            max_age_ms: age of an observation beyond which a chunk is stale; for all, or group -> ms; any where None.
            decay_ms: how long velocities take to 0 under the rule "decay"; for all, or group -> ms.
            dead_after_ms: without a sign of life of the producer's process, in shared memory.
            loop_dead_after_ms: the same of its loop (`publish`, `heartbeat`); no such limit where None.
            shared: name of a segment in shared memory, such as "/dit4dit.g1"; None: this process alone.

        Raises:
            ConfigError: an option or the name is wrong, or this robot cannot have it.
            StreamError: another producer is at work on the segment, or it is another robot's.
        """
        check_robot(embodiment)
        self.robot, self.names = embodiment.name, embodiment.action_names
        self._where = f"stream of {self.robot!r}" if shared is None else f"stream {shared}"
        limits = Limits.of(embodiment) if limits is None else limits
        check_mixing(embodiment, interpolation, seam)
        check_limits(embodiment, limits)
        period, groups = round(1e9 / positive("command_hz", command_hz, MOST_HZ, LEAST_HZ)), Groups(embodiment)
        rules = {"on_dry": on_dry, "on_stale": on_stale, "on_dead": on_dead}
        times = {"max_age_ms": max_age_ms, "decay_ms": decay_ms}
        layout = (self.robot, period, interpolation, seam_of(seam), groups.channels(limits), groups.rules(rules, times))
        self.command_hz = 1e9 / period
        self._options = (ns_of("dead_after_ms", dead_after_ms), ns_of("loop_dead_after_ms", loop_dead_after_ms))
        self._shared = shared
        try:
            self._writer = _native().StreamWriter(shared, *layout)
        except ValueError as error:
            # of the memory it begins with the segment's name; else it is about what was asked for
            if shared and str(error).startswith(shared):
                raise StreamError(str(error)) from None
            raise ConfigError(f"{self._where}: {error}") from None
        # in one process it is this reader that moves the robot; a producer of a shared stream may look at what is sent
        self._reader = self._writer.reader(shared is None, *self._options)
        # readers are told at once when this process ends in order, not after dead_after_ms
        self._closing = weakref.finalize(self, _close, self._writer)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        driver: bool = False,
        group: str | None = None,
        dead_after_ms: float = 50.0,
        loop_dead_after_ms: float | None = None,
        embodiment: Embodiment | None = None,
    ) -> ActionStream:
        """The robot's side of a stream in shared memory.

        Args:
            driver: this reader moves the robot: what it sends is written back for the producer (`feedback`). There is one.
            group: read the channels of this group only; all where None.
            embodiment: the robot that it must be; any where None.

        Raises:
            StreamError: there is no such segment, it is of another version, size or robot, or there is a driver already.
        """
        if embodiment is not None:
            check_robot(embodiment)
        self = cls.__new__(cls)
        self._where, self._shared, self._writer = f"stream {shown(name)}", name, None
        self._options = (ns_of("dead_after_ms", dead_after_ms), ns_of("loop_dead_after_ms", loop_dead_after_ms))
        try:
            self._reader = _native().StreamReader(name, driver, *self._options, group)
            found = self._reader.described()
        except ValueError as error:  # a name in it that is no text, too
            raise StreamError(str(error)) from None
        self.robot, self.names = found["robot"], tuple(found["names"])
        self.command_hz = 1e9 / found["command_period_ns"]
        if embodiment is not None:
            wanted = [name for name in embodiment.action_names if group is None or name in self.names]
            if self.robot != embodiment.name or list(self.names) != wanted:
                got = f"{self._channels(self.names)} of {self.robot!r}"
                raise StreamError(
                    f"{name}: expected {self._channels(wanted)} of robot {embodiment.name!r}, got {got}; start the robot's own "
                    "producer, or choose another name"
                )
        return self

    @staticmethod
    def remove(name: str) -> None:
        """Delete a segment of shared memory, if it is there; StreamError while a producer or a driver is at work on it."""
        try:
            _native().stream_remove(name)
        except ValueError as error:
            raise StreamError(str(error)) from None

    def __enter__(self) -> ActionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        there = "make it there" if self._shared is None else f"ActionStream.attach({self._shared!r}) there"
        raise TypeError(f"{self._where}: a stream is neither copied nor sent to another process; {there}")

    def __repr__(self) -> str:
        return f"ActionStream({self._where}, {len(self.names)} channels at {self.command_hz:g} Hz)"

    # -- the policy's side -----------------------------------------------------------------------------------------------------

    def publish(self, chunk: StampedChunk, *, starts_at_ns: int | None = None, now_ns: int | None = None) -> None:
        """Hand a chunk to the readers.

        Args:
            chunk: float32 [K, A] with its stamps, K at most 64.
            starts_at_ns: when row 0 is meant for; the observation's time where None.
            now_ns: for tests; the present where None.

        Raises:
            InputError: the chunk cannot be sent (NaN, another width, a binary value that is neither 0 nor 1, a stamp that is
                missing, of the future, or older than the last chunk's); the message names channel and row. Readers do not see it.
        """
        writer = self._producing("publish")
        if not isinstance(chunk, StampedChunk):
            wanted = "an ActionChunk of Policy.infer or a Chunk of the client, with names, control_hz and stamps"
            raise InputError(f"{self._where}: expected {wanted}, got {shown(chunk)}")
        if tuple(chunk.names) != self.names:
            raise InputError(
                f"{self._where}: expected a chunk of {self._channels(self.names)}, got {self._channels(chunk.names)}"
            )
        if chunk.observed_at_ns is None or chunk.computed_at_ns is None:
            raise InputError(
                f"{self._where}: the chunk has no observed_at_ns or computed_at_ns; Policy.infer and the client give both, for "
                "others dataclasses.replace(chunk, observed_at_ns=..., computed_at_ns=...) in time.monotonic_ns()"
            )
        actions = chunk.actions
        if (
            not isinstance(actions, np.ndarray)
            or actions.dtype != np.float32
            or actions.shape[1:] != (len(self.names),)
        ):
            got = f"{actions.dtype} {list(actions.shape)}" if isinstance(actions, np.ndarray) else shown(actions)
            raise InputError(
                f"{self._where}: actions: expected float32 [1 to {MOST_ROWS}, {len(self.names)}], got {got}"
            )
        observed_at = chunk.observed_at_ns
        try:
            writer.publish(
                np.ascontiguousarray(actions),
                observed_at,
                chunk.computed_at_ns,
                observed_at if starts_at_ns is None else starts_at_ns,
                chunk.control_hz,
                self._moment("publish", now_ns),
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._where}: {error}") from None

    def heartbeat(self, now_ns: int | None = None) -> None:
        """The producer's loop lives; each `publish` says so too. For `loop_dead_after_ms` shorter than a policy's pass."""
        self._producing("heartbeat").heartbeat(self._moment("heartbeat", now_ns))

    def feedback(self) -> StreamFeedback | None:
        """What the driver sent last; None before its first tick."""
        found = (self._reading() if self._writer is None else self._writer).feedback()
        if found is None:
            return None
        driver, tick, at_ns, chunk, row, status, values = found
        return StreamFeedback(driver, tick, at_ns, chunk, row, Status(status), np.array(values))

    # -- the robot's side ------------------------------------------------------------------------------------------------------

    def at(self, now_ns: int | None = None) -> Command:
        """The command for this moment. It never waits, and there always is one; `status` says why it is what it is.

        A reader keeps the state of seams and limits: call it once per tick, from one thread, with times that grow (the same time
        gives the same command).

        Args:
            now_ns: `time.monotonic_ns()`; the present where None.

        Raises:
            InputError: now_ns is of the wall clock, which is no time of this stream.
        """
        reader = self._reading()
        values = np.empty(len(self.names))
        chunk, row, status, age_ns = reader.read(self._moment("at", now_ns), values)
        return Command(values, chunk, row, Status(status), age_ns)

    def start_at(self, pose: ArrayLike) -> None:
        """Begin at this pose, [A] in the order of `names`, at rest: the measured one, before the first `at` and whenever
        somebody else has moved the robot. NaN where it is not known, and of displacements nothing is taken. It ends `stop`.

        Raises:
            InputError: another number of values, or an infinite one.
        """
        given = numbers(pose)
        if given is None or given.shape != (len(self.names),):
            got = shown(pose) if given is None else f"shape {list(given.shape)}"
            raise InputError(
                f"{self._where}: start_at: expected {len(self.names)} numbers ({self._channels(self.names)}), got {got}"
            )
        try:
            self._reading().start_at(np.ascontiguousarray(given, np.float64))
        except ValueError as error:
            raise InputError(f"{self._where}: start_at: {error}") from None

    def stop(self) -> None:
        """Bring the robot to rest within its limits, for this reader alone, and stay there until `start_at`."""
        self._reading().stop()

    # -- both ------------------------------------------------------------------------------------------------------------------

    def estop(self, now_ns: int | None = None) -> None:
        """Every reader of this stream brings the robot to rest within its limits, and stays there until `clear_estop`.

        It is no safety-rated function: it needs a controller that runs and reads.
        """
        (self._reading() if self._writer is None else self._writer).estop(self._moment("estop", now_ns))

    def clear_estop(self) -> None:
        """Readers follow chunks again."""
        (self._reading() if self._writer is None else self._writer).clear_estop()

    def close(self) -> None:
        """Of a producer: readers see DEAD from now on, `at` of this object too. A segment stays (`remove`).

        Of an attached stream: let go of it, and of its part as driver.
        """
        if self._writer is None:
            self._reader = None
        else:
            self._closing()

    def _producing(self, what: str) -> Any:
        if self._writer is None:
            raise StreamError(
                f"{self._where}: {what}: this end only reads; ActionStream(embodiment, shared={self._shared!r}) publishes"
            )
        return self._writer

    def _reading(self) -> Any:
        if self._reader is None:
            raise StreamError(f"{self._where}: closed; ActionStream.attach opens it again")
        return self._reader

    def _moment(self, what: str, now_ns: int | None) -> int:
        """now_ns, or the present. Of the wall clock it would be the last time that a reader knows, and all after it is DEAD."""
        if now_ns is None:
            return time.monotonic_ns()
        if isinstance(now_ns, (int, np.integer)) and now_ns >= WALL_CLOCK_NS:
            got = f"{shown(now_ns)}; time.time_ns() is another clock"
            raise InputError(f"{self._where}: {what}: now_ns: expected time.monotonic_ns(), got {got}")
        return now_ns

    @staticmethod
    def _channels(names: Sequence[str]) -> str:
        return f"{len(names)} channels ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"


def _native() -> Any:
    from dit4dit import _C

    return _C


def _close(writer: Any) -> None:
    writer.close(time.monotonic_ns())
