"""action_ode's launcher: what it refuses before it touches a GPU, and its error flag."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from head_case import Case, tiny

from dit4dit import _C
from dit4dit.engine.action_ode import Device, Schedule, plan, program
from dit4dit.engine.action_ode.program import OneLaunchHead, _Ready, buffers, numbers
from dit4dit.engine.action_ode.schedule import COUNTER_STRIDE, NONE, Space
from dit4dit.errors import OutputError

DEVICE = Device(13, 99 << 10, 80)


def launcher_arguments(schedule: Schedule) -> dict[str, tuple]:
    """name -> (address, shape, strides, dtype, device) of a sound request; the addresses are never followed."""
    shape, columns = schedule.shape, 2 * schedule.shape.contexts * schedule.shape.width
    actions = (shape.batch, shape.horizon, shape.actions)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "tiles": (schedule.tiles.shape, "int32"),
        "first_tile": (schedule.first_tile.shape, "int32"),
        "segments": (schedule.segments.shape, "int32"),
        "first_segment": (schedule.first_segment.shape, "int32"),
        "weights": ((schedule.weight_bytes,), "uint8"),
        "constants": ((schedule.constant_floats,), "float32"),
        "noise": (actions, "float32"),
        "context": ((shape.batch, shape.context, columns), "bfloat16"),
        "prefix": ((shape.batch, shape.width), "float32"),
        "out": (actions, "float32"),
        "workspace": ((schedule.workspace_bytes,), "uint8"),
        "counters": ((schedule.counters + 1, COUNTER_STRIDE), "int32"),
        "status": ((4,), "int32"),
    }
    return {name: described(*rest, address=(i + 1) << 32) for i, (name, rest) in enumerate(shapes.items())}


def described(shape: tuple[int, ...], dtype: str = "float32", address: int = 4096, device: str = "cuda:0") -> tuple:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return address, tuple(shape), strides, dtype, device


def test_the_error_flag_is_read_and_cleared() -> None:
    case = Case(tiny())
    head = OneLaunchHead(case.folded, case.config, case.steps)
    status = torch.tensor([3, 40, 7, 2], dtype=torch.int32)
    ready = _Ready(plan(case.shape, DEVICE), {"status": status})
    head._ready[(1, 40, True)] = ready
    with pytest.raises(OutputError, match="block 2 waited more than 2 s in tile 40 for counter 7, which stood at 2"):
        head.check()
    head.check()
    status.copy_(torch.tensor([3, NONE, 7, 1]))
    with pytest.raises(
        OutputError, match=r"block 2 waited more than 0\.5 s for barrier 7 of its weights; is something"
    ):
        head.check()


# -- what is known before a launch ---------------------------------------------------------------------------------------


class Chip:
    """What the launcher says of a GPU, which this machine need not have."""

    def __init__(self, multiprocessors: int = 13, shared_memory: int = 99 << 10, blocks: int = 1) -> None:
        self.facts = {"multiprocessors": multiprocessors, "shared_memory": shared_memory, "capability": 80}
        self.blocks = blocks

    def __call__(self, device: int, shared_bytes: int) -> dict[str, int]:
        return {
            **self.facts,
            "blocks_per_multiprocessor": self.blocks if shared_bytes <= self.facts["shared_memory"] else 0,
        }


def refusal(monkeypatch: pytest.MonkeyPatch, chip: Chip, **change) -> str | None:
    """What a head says on a GPU like this, its kernel and its tensors taken for granted."""
    monkeypatch.setattr(_C, "action_ode_facts", chip, raising=False)
    monkeypatch.setattr(OneLaunchHead, "unsuitable", lambda *_: None)
    case = Case(tiny())
    head = OneLaunchHead(case.folded, replace(case.config, **change), case.steps)
    noise, context, prefix = case.given()
    reason = head.refuse(noise, context, prefix)
    assert (head.refuse_any() is None) == (reason is None), "asked at load, it says the same"
    return reason


def test_what_can_run_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of a chip's multiprocessors, as MPS gives one, is what the schedule is made for."""
    assert refusal(monkeypatch, Chip()) is None
    assert refusal(monkeypatch, Chip(multiprocessors=3)) is None


def test_blocks_that_cannot_all_be_there_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other: the occupancy query answers before the launch."""
    reason = refusal(monkeypatch, Chip(blocks=0))
    assert reason is not None
    assert "expected room for 13 blocks at once, got 0" in reason
    assert "use head='library'" in reason


def test_a_chip_with_too_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refusal(monkeypatch, Chip(shared_memory=48 << 10))
    assert reason is not None
    assert "shared_memory: expected at least" in reason


def test_a_head_without_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refusal(monkeypatch, Chip(), hidden_size=90)
    assert reason is not None
    assert "decoder: expected a multiple of 16, got 90" in reason


def test_a_schedule_that_is_not_sound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "action_ode_facts", Chip(), raising=False)
    monkeypatch.setattr(OneLaunchHead, "unsuitable", lambda *_: None)
    right = program.plan

    def broken(*args: Any) -> Schedule:
        tiles = right(*args).tiles.copy()
        tiles[-1, 3] = 0
        return replace(right(*args), tiles=tiles)

    monkeypatch.setattr(program, "plan", broken)
    case = Case(tiny())
    reason = OneLaunchHead(case.folded, case.config, case.steps).refuse(*case.given())
    assert reason is not None
    assert "the schedule must not run: tile" in reason


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "change,numbers_change,error,message",
    [
        ({"noise": described((2, 8, 8))}, {}, ValueError, r"noise: expected shape \[2, 8, 7\] .*, got \[2, 8, 8\]"),
        ({"context": described((2, 40, 256))}, {}, TypeError, "context: expected bfloat16, got float32"),
        ({"prefix": None}, {}, ValueError, "prefix: expected a tensor if and only if the schedule has state tokens"),
        ({"out": None}, {}, ValueError, "out: expected a tensor, got none"),
        (
            {"noise": described((2, 8, 7), address=4100)},
            {},
            ValueError,
            "noise: expected an address that is a multiple",
        ),
        ({"constants": described((4,), device="cpu")}, {}, ValueError, "constants: expected device cuda:0, got cpu"),
        ({"previous": described((2, 8, 7))}, {}, ValueError, "guidance: expected previous and guidance, or neither"),
        (
            {"noise": described((2, 8, 7), address=10 << 32)},
            {},
            ValueError,
            "out: expected memory of its own, got some that noise lies in",
        ),
        ({"noise": (1, 2, 3)}, {}, TypeError, r"noise: expected an array or \(address, .*, got a tuple of 3"),
        ({"x" * 500: described((1,))}, {}, ValueError, "tensors: a key: expected at most 128 bytes of text, got 500"),
        ({}, {"rows": 2**63}, ValueError, "rows: expected a whole number from -9223372036854775808"),
        ({}, {"rows": 2.0}, TypeError, "rows: expected a whole number, got 2.0"),
        ({}, {"width": 17}, ValueError, "width: expected a multiple of 16 up to 2048, got 17"),
        ({}, {"slots": 99}, ValueError, "slots: expected at most 16, got 99"),
        ({}, {"padded_tokens": 40}, ValueError, "padded_tokens: expected 8, 16, 24, 32, 48 or 64, got 40"),
        ({}, {"padded_tokens": 56}, ValueError, "padded_tokens: expected 8, 16, 24, 32, 48 or 64, got 56"),
        ({}, {"part": 300}, ValueError, "part: expected a multiple of 256 that the staging holds, got 300"),
        ({}, {"context_columns": 260}, ValueError, "context_columns: expected a multiple of 8, 16 bytes, got 260"),
        ({}, {"times": 10**6}, ValueError, r"times: expected a place for all steps in \d+ constants, got 1000000"),
        ({}, {"staging": 2**31 - 1}, ValueError, "staging: expected fewer than 2 GiB of shared memory"),
        ({}, {"rows": 17}, ValueError, "rows: expected as many for each sample, got 17"),
        ({}, {"rows": 20}, ValueError, "rows: expected the horizon's, and perhaps a state token's"),
        ({"counters": described((9, 1), "int32")}, {}, ValueError, r"counters: expected shape \[\d+, 32\]"),
        (
            {"workspace": described((4096,), "uint8")},
            {},
            ValueError,
            r"workspace: expected at least \d+ bytes for buffers",
        ),
    ],
)
def test_the_launcher_refuses(change: dict, numbers_change: dict, error: type[Exception], message: str) -> None:
    schedule = plan(Case(tiny(), batch=2).shape, DEVICE)
    tensors = {k: v for k, v in (launcher_arguments(schedule) | change).items() if v is not None}
    sizes = numbers(schedule) | numbers_change
    with pytest.raises(error, match=message):
        _C.action_ode_cuda(tensors, sizes, buffers(schedule), 0.0, 1, 0)


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "space,change,message",
    [
        (Space.NOISY, {"offset": 8}, r"buffers\[1\]: expected an offset that is a multiple of 16, from \d+, got 8"),
        (Space.STREAM, {"offset": 0}, r"buffers\[3\]: expected an offset that is a multiple of 16, from \d+, got 0"),
        (Space.STREAM, {"columns": 32}, r"buffers\[3\]: expected at least 1 plane of 64 columns, got 1 of 32"),
        (Space.ROUNDED, {"columns": 65}, r"buffers\[4\]: expected a multiple of 8 columns, 16 bytes, got 65"),
        (Space.STATS, {"planes": 0}, r"buffers\[7\]: expected at least 1 plane of 8 columns, got 0 of 8"),
        (Space.ATTENDED, {"planes": 2}, r"buffers\[7\]: expected an offset that is a multiple of 16, from \d+"),
        (Space.STREAM, {"planes": 2**31 - 1, "columns": 2**31 - 1}, r"buffers\[3\]: expected sizes below 2\^63, got"),
        (
            Space.STREAM,
            {"offset": 2**63 - 16},
            r"buffers\[3\]: expected sizes below 2\^63, got 9223372036854775792 \+ ",
        ),
        (Space.STREAM, {"planes": 2**31}, r"buffers\[3\]: planes: expected a whole number from -2147483648 to"),
        (Space.DECODED, {"planes": 1000}, r"workspace: expected at least \d+ bytes for buffers\[9\], got \d+"),
    ],
)
def test_the_launcher_refuses_buffers_that_do_not_fit(space: Space, change: dict, message: str) -> None:
    schedule = plan(Case(tiny(), batch=2).shape, DEVICE)
    places = buffers(schedule)
    names = ("offset", "planes", "columns")
    places[space] = tuple(change.get(name, value) for name, value in zip(names, places[space], strict=True))
    with pytest.raises(ValueError, match=message):
        _C.action_ode_cuda(launcher_arguments(schedule), numbers(schedule), places, 0.0, 1, 0)
