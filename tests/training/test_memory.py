"""The memory plan against what a real step holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dit4dit.presets import preset
from dit4dit.training import loop, memory, setup
from dit4dit.training.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from dit4dit.training.parallel import Processes, Root
from dit4dit.training.random_data import RandomData
from dit4dit.training.randomness import Keys

SIZE = (32, 64)


def config_of(**run: object) -> TrainConfig:
    options = {"precision": "float32", "device": "cpu", "gradient_checkpointing": False, **run}
    model = preset("tiny").model
    return TrainConfig(model=model, embodiment="libero", data=DataConfig(batch_size=3), run=RunConfig(**options))


def real_step(config: TrainConfig) -> tuple[Root, partial]:
    keys = Keys()
    model = setup.load(config, torch.device("cpu")).model
    loop.prepare(model, config, keys)
    root = Root(model, config.run.precision).train()
    batch, drawn = memory.blank_step(config, SIZE)
    keys.rows = torch.zeros(len(drawn.action_time), dtype=torch.int64)
    return root, partial(loop.loss_step, batch=batch, drawn=drawn)


def bytes_seen(root: Root, step: partial) -> int:
    """Bytes of distinct storages that saved-tensor hooks are given in a real step, parameters left out."""
    own = {p.data_ptr() for p in root.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        root(step)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["joint", "action", "video"])
def test_activations_are_what_the_hooks_see(mode: str, precision: str) -> None:
    config = config_of(precision=precision).override({"model.flow.training": mode})
    planned = memory.plan(config, SIZE, 1).activations
    assert planned == pytest.approx(bytes_seen(*real_step(config)), rel=0.15)
    assert planned > 100_000


def test_checkpointing_keeps_inputs_and_one_block() -> None:
    whole, less = (memory.plan(config_of(gradient_checkpointing=on), SIZE, 1) for on in (False, True))
    assert less.activations < 0.5 * whole.activations
    root, step = real_step(config_of(gradient_checkpointing=True))
    real = memory.activation_bytes(root, lambda: torch.stack(list(root(step).values())).sum())
    assert less.activations == pytest.approx(real, rel=0.15)
    # the whole of what the hooks see outside the blocks is part of it
    assert less.activations > bytes_seen(root, step)


@pytest.mark.parametrize(
    "changes", [{}, {"optim.freeze": "backbone_interface.extractor.transformer"}, {"optim.lora.rank": "2"}]
)
def test_the_rest_is_exact(changes: dict[str, str]) -> None:
    config = config_of().override({"optim.ema": "0.9", "optim.warmup_steps": "0", **changes})
    plan = memory.plan(config, SIZE, 1)
    processes = Processes(config)
    start = setup.load(config, processes.device)
    trainer = loop.Trainer(start, RandomData(config.model, "libero"), processes, None, None)
    for parameter in trainer.moves.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.moves.optimizer.step()

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = list(trainer.moves.parameters.values())
    assert plan.trained == size(trained)
    assert plan.gradients == size(p.grad for p in trained)
    assert plan.optimizer == size(t for state in trainer.moves.optimizer.state.values() for t in state.values())
    assert plan.average == size(trainer.moves.average.values.values())
    assert plan.frozen == size(start.model.parameters()) - size(trained)
    assert plan.total == sum(vars(plan).values())


def test_sharding_halves_what_is_sharded() -> None:
    config = config_of()
    whole, half = (
        memory.plan(config, SIZE, 2),
        memory.plan(replace(config, run=replace(config.run, strategy="fsdp2")), SIZE, 2),
    )
    assert half.trained == pytest.approx(whole.trained / 2, rel=0.01)
    assert half.optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)
    assert half.activations == whole.activations
    assert OptimConfig().ema is None
    assert half.average == 0
