"""action_ode's launcher: what it refuses before it touches a GPU, what the planner is told of one, and its error flag."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_case import Case, tiny

from dit4dit import _C
from dit4dit.engine import Engine
from dit4dit.engine.action_ode import Device, Schedule, plan, program
from dit4dit.engine.action_ode.program import OneLaunchHead, Wanted, _Ready, device_of, numbers, waited
from dit4dit.engine.action_ode.schedule import NONE, SETS, Opcode
from dit4dit.errors import BackendError, CudaError, OutputError
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.stand_in import StandIn, without_data
from dit4dit.policy.prompts import Texts

DEVICE = Device(13, 99 << 10, 80)
CLUSTERS = Device(13, 227 << 10, 90, (6, 3, 1))


def launcher_arguments(schedule: Schedule) -> dict[str, tuple]:
    """name -> (address, shape, strides, dtype, device) of a sound request; the addresses are never followed."""
    shape, columns = schedule.shape, 2 * schedule.shape.contexts * schedule.shape.width
    actions = (shape.batch, shape.horizon, shape.actions)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "tiles": (schedule.tiles.shape, "int32"),
        "first_tile": (schedule.first_tile.shape, "int32"),
        "weights": ((schedule.weight_bytes,), "uint8"),
        "constants": ((schedule.constant_floats,), "float32"),
        "noise": (actions, "float32"),
        "context": ((shape.batch, shape.context, columns), "bfloat16"),
        "prefix": ((shape.batch, shape.width), "float32"),
        "out": (actions, "float32"),
        "words": ((SETS, schedule.set_words), "int32"),
        "private_memory": ((schedule.private_floats,), "float32"),
        "progress": ((2,), "int32"),
        "status": ((4,), "int32"),
    }
    return {name: described(*rest, address=(i + 1) << 32) for i, (name, rest) in enumerate(shapes.items())}


def described(shape: tuple[int, ...], dtype: str = "float32", address: int = 4096, device: str = "cuda:0") -> tuple:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return address, tuple(shape), strides, dtype, device


# -- the error flag --------------------------------------------------------------------------------------------------------


def test_the_error_flag_is_read_and_cleared() -> None:
    case = Case(tiny())
    head = OneLaunchHead(case.folded, case.config, case.steps)
    status = torch.tensor([3, NONE, Wanted.WEIGHTS, 1], dtype=torch.int32)
    ready = _Ready(plan(case.shape, DEVICE), {"status": status})
    head._ready[(1, 40, True)] = ready
    with pytest.raises(
        OutputError, match=r"block 2 .* waited more than 0\.5 s for weights \(slot 1\)\. Another program"
    ):
        head.check()
    head.check()
    assert head.schedules == [ready.schedule]


@pytest.mark.parametrize("device", [DEVICE, CLUSTERS])
def test_an_error_names_block_tile_and_what_it_waited_for(device: Device) -> None:
    """Of two samples, the place that the word has: counted here from the first and the last word of each buffer."""
    schedule = plan(Case(tiny(), batch=2).shape, device)
    names = [tile.opcode for tile in schedule.decoded]
    product, attend = names.index(Opcode.PRODUCT), names.index(Opcode.ATTEND)
    block = schedule.blocks - 1
    for name, buffer in schedule.buffers.items():
        first = waited(schedule, [1 + block, product, Wanted.WORDS, buffer.offset])
        assert f"for row 0, columns 0 and 1 of '{name}' from another team. Another program may hold the GPU" in first
        last = waited(schedule, [1 + block, product, Wanted.WORDS, buffer.offset + buffer.words - 1])
        ends = f"row {buffer.rows - 1}, columns {buffer.columns - 2} and {buffer.columns - 1} of '{name}'"
        assert ends in last
    team, rank = schedule.teams - 1, schedule.ranks - 1
    assert (
        f"action_ode: block {block} (team {team}, rank {rank}) waited more than 2 s in tile {product} (product" in last
    )
    work = schedule.decoded[attend].work
    text = waited(schedule, [1, attend, Wanted.SUMS, 0])
    heads = f"head {work.pair % 4} of sample {work.pair // 4}"
    assert f"block 0 (team 0, rank 0) waited more than 2.5 s in tile {attend} (attention, {heads}" in text
    assert "for sums from the other blocks of its team" in text
    assert "for room for its sums" in waited(schedule, [1, attend, Wanted.ROOM, 0])
    assert "3 s for room for weights (slot 5)" in waited(schedule, [1, NONE, Wanted.WEIGHTS_ROOM, 5])
    assert "for word 123456789 from" in waited(schedule, [1, NONE, Wanted.WORDS, 123456789]), "of no buffer"


# -- what is known before a launch ---------------------------------------------------------------------------------------


class Gpu:
    """What the launcher says of a GPU, which this machine need not have."""

    def __init__(self, device: Device = DEVICE, blocks: int = 1, clusters: tuple[int, ...] | None = None) -> None:
        """blocks: that an SM holds. clusters: of the schedule's blocks; None: as many as of those with all shared memory."""
        self.device, self.blocks, self.clusters = device, blocks, clusters

    def __call__(self, device: int, shared_bytes: int) -> dict[str, int]:
        fits = shared_bytes <= self.device.shared_memory
        all_of_it = shared_bytes == self.device.shared_memory or self.clusters is None
        clusters = (self.device.clusters if all_of_it else self.clusters) or (0, 0, 0)
        return {
            "multiprocessors": self.device.sms,
            "shared_memory": self.device.shared_memory,
            "capability": self.device.capability,
            "blocks_per_multiprocessor": self.blocks if fits else 0,
            **{f"clusters_{n}": clusters[i] if fits else 0 for i, n in enumerate((2, 4, 8))},
        }


def refusal(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, **change) -> str | None:
    """What a head says on a GPU like this, its kernel and its tensors taken for granted."""
    monkeypatch.setattr(_C, "action_ode_facts", gpu, raising=False)
    monkeypatch.setattr(OneLaunchHead, "unsuitable", lambda *_: None)
    case = Case(tiny())
    head = OneLaunchHead(case.folded, replace(case.config, **change), case.steps)
    noise, context, prefix = case.given()
    reason = head.refuse(noise, context, prefix)
    assert (head.refuse_any() is None) == (reason is None), "asked at load, it says the same"
    return reason


def test_what_can_run_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of a GPU's SMs, as MPS gives one, is what the schedule is made for."""
    assert refusal(monkeypatch, Gpu()) is None
    assert refusal(monkeypatch, Gpu(replace(DEVICE, sms=3))) is None
    assert refusal(monkeypatch, Gpu(CLUSTERS)) is None


def test_blocks_that_cannot_all_be_there_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other: the occupancy query answers before the launch."""
    reason = refusal(monkeypatch, Gpu(blocks=0))
    assert reason is not None
    assert "blocks at once, got 0" in reason
    assert "use head='library'" in reason


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_clusters_that_cannot_all_be_there_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """An SM for each block is not enough: clusters need SMs that lie together."""
    schedule = replace(plan(Case(tiny()).shape, DEVICE), ranks=ranks, teams=3)
    for clusters, fits in ((3, True), (2, False)):
        counts = {n: (clusters if n == ranks else 99) for n in (2, 4, 8)}
        gpu = Gpu(Device(3 * ranks, 227 << 10, 90, tuple(counts.values())))
        monkeypatch.setattr(_C, "action_ode_facts", gpu, raising=False)
        if fits:
            program.expect_residency(schedule, torch.device("cuda:0"))
            continue
        with pytest.raises(BackendError, match=f"{3 * ranks} blocks at once in clusters of {ranks}, got {2 * ranks}"):
            program.expect_residency(schedule, torch.device("cuda:0"))


def test_the_planner_is_told_of_clusters_that_take_whole_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of smaller blocks more would fit; under MPS not more than this process's SMs hold."""
    small = (99, 98, 97)
    monkeypatch.setattr(_C, "action_ode_facts", Gpu(CLUSTERS, clusters=small), raising=False)
    assert device_of(torch.device("cuda:0")) == CLUSTERS
    share = Device(13, 227 << 10, 90, (66, 30, 15))
    monkeypatch.setattr(_C, "action_ode_facts", Gpu(share), raising=False)
    assert device_of(torch.device("cuda:0")) == replace(share, clusters=(6, 3, 1))
    with without_data(StandIn("90", 132, 227 << 10, clusters=(66, 30, 15))):
        assert device_of(torch.device("meta")) == Device(132, 227 << 10, 90, (66, 30, 15))
    with without_data(StandIn("80", 108)):
        old = device_of(torch.device("meta"))
    assert [old.teams(ranks) for ranks in (1, 2, 4, 8)] == [108, 0, 0, 0]


def test_a_gpu_with_too_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refusal(monkeypatch, Gpu(replace(DEVICE, shared_memory=40 << 10)))
    assert reason is not None
    assert "shared" in reason


def test_a_head_without_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refusal(monkeypatch, Gpu(), hidden_size=90)
    assert reason is not None
    assert "decoder: expected a multiple of 16, got 90" in reason


def test_a_schedule_that_is_not_sound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "action_ode_facts", Gpu(), raising=False)
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


def test_a_recorded_launch_has_its_schedule() -> None:
    """Of it whoever predicts a time makes the prediction."""
    found: list[Launch] = []
    case = Case(tiny(), batch=2)
    head = OneLaunchHead(case.folded, case.config, case.steps)
    given = [None if x is None else x.to("meta") for x in case.given()]
    with without_data(StandIn(multiprocessors=13, clusters=(6, 3, 1), record=found.extend)):
        out = head.launch(*given, None)
    (one,) = found
    schedule = one.constants["schedule"]
    assert schedule.device == CLUSTERS
    assert schedule.shape == case.shape
    assert one.grid == (schedule.teams * schedule.ranks,)
    assert one.arguments["weights"].nbytes == schedule.weight_bytes
    assert (out.shape, out.dtype) == (case.noise.shape, torch.float32)


def test_plans_run_before_the_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch waits for SMs to be free: kernels of `Policy.prepare` that have not begun must not be in its way."""
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: made.append(priority))
    on_gpu = torch.device("cuda:0")
    assert Engine.stream.fget is not None
    Engine.stream.fget(SimpleNamespace(_stream=None, device=on_gpu))
    Texts(SimpleNamespace(device=on_gpu), None, None, None)._background.shutdown()  # type: ignore[arg-type]
    plans, encoder = made
    assert plans < encoder, "a lower number comes first"


# -- the launcher ------------------------------------------------------------------------------------------------------------


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
        ({"noise": (1, 2, 3)}, {}, TypeError, r"noise: expected an array or \(address, .*, got a tuple of 3"),
        ({"x" * 500: described((1,))}, {}, ValueError, "tensors: a key: expected at most 128 bytes of text, got 500"),
        (
            {"first_tile": described((99,), "int32")},
            {},
            ValueError,
            r"first_tile: expected shape \[\d+\] .*, got \[99\]",
        ),
        ({"words": described((2, 64), "int32")}, {}, ValueError, r"words: expected shape \[3, \d+\] .*, got \[2, 64\]"),
        ({"words": described((3, 64))}, {}, TypeError, "words: expected int32, got float32"),
        ({"progress": described((1,), "int32")}, {}, ValueError, r"progress: expected shape \[2\] .*, got \[1\]"),
        ({"status": described((5,), "int32")}, {}, ValueError, r"status: expected shape \[4\] .*, got \[5\]"),
        ({"private_memory": described((4,))}, {}, ValueError, r"private_memory: expected shape \[\d+\] .*, got \[4\]"),
        ({}, {"rows": 2**63}, ValueError, "rows: expected a whole number from -9223372036854775808"),
        ({}, {"rows": 2.0}, TypeError, "rows: expected a whole number, got 2.0"),
        ({}, {"rows": 17}, ValueError, "rows: expected as many for each sample, got 17"),
        ({}, {"rows": 20}, ValueError, "rows: expected the horizon's, and perhaps a state token's"),
        ({}, {"width": 17}, ValueError, "width: expected a multiple of 16 up to 2048, got 17"),
        ({}, {"context_columns": 260}, ValueError, "context_columns: expected a multiple of 8, 16 bytes, got 260"),
        ({}, {"times": 10**6}, ValueError, r"times: expected a place for all steps in \d+ constants, got 1000000"),
        ({}, {"ranks": 3, "inbox": 16}, ValueError, "ranks: expected 1, 2, 4 or 8, got 3"),
        ({}, {"ranks": 16, "inbox": 16}, ValueError, "ranks: expected 1, 2, 4 or 8, got 16"),
        ({}, {"teams": 0}, ValueError, "teams: expected a number from 1, got 0"),
        (
            {},
            {"teams": 2**29, "ranks": 4},
            ValueError,
            r"teams: expected fewer than 2\^31 blocks in all, got 536870912",
        ),
        ({}, {"set_words": 66}, ValueError, "set_words: expected a multiple of 4, 16 bytes, .*, got 66"),
        (
            {},
            {"set_words": 2**30},
            ValueError,
            r"set_words: expected .* fewer than 2\^31 words in all sets, got 1073741824",
        ),
        ({}, {"padded_tokens": 8}, ValueError, "padded_tokens: expected a number from 16, got 8"),
        ({}, {"padded_tokens": 32}, ValueError, "padded_tokens: expected 16, 24, 40, 56 or 72, got 32"),
        ({}, {"padded_tokens": 80}, ValueError, "padded_tokens: expected 16, 24, 40, 56 or 72, got 80"),
        ({}, {"part": 300}, ValueError, "part: expected a multiple of 32 that the staging holds, got 300"),
        ({}, {"part": 2**20}, ValueError, "part: expected a multiple of 32 that the staging holds, got 1048576"),
        ({}, {"slots": 2}, ValueError, "slots: expected a number from 3, got 2"),
        ({}, {"slots": 17}, ValueError, "slots: expected at most 16, got 17"),
        ({}, {"staging": 65544}, ValueError, "staging: expected a multiple of 16, got 65544"),
        ({}, {"staging": 2**31 - 16}, ValueError, "staging: expected fewer than 2 GiB of shared memory"),
        ({}, {"inbox": 16}, ValueError, "inbox: expected a multiple of 16, 0 with one rank, got 16"),
        ({}, {"ranks": 2, "inbox": 24}, ValueError, "inbox: expected a multiple of 16, 0 with one rank, got 24"),
        ({}, {"ranks": 2, "inbox": 2**31 - 16}, ValueError, "fewer than 2 GiB of shared memory in all, got 4295"),
    ],
)
def test_the_launcher_refuses(change: dict, numbers_change: dict, error: type[Exception], message: str) -> None:
    schedule = plan(Case(tiny(), batch=2).shape, DEVICE)
    tensors = {k: v for k, v in (launcher_arguments(schedule) | change).items() if v is not None}
    sizes = numbers(schedule) | numbers_change
    with pytest.raises(error, match=message):
        _C.action_ode_cuda(tensors, sizes, 0.0, 1, 0)


@pytest.mark.cuda_build
@pytest.mark.parametrize("written", ["out", "words", "private_memory", "progress", "status"])
def test_the_launcher_refuses_memory_that_is_shared(written: str) -> None:
    """What the kernel writes lies in nothing else, from the first byte to the last."""
    schedule = plan(Case(tiny(), batch=2).shape, DEVICE)
    arguments = launcher_arguments(schedule)
    for name, (_, *rest) in arguments.items():
        if name == written:
            continue
        here = arguments[written][0]
        with pytest.raises(
            ValueError, match=rf"(expected memory of its own, got some that ({name}|{written}) lies in)"
        ):
            _C.action_ode_cuda(arguments | {name: (here, *rest)}, numbers(schedule), 0.0, 1, 0)


@pytest.mark.cuda_build
def test_the_launcher_takes_what_is_sound_as_far_as_the_gpu() -> None:
    """Every refusal above has one cause: without it the call gets as far as the driver, which finds no GPU here."""
    if torch.cuda.is_available():
        pytest.skip("it would launch on addresses of nothing")
    for device in (DEVICE, CLUSTERS):
        schedule = plan(Case(tiny(), batch=2).shape, device)
        with pytest.raises(CudaError, match="cudaGetDevice"):
            _C.action_ode_cuda(launcher_arguments(schedule), numbers(schedule), 0.0, 1, 0)
