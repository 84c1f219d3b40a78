"""Real-time chunking through the policy: the formulas, what is refused, and the default path left alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import Guidance, Noise, Observation, Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.errors import BackendError, InputError
from dit4dit.model import flow
from dit4dit.policy.prompts import plain
from dit4dit.policy.runner import step_inputs
from dit4dit.presets import preset

K, A = 8, 8


@pytest.fixture(scope="module")
def plain_policy(small_libero: Path) -> Policy:
    return Policy.from_pretrained(small_libero, device="cpu", engine="off")


@pytest.fixture(scope="module")
def policy(small_libero: Path) -> Policy:
    return Policy.from_pretrained(small_libero, device="cpu")


def left_over(rows: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (rows, A)).astype(np.float32)


def by_the_formulas(policy: Policy, observation: Observation, noise: Noise, given: Guidance) -> np.ndarray:
    """The spec, in float64 where it is ours to choose: v' = v - g w (prev - (x - t v)), row by row, with no padding at all."""
    model, steps = policy.model, policy.config.head.num_inference_timesteps
    rows = len(given.previous)
    end = min(rows if given.horizon is None else given.horizon, rows)
    with plain(policy.device):
        request = policy.request(observation, "go", noise=noise)
        context = policy._texts.get("go")
        inputs = step_inputs(model, [request], ())
        features = model.features(inputs.frame, context, inputs.posterior, inputs.latent)
        x = inputs.action[0].double().numpy()
        for step in range(steps):
            tau = step / steps
            t = 1 - tau
            bucket = torch.tensor([flow.bucket(t, policy.config.head.num_timestep_buckets)])
            v = (
                model.head.velocity(torch.from_numpy(x)[None].float(), bucket, features, inputs.state)[0]
                .double()
                .numpy()
            )
            g = given.max_guidance
            if tau > 0:
                g = min((1 - tau) / tau * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2, given.max_guidance)
            pulled = v.copy()
            for i in range(end):
                w = 1.0 if i < given.delay else 1 - (i - given.delay + 1) / (end - given.delay + 1)
                pulled[i] = v[i] - g * w * (given.previous[i].astype(np.float64) - (x[i] - t * v[i]))
            x = x - pulled / steps
    return x


@pytest.mark.parametrize(("delay", "horizon", "most"), [(2, None, 10.0), (0, 4, 2.5), (3, 8, 5.0)])
def test_model_engine_and_plan_are_the_formulas(
    policy: Policy, plain_policy: Policy, observation: Observation, delay: int, horizon: int | None, most: float
) -> None:
    given = Guidance(left_over(), delay, horizon, "linear", most)
    with torch.no_grad():
        wanted = by_the_formulas(plain_policy, observation, Noise.from_seed(3), given)
    for one in (plain_policy, policy):
        got = one.infer(observation, "go", seed=3, guidance=given).normalized
        assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()
        free = one.infer(observation, "go", seed=3).normalized
        assert np.abs(got - free).max() > 0.05
    with plain(policy.device), torch.no_grad():  # the engine itself, without a plan
        inputs = next(policy.step_inputs([observation], ["go"], noise=[Noise.from_seed(3)]))
        previous, weights = (torch.from_numpy(part)[None] for part in flow.guidance_arrays(given, K))
        direct = policy.engine.sample(*inputs, guidance=flow.GuidanceTensors(previous, weights, most))[0].numpy()
    assert np.array_equal(direct, policy.infer(observation, "go", seed=3, guidance=given).normalized)


@pytest.mark.parametrize("most", [5.0, 10.0])
def test_full_weights_with_a_large_bound_pull_the_chunk_to_the_left_over(
    policy: Policy, observation: Observation, most: float
) -> None:
    previous = left_over(K)
    got = policy.infer(observation, "go", seed=1, guidance=Guidance(previous, K, K, "ones", most)).normalized
    free = policy.infer(observation, "go", seed=1).normalized
    assert np.abs(got - previous).mean() < 0.3 * np.abs(free - previous).mean()


def test_a_short_left_over_says_nothing_about_the_rows_it_does_not_have(
    policy: Policy, observation: Observation
) -> None:
    """Padded with zeros and read as actions, the other rows would be drawn to the mean action."""
    infer = partial(policy.infer, observation, "go", seed=2)
    short = Guidance(left_over(3), 3, K, "ones")
    previous, weights = flow.guidance_arrays(short, K)
    assert weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    got = infer(guidance=short).normalized
    other = previous.copy()
    other[3:] = 7.0  # whatever is there where nothing is
    assert np.array_equal(got, infer(guidance=Guidance(other, 3, 3, "ones")).normalized)
    padded = infer(guidance=Guidance(previous, 3, K, "ones")).normalized
    assert np.abs(padded[3:]).mean() < 0.5 * np.abs(got[3:]).mean()


def test_the_default_path_is_left_alone(policy: Policy, plain_policy: Policy, make_observation) -> None:
    seen, words = [make_observation(i) for i in range(3)], ["open", "close", "open"]
    noise = [Noise.from_seed(4, i) for i in range(3)]
    given = [None, Guidance(left_over(), 2), None]
    for one in (plain_policy, policy):
        before = one.infer_batch(seen[:1] + seen[2:], words[:1] + words[2:], noise=noise[:1] + noise[2:])
        mixed = one.infer_batch(seen, words, noise=noise, guidance=given)
        assert np.array_equal(mixed[0].normalized, before[0].normalized)  # two without guidance are a pass of two
        assert np.array_equal(mixed[2].normalized, before[1].normalized)
        alone = one.infer(seen[1], words[1], noise=noise[1], guidance=given[1])
        assert np.array_equal(mixed[1].normalized, alone.normalized)


def test_each_request_of_a_pass_keeps_to_its_own(policy: Policy, make_observation) -> None:
    seen, words = [make_observation(i) for i in range(3)], ["open"] * 3
    noise = [Noise.from_seed(5, i) for i in range(3)]
    given = [Guidance(left_over(8 - 2 * i, i), i, None, name) for i, name in enumerate(("linear", "exp", "zeros"))]
    got = policy.infer_batch(seen, words, noise=noise, guidance=given)
    for i in range(3):
        alone = policy.infer(seen[i], words[i], noise=noise[i], guidance=given[i])
        assert np.allclose(got[i].normalized, alone.normalized, atol=2e-5)


def test_a_guided_plan_leaves_no_trace(policy: Policy, observation: Observation) -> None:
    first, other = Guidance(left_over(), 2), Guidance(left_over(K, 1), K)
    infer = partial(policy.infer, observation, "go", seed=6)
    free, guided = infer().normalized, infer(guidance=first).normalized
    infer(guidance=other)
    assert np.array_equal(infer(guidance=first).normalized, guided)
    assert np.array_equal(infer().normalized, free)


def test_guided_requests_can_be_warmed_up(small_libero: Path, observation: Observation) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    sizes = {name: picture.shape[:2] for name, picture in observation.images.items()}
    policy.warm_up(sizes, max_guidance=10.0)
    before = policy._runner.plans
    policy.infer(observation, "go", seed=0, guidance=Guidance(left_over(), 2))
    assert policy._runner.plans == before
    policy.infer(observation, "go", seed=0)
    assert policy._runner.plans == before + 1


def test_the_one_launch_head_takes_one_row_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneLaunchHead, "backend", "torch")  # its reference stands for the kernel
    config = preset("tiny").model
    engine = Engine(random_model(config, 0, with_text=False))
    head = config.head
    features, state = torch.randn(2, 5, head.context_dim), torch.randn(2, 1, head.state_dim)
    noise = torch.randn(2, head.action_horizon, head.action_dim)
    previous = torch.randn_like(noise)
    weights = torch.linspace(1, 0, head.action_horizon).expand(2, -1)
    given = flow.GuidanceTensors(previous, weights, 5.0)
    one = replace(given, previous=previous[:1], weights=weights[:1])
    loop = engine.actions(features[:1], state[:1], noise[:1], one)
    engine.one_launch = OneLaunchHead(engine.head, config.head, engine.steps)
    launched = engine.actions(features[:1], state[:1], noise[:1], one)
    assert (launched - loop).abs().max() < 1e-5 * loop.abs().max()
    with pytest.raises(BackendError, match="one row of weights"):
        engine.actions(features, state, noise, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous": np.zeros((0, A), np.float32)}, "n >= 1"),
        ({"previous": np.zeros(A, np.float32)}, r"floats \[n, A\]"),
        ({"previous": np.zeros((2, A), np.int64)}, "got int64"),
        ({"previous": np.full((2, A), np.nan, np.float32)}, "finite"),
        ({"delay": 7}, "delay: expected a whole number 0 to 6"),
        ({"delay": -1}, "delay"),
        ({"delay": 1.5}, "delay: expected a whole number"),
        ({"delay": 3, "horizon": 2}, "horizon: expected a whole number >= 3"),
        ({"schedule": "liner"}, "did you mean 'linear'"),
        ({"max_guidance": 0.0}, "max_guidance"),
        ({"max_guidance": float("inf")}, "max_guidance"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guidance(**{"previous": left_over(), **change})


def test_what_does_not_fit_the_policy_is_refused(policy: Policy, observation: Observation) -> None:
    def ask(guidance):
        policy.infer_batch([observation], ["go"], guidance=guidance)

    chunk = policy.infer(observation, "go", seed=0)
    with pytest.raises(InputError, match=r"\[1 to 8, 8\].*normalized\[executed:\].*got \[6, 7\]"):
        ask([Guidance(chunk.actions[2:])])  # in robot units: here their width is another
    with pytest.raises(InputError, match="1 to 8"):
        ask([Guidance(left_over(9))])
    with pytest.raises(InputError, match="horizon: expected at most 8"):
        ask([Guidance(left_over(), 0, 9)])
    with pytest.raises(InputError, match=r"one per request \(1\), got 2"):
        ask([None, None])
    with pytest.raises(InputError, match="a list of Guidance or None"):
        ask(left_over())


def test_the_left_over_is_a_copy() -> None:
    mine = left_over()
    given = Guidance(mine, 1)
    mine[:] = 0
    assert given.previous.any()
    with pytest.raises(ValueError, match="read-only"):
        given.previous[0] = 0
