"""What every rank of a one-launch head reads and stores, word by word, and which of it comes before which: by trying it all.

The validator proves schedules from the chain of stages; here nothing is known of stages, buffers or matrices, only the numbers of
the records. It takes long, so schedules have to be small.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dit4dit.engine.action_ode.schedule import NONE, Attend, Epilogue, Operands, Product, Schedule

STEPS = 2
Event = tuple[int, int, int]
"""Tile, rank, step."""


def area(first: int, tokens: int, stride: int, columns: int) -> set[int]:
    """Words of `columns` columns of tokens."""
    return {first + t * stride + c for t in range(tokens) for c in range(columns // 2)}


def read_words(w: Operands, schedule: Schedule, rank: int) -> set[int]:
    if isinstance(w, Product):
        return read_by_product(w, schedule, rank)
    pair, index = pair_of(w, rank)
    keys, dim = min(max(w.keys - index * w.slice, 0), w.slice), schedule.shape.head_dim
    if pair is None or keys == 0:
        return set()
    place = place_of(pair, w.stride, schedule)
    found = area(w.query + place, w.tokens, w.stride, dim)
    if w.context == NONE:
        for first in (w.key, w.value):
            found |= area(first + place + index * w.slice * w.stride, keys, w.stride, dim)
    return found


def read_by_product(w: Product, schedule: Schedule, rank: int) -> set[int]:
    """Its own columns; where they are attention's results, q, k and v of every head that one of them belongs to."""
    first = rank % w.split * w.slice
    end = min(first + w.slice, w.columns)
    if end <= first:
        return set()
    if not w.attend:
        return area(w.source + first // 2, w.tokens, w.source_stride, end - first)
    dim = schedule.shape.head_dim
    heads = {column // dim for column in range(first, end)}
    begins = [w.source + (part * w.columns + head * dim) // 2 for part in range(3) for head in heads]
    return set().union(*(area(begin, w.tokens, w.source_stride, dim) for begin in begins))


def pair_of(w: Attend, rank: int) -> tuple[int | None, int]:
    """(the pair that a rank has a share of, which share of it); of pairs that a tile does not have None."""
    which, index = divmod(rank, w.share)
    return w.pair + which if which < w.pairs else None, index


def place_of(pair: int, stride: int, schedule: Schedule) -> int:
    """Words from the first sample's first head to a pair."""
    sample, head = divmod(pair, schedule.shape.heads)
    return sample * schedule.shape.tokens * stride + head * schedule.shape.head_dim // 2


def stored_words(w: Operands, schedule: Schedule, rank: int) -> set[int]:
    if isinstance(w, Attend):
        pair, index = pair_of(w, rank)
        if pair is None:
            return set()
        columns = schedule.shape.head_dim // w.share
        first = w.out + place_of(pair, w.out_stride, schedule) + index * columns // 2
        return area(first, w.tokens, w.out_stride, columns)
    own = w.tile_rows // schedule.ranks
    end = schedule.shape.padded_actions - w.row if w.epilogue == Epilogue.EULER else w.rows
    columns = min(max(end - rank * own, 0), own)
    return area(w.out + rank * own // 2, w.tokens, w.out_stride, columns)


def summed(w: Operands, rank: int) -> list[int]:
    """Ranks whose sums are in what a rank stores, itself included; of attention those that have keys of the same pair."""
    if isinstance(w, Product):
        first = rank // w.split * w.split
        return list(range(first, first + w.split))
    if pair_of(w, rank)[0] is None:
        return [rank]
    first = rank // w.share * w.share
    return [r for r in range(first, first + w.share) if r == rank or (r - first) * w.slice < w.keys]


@dataclass
class Order:
    """Events of STEPS steps: each rank's reads of each tile, and what it stores; and what comes before each for certain."""

    schedule: Schedule
    reads: dict[Event, set[int]] = field(default_factory=dict)
    stores: dict[Event, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.events = [
            (i, rank, step)
            for step in range(STEPS)
            for i in range(len(self.schedule.tiles))
            for rank in range(self.schedule.ranks)
        ]
        self.number = {event: n for n, event in enumerate(self.events)}
        work = [tile.work for tile in self.schedule.decoded]
        for event in self.events:
            self.reads[event] = read_words(work[event[0]], self.schedule, event[1])
            self.stores[event] = stored_words(work[event[0]], self.schedule, event[1])
        self.work = work

    def is_ahead(self, i: int) -> bool:
        """Whether a tile's words are the next step's."""
        w = self.work[i]
        return isinstance(w, Product) and w.epilogue == Epilogue.EULER

    def fault(self) -> str | None:
        """What is wrong with words or their order; None: nothing."""
        writer: dict[int, tuple[int, int]] = {}
        for (i, rank, step), words in self.stores.items():
            if step == 0:
                if any(word in writer for word in words):
                    return f"tile {i} stores a word of another"
                writer |= dict.fromkeys(words, (i, rank))
        for (i, _, _), words in self.reads.items():
            if not words <= writer.keys():
                return f"tile {i} reads what nobody stores"
        before = self._before(self._edges(writer))
        if before is None:
            return "circle"
        late = len(self.events)
        for event, words in self.reads.items():
            i, rank, step = event
            for word in words if step == 0 else ():
                who, by = writer[word]
                # EMPTY is stored with the next step's word, of noisy actions in the step that reads them
                store = (who, by, 0 if self.is_ahead(who) else 1)
                if not before[late + self.number[store]] >> self.number[event] & 1:
                    return f"tile {i} rank {rank} may still read {word} when tile {who} makes it EMPTY"
        return None

    def _edges(self, writer: dict[int, tuple[int, int]]) -> dict[int, set[int]]:
        """What comes right before each node: reads have an event's number, what is stored that and as many more as events."""
        edges: dict[int, set[int]] = defaultdict(set)
        late, ranks = len(self.events), self.schedule.ranks
        for (i, rank, step), words in self.reads.items():
            node = self.number[i, rank, step]
            for who, by in {writer[word] for word in words}:
                since = step - self.is_ahead(who)
                if since >= 0:
                    edges[node].add(late + self.number[who, by, since])
            for other in summed(self.work[i], rank):
                edges[late + node].add(self.number[i, other, step])
        for begin, end in pairwise(self.schedule.first_tile.tolist()):
            tiles = [(i, step) for step in range(STEPS) for i in range(begin, end)]
            for rank in range(ranks):
                for (i, step), (following, then) in pairwise(tiles):
                    edges[self.number[following, rank, then]].add(self.number[i, rank, step])
        return edges

    def _before(self, edges: dict[int, set[int]]) -> list[int] | None:
        """Bits of all nodes before each; None where there is a circle."""
        count = 2 * len(self.events)
        after: dict[int, list[int]] = defaultdict(list)
        left = np.zeros(count, np.int64)
        for node, those in edges.items():
            left[node] = len(those)
            for one in those:
                after[one].append(node)
        before, ready, done = [0] * count, np.flatnonzero(left == 0).tolist(), 0
        while ready:
            node = ready.pop()
            done += 1
            for following in after[node]:
                before[following] |= before[node] | 1 << node
                left[following] -= 1
                if left[following] == 0:
                    ready.append(following)
        return before if done == count else None
