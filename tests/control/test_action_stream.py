"""ActionStream on the package's robots: what reaches a robot of what is published, and what is refused with which words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from stream_chunks import MS, T0, S, chunk, commands, unused_segment, values

from dit4dit.control import ActionStream, Blend, Ensemble, Limits, Status, Switch, stream_layout
from dit4dit.errors import ConfigError, Dit4DitError, InputError, StreamError
from dit4dit.robots import G1, GR1, LIBERO, TABLETOP, Bounds, Key
from dit4dit.serving.client import Chunk

QUICK = {"velocity": 0.5, "acceleration": 5.0, "jerk": 500.0}
GENERATOR = 7


@pytest.fixture
def segment() -> Iterator[str]:
    with unused_segment() as name:
        yield name


def libero_rows(count: int = 8, scale: float = 0.75) -> np.ndarray:
    """Displacements inside 0.8 of what LIBERO takes, and a gripper that opens and closes."""
    rng = np.random.default_rng(GENERATOR)
    rows = rng.uniform(-scale, scale, (count, 7)).astype(np.float32)
    rows[:, 6] = rng.integers(0, 2, count)
    return rows


def ticks(hz: float, seconds: float, jitter: float = 0.0) -> np.ndarray:
    """Times from T0 on; each but the first late by up to `jitter` periods."""
    n = round(seconds * hz)
    late = np.random.default_rng(GENERATOR).uniform(0, jitter, n) if jitter else np.zeros(n)
    late[0] = 0
    return (T0 + (np.arange(n) + late) * (S / hz)).round().astype(np.int64)


@pytest.mark.parametrize("interpolation", ["hold", "linear", "cubic"])
@pytest.mark.parametrize("hz, jitter", [(20, 0.0), (30, 0.0), (500, 0.0), (333, 0.9), (1000, 0.5)])
def test_libero_keeps_the_sum_of_its_displacements(interpolation: str, hz: float, jitter: float) -> None:
    """At any rate, with the limiter of the robot's own clip on; the gripper is always 0 or 1."""
    rows = libero_rows()
    stream = ActionStream(LIBERO, command_hz=hz, interpolation=interpolation, seam=Switch())
    stream.publish(chunk(LIBERO, rows), now_ns=T0)
    sent = values(stream, [*ticks(hz, 8 / 20, jitter), *(T0 + S * np.arange(8, 20) // 20)])
    assert np.abs(sent[:, :6].sum(axis=0) - rows[:, :6].astype(np.float64).sum(axis=0)).max() < 1e-9
    assert set(np.unique(sent[:, 6])) == {0.0, 1.0}
    if hz == 20:  # the policy's own rate: its own rows
        assert np.abs(sent[:8, :6] - rows[:, :6]).max() < 1e-9
        assert np.array_equal(sent[:8, 6], rows[:, 6])


@pytest.mark.parametrize("seam", [Switch(), Blend(rows=3), Ensemble(0.1, 3)], ids=str)
def test_the_sum_is_kept_over_a_seam(seam) -> None:
    """Two chunks that agree where they overlap: every row counts once."""
    rows = libero_rows(12)
    stream = ActionStream(LIBERO, command_hz=100, interpolation="linear", seam=seam)
    stream.publish(chunk(LIBERO, rows[:8]), now_ns=T0)
    first = values(stream, ticks(100, 0.2))
    middle = T0 + S // 5
    stream.publish(chunk(LIBERO, rows[4:], middle), now_ns=middle)
    rest = values(stream, middle + ticks(100, 0.5) - T0)
    total = np.concatenate([first, rest])
    assert np.abs(total[:, :6].sum(axis=0) - rows[:, :6].astype(np.float64).sum(axis=0)).max() < 1e-9
    assert set(np.unique(total[:, 6])) == {0.0, 1.0}


def test_rows_are_found_by_time() -> None:
    """A policy at 10 Hz whose chunk is 250 ms late is entered in row 2; `starts_at_ns` moves the rows."""
    rows = np.stack([np.linspace(0, 0.14, 8), np.linspace(0, -0.14, 8), [0, 0, 0, 0, 1, 1, 1, 1]], axis=1)
    stream = ActionStream(TABLETOP, interpolation="linear", seam=Switch())
    stream.publish(chunk(TABLETOP, rows), now_ns=T0 + 250 * MS)
    command = stream.at(T0 + 250 * MS)
    assert (command.chunk, command.row, command.status, command.age_ms) == (1, 2, Status.OK, 250.0)
    assert np.allclose(command.values, [0.05, -0.05, 0.0], atol=1e-6)
    moved = ActionStream(TABLETOP, interpolation="linear", seam=Switch())
    moved.publish(chunk(TABLETOP, rows), now_ns=T0 + 250 * MS, starts_at_ns=T0 + 250 * MS)
    assert np.allclose(moved.at(T0 + 300 * MS).values, [0.01, -0.01, 0.0], atol=1e-6)
    faster = ActionStream(TABLETOP, interpolation="linear", seam=Switch())  # the chunk's rate counts, not the robot's
    faster.publish(chunk(TABLETOP, rows, control_hz=30.0), now_ns=T0)
    command = faster.at(T0 + 150 * MS)
    assert (command.row, command.values[2]) == (4, 1.0)
    assert np.allclose(command.values[:2], [0.09, -0.09], atol=1e-6)


def g1_rows(value: float) -> np.ndarray:
    row = np.full(36, value)
    row[G1.places["base_height"]] = 0.7
    return row


def test_g1s_groups_have_their_own_rules() -> None:
    """Without a chunk arms, hands and torso stay, the base stops walking within `decay_ms` and keeps its heading."""
    stream = ActionStream(G1, command_hz=100, interpolation="hold", decay_ms=400)
    stream.start_at(g1_rows(0.08))
    stream.publish(chunk(G1, g1_rows(0.08)), now_ns=T0)
    following = stream.at(T0 + 200 * MS)
    assert following.status is Status.OK
    assert np.allclose(following.values, g1_rows(0.08), atol=1e-6)
    end = T0 + round(8 / 30 * S) + 1
    dry = commands(stream, [end, end + 200 * MS, end + 400 * MS, end + S])
    assert {command.status for command in dry} == {Status.DRY}
    assert {command.row for command in dry} == {-1}
    base = G1.places["base_velocity"]
    assert np.allclose([command.values[base] for command in dry], np.outer([0.08, 0.04, 0, 0], np.ones(3)), atol=1e-6)
    still = np.ones(36, bool)
    still[base] = False
    assert np.allclose(dry[-1].values[still], g1_rows(0.08)[still], atol=1e-6)
    held = ActionStream(G1, interpolation="hold", on_dry={"base": "hold"})
    held.start_at(g1_rows(0.08))
    held.publish(chunk(G1, g1_rows(0.08)), now_ns=T0)
    assert values(held, [T0, end])[-1][base].tolist() == [0.0, 0.0, 0.0]


def test_a_group_may_be_read_by_itself(segment: str) -> None:
    stream = ActionStream(G1, shared=segment, interpolation="hold")
    stream.publish(chunk(G1, g1_rows(0.08), time.monotonic_ns()))
    with ActionStream.attach(segment, group="base", driver=True) as base:
        assert base.names == (*(f"base_velocity.{i}" for i in range(3)), "target_yaw")
        base.start_at([0.08, 0.08, 0.08, 0.08])
        assert np.allclose(base.at().values, 0.08)
    found = stream.feedback()
    assert np.isnan(found.values[:32]).all()
    assert np.allclose(found.values[32:], 0.08)
    stream.close()


def test_limits_hold_for_what_is_sent() -> None:
    """A step of 0.4 m at once becomes a motion within the bounds; the robot's own clip bounds the place."""
    limits = Limits.of(TABLETOP).override({"x": QUICK, "y": QUICK})
    stream = ActionStream(TABLETOP, command_hz=1000, interpolation="hold", seam=Switch(), limits=limits)
    stream.start_at([-0.2, 0.0, 0.0])
    for i, place in enumerate((0.2, 0.9)):
        begin = T0 + i * S
        stream.publish(chunk(TABLETOP, [place, 0.0, 1.0], begin), now_ns=begin)
        sent = values(stream, begin + ticks(1000, 1.0) - T0)
        for order, bound in enumerate(QUICK.values(), 1):
            most = np.abs(np.diff(sent[:, 0], order)).max() * 1000**order
            # the second step, of a centimetre, needs less
            assert 0.9 * bound * (i == 0) < most <= bound * (1 + 1e-6), order
        # float32's 0.2, and the world's reach of 0.21
        assert sent[-1, 0] == pytest.approx(min(place, 0.21), abs=1e-6)
        assert sent[:, 0].max() <= 0.21


def test_stale_estop_and_close() -> None:
    rows = np.tile([0.1, 0.1, 1.0], (30, 1))
    stream = ActionStream(TABLETOP, interpolation="hold", max_age_ms=800)
    stream.publish(chunk(TABLETOP, rows), now_ns=T0)
    found = commands(stream, [T0, T0 + 800 * MS, T0 + 801 * MS])
    assert [command.status for command in found] == [Status.OK, Status.OK, Status.STALE]
    stream.publish(chunk(TABLETOP, rows, T0 + 900 * MS), now_ns=T0 + 900 * MS)
    assert stream.at(T0 + 900 * MS).status is Status.OK
    stream.estop(T0 + 901 * MS)
    command = stream.at(T0 + 950 * MS)
    assert command.status is Status.ESTOP
    assert np.array_equal(command.values, stream.at(T0 + 990 * MS).values)
    stream.clear_estop()
    stream.publish(chunk(TABLETOP, rows, T0 + 1000 * MS), now_ns=T0 + 1000 * MS)
    assert stream.at(T0 + 1000 * MS).status is Status.OK
    stream.stop()
    assert stream.at(T0 + 1010 * MS).status is Status.ESTOP
    stream.start_at([0.1, 0.1, 1.0])
    stream.publish(chunk(TABLETOP, rows, T0 + 1100 * MS), now_ns=T0 + 1100 * MS)
    assert stream.at(T0 + 1100 * MS).status is Status.OK
    stream.close()
    assert stream.at(T0 + 1200 * MS).status is Status.DEAD
    with pytest.raises(InputError, match="stream of 'tabletop': the stream is closed; open a new one"):
        stream.publish(chunk(TABLETOP, rows, T0 + 1200 * MS), now_ns=T0 + 1200 * MS)


def test_a_loop_that_stands_still_is_dead() -> None:
    stream = ActionStream(TABLETOP, loop_dead_after_ms=100)
    stream.publish(chunk(TABLETOP, np.tile([0.1, 0.1, 1.0], (30, 1))), now_ns=T0)
    assert stream.at(T0 + 100 * MS - 1).status is Status.OK
    assert stream.at(T0 + 100 * MS).status is Status.DEAD
    stream.heartbeat(T0 + 150 * MS)
    assert stream.at(T0 + 160 * MS).status is Status.OK


def test_before_the_first_chunk() -> None:
    stream = ActionStream(G1)
    command = stream.at(T0)
    assert (command.chunk, command.row, command.status) == (0, -1, Status.DRY)
    moving = G1.places["base_velocity"]
    assert command.values[moving].tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(np.delete(command.values, moving)).all()
    assert stream.feedback().tick == 1  # in one process this reader is the driver
    stream.start_at(g1_rows(0.05))
    assert np.allclose(np.delete(stream.at(T0 + MS).values, moving), np.delete(g1_rows(0.05), moving))


# -- what is refused ---------------------------------------------------------------------------------------------------------


def spoiled(value: float, row: int = 3, column: int = 1) -> np.ndarray:
    rows = np.tile(np.float32([0.1, 0.2, 1.0]), (8, 1))
    rows[row, column] = value
    return rows


GOOD = chunk(TABLETOP, [0.1, 0.2, 1.0])
REFUSED = [
    (chunk(TABLETOP, spoiled(np.nan)), "channel 'y', row 3 is nan, wanted a finite number"),
    (chunk(TABLETOP, spoiled(-np.inf)), "channel 'y', row 3 is -inf, wanted a finite number"),
    (chunk(TABLETOP, spoiled(0.5, 2, 2)), "channel 'grip', row 2 is 0.5, wanted exactly 0 or 1"),
    (chunk(TABLETOP, np.zeros((65, 3))), r"expected float32 \[1 to 64, 3\], row by row, got float32 \[65, 3\]"),
    (chunk(TABLETOP, np.zeros((0, 3))), r"expected float32 \[1 to 64, 3\], row by row, got float32 \[0, 3\]"),
    (chunk(TABLETOP, np.zeros((8, 2))), r"actions: expected float32 \[1 to 64, 3\], got float32 \[8, 2\]"),
    (replace(GOOD, actions=np.zeros((8, 3))), r"actions: expected float32 \[1 to 64, 3\], got float64 \[8, 3\]"),
    (replace(GOOD, actions=[[0.0] * 3]), r"actions: expected float32 \[1 to 64, 3\], got"),
    (replace(GOOD, names=("y", "x", "grip")), r"expected a chunk of 3 channels \(x, y, grip\), got 3 channels \(y, x, grip\)"),
    (chunk(LIBERO, libero_rows()), r"expected a chunk of 3 channels \(x, y, grip\), got 7 channels \(x, y, z, roll, ...\)"),
    (replace(GOOD, observed_at_ns=None), "the chunk has no observed_at_ns or computed_at_ns; Policy.infer"),
    (replace(GOOD, computed_at_ns=None), "the chunk has no observed_at_ns or computed_at_ns; Policy.infer"),
    (replace(GOOD, observed_at_ns=T0 - 1), f"observed_at_ns {T0 - 1} is before the last chunk's, {T0}"),
    (replace(GOOD, computed_at_ns=T0 - 1), f"computed_at_ns {T0 - 1} is before observed_at_ns, {T0}"),
    (replace(GOOD, computed_at_ns=T0 + 1), f"computed_at_ns {T0 + 1} is in the future, now is {T0}"),
    (replace(GOOD, control_hz=0.0), "control_hz is 0, wanted the rate of the rows"),
    (replace(GOOD, control_hz=float("nan")), "control_hz is nan, wanted the rate of the rows"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_chunk_that_cannot_be_sent_is_refused_and_changes_nothing(wrong, message: str) -> None:
    stream = ActionStream(TABLETOP, seam=Switch())
    stream.publish(GOOD, now_ns=T0)
    with pytest.raises(
        InputError, match=rf"^stream of 'tabletop': {'values: ' * message.startswith('expected float32')}{message}"
    ):
        stream.publish(wrong, now_ns=T0)
    command = stream.at(T0 + 10 * MS)
    assert (command.chunk, command.status) == (1, Status.OK)
    assert np.array_equal(command.values, np.float32([0.1, 0.2, 1.0]))


def test_what_the_client_returns_can_be_published() -> None:
    stream, now = ActionStream(TABLETOP), time.monotonic_ns()
    actions = np.float32([[0.1, 0.2, 1.0]])
    stream.publish(Chunk(actions, TABLETOP.action_names, 10.0, actions, 7, 0, {}, now - 5, now))
    assert np.allclose(stream.at().values, actions)


def test_rows_that_lie_apart_are_published_as_they_are() -> None:
    rows = np.zeros((16, 6), np.float32)
    rows[::2, ::2] = [[0.01 * i, -0.01 * i, i % 2] for i in range(8)]
    stream = ActionStream(TABLETOP, interpolation="hold", seam=Switch())
    stream.publish(replace(GOOD, actions=rows[::2, ::2]), now_ns=T0)
    assert np.array_equal(stream.at(T0 + 510 * MS).values, rows[10, ::2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interpolation": "cubik"}, "interpolation: expected one of hold, linear, cubic, got 'cubik'; did you mean 'cubic'"),
        ({"seam": "blend"}, r"seam: expected Switch\(\), Ensemble\(alpha, history\) or Blend\(rows\), got 'blend'"),
        ({"seam": Ensemble(0.1, 9)}, "stream of 'g1': seam: history is 9, wanted 1 to 8"),
        ({"command_hz": 0}, "command_hz: expected a number from 1 to 20000, got 0"),
        ({"command_hz": "fast"}, "command_hz: expected a number from 1 to 20000, got 'fast'"),
        ({"on_dry": {"bass": "hold"}}, "on_dry: unknown group 'bass'; did you mean 'base'.*arms, hands, torso, base"),
        ({"on_dry": "finish"}, "group 'arms': on_dry: expected one of hold, decay, got 'finish'"),
        ({"on_dead": {"base": "stop"}}, "group 'base': on_dead: expected one of hold, decay, finish, got 'stop'"),
        ({"max_age_ms": {"base": -1}}, "max_age_ms: expected a number above 0, 1e.09 at most, got -1"),
        ({"max_age_ms": {"bass": 1}}, "max_age_ms: unknown group 'bass'; did you mean 'base'"),
        ({"decay_ms": float("nan")}, "decay_ms: expected a number above 0"),
        ({"dead_after_ms": 0}, "dead_after_ms: expected a number above 0"),
        ({"limits": Limits.of(GR1)}, "limits: expected those of 'g1', got those of 'gr1'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),  # a function's repr has its address
)  # fmt: skip
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionStream(G1, **options)


def test_more_than_a_stream_holds_is_refused() -> None:
    wide = replace(GR1, action=(Key("tokens", 65, kind="position"),), groups=())
    with pytest.raises(ConfigError, match="stream of 'gr1': channels: expected at most 64 elements, got 65"):
        ActionStream(wide)
    long = replace(GR1, action=(Key("x" * 47, kind="position"),), groups=())
    with pytest.raises(
        ConfigError, match=r"stream of 'gr1': channels\[0\]: name: expected at most 46 bytes of text, got 47"
    ):
        ActionStream(long)


def test_an_action_without_a_kind_is_refused() -> None:
    robot = replace(TABLETOP, action=(Key("x"), *TABLETOP.action[1:]))
    with pytest.raises(ConfigError, match="action 'x': nothing says whether it is an absolute target"):
        ActionStream(robot)


@pytest.mark.parametrize("representation", ["quaternion", "rotation_6d", "matrix", "axis_angle"])
def test_rotations_are_not_mixed_number_by_number(representation: str) -> None:
    turn = Key("turn", 4, kind="position", rotation=representation)
    robot = replace(TABLETOP, action=(*TABLETOP.action, turn))
    message = (
        rf"action 'turn' is a rotation \({representation}\), whose numbers cannot be mixed one by one: expected inter"
    )
    for options in ({}, {"interpolation": "linear", "seam": Switch()}, {"interpolation": "hold", "seam": Blend(1)}):
        with pytest.raises(ConfigError, match=message):
            ActionStream(robot, **options)
    stream = ActionStream(robot, interpolation="hold", seam=Switch())
    rows = np.tile(np.float32([0.1, 0.2, 1.0, 0.5, 0.5, 0.5, -0.5]), (8, 1))
    rows[1::2, 3:] *= -1  # the same rotation: halfway between them there is none
    stream.publish(chunk(robot, rows), now_ns=T0)
    assert np.array_equal(np.abs(values(stream, ticks(500, 0.4))[:, 3:]), np.full((200, 4), 0.5))
    # a displacement is a small turn, and those add up
    ActionStream(replace(robot, action=(*TABLETOP.action, replace(turn, kind="relative"))))


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_layout, "_told", set())


@pytest.mark.usefixtures("untold")
def test_a_robot_without_limits_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dit4dit.control"):
        for robot in (LIBERO, G1, TABLETOP):
            ActionStream(robot)
        ActionStream(GR1, limits=Limits.of(GR1).override({"waist": {"velocity": 1.0}}))
        assert caplog.messages == []
        for _ in range(2):
            ActionStream(GR1)
    (said,) = caplog.messages
    assert "robot 'gr1': no limits are known" in said
    assert "Limits.of(embodiment).override('limits.yaml')" in said


@pytest.mark.parametrize("pose, message", [
    ([0.0, 0.0], r"expected 3 numbers \(3 channels \(x, y, grip\)\), got shape \[2\]"),
    ("home", r"expected 3 numbers \(3 channels \(x, y, grip\)\), got 'home'"),
    ([0.0, np.inf, 0.0], "channel 'y': expected a finite number, or NaN where it is not known, got inf"),
], ids=str)  # fmt: skip
def test_a_pose_that_is_none_is_refused(pose, message: str) -> None:
    with pytest.raises(InputError, match=f"stream of 'tabletop': start_at: {message}"):
        ActionStream(TABLETOP).start_at(pose)


def test_threads_may_share_a_stream() -> None:
    """One publishes, one reads, others stop and look: no read fails, and what is read is what somebody published."""
    stream, over, failed = ActionStream(TABLETOP, interpolation="hold", seam=Switch()), threading.Event(), []
    stream.publish(chunk(TABLETOP, [0.0, 0.0, 0.0], time.monotonic_ns()))

    def forever(work) -> threading.Thread:
        def run() -> None:
            try:
                while not over.is_set():
                    work()
            except Exception as error:
                failed.append(error)

        return threading.Thread(target=run)

    def publish() -> None:
        value = time.monotonic_ns() % 1000 / 10_000
        stream.publish(chunk(TABLETOP, [value, -value, 1.0], time.monotonic_ns()))

    threads = [forever(work) for work in (publish, stream.feedback, stream.heartbeat, stream.clear_estop)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3000):
            command = stream.at()
            assert command.status in (Status.OK, Status.DRY, Status.CONTENDED)
            assert command.values[0] == -command.values[1]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_an_end_that_only_reads_publishes_nothing(segment: str) -> None:
    with ActionStream(TABLETOP, shared=segment) as stream:
        reading = ActionStream.attach(segment)
        for call in (lambda: reading.publish(GOOD), reading.heartbeat):
            with pytest.raises(StreamError, match=r"this end only reads; ActionStream\(embodiment, shared='/dit4dit"):
                call()
        reading.close()
        for call in (reading.at, reading.stop, reading.feedback, reading.estop):
            with pytest.raises(StreamError, match=r"closed; ActionStream.attach opens it again"):
                call()
        assert stream.at().status is Status.DRY


def test_errors_of_a_stream_are_the_packages(segment: str) -> None:
    """So that a command line says one line."""
    with pytest.raises(Dit4DitError, match=f"{segment}: there is no such segment; start the producer first"):
        ActionStream.attach(segment)
    with pytest.raises(StreamError, match="is no name for a segment; wanted one such as"):
        ActionStream.attach("g1")
    ActionStream.remove(segment)  # nothing to do


def test_bounds_of_every_kind_reach_the_header() -> None:
    """Of each bound: a stream with it sends something else than one without."""
    rows = np.zeros((8, 3), np.float32)
    rows[:, 0] = [0, 0.2, 0.2, 0, 0, 0.2, 0.2, 0.2]

    def sent(bounds: Bounds) -> np.ndarray:
        robot = replace(TABLETOP, action=(Key("x", kind="position", limits=bounds), *TABLETOP.action[1:]))
        stream = ActionStream(robot, interpolation="linear", seam=Switch())
        stream.start_at([0.05, 0.0, 0.0])
        stream.publish(chunk(robot, rows), now_ns=T0)
        return values(stream, ticks(500, 0.8))[:, 0]

    free = sent(Bounds())
    for bounds in (
        Bounds(low=0.1),
        Bounds(high=0.1),
        Bounds(velocity=0.5),
        Bounds(acceleration=3.0),
        Bounds(jerk=100.0),
    ):
        assert np.abs(sent(bounds) - free).max() > 1e-3, bounds
