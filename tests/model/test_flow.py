"""The time convention, the integrator, the draws of times, and the loss."""

from __future__ import annotations

import pytest
import torch

from dit4dit.config import FlowConfig
from dit4dit.model import flow


def test_bridge_ends_at_data_and_noise_and_moves_with_its_velocity() -> None:
    x, e = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    x_t, v = flow.bridge(x, e, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[1], e[1])
    assert torch.allclose(x_t[2] - 0.25 * v[2], x[2], atol=1e-6)
    assert torch.equal(v, e - x)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_integrate_follows_a_straight_flow_back_to_the_data(steps: int) -> None:
    x, e = torch.randn(5), torch.randn(5)
    times = []

    def velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        assert torch.allclose(x_t, (1 - t) * x + t * e, atol=1e-5)
        return e - x

    assert torch.allclose(flow.integrate(velocity, e, steps), x, atol=1e-5)
    assert times == [1 - i / steps for i in range(steps)]


def test_buckets_of_the_four_published_steps() -> None:
    assert [flow.bucket(1 - i / 4, 1000) for i in range(4)] == [1000, 750, 500, 250]
    with pytest.raises(ValueError, match="at least 1"):
        flow.integrate(lambda x, t: x, torch.zeros(1), 0)


def test_masked_entries_do_not_count() -> None:
    p, t = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])
    assert flow.masked_mse(p, t, torch.tensor([True, False, True])).item() == pytest.approx(2.5)


def test_action_times_are_beta_and_reach_above_one() -> None:
    t = flow.action_times(200_000, FlowConfig(), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert t.shape == (200_000,)
    assert t.mean().item() == pytest.approx(1.5 / 2.5 / 0.999, abs=0.003)
    assert t.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.002)
    assert 1.0005 < t.max() <= 1 / 0.999 + 1e-6


@pytest.mark.parametrize("distribution, mean, spread", [("uniform", 0.5, 1 / 12), ("logit_normal", 0.5, 0.0434)])
def test_video_times(distribution: str, mean: float, spread: float) -> None:
    config = FlowConfig(time_distribution=distribution, high_sigma_ratio=None, high_sigma_min=None)  # type: ignore[arg-type]
    t = flow.video_times(100_000, config, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert t.mean().item() == pytest.approx(mean, abs=0.005)
    assert t.var().item() == pytest.approx(spread, abs=0.002)


def test_high_sigma_share() -> None:
    config = FlowConfig(high_sigma_ratio=0.35, high_sigma_min=0.98)
    t = flow.video_times(100_000, config, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (t >= 0.98).float().mean().item() == pytest.approx(0.35, abs=0.01)


def test_same_generator_same_times() -> None:
    draw = [flow.action_times(5, FlowConfig(), torch.Generator().manual_seed(7), torch.device("cpu")) for _ in range(2)]
    assert torch.equal(*draw)
