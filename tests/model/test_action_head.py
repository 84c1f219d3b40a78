"""The action head: sizes, tokens, dropout, tiling, and the ways its parts can be switched off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit4dit.config import HeadConfig
from dit4dit.model import flow
from dit4dit.model.action_head import ActionHead, sinusoid
from dit4dit.presets import preset

TINY = preset("tiny").model.head


def head(config: HeadConfig = TINY) -> ActionHead:
    torch.manual_seed(0)
    return ActionHead(config).eval()


@pytest.mark.parametrize("config, millions", [(HeadConfig.dit_b(), 163), (HeadConfig.dit_l(), 400)])
def test_released_sizes(config: HeadConfig, millions: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in ActionHead(config).parameters())
    assert config.width in (768, 1536)
    if config.width == 768:
        assert count == pytest.approx(millions * 1e6, rel=0.01)
    else:
        assert count > millions * 1e6


def test_weights_streamed_per_euler_step() -> None:
    """About 114 M: the blocks and what is around them, without cross-attention's k and v and the AdaLN matrices."""
    config = HeadConfig.dit_b()
    with torch.device("meta"):
        model = ActionHead(config)
    folded = ("norm1.linear", "timestep_encoder", "proj_out_1", "position_embedding", "state_encoder")
    cross = tuple(f"blocks.{i}.attn1.{name}" for i in range(0, 16, 2) for name in ("to_k", "to_v"))
    streamed = sum(p.numel() for n, p in model.named_parameters() if not any(f in n for f in (*folded, *cross)))
    assert streamed == pytest.approx(114e6, rel=0.04)


@pytest.mark.parametrize("batch, context_tokens", [(1, 1), (2, 5), (3, 16)])
@pytest.mark.parametrize("state_dim", [16, None])
@pytest.mark.parametrize("kind", ["dit_b", "dit_l"])
def test_shapes(batch: int, context_tokens: int, state_dim: int | None, kind: str) -> None:
    sizes = {"dit_b": (12, 64), "dit_l": (32, 48)}[kind]
    config = replace(TINY, num_layers=2, num_heads=sizes[0], head_dim=sizes[1], state_dim=state_dim)
    model = head(config)
    x, t = torch.randn(batch, config.action_horizon, config.action_dim), torch.randint(0, 1002, (batch,))
    state = None if state_dim is None else torch.randn(batch, 1, state_dim)
    out = model.velocity(x, t, torch.randn(batch, context_tokens, config.context_dim), state)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_state_and_context_and_time_matter() -> None:
    model = head()
    x, context, state = torch.randn(1, 8, 8), torch.randn(1, 5, 64), torch.randn(1, 1, 16)
    t = torch.tensor([500])
    base = model.velocity(x, t, context, state)
    for other in (
        model.velocity(x, t, context, state + 1),
        model.velocity(x, t, context + 1, state),
        model.velocity(x, t + 1, context, state),
        model.velocity(x.flip(1), t, context, state).flip(1),
    ):
        assert not torch.allclose(base, other, atol=1e-4)


def test_without_a_state_its_token_is_left_out() -> None:
    """As published: the same weights, one token fewer."""
    model = head()
    bare = ActionHead(replace(TINY, state_dim=None)).eval()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("state_encoder")})
    args = (torch.randn(1, 8, 8), torch.tensor([3]), torch.randn(1, 5, 64), None)
    assert torch.equal(model.velocity(*args), bare.velocity(*args))


def test_sample_is_the_integral_of_velocity() -> None:
    model = head()
    noise, context, state = torch.randn(2, 8, 8), torch.randn(2, 5, 64), torch.randn(2, 1, 16)
    x = noise
    for index in (1000, 750, 500, 250):
        x = x - 0.25 * model.velocity(x, torch.full((2,), index), context, state)
    with torch.no_grad():
        assert torch.allclose(model.sample(noise, context, state), x, atol=1e-6)
        assert not torch.allclose(model.sample(noise, context, state, steps=2), x, atol=1e-3)


def test_loss_tiles_the_batch_without_interleaving() -> None:
    model = head()
    actions, context, state = torch.randn(2, 8, 8), torch.randn(2, 5, 64), torch.randn(2, 1, 16)
    mask = torch.rand(2, 8, 8) > 0.3
    t, noise = torch.rand(6), torch.randn(6, 8, 8)
    with torch.no_grad():
        loss = model.loss(actions, mask, context, state, t, noise)
        total, count = 0.0, 0.0
        for i in range(6):
            b = i % 2
            x_t, v = flow.bridge(actions[b : b + 1], noise[i : i + 1], t[i : i + 1])
            got = model.velocity(x_t, (t[i : i + 1] * 1000).long(), context[b : b + 1], state[b : b + 1])
            total += (mask[b] * (got[0] - v[0]) ** 2).sum()
            count += mask[b].sum()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)


def test_dropout_is_only_in_training() -> None:
    model = head()
    args = (torch.randn(1, 8, 8), torch.tensor([3]), torch.randn(1, 5, 64), torch.randn(1, 1, 16))
    assert torch.equal(model.velocity(*args), model.velocity(*args))
    model.train()
    assert not torch.equal(model.velocity(*args), model.velocity(*args))
    kinds = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(kinds) == 4 * TINY.num_layers
    assert {m.p for m in kinds} == {0.2}


def test_sinusoids() -> None:
    t = torch.tensor([0, 7])
    cos_first = sinusoid(t, 256, cos_first=True, denominator=127)
    assert cos_first[0, :128].eq(1).all()
    assert cos_first[1, 127].item() == pytest.approx(torch.tensor(7 / 10000.0).cos().item())
    sin_first = sinusoid(t, 64, cos_first=False, denominator=32)
    assert sin_first[1, 0].item() == pytest.approx(torch.tensor(7.0).sin().item())
    assert sin_first[1, 32 + 16].item() == pytest.approx(torch.tensor(0.07).cos().item(), rel=1e-5)
