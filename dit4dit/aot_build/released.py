"""Which kernels one chunk of the released models launches: the engine's own plan, run and listed on tensors without data."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.fp8 import Fp8Matrix
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.ops import launch
from dit4dit.ops.aot.launch_record import Launch, Launches
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.linear_fp8 import LEAST_CAPABILITY
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS

Call = tuple[Launches, tuple[Any, ...]]
"""`launches` of an op, and its arguments on the meta device."""
CAPABILITIES = (80, 89, 90, 100, 120)
"""Compute capabilities, without their dot, that kernels are compiled ahead of time for."""
MODELS = ("robocasa_gr1", "libero", "unitree_g1")
BATCHES = (1, 2, 3, 4, 5, 8, 15, 16)
"""Those between launch the same kernels: what is compiled in is only which sizes are 1 or multiples of 16, and the tile."""


@dataclass(frozen=True)
class Variant:
    """A released model as a GPU runs it: backbone in bfloat16, its matrices perhaps in fp8, the head in float32 or bfloat16."""

    model: str
    head_dtype: torch.dtype = torch.float32
    fp8: bool = False

    def engine(self) -> Engine:
        """The engine on the meta device."""
        config = preset(self.model).model
        with torch.device("meta"):
            model = DiT4DiT(config, with_text=False).bfloat16().eval()
            model.backbone.scale.to("meta")
            assert model.head is not None
            model.head.to(self.head_dtype)
            engine = Engine(model)
            if self.fp8:
                narrow = [b.with_matrices(lambda _, matrix: Fp8Matrix.quantized(matrix, 1.0)) for b in engine.blocks]
                engine.blocks = tuple(narrow)
        return engine


VARIANTS = tuple(
    Variant(model, head_dtype, fp8)
    for model, head_dtype, fp8 in product(MODELS, (torch.float32, torch.bfloat16), (False, True))
)


class _ChannelsLast(TorchDispatchMode):
    """Convolutions leave their result channels last, as cuDNN does where the weights are; without data torch forgets it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and isinstance(out, Tensor) and out.dim() == 4:
            return out.contiguous(memory_format=torch.channels_last)
        return out


def record(variant: Variant, batches: tuple[int, ...] = BATCHES) -> list[Call]:
    """Every call of a Triton kernel in one chunk, noise and units included, for each batch in turn, each kind once.

    Pictures come at the model's own size: their kernel is CUDA C++ and takes any.
    """
    engine = variant.engine()
    config, robot = engine.config, EMBODIMENTS[preset(variant.model).embodiment]
    size = (config.image_size[0], config.image_size[1])
    table = torch.zeros(5, robot.action_dim, dtype=torch.float64)
    # with a state there is a token more
    states = (False,) if config.head.state_dim is None else (False, True)
    found: dict[Hashable, Call] = {}
    for batch, state in product(batches, states):
        shape = RequestShape(batch, (size,) * len(robot.views), None, robot.resize, state, config.text.max_length)
        with launch.recording() as calls, torch.no_grad(), _ChannelsLast():
            Plan(engine, shape, table).compute()
        for call in calls:
            found.setdefault((call[0], tuple(map(_facts, call[1]))), call)
    return list(found.values())


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
