"""A policy as the server sees it: what it says of itself, which requests it takes, and how several run in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import dit4dit
from dit4dit.errors import InputError, did_you_mean
from dit4dit.noise import Noise
from dit4dit.policy import published_api as published_examples
from dit4dit.policy.policy import Policy
from dit4dit.types import Observation

MAX_EXAMPLES = 64
"""Examples of one request."""
MAX_WORDS = 4096
"""Letters of one instruction."""
MAX_AREA = 4
"""A joined picture may have this many times the area of the model's own: attention grows with its square, and a picture that fits
a frame but not the memory would end the server."""


@dataclass(frozen=True, eq=False)
class Work:
    """A checked request. Those with equal keys can share a pass.

    Attributes:
        inputs: an Observation with its instruction, or published examples.
        count: chunks wanted.
    """

    inputs: tuple[Observation, str] | list[Mapping[str, Any]]
    count: int
    key: tuple[Any, ...]


class Backend(Protocol):
    """What a server needs of a policy."""

    metadata: Mapping[str, Any]

    def check(self, message: Mapping[str, Any]) -> Work:
        """The work that an inference request asks for; InputError where it does not fit the policy."""

    def run(self, works: Sequence[Work], noises: Sequence[Sequence[Noise]]) -> list[dict[str, Any]]:
        """The `data` of each answer; works have equal keys, each its noises, one per chunk."""


class PolicyBackend:
    """A loaded policy."""

    def __init__(self, policy: Policy, checkpoint: str, fingerprint: str) -> None:
        """checkpoint, fingerprint: its name, and a hash of what is in it, for clients' records."""
        self.policy = policy
        self.metadata = describe(policy) | {"checkpoint": checkpoint, "checkpoint_hash": fingerprint}

    def check(self, message: Mapping[str, Any]) -> Work:
        if "observation" in message:
            if "examples" in message:
                raise InputError("examples and observation: send one of them")
            return self._raw(message)
        found = published_examples.check(message.get("examples"))
        if len(found) > MAX_EXAMPLES:
            raise InputError(f"examples: at most {MAX_EXAMPLES} a request, got {len(found)}")
        for words in published_examples.instructions(found):
            _check_words("lang", words)
        config, views = self.policy.config, len(self.policy.embodiment.views)
        pictures = published_examples.pictures(found, config.pixels_per_token)
        height, width = pictures.shape[1:3]
        own = (config.image_size[0], config.image_size[1] * views)
        if height * width > MAX_AREA * own[0] * own[1]:
            raise InputError(
                f"examples[0].image: {height} x {width} is too large for a joined picture; the model's has {own[0]} x {own[1]}"
            )
        wide = config.head.state_dim
        with_state = wide is not None and published_examples.encoded_states(found, wide) is not None
        return Work(found, len(found), ("examples", height, width, with_state))

    def _raw(self, message: Mapping[str, Any]) -> Work:
        robot, given = self.policy.embodiment, message["observation"]
        if not isinstance(given, Mapping):
            raise InputError(f"observation: expected a map with images and state, got {type(given).__name__}")
        known = ("images", "state")
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known) if isinstance(name, str) else ""
                raise InputError(f"observation {name!r:.40}: unknown key{hint}; known: {', '.join(known)}")
        pictures = robot.ordered_views(given.get("images"))  # type: ignore[arg-type]  # it says what it wants
        state = given.get("state", {})
        if self.policy.codec.state is not None:
            robot.state_vector(state)
        words = _check_words("instruction", message.get("instruction"))
        observation = Observation(dict(zip(robot.views, pictures, strict=True)), state)
        return Work((observation, words), 1, ("observation", *(picture.shape for picture in pictures)))

    def run(self, works: Sequence[Work], noises: Sequence[Sequence[Noise]]) -> list[dict[str, Any]]:
        flat = [noise for several in noises for noise in several]
        if works[0].key[0] == "observation":
            asked: list[Any] = [work.inputs for work in works]
            chunks = self.policy.infer_batch([o for o, _ in asked], [words for _, words in asked], noise=flat)
            return [{"normalized_actions": chunk.normalized[None], "actions": chunk.actions[None]} for chunk in chunks]
        examples = [dict(example) for work in works for example in work.inputs]  # type: ignore[arg-type]
        normalized = self.policy.predict_action(examples, noise=flat)["normalized_actions"]
        actions = self.policy.codec.robot_units(normalized)
        ends = np.cumsum([work.count for work in works])
        return [
            {"normalized_actions": normalized[end - work.count : end], "actions": actions[end - work.count : end]}
            for work, end in zip(works, ends, strict=True)
        ]


def _check_words(where: str, words: Any) -> str:
    if not isinstance(words, str) or not words.strip() or len(words) > MAX_WORDS:
        raise InputError(f"{where}: expected words (at most {MAX_WORDS} letters), got {words!r:.60}")
    return words


def describe(policy: Policy) -> dict[str, Any]:
    """What a robot must know of a policy to use it without its checkpoint; plain values only."""
    import torch

    robot, config, codec = policy.embodiment, policy.config, policy.codec
    height, width = config.image_size
    horizon = config.head.action_horizon
    steps = config.head.num_inference_timesteps if policy.engine is None else policy.engine.steps
    uses_state = codec.state is not None
    return {
        "server": "dit4dit",
        "version": dit4dit.__version__,
        "torch": torch.__version__,
        "device": policy.device.type,
        "dtype": str(policy.model.backbone.transformer.proj_out.weight.dtype).removeprefix("torch."),
        "embodiment": robot.name,
        "statistics": codec.tag,
        "views": [{"name": name, "height": height, "width": width} for name in robot.views],
        "resize": robot.resize,
        "joined_picture": [height, width * len(robot.views)],
        "state_keys": [{"name": key.name, "dim": key.dim} for key in robot.state] if uses_state else [],
        "encoded_state_dim": config.head.state_dim,
        "action_names": list(robot.action_names),
        "model_action_dim": config.head.action_dim,
        "action_horizon": horizon,
        "rate_hz": robot.rate_hz,
        "chunk_seconds": horizon / robot.rate_hz,
        "gripper": None if robot.gripper is None else robot.gripper.meaning,
        "steps": steps,
        "notes": list(robot.notes),
    }
