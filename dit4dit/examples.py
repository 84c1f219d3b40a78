"""The published call's examples (dicts of pictures, words and encoded state) -> checked arrays.

{"image": uint8 [H, W, 3] or a list of them, "lang": str, "state": [1, state_dim]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.embodiments.embodiment import check_picture
from dit4dit.errors import InputError

Example = Mapping[str, Any]


def joined_pictures(examples: Sequence[Example], unit: int) -> NDArray[np.uint8]:
    """uint8 [B, H, W, 3]: each example's views joined along the width, not resized.

    Raises:
        InputError: a picture is missing or of another kind, heights or sizes differ, or sides not divisible by `unit`.
    """
    joined = []
    for i, example in enumerate(examples):
        views = _pictures(example, i)
        if len({view.shape[0] for view in views}) > 1:
            heights = [view.shape[0] for view in views]
            raise InputError(f"examples[{i}].image: views of different heights {heights}; resize them")
        joined.append(np.concatenate(views, axis=1))
    sizes = sorted({picture.shape[:2] for picture in joined})
    if len(sizes) > 1:
        raise InputError(f"examples: pictures of different sizes {sizes}; one batch, one size")
    height, width = sizes[0]
    if height % unit or width % unit:
        raise InputError(
            f"examples[0].image: expected sides divisible by {unit}, got {height} x {width}; resize it, or use infer()"
        )
    return np.stack(joined)


def encoded_states(examples: Sequence[Example], width: int) -> NDArray[np.float32]:
    """float32 [B, 1, width]; InputError names the example whose state is missing, of another size, or not finite."""
    rows = []
    for i, example in enumerate(examples):
        if example.get("state") is None:
            raise InputError(f"examples[{i}].state: missing; this model takes an encoded state of shape [1, {width}]")
        try:
            row = np.asarray(example["state"], dtype=np.float32)
        except (TypeError, ValueError):
            raise InputError(f"examples[{i}].state: expected {width} numbers, got {example['state']!r:.60}") from None
        if row.shape not in ((1, width), (width,)):
            shape = list(row.shape)
            raise InputError(f"examples[{i}].state: expected shape [1, {width}], encoded and padded, got {shape}")
        if not np.isfinite(row).all():
            raise InputError(f"examples[{i}].state: has NaN or infinite values; check the sensor")
        rows.append(row.reshape(1, width))
    return np.stack(rows)


def instructions(examples: Sequence[Example]) -> list[str]:
    """The words of each example."""
    for i, example in enumerate(examples):
        if not isinstance(example.get("lang"), str):
            raise InputError(f"examples[{i}].lang: expected a string, got {example.get('lang')!r:.60}")
    return [str(example["lang"]) for example in examples]


def _pictures(example: Example, index: int) -> list[NDArray[np.uint8]]:
    image = example.get("image")
    views = list(image) if isinstance(image, (list, tuple)) else [image]
    if image is None or not views:
        raise InputError(f"examples[{index}].image: missing; expected a uint8 [H, W, 3] array or a list of them")
    return [check_picture(view, f"examples[{index}].image") for view in views]
