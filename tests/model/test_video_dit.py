"""The backbone against diffusers' own module, on fresh random weights and odd sizes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos

from dit4dit.checkpoints.export import transformer_arguments
from dit4dit.config import VideoDitConfig
from dit4dit.model.video_dit import VideoDiT, rotary_table

SMALL = VideoDitConfig(num_layers=3, num_heads=3, head_dim=32, adaln_lora_dim=24, text_in=40, text_dim=56)


@pytest.fixture
def torchvision_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers resizes the padding mask with torchvision, which has no build beside every torch."""
    functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size, mode=interpolation))
    fake = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", fake, raising=False)


def random_weights(module: torch.nn.Module) -> None:
    """Norm weights too, so that a norm in the wrong place shows."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)


def pair(config: VideoDitConfig) -> tuple[VideoDiT, torch.nn.Module]:
    arguments = transformer_arguments(SimpleNamespace(dit=config))  # type: ignore[arg-type]
    theirs = transformer_cosmos.CosmosTransformer3DModel(**arguments).eval()
    random_weights(theirs)
    ours = VideoDiT(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(config: VideoDitConfig, batch: int, frames: int, rows: int, columns: int):
    latents = torch.randn(batch, config.latent_channels, frames, rows, columns)
    times = torch.rand(batch, frames)
    text = torch.randn(batch, 7, config.text_in)
    return latents, times, text


def theirs_forward(theirs: torch.nn.Module, latents, times, text) -> torch.Tensor:
    batch, _, frames, rows, columns = latents.shape
    mask = torch.zeros(batch, 1, frames, rows, columns)
    mask[:, :, 0] = 1
    return theirs(
        latents,
        times[:, None, :, None, None],
        text,
        condition_mask=mask,
        padding_mask=torch.zeros(1, 1, 8 * rows, 8 * columns),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("batch, frames, rows, columns", [(1, 1, 2, 2), (2, 3, 6, 10), (1, 5, 14, 4)])
@pytest.mark.usefixtures("torchvision_resize")
def test_velocity_agrees_with_diffusers(batch: int, frames: int, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    ours, theirs = pair(SMALL)
    latents, times, text = inputs(SMALL, batch, frames, rows, columns)
    with torch.no_grad():
        want = theirs_forward(theirs, latents, times, text)
        got = ours.velocity(latents, times, ours.project_text(text))
    assert got.shape == want.shape
    assert (got - want).abs().max() / want.abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.usefixtures("torchvision_resize")
def test_features_are_the_hidden_states_after_that_block(layer: int) -> None:
    torch.manual_seed(1)
    ours, theirs = pair(SMALL)
    latents, times, text = inputs(SMALL, 2, 2, 4, 6)
    seen = []
    theirs.transformer_blocks[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        theirs_forward(theirs, latents, times, text)
        got = ours.features(latents, times, ours.project_text(text), layer)
    assert (got - seen[0]).abs().max() / seen[0].abs().max() < 1e-5


@pytest.mark.usefixtures("torchvision_resize")
def test_gradients_agree_with_diffusers() -> None:
    torch.manual_seed(2)
    ours, theirs = pair(SMALL)
    latents, times, text = inputs(SMALL, 2, 2, 4, 4)
    theirs_forward(theirs, latents, times, text).square().mean().backward()
    ours.velocity(latents, times, ours.project_text(text)).square().mean().backward()
    want = {name: p.grad for name, p in theirs.named_parameters()}
    assert want.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - want[name]).abs().max() < 1e-4 * want[name].abs().max(), name


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(3)
    model = VideoDiT(SMALL)
    latents, times, text = inputs(SMALL, 1, 2, 4, 4)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.velocity(latents, times, model.project_text(text)).square().mean().backward()
        grads.append(model.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*grads)


def test_later_blocks_are_not_run() -> None:
    model = VideoDiT(SMALL)
    latents, times, text = inputs(SMALL, 1, 1, 2, 2)
    for parameter in model.transformer_blocks[2].parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        assert model.features(latents, times, model.project_text(text), 1).isfinite().all()


def test_rotary_axes_and_their_order() -> None:
    """128-wide heads: 44 time, 42 row, 42 column dimensions; the angles are [t | h | w], then the same again."""
    table = rotary_table(VideoDitConfig(), 2, 3, 4, torch.device("cpu"))
    assert table.shape == (2, 24, 128)
    token = table[:, 1 * 12 + 2 * 4 + 3]  # frame 1, row 2, column 3
    theta_space = 10000.0 * 3.0 ** (42 / 40)
    want = {
        0: 1.0,
        1: 10000.0 ** (-2 / 44),
        22: 2.0,
        23: 2 * theta_space ** (-2 / 42),
        43: 3.0,
        44: 3 * theta_space ** (-2 / 42),
    }
    for index, angle in want.items():
        for half in (0, 64):
            assert token[0, half + index].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)
            assert token[1, half + index].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)


def test_bfloat16_rounds_the_times() -> None:
    """200/201 is 0.99609375 in bfloat16; both give the same result there, so the cast happens before the sinusoid."""
    torch.manual_seed(4)
    model = VideoDiT(SMALL).to(torch.bfloat16)
    latents, _, text = inputs(SMALL, 1, 2, 4, 4)
    context = model.project_text(text)
    with torch.no_grad():
        outs = [model.velocity(latents, torch.tensor([[0.0, t]]), context) for t in (200 / 201, 0.99609375, 0.98)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_released_size() -> None:
    with torch.device("meta"):
        model = VideoDiT(VideoDitConfig())
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(2.06e9, rel=0.01)
    assert VideoDitConfig().width == 2048


def test_learned_positions_tell_places_apart() -> None:
    """Without them a shifted picture is only a shift of the angles; with them each place has an embedding of its own."""
    config = replace(SMALL, learned_positions=True, max_size=(4, 8, 8))
    torch.manual_seed(0)
    model = VideoDiT(config)
    latents = torch.zeros(1, config.latent_channels, 2, 8, 8)
    tokens = model.embed_latents(latents)
    table = model.learnable_pos_embed(4, 4)
    assert table.shape == (16, config.width)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1
    plain = VideoDiT(replace(config, learned_positions=False))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("learnable_pos_embed")})
    assert torch.allclose(tokens, plain.embed_latents(latents) + table, atol=1e-6)
    # rows first, as the tokens
    assert torch.equal(
        model.learnable_pos_embed(2, 3)[4],
        model.learnable_pos_embed.pos_emb_h[1] + model.learnable_pos_embed.pos_emb_w[1],
    )


def test_open_gates_make_a_plain_transformer() -> None:
    torch.manual_seed(0)
    model = VideoDiT(SMALL)
    model.open_gates()
    for t in (0.0001, 0.3, 0.995):
        embedded, temb = model.embed_times(torch.full((1, 2), t))
        for block in model.blocks:
            for norm in (block.norm1, block.norm2, block.norm3):
                shift, scale, gate = norm.modulation(embedded, temb)
                assert shift.abs().max() == scale.abs().max() == 0
                assert (gate - 1).abs().max() < 0.2, t
