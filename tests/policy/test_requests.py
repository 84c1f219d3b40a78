"""Requests: checked once, wherever they come in, and their kinds, which say who may share a pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import Guidance, Noise, Observation, Policy
from dit4dit.errors import InputError
from dit4dit.evaluation.batching import BatchedPolicy, Question
from dit4dit.policy.prompts import Embedder
from dit4dit.policy.requests import groups
from dit4dit.robots.embodiment import Embodiment
from dit4dit.serving.backend import PolicyBackend

EXAMPLE = {"image": np.zeros((32, 64, 3), np.uint8), "lang": "go", "state": np.zeros((1, 16), np.float32)}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of a request has been looked at."""
    counts: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def count(*given, **named):
            counts[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(owner, name, count)

    for owner, name in ((Embodiment, "ordered_views"), (Embodiment, "state_vector"), (Embedder, "length")):
        counted(owner, name)
    counted(Guidance, "check")
    return counts


def test_the_server_checks_a_request_once(libero_policy: Policy, observation: Observation, checks) -> None:
    backend = PolicyBackend(libero_policy, "here", "hash")
    given = {"images": dict(observation.images), "state": dict(observation.state)}
    backend.run(backend.check({"observation": given, "instruction": "go"}))
    assert checks == {"ordered_views": 1, "state_vector": 1, "length": 1}


def test_the_evaluation_checks_a_request_once_whatever_fills_its_pass(
    libero_policy: Policy, observation: Observation, checks
) -> None:
    guidance = Guidance(np.zeros((4, 8), np.float32), 2)
    request = libero_policy.request(observation, "go", noise=Noise.from_seed(0), guidance=guidance)
    question = Question(request)
    BatchedPolicy(libero_policy, 3)._run([question])
    assert question.answer.result().chunk.actions.shape == (8, 7)
    assert checks == {"ordered_views": 1, "state_vector": 1, "length": 1, "check": 1}


def test_requests_of_one_kind_share_a_pass_and_no_others(small_libero: Path, make_observation) -> None:
    texts = {"go": torch.zeros(4, 64), "stop": torch.zeros(4, 64), "turn around": torch.zeros(9, 64)}
    policy = Policy.from_pretrained(small_libero, device="cpu", prompt_embeds=texts)
    seen, left = make_observation(0), np.zeros((4, 8), np.float32)
    first = policy.request(seen, "go")
    same = [policy.request(make_observation(1), "stop", noise=Noise.from_seed(0)), replace(first, noise=Noise.fresh())]
    others = [
        policy.request(make_observation(1, side=100), "go"),
        policy.request(seen, "turn around"),
        policy.request(seen, "go", guidance=Guidance(left, 1)),
        policy.request(seen, "go", guidance=Guidance(left, 1, max_guidance=2.0)),
        *policy.published_requests(EXAMPLE),
        *policy.published_requests({**EXAMPLE, "state": None}),
    ]
    assert groups([first, *others, *same]) == [[0, 7, 8], *([i + 1] for i in range(len(others)))]
    assert [len(group) for group in groups([first] * 20)] == [16, 4]


@pytest.mark.parametrize("instruction", [["go"], None, 5, b"go", ""])
def test_an_instruction_that_is_no_text_is_refused_at_the_door(
    libero_policy: Policy, observation: Observation, instruction
) -> None:
    for call in (libero_policy.infer, libero_policy.request):
        with pytest.raises(InputError, match="instruction: expected words"):
            call(observation, instruction)
    with pytest.raises(InputError, match="instruction: expected words"):
        libero_policy.prepare(instruction).result()
