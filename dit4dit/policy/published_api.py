"""The published call's examples (dicts of pictures, words and encoded state) -> checked arrays.

{"image": uint8 [H, W, 3] or a list of them, "lang": str, "state": [1, state_dim] (optional)}
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError, shown
from dit4dit.robots.embodiment import check_picture, narrowed, numbers

log = logging.getLogger("dit4dit.policy")
Example = Mapping[str, Any]
ASPECT = 0.05
"""How far the first image's aspect may be from the joined one's before it looks like a single view, as a share of it."""


def check(examples: Any) -> list[Example]:
    """A non-empty list of mappings, or one mapping; InputError otherwise."""
    found = [examples] if isinstance(examples, Mapping) else examples
    if not isinstance(found, (list, tuple)) or not found:
        hint = (
            "; give list(examples)"
            if isinstance(found, Iterable) and not isinstance(found, (str, bytes, list, tuple))
            else ""
        )
        raise InputError(f"examples: expected a dict or a list of at least one, got {_named(found)}{hint}")
    for i, example in enumerate(found):
        if not isinstance(example, Mapping):
            raise InputError(f"examples[{i}]: expected a dict with image and lang, got {type(example).__name__}")
    return list(found)


def _named(found: object) -> str:
    return f"an empty {type(found).__name__}" if isinstance(found, (list, tuple)) else type(found).__name__


def pictures(examples: Sequence[Example], unit: int) -> list[NDArray[np.uint8]]:
    """Each example's first picture as it is, uint8 [H, W, 3], all of one size. In a list the others are future frames of a
    training sample, which a policy does not see; views come joined already.

    Raises:
        InputError: a picture is missing or of another kind, sizes differ, or sides are not divisible by `unit`.
    """
    found = []
    for i, example in enumerate(examples):
        image = example.get("image")
        first = image[0] if isinstance(image, (list, tuple)) and image else image
        if first is None or (isinstance(first, (list, tuple)) and not first):
            raise InputError(f"examples[{i}].image: missing; expected a uint8 [H, W, 3] array or a list of them")
        found.append(check_picture(first, f"examples[{i}].image"))
    sizes = sorted({picture.shape[:2] for picture in found})
    if len(sizes) > 1:
        raise InputError(f"examples: pictures of different sizes {sizes}; one batch, one size")
    check_unit("examples[0].image", sizes[0], unit)
    return found


def check_unit(where: str, size: Sequence[int], unit: int) -> None:
    """InputError unless a joined image's sides are divisible by `unit`, the pixels of a token."""
    if size[0] % unit or size[1] % unit:
        raise InputError(
            f"{where}: expected sides divisible by {unit}, got {size[0]} x {size[1]}; resize it, or use infer()"
        )


def encoded_states(examples: Sequence[Example], width: int) -> NDArray[np.float32] | None:
    """float32 [B, 1, width], or None where no example has a state (the model then goes without its state token).

    Raises:
        InputError: some examples have a state and others none, or one is of another size, not numeric or not finite.
    """
    given = [example.get("state") is not None for example in examples]
    if not any(given):
        return None
    rows = []
    for i, example in enumerate(examples):
        if not given[i]:
            raise InputError(f"examples[{i}].state: missing, and other examples have one; give all or none")
        row = numbers(example["state"])
        if row is None:
            raise InputError(f"examples[{i}].state: expected {width} numbers, got {shown(example['state'])}")
        if row.shape not in ((1, width), (width,)):
            shape = list(row.shape)
            raise InputError(f"examples[{i}].state: expected shape [1, {width}], encoded and padded, got {shape}")
        row = narrowed(row.reshape(1, width))
        if not np.isfinite(row).all():
            raise InputError(f"examples[{i}].state: has NaN or infinite values; check the sensor")
        rows.append(row)
    return np.stack(rows)


def instructions(examples: Sequence[Example]) -> list[str]:
    """The words of each example."""
    for i, example in enumerate(examples):
        if not isinstance(example.get("lang"), str):
            raise InputError(f"examples[{i}].lang: expected a string, got {shown(example.get('lang'))}")
    return [str(example["lang"]) for example in examples]


class Unjoined:
    """Warns once of examples whose image is a list of single views, of which a policy would see the first alone."""

    def __init__(self, views: int, size: tuple[int, int]) -> None:
        """size: height and width of one view as the model has it."""
        self._views, self._size = views, size
        self._silent = views < 2

    def look(self, examples: Sequence[Example]) -> None:
        """Examples that `pictures` has taken. A list may hold the future frames of a joined image, so this is no error."""
        if self._silent:
            return
        height, width = self._size
        for i, example in enumerate(examples):
            image = example["image"]
            if not isinstance(image, (list, tuple)) or len(image) < 2:
                continue
            own = np.shape(image[0])
            joined = self._views * width / height
            if abs(own[1] / own[0] / joined - 1) > ASPECT + 1e-9:
                self._silent = True
                log.warning(
                    "examples[%d].image: of a list of %d images only the first is used, %d x %d; the others count as future "
                    "frames. This robot has %d views: join them side by side (numpy.concatenate(views, axis=1), %d x %d), or use "
                    "infer(). Said once",
                    *(i, len(image), own[0], own[1], self._views, height, self._views * width),
                )
                return
