"""What the twin's teams exchange: words that know of which step they are, and which of them each tile reads and writes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit4dit.engine.action_ode.schedule import (
    EMPTY,
    NONE,
    SETS,
    Attend,
    Epilogue,
    HeadShape,
    Operands,
    Product,
    Schedule,
)


class Area(NamedTuple):
    """Words of a set: `words` neighbours for each token, `stride` from token to token."""

    first: int
    tokens: int
    stride: int
    words: int


class Words:
    """What launches of one schedule leave to the next.

    Attributes:
        values: [SETS, set_words, 2]; NaN where EMPTY.
        step: int64 [SETS, set_words], which step a word is of, counted over all launches, or EMPTY.
        done: steps of all launches so far.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype, device: torch.device) -> None:
        size = (SETS, schedule.set_words)
        self.values = torch.full((*size, 2), math.nan, dtype=dtype, device=device)
        self.step = torch.full(size, EMPTY, dtype=torch.int64, device=device)
        self.done = 0

    def missing(self, area: Area, step: int) -> int | None:
        """A word of step `step` that is not there, or None.

        RuntimeError: a word is of another step.
        """
        found = self._of(self.step[step % SETS], area)
        late = (found != step).flatten().nonzero()
        if not len(late):
            return None
        wrong = found[(found != step) & (found != EMPTY)]
        if len(wrong):
            raise RuntimeError(f"action_ode: {area}: expected words of step {step}, got one of step {int(wrong[0])}")
        token, word = divmod(int(late[0]), area.words)
        return area.first + token * area.stride + word

    def read(self, area: Area, step: int) -> Tensor:
        """[tokens, columns]."""
        if self.missing(area, step) is not None:
            raise RuntimeError(f"action_ode: {area}: expected words of step {step}, got EMPTY")
        return self._of(self.values[step % SETS], area)

    def write(self, area: Area, step: int, values: Tensor) -> None:
        """values [tokens, columns] for step `step`.

        RuntimeError: a word is not EMPTY.
        """
        steps = self._of(self.step[step % SETS], area)
        if (steps != EMPTY).any():
            raise RuntimeError(f"action_ode: {area}: overwrites a word of step {int(steps.max())} in step {step}")
        steps.fill_(step)
        self._of(self.values[step % SETS], area).copy_(values)

    def clear(self, area: Area, step: int) -> None:
        """Make words EMPTY that will be of step `step`.

        RuntimeError: one is of another step than the last that had the set.
        """
        steps = self._of(self.step[step % SETS], area)
        wrong = steps[(steps != EMPTY) & (steps != step - SETS)]
        if len(wrong):
            raise RuntimeError(f"action_ode: {area}: clears a word of step {int(wrong[0])} for step {step}")
        self._of(self.step[step % SETS], area).fill_(EMPTY)
        self._of(self.values[step % SETS], area).fill_(math.nan)

    @staticmethod
    def _of(table: Tensor, area: Area) -> Tensor:
        """The area of one set of `step` or `values`: [tokens, words or columns], a view."""
        each = table[0].numel()
        last = area.first + (area.tokens - 1) * area.stride + area.words
        assert 0 <= area.first < last <= len(table), area
        return table[area.first :].as_strided((area.tokens, area.words * each), (area.stride * each, 1))


def source(w: Product) -> Area:
    """The words that a product multiplies, or from which it works out what it multiplies."""
    return Area(w.source, w.tokens, w.source_stride, (3 if w.attend else 1) * w.columns // 2)


def reads(w: Operands, shape: HeadShape) -> list[Area]:
    """All words that a tile reads: a product's source, or queries, and keys and values where they are words."""
    if isinstance(w, Product):
        return [source(w)]
    return [area for pair in range(w.pair, w.pair + w.pairs) for area in pair_reads(w, pair, shape)]


def pair_reads(w: Attend, pair: int, shape: HeadShape) -> list[Area]:
    """Queries of one head of one sample, and its keys and values where they are words."""
    firsts = [w.query] if w.context != NONE else [w.query, w.key, w.value]
    return [_of_pair(pair, first, w.stride, shape) for first in firsts]


def pair_out(w: Attend, pair: int, shape: HeadShape) -> Area:
    """The words that one head of one sample writes."""
    return _of_pair(pair, w.out, w.out_stride, shape)


def _of_pair(pair: int, first: int, stride: int, shape: HeadShape) -> Area:
    sample, head = divmod(pair, shape.heads)
    words = shape.head_dim // 2
    return Area(first + sample * shape.tokens * stride + head * words, shape.tokens, stride, words)


def written(w: Product, shape: HeadShape) -> Area:
    """The words that a product writes; of the noisy actions all columns are written."""
    columns = min(w.tile_rows, shape.padded_actions - w.row) if w.epilogue == Epilogue.EULER else w.rows
    return Area(w.out, w.tokens, w.out_stride, columns // 2)
