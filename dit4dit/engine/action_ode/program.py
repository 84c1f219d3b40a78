"""A head made ready for the kernel: schedules and weights on the GPU, launches, and the error flag that comes with them.

A launch begins when all SMs that it needs are free at once, because its blocks wait for each other. Kernels of other streams
that are already running end first. Those that are not wait behind it: plans run in `Engine.stream`, whose priority is high, and
the text encoder of `Policy.prepare` runs in a stream of the usual priority.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode.plan import head_shape, plan
from dit4dit.engine.action_ode.schedule import EMPTY, NONE, RANKS, SETS, THREADS, Attend, Device, Schedule
from dit4dit.engine.action_ode.validate import ScheduleError, validate
from dit4dit.engine.action_ode.weights import as_bytes, pack_constants, pack_matrices
from dit4dit.engine.fold import fold_head
from dit4dit.errors import BackendError, ConfigError, OutputError, shown
from dit4dit.model.action_head import ActionHead
from dit4dit.model.flow import GuidanceTensors
from dit4dit.ops import device_tables, native, stand_in
from dit4dit.ops.action_ode import FoldedHead
from dit4dit.ops.aot.launch_record import Launch
from dit4dit.ops.dispatch import set_example

log = logging.getLogger("dit4dit.engine.action_ode")

HeadChoice = Literal["auto", "library", "one_launch"]
CHOICES = ("auto", "library", "one_launch")

KINDS = 2
"""Kinds of request that stay ready though no plan reads them."""
LONGEST_WAIT_NS = 2_000_000_000
"""A wait inside the kernel for another team's words that takes longer ends the launch with an error; a launch takes about a
thousandth of it."""


class Wanted(IntEnum):
    """What a block waited for in vain; kernels/action_ode_block.cuh has the same."""

    WORDS = 0  # activations that another team writes
    SUMS = 1  # from the other blocks of its team
    ROOM = 2  # in the other blocks' inboxes
    WEIGHTS = 3  # a panel of its own, on its way into shared memory
    WEIGHTS_ROOM = 4  # in its own shared memory, for the next panel

    @property
    def seconds(self) -> float:
        """The longest wait. Who waits for what others give only when they have what they wait for is to be heard after them."""
        share = {Wanted.WORDS: 1.0, Wanted.WEIGHTS: 0.25, Wanted.WEIGHTS_ROOM: 1.5}.get(self, 1.25)
        return share * LONGEST_WAIT_NS / 1e9


@dataclass(frozen=True, eq=False)
class _Ready:
    """One kind of request: a validated schedule, and its tensors on the GPU, under the launcher's names."""

    schedule: Schedule
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of what is this kind's own; weights are shared."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name != "weights")

    @property
    def status(self) -> Tensor:
        """int32 [4], zero while all is well; kernels/action_ode_tiles.cuh names its fields."""
        return self.tensors["status"]


class OneLaunchHead:
    """A folded head for a fixed number of steps. One launch at a time: launches of one kind share a workspace.

    The first request of a kind (batch, feature tokens, state token or none) plans, validates and packs for it; kinds that cut
    the matrices in the same way share one copy of the weights.
    """

    backend: str | None = "cuda"
    """Which implementation of the op the engine asks for; None: the one that a verdict names, else its loop."""

    def __init__(self, folded: FoldedHead, config: HeadConfig, steps: int, *, fp8: bool = False) -> None:
        """fp8: the blocks' weights in e4m3 with a scale for each row; changes the result."""
        self.folded, self.config, self.steps, self.fp8 = folded, config, steps, fp8
        self._start()

    def _start(self) -> None:
        # what a plan's graph reads the plan keeps; of what no plan reads the last few kinds stay
        self._ready: WeakValueDictionary[tuple[int, int, bool], _Ready] = WeakValueDictionary()
        self._last: deque[_Ready] = deque(maxlen=KINDS)
        self._weights: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What belongs to a device is made anew."""
        own = ("_ready", "_last", "_weights", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def call_text(self) -> str:
        """What a verdict says of this head (`ops.verdicts.call_text`)."""
        config = self.config
        size = f"{config.num_layers} layers of {config.width}, {config.num_heads} heads, {config.hidden_size} hidden"
        dtype = str(self.folded.decode_out.weight.dtype).removeprefix("torch.")
        return f"head of {size}, {self.steps} steps, {dtype}{', blocks in fp8' if self.fp8 else ''}"

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, in which nothing can be read."""
        return self.folded.decode_out.weight.is_cuda and torch.cuda.is_current_stream_capturing()

    def refuse(self, noise: Tensor, context: Tensor, prefix: Tensor | None) -> str | None:
        """Why the kernel cannot run this request, or None, after which it is ready to be launched."""
        reason = self.unsuitable(noise.device, context.dtype)
        if reason is not None:
            return reason
        given = {"noise": noise, "context": context, "prefix": prefix}
        for name, tensor in given.items():
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                return f"{name} needs a gradient"
        try:
            if stand_in.of(noise.device) is not None:
                self.schedule(noise.device, noise.shape[0], context.shape[1], prefix is not None)
            else:
                self.prepare(noise.device, noise.shape[0], context.shape[1], prefix is not None)
        except (ConfigError, BackendError) as error:
            return str(error)
        return None

    def refuse_any(self) -> str | None:
        """Why the kernel could not run a single sample where the weights are, or None. Prepares nothing."""
        weight = self.folded.decode_out.weight
        reason = self.unsuitable(weight.device, weight.dtype)
        if reason is not None:
            return reason
        try:
            schedule = self.schedule(weight.device, 1, 1, self.config.state_dim is not None)
            expect_residency(schedule, weight.device)
        except (ConfigError, BackendError) as error:
            return str(error)
        return None

    def unsuitable(self, device: torch.device, context: torch.dtype) -> str | None:
        """Why no request of this kind could be launched, by device, dtype and build alone, or None."""
        dtype = self.folded.decode_out.weight.dtype
        if not stand_in.on_gpu(device):
            return f"it is on {device}: load with device='cuda', or take head='library'"
        if context != torch.bfloat16 or dtype != torch.bfloat16:
            return f"context is {context} and the head {dtype}, not bfloat16 (head_dtype=torch.bfloat16)"
        return native.no_cuda_kernels(device)

    def schedule(self, device: torch.device, batch: int, context: int, prefix: bool) -> Schedule:
        """The schedule of one kind of request. ConfigError: no tiles for this shape, or too little shared memory."""
        shape = head_shape(self.config, batch=batch, context=context, prefix=prefix, steps=self.steps, fp8=self.fp8)
        return plan(shape, device_of(device))

    @property
    def schedules(self) -> list[Schedule]:
        """Of the kinds of request that are ready."""
        with self._lock:
            return [ready.schedule for ready in self._ready.values()]

    def prepare(self, device: torch.device, batch: int, context: int, prefix: bool) -> _Ready:
        """Plan, validate and pack for one kind of request, once. It allocates: call it before a CUDA graph is captured.

        ConfigError: no tiles for this shape. BackendError: the device cannot hold all blocks at once, or the schedule is not
        sound, which is a bug of the planner.
        """
        key = (batch, context, prefix)
        with self._lock:
            ready = self._ready.get(key)
            if ready is None:
                schedule = self.schedule(device, *key)
                try:
                    validate(schedule)
                except ScheduleError as error:
                    raise BackendError(
                        f"action_ode: the schedule must not run: {error}; use head='library' and report this configuration"
                    ) from error
                expect_residency(schedule, device)
                ready = self._ready[key] = self._place(schedule, device)
            if ready not in self._last:
                self._last.append(ready)
        device_tables.note(ready)
        return ready

    def _place(self, schedule: Schedule, device: torch.device) -> _Ready:
        cut = tuple(schedule.matrices.values())
        weights = self._weights.get(cut)
        if weights is None:
            weights = self._weights[cut] = as_bytes(pack_matrices(self.folded, schedule.matrices))
        tensors = {name: torch.from_numpy(getattr(schedule, name)).to(device) for name in ("tiles", "first_tile")}
        tensors["weights"] = weights
        tensors["constants"] = pack_constants(self.folded, schedule)
        # what launches leave to each other: the kernel keeps it as the next one needs it, also where one fails
        tensors["words"] = torch.full((SETS, schedule.set_words), EMPTY, dtype=torch.int32, device=device)
        tensors["private_memory"] = torch.zeros(schedule.private_floats, dtype=torch.float32, device=device)
        tensors["progress"] = torch.zeros(2, dtype=torch.int32, device=device)
        tensors["status"] = torch.zeros(4, dtype=torch.int32, device=device)
        return _Ready(schedule, tensors)

    def launch(self, noise: Tensor, context: Tensor, prefix: Tensor | None, guidance: GuidanceTensors | None) -> Tensor:
        """`ops.action_ode` on a GPU, whose arguments these are. Returns at once; `check` tells how it went."""
        if stand_in.of(noise.device) is not None:
            return self._recorded(noise, context, prefix)
        ready = self.prepare(noise.device, noise.shape[0], context.shape[1], prefix is not None)
        out = torch.empty(noise.shape, dtype=torch.float32, device=noise.device)  # dense, whatever the noise is
        given = {"noise": noise.float().contiguous(), "context": context.contiguous(), "out": out}
        if prefix is not None:
            given["prefix"] = prefix.float().contiguous()
        if guidance is not None:
            given["previous"] = guidance.previous.float().contiguous()
            given["guidance"] = guidance.weights.float().contiguous()
        views = {name: native.view(tensor) for name, tensor in (ready.tensors | given).items()}
        most = 0.0 if guidance is None else guidance.max_guidance
        stream = native.stream(noise.device)
        native.compiled().action_ode_cuda(views, numbers(ready.schedule), most, LONGEST_WAIT_NS, stream)
        return out

    def _recorded(self, noise: Tensor, context: Tensor, prefix: Tensor | None) -> Tensor:
        """`launch` of tensors without data: what it does there, for whoever records launches."""
        schedule = self.schedule(noise.device, noise.shape[0], context.shape[1], prefix is not None)
        given, out = noise.float().contiguous(), torch.empty(noise.shape, dtype=torch.float32, device=noise.device)
        weights = torch.empty(schedule.weight_bytes, dtype=torch.uint8, device=noise.device)
        arguments = {"noise": given, "context": context.contiguous(), "weights": weights, "out": out}
        if prefix is not None:
            arguments["prefix"] = prefix.float().contiguous()
        facts = {"schedule": schedule}
        one = Launch("action_ode.cu", (schedule.blocks,), arguments, facts, {"num_warps": THREADS // 32})
        stand_in.recorded(noise.device, [one])
        return out

    def check(self) -> None:
        """Wait for all launches and read their error flags; a launch that failed left NaN as its actions.

        OutputError: one ended because a wait in it took too long. DeviceError: the GPU is lost to this process.
        """
        with self._lock:
            all_ready = list(self._ready.values())
        for ready in all_ready:
            try:
                status = ready.status.tolist()
            except torch.AcceleratorError as error:
                native.check_device(ready.status.device, error)
                raise
            if status[0]:
                ready.status.zero_()
                raise OutputError(waited(ready.schedule, status))


def waited(schedule: Schedule, status: list[int]) -> str:
    """What a launch's `status` says, [1 + block, tile, `Wanted`, detail], in words."""
    block, tile, wanted, detail = status[0] - 1, status[1], Wanted(status[2]), status[3]
    what = {
        Wanted.WORDS: f"{word_text(schedule, detail)} from another team",
        Wanted.SUMS: "sums from the other blocks of its team",
        Wanted.ROOM: "room for its sums in the other blocks of its team",
        Wanted.WEIGHTS: f"weights (slot {detail})",
        Wanted.WEIGHTS_ROOM: f"room for weights (slot {detail})",
    }[wanted]
    team, rank = divmod(block, schedule.ranks)
    where = "" if tile == NONE else f" in tile {tile} ({tile_text(schedule, tile)})"
    return (
        f"action_ode: block {block} (team {team}, rank {rank}) waited more than {wanted.seconds:g} s{where} for {what}. "
        "Another program may hold the GPU: stop it (nvidia-smi lists them), or load with head='library'"
    )


def word_text(schedule: Schedule, word: int) -> str:
    """Where a word of a set lies: "row 3, columns 8 and 9 of '0.project'"."""
    for name, buffer in schedule.buffers.items():
        row, column = divmod(2 * (word - buffer.offset), buffer.columns)
        if 0 <= row < buffer.rows:
            return f"row {row}, columns {column} and {column + 1} of {name!r}"
    return f"word {word}"


def tile_text(schedule: Schedule, index: int) -> str:
    """What a tile does: "product that reads 'tokens', rows 64 to 127 of its matrix"."""
    work = schedule.decoded[index].work
    if isinstance(work, Attend):
        sample, head = divmod(work.pair, schedule.shape.heads)
        last_sample, last = divmod(work.pair + work.pairs - 1, schedule.shape.heads)
        if work.pairs == 1:
            return f"attention, head {head} of sample {sample}"
        return f"attention, head {head} of sample {sample} to head {last} of sample {last_sample}"
    (source,) = [name for name, b in schedule.buffers.items() if b.offset <= work.source < b.offset + b.words]
    return f"product that reads {source!r}, rows {work.row} to {work.row + work.rows - 1} of its matrix"


def numbers(schedule: Schedule) -> dict[str, int]:
    """The sizes of a schedule under the launcher's names (`Launch` in kernels/action_ode_tiles.cuh)."""
    shape = schedule.shape
    names = ("rows", "width", "head_dim", "heads", "horizon", "actions", "padded_actions", "steps", "batch")
    own = ("teams", "ranks", "set_words", "private_floats", "padded_tokens", "part", "slots", "staging", "inbox")
    return {
        **{name: getattr(shape, name) for name in names},
        **{name: getattr(schedule, name) for name in own},
        "context_tokens": shape.context,
        "context_columns": 2 * shape.contexts * shape.width,
        "times": schedule.constants["times"][0],
    }


def device_of(device: torch.device) -> Device:
    """What the planner needs to know of a GPU. Under MPS the SMs are those of this process's share."""
    stands = stand_in.of(device)
    if stands is not None:
        return Device(stands.multiprocessors, stands.shared_memory, int(stands.architecture), stands.clusters)
    ask, index = native.compiled().action_ode_facts, device.index or 0
    shared = ask(index, 0)["shared_memory"]
    facts = ask(index, shared)  # of blocks that take all of it: one an SM
    clusters = tuple(min(facts[f"clusters_{n}"], facts["multiprocessors"] // n) for n in RANKS[1:])
    return Device(facts["multiprocessors"], shared, facts["capability"], clusters)


def expect_residency(schedule: Schedule, device: torch.device) -> None:
    """BackendError unless all blocks of the launch can run at the same time, which their waiting for each other needs."""
    shared = schedule.shared_bytes
    facts = native.compiled().action_ode_facts(device.index or 0, shared)
    blocks = facts["blocks_per_multiprocessor"] * facts["multiprocessors"]
    clusters = facts[f"clusters_{schedule.ranks}"] if schedule.ranks > 1 else blocks
    if blocks < schedule.blocks or clusters < schedule.teams:
        of = "" if schedule.ranks == 1 else f" in clusters of {schedule.ranks}"
        raise BackendError(
            f"action_ode: {device}: expected room for {schedule.blocks} blocks at once{of}, got "
            f"{min(blocks, clusters * schedule.ranks)} ({shared} bytes of shared memory each); use head='library'"
        )


def choose_head(
    choice: HeadChoice, folded: FoldedHead, config: HeadConfig, steps: int, fp8: bool = False
) -> OneLaunchHead | None:
    """What the engine's option `head` asks for; None is the engine's own loop over library calls, and nothing else ever.

    With "auto" each plan's verdict decides, where the kernel could run at all; its weights are then the loop's, as what was
    measured must not change the result. fp8: with "one_launch", the blocks' weights in e4m3.
    ConfigError: no such choice, or a head without tiles. BackendError: "one_launch" where the kernel cannot run.
    """
    if choice not in CHOICES:
        raise ConfigError(f"engine head: expected one of {', '.join(CHOICES)}, got {shown(choice)}")
    if choice == "library":
        return None
    head = OneLaunchHead(folded, config, steps, fp8=fp8 and choice == "one_launch")
    if choice == "auto":
        head.backend = None
        weight = folded.decode_out.weight
        # float32, the default of a head, asks for exactness that the kernel does not have: nothing to warn of
        return head if head.unsuitable(weight.device, weight.dtype) is None else None
    reason = head.refuse_any()
    if reason is not None:
        raise BackendError(f"engine head: 'one_launch' refused: {reason}")
    return head


def example(device: torch.device) -> tuple[OneLaunchHead, Tensor, Tensor, Tensor | None, None]:
    """Small arguments of the usual kind, for `ops.explain`."""
    config = HeadConfig(num_layers=2, num_heads=1, hidden_size=64, output_dim=64, action_dim=8, context_dim=64)
    with torch.random.fork_rng(devices=[]):
        folded = fold_head(ActionHead(config).to(device, torch.bfloat16), 1)
    noise = torch.zeros(1, config.action_horizon, config.action_dim, device=device)
    context = torch.zeros(1, 16, 2 * config.width, device=device, dtype=torch.bfloat16)
    prefix = torch.zeros(1, config.width, device=device, dtype=torch.bfloat16)
    return OneLaunchHead(folded, config, 1), noise, context, prefix, None


set_example("action_ode", example)
