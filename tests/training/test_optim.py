"""What moves and how fast: the published schedule and groups, freezing, averages, adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit4dit.checkpoints.weights import random_model
from dit4dit.config import ModelConfig
from dit4dit.errors import ConfigError
from dit4dit.presets import preset
from dit4dit.training import optim
from dit4dit.training.config import LearningRates, LoraConfig, OptimConfig
from dit4dit.training.moves import blank_moments
from dit4dit.training.recipes import recipe

TINY = preset("tiny").model
EXTRACTOR = "backbone_interface.extractor."


def model_of(config: ModelConfig = TINY):
    return random_model(config, 0, with_text=False)


def test_schedule_is_transformers_own() -> None:
    from transformers import get_scheduler

    config, steps = OptimConfig(warmup_steps=7), 40
    parameters = {
        f"{EXTRACTOR}transformer.a": torch.nn.Parameter(torch.zeros(2)),
        "action_model.b": torch.nn.Parameter(torch.zeros(2)),
    }
    ours = optim.make_optimizer(parameters, config)
    groups = [{"params": group["params"], "lr": group["lr"]} for group in ours.param_groups]
    theirs = torch.optim.AdamW(groups, lr=config.learning_rate.base)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        theirs,
        num_warmup_steps=7,
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr": config.min_lr},
    )
    for step in range(steps + 1):
        rates = optim.set_rates(ours, optim.schedule(step, steps, config))
        assert list(rates.values()) == pytest.approx(scheduler.get_last_lr(), rel=1e-9), step
        theirs.step()
        scheduler.step()
    assert rates == pytest.approx({"backbone_interface": 5e-7, "action_model": 5e-6})


def test_a_fused_step_finds_its_state_on_the_parameters_device() -> None:
    """No GPU is needed to see it: what a kernel would read lies where the parameter does."""
    assert optim.make_optimizer({"a": torch.nn.Parameter(torch.zeros(2))}, OptimConfig()).defaults["fused"]
    state = blank_moments(torch.empty(2, device="meta"))
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_published_optimizer() -> None:
    optimizer = optim.make_optimizer(optim.trainable(model_of()), recipe("libero").optim)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("backbone_interface", 1e-5),
        ("action_model", 1e-4),
    ]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 1e-8)
    assert recipe("libero").optim.warmup_steps == 5000
    assert optim.schedule(5000, 80_000, recipe("libero").optim) == 1.0


def test_a_name_of_neither_group_is_base() -> None:
    parameters = {"something.else": torch.nn.Parameter(torch.zeros(1))}
    (group,) = optim.make_optimizer(parameters, OptimConfig(learning_rate=LearningRates(base=0.5))).param_groups
    assert (group["name"], group["lr"]) == ("base", 0.5)


@pytest.mark.parametrize(
    "pattern, prefix",
    [
        (f"{EXTRACTOR}transformer", f"{EXTRACTOR}transformer."),
        ("action_model", "action_model."),
        (f"{EXTRACTOR}transformer.transformer_blocks.0.*", f"{EXTRACTOR}transformer.transformer_blocks.0."),
        ("action_model.action_decoder.layer2.weight", "action_model.action_decoder.layer2.weight"),
    ],
)
def test_freezing_by_pattern(pattern: str, prefix: str) -> None:
    model = model_of()
    optim.freeze(model, [pattern, f"{EXTRACTOR}text_encoder", f"{EXTRACTOR}vae"])
    names = optim.named_parameters(model)
    assert {n for n, p in names.items() if not p.requires_grad} == {n for n in names if n.startswith(prefix)}
    assert set(optim.trainable(model)) == {n for n in names if not n.startswith(prefix)}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"matches no parameter; did you mean 'action_model\.action_decoder'"):
        optim.freeze(model_of(), ["action_model.action_decode"])
    model = model_of()
    optim.freeze(model, ["action_model", f"{EXTRACTOR}transformer"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        optim.trainable(model)


@pytest.mark.parametrize("reaches", [False, True])
def test_action_mode_trains_what_its_loss_reaches(reaches: bool) -> None:
    flow = replace(TINY.flow, training="action", action_grad_to_backbone=reaches)
    model = model_of(replace(TINY, flow=flow))
    assert optim.freeze_unreached(model)
    trained = {n for n in optim.trainable(model) if not n.startswith("action_model.")}
    assert bool(trained) == reaches
    assert not [n for n in trained if "proj_out" in n or "norm_out" in n or "transformer_blocks.4." in n]


def test_average_follows_the_weights() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = optim.Average({"a": parameter}, 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(2):
        average.update({"a": parameter})
    assert torch.allclose(average.values["a"], torch.full((3,), 1 - 0.9**2))


def test_lora_trains_adapters_and_merges_to_the_same_function() -> None:
    model = model_of()
    plain = model_of()
    optim.add_lora(model, LoraConfig(rank=2, alpha=4.0), seed=1)
    trained = optim.trainable(model)
    assert all(".lora_" in name for name in trained)
    assert any(n.startswith("action_model.") for n in trained)
    assert any(n.startswith(EXTRACTOR) for n in trained)
    with torch.no_grad():
        for n, p in trained.items():
            if ".lora_B." in n:
                p.normal_(generator=torch.Generator().manual_seed(len(n)))
    values = {name: p.detach() for name, p in optim.named_parameters(model).items()}
    merged = optim.merged_weights(model, values)
    assert set(merged) == set(optim.named_parameters(plain))
    for name, p in optim.named_parameters(plain).items():
        p.data.copy_(merged[name])
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 8, 8, generator=generator), torch.randn(2, 5, 64, generator=generator)
    state, t = torch.randn(2, 1, 16, generator=generator), torch.tensor([3, 700])
    with torch.no_grad():
        got, want = (m.head.velocity(x, t, context, state) for m in (plain, model))
        before = model_of().head.velocity(x, t, context, state)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-2)


def test_lora_follows_its_seed_and_nothing_else_trains() -> None:
    """Also where the targets are in one part alone, and whatever the global generator has drawn."""
    found = []
    for seed in (1, 1, 2):
        model, before = model_of(), torch.get_rng_state()
        optim.add_lora(model, LoraConfig(rank=2, targets=("action_decoder.layer2",)), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(optim.trainable(model))
        torch.rand(1)
    name = "action_model.action_decoder.layer2.lora_{}.default.weight"
    assert [set(trained) for trained in found] == [{name.format(side) for side in "AB"}] * 3
    first, again, other = (trained[name.format("A")] for trained in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lora_target_that_ends_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'to_qq' ends no linear layer"):
        optim.add_lora(model_of(), LoraConfig(rank=2, targets=("to_q", "to_qq")), seed=0)
