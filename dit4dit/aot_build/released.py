"""Which kernels one chunk of the released models launches: the engine's own plan, run and listed on tensors without data."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.engine import Engine, RequestShape
from dit4dit.engine.listing import calls, engine_without_data
from dit4dit.ops import launch, stand_in
from dit4dit.ops.aot.launch_record import Launch, Launches
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.dispatch import find, foreign
from dit4dit.ops.linear_fp8 import LEAST_CAPABILITY
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS
from dit4dit.types import MAX_GUIDANCE

Call = tuple[Launches, tuple[Any, ...]]
"""`launches` of an op, and its arguments on the meta device."""
CAPABILITIES = (80, 89, 90, 100, 120)
"""Compute capabilities, without their dot, that kernels are compiled ahead of time for."""
MODELS = ("robocasa_gr1", "libero", "unitree_g1")
BATCHES = (1, 2, 3, 4, 5, 8, 15, 16)
"""Those between launch the same kernels: what is compiled in is only which sizes are 1 or multiples of 16, and the tile."""
CANDIDATE_BATCHES = (1,)
"""Of implementations that run only where a verdict names them (`measured_only`): a robot's own. With other batches they are
compiled just in time, and where nothing can, what runs without a verdict runs. For all batches a wheel would hold a third
more kernels."""


@dataclass(frozen=True)
class Variant:
    """A released model as a GPU runs it: backbone in bfloat16, its matrices perhaps in fp8, the head in float32 or bfloat16."""

    model: str
    head_dtype: torch.dtype = torch.float32
    fp8: bool = False

    def engine(self) -> Engine:
        """The engine on the meta device."""
        return engine_without_data(preset(self.model).model, head_dtype=self.head_dtype, fp8=self.fp8)


VARIANTS = tuple(
    Variant(model, head_dtype, fp8)
    for model, head_dtype, fp8 in product(MODELS, (torch.float32, torch.bfloat16), (False, True))
)


def record(variant: Variant, batches: tuple[int, ...] = BATCHES) -> list[Call]:
    """Every call of a Triton kernel in one chunk, noise, guidance and units included, for each batch in turn, each kind once;
    of candidates those of `CANDIDATE_BATCHES`.

    Pictures come at the model's own size: their kernel is CUDA C++ and takes any.
    """
    engine = variant.engine()
    kernel = engine.one_launch
    config, robot = engine.config, EMBODIMENTS[preset(variant.model).embodiment]
    size = (config.image_size[0], config.image_size[1])
    # with a state there is a token more; guidance changes one kernel, whatever the tokens
    takes_state = config.head.state_dim is not None
    kinds = [(False, None), *([(True, None)] if takes_state else []), (takes_state, MAX_GUIDANCE)]
    found: dict[Hashable, Call] = {}
    for batch, (state, guidance) in product(batches, kinds):
        views, length = (size,) * len(robot.views), config.text.max_length
        shape = RequestShape(batch, views, None, robot.resize, state, length, guidance)
        # where the head in one launch cannot run, or is not asked for, the state's token has the head's dtype, in any batch
        first = state and batch == batches[0]
        for engine.one_launch in (kernel, None) if kernel is not None and first else (kernel,):
            listed = calls(engine, shape, robot.action_dim)
            for function, args in by_triton(listed, candidates=batch in CANDIDATE_BATCHES):
                found.setdefault((function, tuple(map(_facts, args))), (function, args))
    return list(found.values())


def by_triton(found: Iterable[ops.Call], *, candidates: bool = True) -> Iterator[Call]:
    """Those of the calls, on the meta device, that this package's Triton kernels take on a GPU.

    candidates: also by implementations that run only where a verdict names them.
    """
    for op, args in found:
        for implementation in find(op).implementations.values():
            launches = launch.launches_of(implementation.run)
            if (
                launches is None
                or foreign(implementation) is not None
                or (implementation.measured_only and not candidates)
            ):
                continue
            with stand_in.without_data(), torch.no_grad():
                reason = implementation.refuse(*args)
            if reason is None:
                yield launches, args


def _facts(value: Any) -> Hashable:
    """What tells one argument of an op from another one."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.storage_offset()
    return type(value), value


def launches(calls: Iterable[Call], capability: int) -> list[Launch]:
    """What the calls launch on a capability."""
    steps = [step for function, args in calls for step in function(args, str(capability))[0]]
    return [step for step in steps if capability >= LEAST_CAPABILITY or not step.kernel.startswith("linear_fp8")]


def specializations(calls: Iterable[Call], capability: int) -> dict[str, tuple[Specialization, Launch]]:
    """key -> what to compile for a capability, and one launch of it."""
    found: dict[str, tuple[Specialization, Launch]] = {}
    for step in launches(calls, capability):
        special = Specialization.of(step)
        found.setdefault(special.key, (special, step))
    return found
