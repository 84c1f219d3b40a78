"""The ops say what the model computes: its own blocks against the same blocks composed of ops, and those on Triton."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dit4dit import ops
from dit4dit.config import HeadConfig, VideoDitConfig
from dit4dit.model import action_head, video_dit
from dit4dit.ops.qk_norm_rope import rms_norm

BATCH, FRAMES, ROWS, COLUMNS = 2, 2, 3, 5
TOKENS = ROWS * COLUMNS


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def call(run, op, *args, **kwargs):
    """Through the interpreter where `run` is one, else by the automatic choice."""
    return run(op, *args, **kwargs) if run else getattr(ops, op)(*args, **kwargs)


@pytest.fixture(params=["automatic", "triton"])
def op(request):
    run = request.getfixturevalue("interpreter") if request.param == "triton" else None
    return partial(call, run)


@torch.no_grad()
def test_a_block_of_the_backbone(op):
    torch.manual_seed(0)
    config = VideoDitConfig(num_heads=2, head_dim=32, adaln_lora_dim=16, text_dim=48)
    block = video_dit.Block(config)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    width, heads = config.width, config.num_heads
    x = torch.randn(BATCH, FRAMES, TOKENS, width)
    text = torch.randn(1, 11, config.text_dim)
    # the times of the latent frames are constants, so one row a frame serves every sample
    embedded_t, temb = torch.randn(1, FRAMES, 1, width), torch.randn(1, FRAMES, 1, 3 * width)
    rotary = video_dit.rotary_table(config, FRAMES, ROWS, COLUMNS, x.device)
    expected = block(x, *(t.expand(BATCH, -1, -1, -1) for t in (embedded_t, temb)), text.expand(BATCH, -1, -1), rotary)

    tables = [
        [t[0, :, 0].contiguous() for t in n.modulation(embedded_t, temb)]
        for n in (block.norm1, block.norm2, block.norm3)
    ]
    (shift1, scale1, gate1), (shift2, scale2, gate2), (shift3, scale3, gate3) = tables
    self_, cross, feed = block.attn1, block.attn2, block.ff.net
    frames = partial(torch.Tensor.unflatten, dim=1, sizes=(FRAMES, TOKENS))

    k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (cross.to_k(text), cross.to_v(text)))
    k = rms_norm(k, cross.norm_k.weight, 1e-5)

    x, h = op("adaln", x, None, None, shift1, scale1, 1e-6, torch.float32)
    qkv = h.flatten(1, 2) @ torch.cat([self_.to_q.weight, self_.to_k.weight, self_.to_v.weight]).T
    y = op("self_attention", qkv, self_.norm_q.weight, self_.norm_k.weight, rotary, heads, 1e-5)
    x, h = op("adaln", x, frames(self_.to_out[0](y)), gate1, shift2, scale2, 1e-6, torch.float32)
    y = op("cross_attention", cross.to_q(h.flatten(1, 2)), k.contiguous(), v, cross.norm_q.weight, heads, 1e-5)
    x, h = op("adaln", x, frames(cross.to_out[0](y)), gate2, shift3, scale3, 1e-6, torch.float32)
    y = op("linear_gelu", h, feed[0].proj.weight, None, "none")
    x, _ = op("adaln", x, feed[2](y), gate3, None, None, 1e-6, torch.float32)
    close(x, expected)


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_a_block_of_the_action_head(op, cross):
    torch.manual_seed(1)
    config = HeadConfig(num_layers=2, num_heads=4, head_dim=16, context_dim=48, action_dim=8, action_horizon=8)
    block = action_head.Block(config, config.context_dim if cross else None).eval()
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    width, heads, tokens = config.width, config.num_heads, 9
    x, temb, features = torch.randn(BATCH, tokens, width), torch.randn(1, width), torch.randn(BATCH, 70, 48)
    expected = block(x, temb.expand(BATCH, -1), features)

    scale, shift = (t.contiguous() for t in block.norm1.linear(torch.nn.functional.silu(temb)).chunk(2, dim=-1))
    attention, feed, x = block.attn1, block.ff.net, x[:, None]
    x, h = op("adaln", x, None, None, shift, scale, 1e-5, torch.float32)
    if cross:
        projections = (attention.to_k(features), attention.to_v(features))
        k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in projections)
        y = op("cross_attention", attention.to_q(h[:, 0]), k, v, None, heads, 0.0)
    else:
        parts = (attention.to_q, attention.to_k, attention.to_v)
        qkv = torch.nn.functional.linear(
            h[:, 0], torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        )
        y = op("self_attention", qkv, None, None, None, heads, 0.0)
    x, h = op("adaln", x, attention.to_out[0](y)[:, None], None, None, None, 1e-5, torch.float32)
    y = op("linear_gelu", h, feed[0].proj.weight, feed[0].proj.bias, "tanh")
    x, _ = op("adaln", x, feed[2](y), None, None, None, 1e-5, torch.float32)
    close(x[:, 0], expected)
