"""How much memory a run will take, before it takes any: the step is run once on fake tensors, which have sizes but no bytes.

Parameters, gradients and optimiser are sums over the real shapes. Activations are what autograd keeps for the backward pass,
seen by saved-tensor hooks on the fake step; with gradient checkpointing, the inputs of each block and the largest block's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.tables import table
from dit4dit.training import optim, zero
from dit4dit.training.config import TrainConfig
from dit4dit.training.loop import loss_step, prepare
from dit4dit.training.parallel import Root
from dit4dit.training.randomness import Keys
from dit4dit.types import Batch, ClipLatents


@dataclass(frozen=True)
class Plan:
    """Bytes on each process, at its largest; `total` leaves out what libraries and the allocator take."""

    trained: int
    frozen: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class Saved:
    """Bytes of distinct storages that autograd keeps, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self._known = {p.untyped_storage()._cdata for p in module.parameters()}
        self._kept: list[Tensor] = []
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor once; the hook's pack function."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(tensor)  # a storage that is gone could give its address to another
            self.bytes += storage.nbytes()
        return tensor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield


def activation_bytes(root: Root, step: Callable[[], Tensor]) -> int:
    """Bytes kept between `step`, which returns a loss, and its backward pass, at the largest moment of that pass."""
    model = root.model
    blocks: list[nn.Module] = [*model.backbone.transformer.blocks, *(model.head.model.blocks if model.head else [])]
    checkpointed = model.backbone.transformer.gradient_checkpointing
    saved, within = Saved(model), [0]
    if not checkpointed:
        with saved.counting():
            step()
        return saved.bytes

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        # a checkpointed block keeps its inputs by itself, where no hook sees them
        for tensor in inputs:
            if isinstance(tensor, Tensor) and torch.is_grad_enabled():
                saved.keep(tensor)

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    largest: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    handles += [block.register_forward_hook(partial(_remember, largest)) for block in blocks]
    with saved.counting():
        step()
    for handle in handles:
        handle.remove()
    for block, inputs in largest.values():
        inner = Saved(model)
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                inner._known.add(tensor.untyped_storage()._cdata)
        with inner.counting(), root.precision():
            block(*inputs)
        within.append(inner.bytes)
    return saved.bytes + max(within)


def _remember(
    largest: dict[str, tuple[nn.Module, tuple[Any, ...]]], block: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> None:
    """One block of each kind, with its inputs, is enough: all of a kind are alike."""
    if torch.is_grad_enabled():
        largest[f"{type(block).__module__} {getattr(block, 'cross', '')}"] = (block, inputs)


def plan(config: TrainConfig, picture_size: tuple[int, int], processes: int) -> Plan:
    """The plan of a run on `processes` processes.

    Args:
        config: with the sizes that the weights have.
        picture_size: height and width of the joined views.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    keys = Keys()
    # built and changed without data first: adapters cannot be put on fake layers
    with torch.device("meta"):
        model = DiT4DiT(
            config.model, with_text=False, with_video_vae=True, with_head=config.model.flow.training != "video"
        )
        prepare(model, replace(config, run=replace(config.run, compile=False)), keys)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model.to_empty(device="cpu")
        root = Root(model, config.run.precision).train()
        parameters = optim.trainable(model)
        batch, drawn = blank_step(config, picture_size)
        keys.rows = torch.zeros(len(drawn.action_time), dtype=torch.int64)

        def step() -> Tensor:
            return torch.stack(list(root(partial(loss_step, batch=batch, drawn=drawn)).values())).sum()

        activations = activation_bytes(root, step)
    split = processes if config.run.strategy == "fsdp2" else 1
    trained = {n: p for n, p in optim.named_parameters(model).items() if n in parameters}
    fixed = {n: p for n, p in optim.named_parameters(model).items() if n not in parameters}
    moving = tensor_bytes(trained, split)
    assert model.video_vae is not None
    whole = [*model.backbone.frame_encoder.parameters(), *model.video_vae.parameters()]
    average = 0 if config.optim.ema is None else moving
    if config.run.strategy in ("zero2", "zero3"):
        parts = zero.planned(config.run.strategy, trained, [*fixed.values(), *dict.fromkeys(whole)], processes)
        return Plan(**parts, average=average, activations=activations)
    vae = sum(p.numel() * p.element_size() for p in whole)
    return Plan(
        trained=moving,
        frozen=tensor_bytes(fixed, split) + vae,
        gradients=moving,
        # two moments, and a step counter of four bytes for each parameter
        optimizer=2 * moving + 4 * len(trained),
        average=average,
        activations=activations,
    )


def tensor_bytes(tensors: Mapping[str, Tensor], split: int) -> int:
    """Bytes on the first of `split` ranks, which holds the largest piece: sharding cuts the first dimension."""
    total = 0
    for tensor in tensors.values():
        rows = tensor.shape[0] if tensor.dim() else 1
        count = math.ceil(rows / split) * (tensor.numel() // rows)
        total += count * tensor.element_size()
    return total


def blank_step(config: TrainConfig, picture_size: tuple[int, int]) -> tuple[Batch, Draws]:
    """Inputs of a micro step, zeros of the right shapes."""
    model, count = config.model, config.data.batch_size
    head, (rows, columns) = model.head, model.latent_size(*picture_size)
    z, frames, repeated = model.vae.z_dim, model.latent_frames, count * model.flow.repeated_diffusion_steps
    latents = None
    if config.data.cache_latents:
        still = torch.zeros(count, z, rows, columns)
        latents = ClipLatents(still, still.clone(), torch.zeros(count, z, frames, rows, columns))
    batch = Batch(
        video=None if latents else torch.zeros(count, model.frames, 3, *picture_size),
        prompt_embeds=torch.zeros(count, model.text.max_length, model.dit.text_in),
        actions=torch.zeros(count, head.action_horizon, head.action_dim),
        action_mask=torch.ones(count, head.action_horizon, head.action_dim, dtype=torch.bool),
        state=None if head.state_dim is None else torch.zeros(count, 1, head.state_dim),
        latents=latents,
    )
    drawn = Draws(
        posterior=torch.zeros(count, z, 1, rows, columns),
        latent=torch.zeros(count, z, frames, rows, columns),
        video_time=torch.zeros(count),
        video_noise=torch.zeros(count, z, frames - 1, rows, columns),
        action_time=torch.zeros(repeated),
        action_noise=torch.zeros(repeated, head.action_horizon, head.action_dim),
    )
    return batch, drawn


def show(made: Plan, config: TrainConfig, processes: int) -> str:
    """The plan as a table."""
    rows = [
        [name, f"{value / 2**30:,.3f}", f"{value:,}"] for name, value in (*vars(made).items(), ("total", made.total))
    ]
    head = f"{config.run.strategy} on {processes} process(es), {config.data.batch_size} samples each, {config.run.precision}"
    return head + "\n" + table(["memory of each process", "GiB", "bytes"], rows, right=(1, 2))
