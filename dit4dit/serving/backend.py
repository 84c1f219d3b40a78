"""A policy as the server sees it: what it says of itself, which requests it takes, and how several run in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch

import dit4dit
from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.policy.policy import Policy
from dit4dit.policy.requests import Request
from dit4dit.types import ActionChunk, Observation

MAX_EXAMPLES = 64
"""Examples of one request."""
MAX_WORDS = 4096
"""Letters of one instruction."""
MAX_AREA = 4
"""A joined picture may have this many times the area of the model's own: attention grows with its square, and a picture that fits
a frame but not the memory would end the server."""
MAX_VIEW = (3840, 2160)
"""Pixels of the longer and the shorter side of one image of a raw observation, whichever of them is its height: 4K."""


class Backend(Protocol):
    """What a server needs of a policy."""

    metadata: Mapping[str, Any]

    def check(self, message: Mapping[str, Any]) -> list[Request]:
        """What an inference message asks for, one request a chunk, at least one, each with a noise of its own; InputError where
        it does not fit the policy."""

    def prepare(self, request: Request) -> Future[None] | None:
        """Begin to make, in a thread of its own, what `run` needs of the request's instruction; None where it is there."""

    def run(self, requests: Sequence[Request]) -> list[ActionChunk]:
        """The chunk of each request."""


class PolicyBackend:
    """A loaded policy."""

    def __init__(self, policy: Policy, checkpoint: str, fingerprint: str) -> None:
        """checkpoint, fingerprint: its name, and a hash of what is in it, for clients' records."""
        self.policy, self.run = policy, policy.run
        self.metadata: Mapping[str, Any] = describe(policy) | {"checkpoint": checkpoint, "checkpoint_hash": fingerprint}

    def check(self, message: Mapping[str, Any]) -> list[Request]:
        """The policy's own door, and bounds of what strangers may ask for."""
        raw = "observation" in message
        if raw and "examples" in message:
            raise InputError("examples and observation: send one of them")
        return [self._raw(message)] if raw else self._published(message.get("examples"))

    def prepare(self, request: Request) -> Future[None] | None:
        words = request.instruction
        return None if self.policy.has_prepared(words) else self.policy.prepare(words)

    def _published(self, examples: Any) -> list[Request]:
        if isinstance(examples, (list, tuple)) and len(examples) > MAX_EXAMPLES:
            raise InputError(f"examples: at most {MAX_EXAMPLES} a request, got {len(examples)}")
        for example in examples if isinstance(examples, (list, tuple)) else [examples]:
            _bound("lang", example.get("lang") if isinstance(example, Mapping) else None)
        requests = self.policy.published_requests(examples)
        height, width = requests[0].pictures[0].shape[:2]
        own = self.policy.config.image_size
        joined = (own[0], own[1] * len(self.policy.embodiment.views))
        if height * width > MAX_AREA * joined[0] * joined[1]:
            raise InputError(
                f"examples[0].image: {height} x {width} is too large for a joined picture; the model's has {joined[0]} x "
                f"{joined[1]}"
            )
        return requests

    def _raw(self, message: Mapping[str, Any]) -> Request:
        given = message["observation"]
        if not isinstance(given, Mapping):
            raise InputError(f"observation: expected a map with images and state, got {type(given).__name__}")
        known = ("images", "state")
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known)
                raise InputError(f"observation {shown(name)}: unknown key{hint}; known: {', '.join(known)}")
        _bound("instruction", message.get("instruction"))
        # the door says what it wants instead of None
        observation = Observation(given.get("images"), given.get("state", {}))  # type: ignore[arg-type]
        request = self.policy.request(observation, message.get("instruction"))  # type: ignore[arg-type]
        for view, image in zip(self.policy.embodiment.views, request.pictures, strict=True):
            height, width = image.shape[:2]
            if max(height, width) > MAX_VIEW[0] or min(height, width) > MAX_VIEW[1]:
                raise InputError(
                    f"image {view!r}: expected at most {MAX_VIEW[0]} x {MAX_VIEW[1]} pixels, either way round, got {height} x "
                    f"{width}; send it smaller"
                )
        return request


def _bound(name: str, words: object) -> None:
    """InputError for more letters than a stranger may ask the policy to look at; whether they are words the door says."""
    if isinstance(words, str) and len(words) > MAX_WORDS:
        raise InputError(f"{name}: expected at most {MAX_WORDS} letters, got {len(words)}: {shown(words[:50])}...")


def describe(policy: Policy) -> dict[str, Any]:
    """What a robot must know of a policy to use it without its checkpoint; plain values only."""
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
        "dtype": str(policy.model.dtype).removeprefix("torch."),
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
        "control_hz": robot.control_hz,
        "chunk_seconds": horizon / robot.control_hz,
        "gripper": None if robot.gripper is None else robot.gripper.meaning,
        "steps": steps,
        "notes": list(robot.notes),
    }
