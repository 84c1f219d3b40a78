"""Requests as a policy runs them: checked, and sorted into passes of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit4dit.engine import MAX_BATCH, PromptPack
from dit4dit.errors import InputError
from dit4dit.noise import Noise
from dit4dit.types import Guidance


@dataclass(frozen=True, eq=False)
class Request:
    """One request, checked: pictures uint8 [H, W, 3] per view, encoded state [1, state_dim] or None."""

    pictures: list[NDArray[np.uint8]]
    state: NDArray[np.float32] | None
    instruction: str
    noise: Noise
    guidance: Guidance | None = None

    @property
    def max_guidance(self) -> float | None:
        """Bound of the guidance, which a pass has in common; None without guidance."""
        return None if self.guidance is None else self.guidance.max_guidance


def checked_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width); InputError unless it is two positive whole numbers."""
    numbers = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in numbers):
        raise InputError(f"{name}: expected (height, width) in pixels, got {size!r:.60}")
    return int(numbers[0]), int(numbers[1])


def groups(requests: Sequence[Request], texts: Sequence[PromptPack | Tensor]) -> list[list[int]]:
    """Indices of requests that can go in one pass: same sizes and bound of guidance, at most MAX_BATCH of them.

    texts: each request's pack or projected text [1, L, text_dim].
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (request, text) in enumerate(zip(requests, texts, strict=True)):
        length = text.length if isinstance(text, PromptPack) else text.shape[1]
        kind = (length, request.max_guidance, *(picture.shape for picture in request.pictures))
        alike.setdefault(kind, []).append(i)
    return [group[i : i + MAX_BATCH] for group in alike.values() for i in range(0, len(group), MAX_BATCH)]


def states(requests: Sequence[Request]) -> NDArray[np.float32] | None:
    """Encoded states of one pass [B, 1, state_dim]; None where its requests have none."""
    found = [request.state for request in requests if request.state is not None]
    return np.stack(found) if found else None


def noises_of(noise: Sequence[Noise] | None, count: int) -> list[Noise]:
    """One noise per request, fresh where none is given."""
    if noise is None:
        return [Noise.fresh() for _ in range(count)]
    if not isinstance(noise, (list, tuple)) or any(not isinstance(one, Noise) for one in noise):
        raise InputError(f"noise: expected a list of Noise, one per request, got {type(noise).__name__}")
    if len(noise) != count:
        raise InputError(f"noise: expected one per request ({count}), got {len(noise)}")
    return list(noise)


def guidances_of(
    guidance: Sequence[Guidance | None] | None, count: int, length: int, width: int
) -> list[Guidance | None]:
    """One guidance or None per request, checked for chunks [length, width]."""
    if guidance is None:
        return [None] * count
    if not isinstance(guidance, (list, tuple)) or any(not isinstance(one, Guidance | None) for one in guidance):
        raise InputError(f"guidance: expected a list of Guidance or None, one per request, got {guidance!r:.60}")
    if len(guidance) != count:
        raise InputError(f"guidance: expected one per request ({count}), got {len(guidance)}")
    for one in guidance:
        if one is not None:
            one.check(length, width)
    return list(guidance)
