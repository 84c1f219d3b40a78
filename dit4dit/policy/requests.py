"""Requests as a policy runs them: checked once, where they come in, and sorted into passes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dit4dit.config import ModelConfig
from dit4dit.engine import MAX_BATCH, RequestShape
from dit4dit.errors import ConfigError, InputError, shown
from dit4dit.policy import published_api as published
from dit4dit.policy.prompts import Embedder
from dit4dit.robots.embodiment import Array, Resize
from dit4dit.robots.processor import Codec
from dit4dit.types import Guidance, Noise, Observation

Size = tuple[int, int] | None
"""Height and width that each view is brought to; None leaves the pictures as they are."""
Kind = tuple[RequestShape, bool]
"""What the requests of one pass have in common: its shape but for their number, and `Request.units`."""
One = TypeVar("One")
MAX_SIDE = 16384
"""Pixels of a camera image's side that a plan is made for beforehand."""
MAX_IMAGES = 8 * 2**30
"""Bytes of the images of one pass that a plan is made for beforehand."""


@dataclass(frozen=True, eq=False)
class Request:
    """One request, checked: the `Door` makes them, and nothing behind it looks again.

    Attributes:
        pictures: uint8 [H, W, 3] per view.
        state: encoded state [1, state_dim] or None.
        text_length: tokens of the instruction.
        size, resize: what each view is brought to, and the filter that brings it there.
        units: whether the device computes the actions in robot units too; if not, NumPy does behind it.
        observed_at_ns: of the chunk (`ActionChunk`).
    """

    pictures: list[NDArray[np.uint8]]
    state: NDArray[np.float32] | None
    instruction: str
    text_length: int
    noise: Noise
    size: Size
    resize: Resize
    units: bool
    guidance: Guidance | None = None
    observed_at_ns: int | None = None

    @cached_property
    def kind(self) -> Kind:
        """Requests of one kind may share a pass, and no others; the shape is that of a pass of this request alone."""
        views = tuple((int(picture.shape[0]), int(picture.shape[1])) for picture in self.pictures)
        with_state, most = self.state is not None, None if self.guidance is None else self.guidance.max_guidance
        return RequestShape(1, views, self.size, self.resize, with_state, self.text_length, most), self.units


def groups(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests of each pass: of one kind, at most MAX_BATCH."""
    alike: dict[Kind, list[int]] = {}
    for i, request in enumerate(requests):
        alike.setdefault(request.kind, []).append(i)
    return [group[i : i + MAX_BATCH] for group in alike.values() for i in range(0, len(group), MAX_BATCH)]


def states(requests: Sequence[Request]) -> NDArray[np.float32] | None:
    """Encoded states of one pass [B, 1, state_dim]; None where its requests have none."""
    found = [request.state for request in requests if request.state is not None]
    return np.stack(found) if found else None


def listed(name: str, what: str, values: Any) -> Sequence[Any]:
    """The values themselves; InputError unless they are a list or another sequence.

    What can be gone through only once, or in no order, is none; the letters of a text and the keys of a dict are not meant.
    """
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray, memoryview)):
        return values
    known = (str, bytes, bytearray, memoryview, Mapping)
    got = "one string" if isinstance(values, str) else type(values).__name__
    hint = f"; give list({name})" if isinstance(values, Iterable) and not isinstance(values, known) else ""
    raise InputError(f"{name}: expected a list of {what}, got {got}{hint}")


def checked_batch(batch: Any) -> int:
    """Requests of one pass; InputError unless it is a whole number, 1 to MAX_BATCH."""
    whole = isinstance(batch, (int, np.integer)) and not isinstance(batch, bool)
    if not whole or not 1 <= batch <= MAX_BATCH:
        raise InputError(f"batch: expected 1 to {MAX_BATCH}, got {shown(batch)}")
    return int(batch)


def check_room(batch: int, sizes: Sequence[tuple[int, int]]) -> None:
    """InputError where the images of one pass are larger than any camera's, or all together than MAX_IMAGES."""
    largest = max(max(size) for size in sizes)
    if largest > MAX_SIDE:
        raise InputError(
            f"image sizes: expected sides of at most {MAX_SIDE} pixels, got {largest}; give the cameras' own"
        )
    total = batch * sum(3 * height * width for height, width in sizes)
    if total > MAX_IMAGES:
        raise InputError(
            f"image sizes: expected at most {MAX_IMAGES / 2**30:g} GiB of images in one pass, got {total / 2**30:.1f} ({batch} x "
            f"{', '.join(f'{height} x {width}' for height, width in sizes)}); make the images smaller, or the batch"
        )


def checked_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width); InputError unless it is two positive whole numbers."""
    numbers = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in numbers):
        raise InputError(f"{name}: expected (height, width) in pixels, got {shown(size)}")
    return int(numbers[0]), int(numbers[1])


class Door:
    """What comes from outside -> requests; each is checked here and nowhere else."""

    def __init__(self, codec: Codec, config: ModelConfig, embedder: Embedder) -> None:
        self._codec, self._config, self._embedder = codec, config, embedder
        self._unjoined = published.Unjoined(len(codec.embodiment.views), config.image_size)

    def request(
        self,
        observation: Observation,
        instruction: str,
        noise: Noise | None,
        guidance: Guidance | None,
        observed_at_ns: int | None = None,
    ) -> Request:
        """InputError where something does not fit; noise None is a fresh one, observed_at_ns None the time of this call."""
        observed_at = _observed_at(observed_at_ns)
        _expect("observation: expected an Observation", observation, Observation)
        robot, head = self._codec.embodiment, self._config.head
        if guidance is not None:
            _expect("guidance: expected a Guidance or None", guidance, Guidance)
            guidance.check(head.action_horizon, head.action_dim)
        seen, state = robot.ordered_views(observation.images), self._state(observation)
        length, noise = self._embedder.length(instruction), _noise(noise)
        size, resize = self._config.image_size, robot.resize
        return Request(seen, state, instruction, length, noise, size, resize, True, guidance, observed_at)

    def requests(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        noise: Sequence[Noise] | None,
        guidance: Sequence[Guidance | None] | None = None,
        observed_at_ns: Sequence[int | None] | None = None,
    ) -> list[Request]:
        """One per observation."""
        now = time.monotonic_ns()
        seen = listed("observations", "Observation", observations)
        words = listed("instructions", "strings, one per observation", instructions)
        count = len(seen)
        if not count or count != len(words):
            raise InputError(
                f"batch: {count} observations and {len(words)} instructions; expected as many, and at least one"
            )
        for i, one in enumerate(seen):
            _expect(f"observations[{i}]: expected an Observation", one, Observation)
        noises = _noises(noise, count)
        kept = _one_each("guidance", "Guidance or None", guidance, count)
        stamps = _one_each("observed_at_ns", "ns or None", observed_at_ns, count)
        stamps = [now if stamp is None else stamp for stamp in stamps]
        return [self.request(*given) for given in zip(seen, words, noises, kept, stamps, strict=True)]

    def examples(
        self, examples: Sequence[published.Example] | published.Example, noise: Noise | Sequence[Noise] | None
    ) -> list[Request]:
        """One per example of the published call."""
        now = time.monotonic_ns()
        found = published.check(examples)
        noises = _noises([noise] if isinstance(noise, Noise) else noise, len(found))
        pictures = published.pictures(found, self._config.pixels_per_token)
        self.check_joined("examples[0].image", pictures[0].shape[:2])
        self._unjoined.look(found)
        width, state_range = self._config.head.state_dim, self._codec.state_range
        encoded = None if width is None else published.encoded_states(found, width)
        if encoded is not None and state_range is not None:
            state_range.look_encoded(encoded)
        requests = []
        for i, words in enumerate(published.instructions(found)):
            state, length = None if encoded is None else encoded[i], self._embedder.length(words)
            one = Request([pictures[i]], state, words, length, noises[i], None, "bilinear", units=False)
            requests.append(replace(one, observed_at_ns=now))
        return requests

    def check_joined(self, where: str, size: tuple[int, ...]) -> None:
        """InputError unless the model takes joined images of this height and width."""
        published.check_unit(where, size, self._config.pixels_per_token)
        try:
            self._config.latent_size(size[0], size[1])
        except ConfigError as error:
            raise InputError(f"{where}: {error}") from None

    def _state(self, observation: Observation) -> Array | None:
        """Encoded state [1, state_dim]; None for a model without a state token, which looks at no state."""
        if self._codec.state is None:
            return None
        raw = self._codec.embodiment.state_vector(observation.state)
        if self._codec.state_range is not None:
            self._codec.state_range.look(raw)
        return self._codec.state.forward(raw[None])


def _noise(noise: Noise | None) -> Noise:
    """A fresh one for None."""
    if noise is None:
        return Noise.fresh()
    _expect("noise: expected a Noise", noise, Noise, "; give Noise.from_seed(7), say, or infer's seed=7")
    return noise


def _noises(noise: Sequence[Noise] | None, count: int) -> list[Noise]:
    """One per request; fresh ones where there is no list, and never in the place of one that is missing in a list."""
    if noise is None:
        return [Noise.fresh() for _ in range(count)]
    given = _one_each("noise", "Noise", noise, count)
    found = [one for one in given if isinstance(one, Noise)]
    if len(found) != count:
        kinds = ", ".join(sorted({type(one).__name__ for one in given if not isinstance(one, Noise)}))
        raise InputError(f"noise: expected a list of Noise, one per request, got one with {kinds}")
    return found


def _observed_at(stamp: int | None) -> int:
    """The stamp of an observation, ns of CLOCK_MONOTONIC; the time of this call for None."""
    now = time.monotonic_ns()
    if stamp is None:
        return now
    whole = isinstance(stamp, (int, np.integer)) and not isinstance(stamp, bool)
    if not whole or not 0 <= stamp <= now:  # time.time_ns() is far in the future of this clock
        raise InputError(
            f"observed_at_ns: expected time.monotonic_ns() of when the observation was made, 0 to {now} (the present), got "
            f"{shown(stamp)}; time.time_ns() and other machines' clocks are not this one"
        )
    return int(stamp)


def _expect(wanted: str, value: object, kind: type, hint: str = "") -> None:
    if not isinstance(value, kind):
        raise InputError(f"{wanted}, got {type(value).__name__}{hint}")


def _one_each(name: str, kind: str, values: Sequence[One] | None, count: int) -> Sequence[One | None]:
    """The values, one per request: InputError where there are more or fewer, or they are no list. None where there are none."""
    if values is None:
        return [None] * count
    listed(name, f"{kind}, one per request", values)
    if len(values) != count:
        raise InputError(f"{name}: expected one per request ({count}), got {len(values)}")
    return values
