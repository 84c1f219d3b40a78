"""The single-frame encoder against diffusers' causal VAE on the padded clip, and the scaling of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

import dit4dit.model.vae as vae_module
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


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits of mantissa that a tensor core takes of a float32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions round their float32 operands as a GPU does, where PyTorch's settings let it; the settings are put back."""
    cudnn = torch.backends.cudnn
    before = torch.backends.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32
    for name in ("conv2d", "conv3d"):
        exact = getattr(F, name)

        def rounded(
            x: torch.Tensor, weight: torch.Tensor, *args: Any, exact: Any = exact, **kwargs: Any
        ) -> torch.Tensor:
            if cudnn.conv.fp32_precision == "tf32" and x.dtype == torch.float32:
                x, weight = tf32(x), tf32(weight)
            return exact(x, weight, *args, **kwargs)

        monkeypatch.setattr(F, name, rounded)
    yield
    torch.backends.fp32_precision, cudnn.allow_tf32 = before[0], before[3]
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before[1:3]


def default() -> None:
    assert torch.backends.cudnn.allow_tf32, "PyTorch's default"


def asked_for() -> None:
    torch.backends.fp32_precision = "tf32"


def parity() -> dict[str, torch.Tensor]:
    """What has convolutions, with fixed weights and inputs."""
    torch.manual_seed(2)
    vae, (_, frame) = VideoVae(SMALL).eval(), fresh(SMALL)
    video, latents = torch.rand(1, 3, 5, 32, 32) * 2 - 1, torch.randn(1, 16, 2, 4, 4)
    with torch.no_grad():
        posterior = vae.posterior(video)
        found = {
            "mean": posterior.mean,
            "std": posterior.std,
            "encode": vae.encode(video),
            "decode": vae.decode(latents),
        }
        return found | dict(zip(("frame mean", "frame std"), frame(video[:, :, 0]), strict=True))


@pytest.mark.parametrize("setting", [default, asked_for])
def test_convolutions_in_float32_are_not_shortened(tensor_cores, monkeypatch: pytest.MonkeyPatch, setting) -> None:
    """Within the 1e-4 of the float32 parity; without the guard the same convolutions are outside of it."""
    with monkeypatch.context() as exactly:
        exactly.setattr(vae_module, "full_precision", contextlib.nullcontext)
        torch.backends.cudnn.allow_tf32 = False
        exact = parity()
        torch.backends.cudnn.allow_tf32 = True
        setting()
        unguarded = parity()
    guarded = parity()
    for name, want in exact.items():
        assert (unguarded[name] - want).abs().max() > 1e-4 * want.abs().max(), f"{name}: the emulation shortens nothing"
        assert torch.equal(guarded[name], want), name
