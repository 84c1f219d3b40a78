"""The single-frame encoder against diffusers' causal VAE on the padded clip, and the scaling of latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from dit4dit.config import VaeConfig
from dit4dit.model.vae import FrameEncoder, LatentScale, VideoVae, build_wan

SMALL = VaeConfig(
    base_dim=6, latents_mean=tuple(0.1 * i for i in range(16)), latents_std=tuple(1 + 0.1 * i for i in range(16))
)


def fresh(config: VaeConfig) -> tuple[AutoencoderKLWan, FrameEncoder]:
    wan = build_wan(config).eval()
    for name, parameter in wan.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    frame = FrameEncoder(config).eval()
    frame.load_state_dict(FrameEncoder.convert(wan.state_dict()), strict=True)
    return wan, frame


@pytest.mark.parametrize(
    "batch, height, width, frames", [(1, 16, 16, 1), (2, 32, 48, 5), (1, 80, 16, 9), (1, 56, 40, 5)]
)
def test_one_frame_is_the_padded_clip(batch: int, height: int, width: int, frames: int) -> None:
    torch.manual_seed(0)
    wan, encoder = fresh(SMALL)
    picture = torch.rand(batch, 3, height, width) * 2 - 1
    clip = torch.zeros(batch, 3, frames, height, width)
    clip[:, :, 0] = picture
    with torch.no_grad():
        posterior = wan.encode(clip).latent_dist
        mean, std = encoder(picture)
    for got, want in ((mean, posterior.mean[:, :, 0]), (std, posterior.std[:, :, 0])):
        assert got.shape == (batch, 16, height // 8, width // 8)
        assert (got - want).abs().max() / want.abs().max() < 1e-5


def test_two_residual_blocks_and_true_widths() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in FrameEncoder(VaeConfig()).parameters())
        video = sum(p.numel() for n, p in build_wan(VaeConfig()).named_parameters() if n.startswith("encoder."))
    assert video == pytest.approx(53.6e6, rel=0.01)
    assert count < video / 2


def test_latents_are_scaled_by_mean_and_std_not_by_its_inverse() -> None:
    scale = LatentScale(SMALL)
    z = torch.randn(2, 16, 3, 4, 5)
    want = torch.stack([(z[:, c] - 0.1 * c) / (1 + 0.1 * c) for c in range(16)], dim=1)
    assert torch.allclose(scale.normalize(z), want, atol=1e-6)
    assert torch.allclose(scale.denormalize(scale.normalize(z)), z, atol=1e-6)


def test_clips_encode_to_the_posterior_mean_and_decode_to_pictures() -> None:
    torch.manual_seed(1)
    vae = VideoVae(SMALL).eval()
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video)
        mode = vae.wan.encode(video).latent_dist.mode()
        again = vae.decode(latents)
    assert torch.allclose(latents, vae.scale.normalize(mode))
    assert latents.shape == (1, 16, 2, 4, 4)
    assert again.shape == video.shape
    assert again.abs().max() <= 1


def test_convolutions_in_float32_are_not_shortened_and_the_callers_setting_stays() -> None:
    seen = []
    encoder = FrameEncoder(VaeConfig(base_dim=4))
    encoder.conv_in.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    with torch.no_grad():
        encoder(torch.zeros(1, 3, 16, 16))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before
