"""euler_step: plain and guided, the kernel, and the schedules of real-time chunking."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.model.flow import guidance_strength, prefix_weights
from dit4dit.ops import euler_step
from dit4dit.ops.euler_step import reference

GENERATOR = torch.Generator().manual_seed(0)
X, V, PREVIOUS = (torch.randn(3, 16, 7, generator=GENERATOR) for _ in range(3))


ROWS = torch.stack([prefix_weights("exp", 3, 11, 16), torch.zeros(16), prefix_weights("linear", 0, 5, 16)])


@pytest.mark.parametrize("weights", [None, ROWS[0], ROWS], ids=["plain", "guided", "rows"])
@pytest.mark.parametrize("t", [1.0, 0.75, 0.25])
def test_triton(triton_op, t, weights):
    rest = (None,) * 4 if weights is None else (t, PREVIOUS, weights, 5.0)

    def run(x, velocity, dt, t, previous, weights, most):
        return triton_op("euler_step", x, velocity, dt, t=t, previous=previous, weights=weights, max_guidance=most)

    assert_no_worse(run, reference, (X, V, 0.25, *rest), float32_limit=1e-6)


@pytest.mark.parametrize("t", [1.0, 0.75, 0.5, 0.25])
def test_guidance_as_published(t):
    """v' = v - g w (prev - (x_t - t v)); c = (1 - tau) / tau, r = ((1 - tau)^2 + tau^2) / (1 - tau)^2, g = min(c r, max)."""
    tau, most, weights = 1 - t, 2.5, prefix_weights("linear", 2, 9, 16)
    g = most if tau == 0 else min((1 - tau) / tau * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2, most)
    v = V - g * weights[:, None] * (PREVIOUS - (X - t * V))
    got = euler_step(X, V, 0.25, t=t, previous=PREVIOUS, weights=weights, max_guidance=most)
    torch.testing.assert_close(got, X - 0.25 * v, rtol=1e-6, atol=1e-6)
    assert guidance_strength(t, most) == pytest.approx(g)


@pytest.mark.parametrize("t", [1.0, 0.5])
def test_each_sample_has_its_own_weights(t):
    got = euler_step(X, V, 0.25, t=t, previous=PREVIOUS, weights=ROWS, max_guidance=5.0)
    for b in range(3):
        x, v, previous = (y[b : b + 1] for y in (X, V, PREVIOUS))
        alone = euler_step(x, v, 0.25, t=t, previous=previous, weights=ROWS[b], max_guidance=5.0)
        assert torch.equal(got[b], alone[0])
    assert torch.equal(got[1], euler_step(X, V, 0.25)[1])  # no weight, no trace


def test_guidance_pulls_towards_the_left_over_and_leaves_the_rest():
    weights = prefix_weights("ones", 4, 4, 16)
    step = partial(euler_step, X, V, 0.25, t=0.5, previous=PREVIOUS, weights=weights)
    plain, guided = euler_step(X, V, 0.25), step(max_guidance=1.0)
    assert torch.equal(plain[:, 4:], guided[:, 4:])
    target = (PREVIOUS - plain)[:, :4].abs().mean()
    assert (PREVIOUS - guided)[:, :4].abs().mean() < target


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("ones", [1, 1, 1, 1, 1, 0, 0]),
        ("zeros", [1, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_schedules(schedule, expected):
    assert prefix_weights(schedule, 2, 5, 7).tolist() == expected


def test_the_exponential_schedule_is_below_the_linear_one():
    linear, exponential = prefix_weights("linear", 2, 6, 8), prefix_weights("exp", 2, 6, 8)
    assert torch.equal(exponential[:2], torch.ones(2))
    assert torch.equal(exponential[6:], torch.zeros(2))
    assert (exponential[2:6] < linear[2:6]).all()
    torch.testing.assert_close(exponential[2:6], linear[2:6] * torch.expm1(linear[2:6]) / (torch.e - 1))


@pytest.mark.parametrize("schedule", ["linear", "exp", "ones", "zeros"])
def test_a_delay_beyond_the_horizon_is_the_horizon(schedule):
    assert prefix_weights(schedule, 9, 3, 8).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert prefix_weights(schedule, 0, 0, 4).tolist() == [0, 0, 0, 0]


def test_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="did you mean 'linear'"):
        prefix_weights("liner", 1, 2, 3)
    with pytest.raises(InputError, match="delay and horizon >= 0"):
        prefix_weights("ones", -1, 2, 3)
    with pytest.raises(InputError, match="delay and horizon >= 0 and length >= 1"):
        prefix_weights("ones", 1, 2, 0)
    whole = dict(t=1.0, previous=PREVIOUS, weights=ROWS, max_guidance=1.0)
    for name, value in whole.items():
        for given in ({name: value}, {n: v for n, v in whole.items() if n != name}):
            with pytest.raises(InputError, match="expected all of t, previous, weights and max_guidance"):
                euler_step(X, V, 0.25, **given)
    with pytest.raises(InputError, match=r"weights: expected \[K\] = \[16\], got \[15\]"):
        euler_step(X, V, 0.25, t=1.0, previous=PREVIOUS, weights=torch.ones(15), max_guidance=1.0)
    with pytest.raises(InputError, match=r"weights: expected \[B, K\] = \[3, 16\], got \[2, 16\]"):
        euler_step(X, V, 0.25, t=1.0, previous=PREVIOUS, weights=torch.ones(2, 16), max_guidance=1.0)
