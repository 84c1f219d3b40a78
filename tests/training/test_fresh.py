"""Fresh weights: what goes in decides what comes out, from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit4dit.checkpoints.weights import random_model
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.presets import preset
from dit4dit.training import setup
from dit4dit.training.fresh import rescale
from dit4dit.training.recipes import recipe

CONFIG = preset("tabletop").model


def model(*, rescaled: bool) -> DiT4DiT:
    made = random_model(CONFIG, seed=3, with_text=False)
    if rescaled:
        rescale(made)
    return made


@torch.no_grad()
def variation(made: DiT4DiT) -> float:
    """How much of the head's output depends on picture and words: variance over a batch, of the whole mean square."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, columns = CONFIG.latent_size(*CONFIG.image_size)
    count, head = 16, CONFIG.head
    condition = normal(count, CONFIG.vae.z_dim, 1, rows, columns)
    latent = normal(1, CONFIG.vae.z_dim, CONFIG.latent_frames, rows, columns).expand(count, -1, -1, -1, -1)
    context = made.context(normal(count, 16, CONFIG.text.embed_width))
    features = made.backbone.features(condition, latent, context)
    noise = normal(1, head.action_horizon, head.action_dim).expand(count, -1, -1)
    state = normal(1, 1, head.state_dim).expand(count, -1, -1)
    out = made.head.velocity(noise, torch.full((count,), 500), features, state)
    return float(out.var(dim=0).mean() / out.square().mean())


def test_picture_and_words_decide_from_the_start() -> None:
    assert variation(model(rescaled=False)) < 0.05
    assert variation(model(rescaled=True)) > 0.2


def test_layers_keep_the_size_of_a_signal() -> None:
    usual, made = model(rescaled=False), model(rescaled=True)
    assert made.head is not None
    layer, before = made.head.model.blocks[0].ff.linears[0], usual.head.model.blocks[0].ff.linears[0]
    assert torch.allclose(layer.weight, 3**0.5 * before.weight)
    assert abs(layer.weight.var() * layer.in_features - 1) < 0.1
    biases = [m.bias for m in made.head.modules() if isinstance(m, nn.Linear)]
    assert biases
    assert all(not bias.any() for bias in biases)
    norm = made.backbone.transformer.blocks[0].norm1
    for time in (0.0, 1.0):
        shift, scale, gate = norm.modulation(*made.backbone.transformer.embed_times(torch.full((1, 1), time)))
        assert shift.abs().max() < 1e-5
        assert scale.abs().max() < 1e-5
        assert (gate - 1).abs().max() < 0.15, "open, as `open_gates` leaves them"


def test_a_run_from_nothing_starts_with_them() -> None:
    """Rescaled where the action loss trains the backbone too, the usual weights elsewhere."""
    for trains_backbone in (True, False):
        config = recipe("tabletop").override({"model.flow.action_grad_to_backbone": str(trains_backbone).lower()})
        start = setup.load(config, torch.device("cpu")).model
        usual = random_model(config.model, config.run.seed, with_text=False)
        assert start.head is not None
        assert usual.head is not None
        ratio = start.head.action_decoder.layer2.weight / usual.head.action_decoder.layer2.weight
        assert torch.allclose(ratio, torch.full_like(ratio, 3**0.5 if trains_backbone else 1.0))
        gate = start.backbone.transformer.blocks[0].norm1.linear_2.weight
        assert not gate.any(), "open either way"


def test_the_frozen_vae_is_not_touched() -> None:
    usual, made = (dict(model(rescaled=flag).backbone.frame_encoder.named_parameters()) for flag in (False, True))
    assert all(torch.equal(usual[name], made[name]) for name in usual)
