"""The op calls of a plan, without running it: the engine and the plan of a configuration on tensors without data."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit4dit import ops
from dit4dit.config import ModelConfig
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.encoder import fold_encoder
from dit4dit.engine.engine import Engine
from dit4dit.engine.fp8 import Fp8Matrix
from dit4dit.engine.plan import Plan, RequestShape
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.ops import stand_in
from dit4dit.ops.verdicts import call_text


class _ChannelsLast(TorchDispatchMode):
    """Convolutions leave their result channels last, as libraries do where the weights are; without data torch forgets it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and isinstance(out, Tensor) and out.dim() == 4:
            return out.contiguous(memory_format=torch.channels_last)
        return out


def engine_without_data(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dtype: torch.dtype | None = None,
    fp8: bool = False,
    steps: int | None = None,
    gpu: bool = True,
) -> Engine:
    """The engine of a model on the meta device.

    dtype: of VAE and backbone. head_dtype: of the head; `dtype` when None. fp8: the backbone's matrices in e4m3.
    steps: as of `Engine`. gpu: whether its plans make the calls of a GPU, which draws the noise and works on it beside the
        VAE, or a CPU's.
    """
    head_dtype = dtype if head_dtype is None else head_dtype
    with torch.device("meta"):
        model = DiT4DiT(config, with_text=False).to(dtype).eval()
        model.backbone.scale.to("meta")
        assert model.head is not None
        model.head.to(head_dtype)
        engine = Engine(model, steps=steps)
        engine.encoder = fold_encoder(model.backbone, apart=gpu)
        engine.branches = gpu
        if fp8:
            narrow = [b.with_matrices(lambda _, matrix: Fp8Matrix.quantized(matrix, 1.0)) for b in engine.blocks]
            engine.blocks = tuple(narrow)
    if head_dtype == torch.bfloat16:  # as with head="auto" on a GPU: a call of its own, and those of its loop
        engine.one_launch = OneLaunchHead(engine.head, config.head, engine.steps)
        engine.one_launch.backend = None
    return engine


def calls(engine: Engine, shape: RequestShape, action_dim: int | None) -> list[ops.Call]:
    """Every op call of one step, on a GPU its noise included, in order: (op, arguments on the meta device).

    engine: from `engine_without_data`. action_dim: of the robot; None where only normalised actions are wanted.
    """
    table = None if action_dim is None else torch.zeros(5, action_dim, dtype=torch.float64)
    # tensors without data are a GPU's, where a kernel of ours takes the place of two ops that a CPU calls
    wish = contextlib.nullcontext() if engine.branches else ops.use_backend(patch_tokens="parts")
    with stand_in.without_data(), torch.no_grad(), _ChannelsLast(), wish, ops.listing() as found:
        Plan(engine, shape, table).compute()
    return found


def distinct(found: list[ops.Call]) -> dict[str, tuple[ops.Call, int]]:
    """ "op: call" as verdicts have it -> the first such call, and how many there are."""
    out: dict[str, tuple[ops.Call, int]] = {}
    for op, args in found:
        key = f"{op}: {call_text(args)}"
        first, count = out.get(key, ((op, args), 0))
        out[key] = first, count + 1
    return out
