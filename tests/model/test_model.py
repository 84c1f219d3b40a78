"""The model as a whole: modes, where gradients go, what is frozen, and its random draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stateless import without_state

from dit4dit.checkpoints.weights import random_model
from dit4dit.config import ModelConfig
from dit4dit.errors import ConfigError
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.presets import PRESETS, preset
from dit4dit.types import Batch

TINY = preset("tiny").model


def with_flow(**changes) -> ModelConfig:
    return replace(TINY, flow=replace(TINY.flow, **changes))


def step(config: ModelConfig, seed: int = 0) -> tuple[DiT4DiT, Batch, Draws]:
    model = random_model(config, seed, with_text=False)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, config.head.action_horizon, config.head.action_dim)
    batch = Batch(
        video=torch.rand(2, config.frames, 3, 32, 48, generator=generator) * 2 - 1,
        prompt_embeds=torch.randn(2, 9, config.dit.text_in, generator=generator),
        actions=torch.randn(shape, generator=generator),
        action_mask=torch.ones(shape, dtype=torch.bool),
        state=None if config.head.state_dim is None else torch.randn(2, 1, config.head.state_dim, generator=generator),
    )
    return model, batch, Draws.random(config, batch, generator)


def grads(module: torch.nn.Module) -> int:
    return sum(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_joint_loss_is_the_weighted_sum() -> None:
    model, batch, draws = step(with_flow(future_video_weight=0.25))
    losses = model.loss(batch, draws)
    assert losses.action is not None
    assert losses.video is not None
    assert torch.allclose(losses.total, losses.action + 0.25 * losses.video)
    losses.total.backward()
    assert grads(model.head)
    assert grads(model.backbone.transformer)
    assert not grads(model.backbone.frame_encoder)
    assert not grads(model.video_vae)


def test_action_mode_never_reaches_the_backbone_unless_asked() -> None:
    model, batch, draws = step(with_flow(training="action"))
    losses = model.loss(batch, draws)
    assert losses.video is None
    losses.total.backward()
    assert grads(model.head)
    assert not grads(model.backbone.transformer)

    open_model, batch, draws = step(with_flow(training="action", action_grad_to_backbone=True))
    open_losses = open_model.loss(batch, draws)
    assert torch.allclose(open_losses.total, losses.total)
    open_losses.total.backward()
    blocks = open_model.backbone.transformer.transformer_blocks
    reached = [bool(grads(block)) for block in blocks]
    assert reached == [i <= TINY.extract_layer for i in range(len(blocks))]
    assert open_model.backbone.transformer.crossattn_proj[0].weight.grad is not None


def test_video_mode_trains_no_head() -> None:
    model, batch, draws = step(with_flow(training="video"))
    model.head = None
    losses = model.loss(batch, draws)
    assert losses.action is None
    losses.total.backward()
    assert grads(model.backbone.transformer)


def test_video_loss_without_its_vae_is_a_clear_error() -> None:
    model, batch, draws = step(TINY)
    model.video_vae = None
    with pytest.raises(RuntimeError, match="with_video_vae=True"):
        model.loss(batch, draws)


def test_no_state_token() -> None:
    config = without_state(TINY)
    model, batch, draws = step(config)
    assert config.head.tokens == config.head.action_horizon
    assert model.head.state_encoder is None
    assert model.loss(batch, draws).total.isfinite()


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = random_model(TINY, 0).train()
    assert model.head.training
    for part in (model.text, model.backbone.frame_encoder, model.video_vae):
        assert not any(module.training for module in part.modules())
        assert not any(p.requires_grad for p in part.parameters())


def test_future_frames_do_not_reach_the_features() -> None:
    """Only frame 0 of the clip conditions; the others matter to the video loss alone."""
    model, batch, draws = step(TINY)
    other = replace(batch, video=torch.cat([batch.video[:, :1], -batch.video[:, 1:]], dim=1))
    a, b = model.loss(batch, draws), model.loss(other, draws)
    assert torch.equal(a.action, b.action)
    assert not torch.equal(a.video, b.video)


def test_sampling_is_a_function_of_its_noise_and_each_sample_its_own() -> None:
    model, batch, _ = step(TINY)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(2, 16, n, 4, 6, generator=g) for n in (1, TINY.latent_frames)]
    action = torch.randn(2, 8, 8, generator=g)
    context = model.context(batch.prompt_embeds)
    full = model.sample(batch.video[:, 0], context, batch.state, *noise, action)
    again = model.sample(batch.video[:, 0], context, batch.state, *noise, action)
    assert torch.equal(full, again)
    one = model.sample(batch.video[1:, 0], context[1:], batch.state[1:], noise[0][1:], noise[1][1:], action[1:])
    assert torch.allclose(one[0], full[1], atol=1e-5)
    for i in range(3):
        changed = [*noise, action]
        changed[i] = -changed[i]
        assert not torch.allclose(model.sample(batch.video[:, 0], context, batch.state, *changed), full, atol=1e-4)


def test_head_in_bfloat16_runs() -> None:
    model = random_model(TINY, 0, dtype=torch.bfloat16, head_dtype=torch.bfloat16, with_text=False)
    out = model.sample(
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 4, TINY.dit.text_dim, dtype=torch.bfloat16),
        torch.zeros(1, 1, 16),
        torch.randn(1, 16, 1, 4, 4),
        torch.randn(1, 16, 2, 4, 4),
        torch.randn(1, 8, 8),
    )
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_random_model_is_a_function_of_its_seed() -> None:
    a, b, c = (random_model(TINY, seed, with_text=False).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    "name, views, tokens, frames, horizon, width, state",
    [
        ("libero", 2, 784, 2, 8, 8, 16),
        ("robocasa_gr1", 1, 588, 3, 16, 32, 64),
        ("unitree_g1", 1, 392, 2, 50, 36, 64),
        ("mid", 1, 588, 3, 16, 32, 64),
    ],
)
def test_released_shapes(name, views, tokens, frames, horizon, width, state) -> None:
    model = preset(name).model
    assert model.tokens(views) == tokens
    assert model.latent_frames == frames
    assert (model.head.action_horizon, model.head.action_dim, model.head.state_dim) == (horizon, width, state)
    assert model.sigma == pytest.approx(0.99502487, abs=1e-8)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_build(name: str) -> None:
    config = preset(name).model
    with torch.device("meta"):
        model = DiT4DiT(config, with_video_vae=True)
    assert len(model.backbone.transformer.blocks) == config.dit.num_layers
    assert model.head.action_decoder.layer2.weight.shape == (config.head.action_dim, config.head.hidden_size)
    if name in ("libero", "robocasa_gr1"):
        assert sum(p.numel() for p in model.text.parameters()) == pytest.approx(7.07e9, rel=0.01)


def test_the_video_loss_may_see_every_nth_sample() -> None:
    """The others change nothing, in pictures and in latents; the action loss still sees all."""
    model, batch, draws = step(with_flow(video_every=2))
    whole = random_model(TINY, 0, with_text=False)
    some, all_ = model.loss(batch, draws), whole.loss(batch, draws)
    assert torch.equal(some.action, all_.action)
    assert not torch.isclose(some.video, all_.video)
    spoilt = replace(batch, video=torch.cat([batch.video[:1], -batch.video[1:]]))
    condition = model.backbone.condition(batch.video[:, 0], draws.posterior)
    context = model.context(batch.prompt_embeds)
    assert torch.equal(some.video, model._video_loss(spoilt, draws, condition, context))
    with pytest.raises(ConfigError, match=r"flow.video_every: expected at least 1, got 0"):
        with_flow(video_every=0)
