"""How the work of a head is cut: ranks of a team, rows, columns and warps of each matrix, keys of each rank, shared memory.

All cuts that the kernel can run are priced by `cost`, and the ones that are predicted to take least are taken. Prices of
matrices do not depend on each other but for what they share: ranks, shared memory, and the owners of the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from dit4dit.engine.action_ode.cost import Costs, attend_us, product_us, weights_us
from dit4dit.engine.action_ode.schedule import (
    FIXED_SHARED,
    MAX_TOKENS,
    MAX_WARP_TILES,
    PADDED_TOKENS,
    RANKS,
    SLOT_BYTES,
    STEP_COLUMNS,
    WARPS,
    WEIGHT_UNIT,
    Device,
    HeadShape,
    MatrixPlan,
    attend_bytes,
    attend_inbox,
    product_staging,
    sums_bytes,
)
from dit4dit.errors import ConfigError

LEAST_SLOTS, ENOUGH_SLOTS, MOST_SLOTS = 3, 6, 16
"""Of weights: the fewest, as many as activations leave room for if they can, and as many as the kernel has barriers for."""
STREAM = ("encode_out", "out", "mlp_out")
"""Matrices whose results are the residual stream: they have the same rows in the same teams."""


class Kind(NamedTuple):
    """Matrices that are cut alike."""

    name: str  # without the block
    rows: int
    columns: int
    fp8: bool


class Cut(NamedTuple):
    """One way to run a kind of matrix; times of a stage, on the team with most tiles, in microseconds."""

    matrix: MatrixPlan
    tiles: int  # of that team
    us: float  # everything but the barriers around parts of the activations
    inbox: int
    sums: int  # bytes of staging for sums, without exchange


@dataclass(frozen=True)
class Cuts:
    """What was chosen. `slices`: keys of one rank, of attention to the tokens themselves and to the features."""

    ranks: int
    teams: int
    matrices: dict[str, MatrixPlan]
    slices: tuple[int, int]
    part: int
    slots: int
    staging: int
    inbox: int
    us: float


def groups_of(shape: HeadShape) -> list[range]:
    """Samples whose tokens one product takes together: as many as it can, evenly."""
    most = max(1, min(shape.batch, MAX_TOKENS // shape.tokens))
    count = -(-shape.batch // most)
    size = -(-shape.batch // count)
    return [range(b, min(b + size, shape.batch)) for b in range(0, shape.batch, size)]


def kinds_of(shape: HeadShape) -> list[tuple[str, Kind]]:
    """All matrices with their names, in the order of the weights."""
    s = shape
    found = [("encode", s.width, s.padded_actions), ("encode_out", s.width, s.width)]
    for i, cross in enumerate(s.blocks):
        found += [
            (f"{i}.project", s.width if cross else 3 * s.width, s.width),
            (f"{i}.out", s.width, s.width),
            (f"{i}.mlp_in", s.mlp, s.width),
            (f"{i}.mlp_out", s.width, s.mlp),
        ]
    found += [("decode_in", s.decoder, s.width), ("decode_out", s.actions, s.decoder)]
    # what is outside the blocks is 3 % of the weights, and nearest to the actions
    return [(name, Kind(name.split(".")[-1], *size, s.fp8 and name[0].isdigit())) for name, *size in found]


def choose(shape: HeadShape, device: Device, costs: Costs) -> Cuts:
    """The cuts with the least predicted time; of equal ones those with fewer ranks.

    Raises:
        ConfigError: the device has too little shared memory for any.
    """
    found = [
        cuts
        for ranks in RANKS
        if device.teams(ranks) and shape.head_dim % (2 * ranks) == 0
        for cuts in _Search(shape, device, ranks, costs).found()
    ]
    if not found:
        needed = _Search(shape, device, 1, costs).least()
        raise ConfigError(
            f"action_ode: shared_memory: expected at least {needed} bytes a block, got {device.shared_memory}; "
            "use head='library'"
        )
    return min(found, key=lambda cuts: cuts.us)


def _round(size: int) -> int:
    return -(-size // 128) * 128


class _Search:
    """All cuts with so many ranks."""

    def __init__(self, shape: HeadShape, device: Device, ranks: int, costs: Costs) -> None:
        self.shape, self.device, self.ranks, self.costs = shape, device, ranks, costs
        self.teams = device.teams(ranks)
        groups = groups_of(shape)
        self.groups, self.tokens = len(groups), len(groups[0]) * shape.tokens
        self.padded = next(n for n in PADDED_TOKENS if n >= self.tokens)
        self.named = kinds_of(shape)
        self.count: dict[Kind, int] = defaultdict(int)
        for _, kind in self.named:
            self.count[kind] += 1
        self.candidates = {kind: list(self._cuts(kind)) for kind in self.count}
        self.slices, self.attend_us = self._attention()
        pairs = zip((shape.tokens, shape.context), self.slices, strict=True)
        self.attend_staging = max(attend_bytes(shape.tokens, size, shape.head_dim) for _, size in pairs)
        self.attend_inbox = attend_inbox(shape.tokens, ranks, shape.head_dim) if ranks > 1 else 0

    # -- candidates ----------------------------------------------------------------------------------------------------

    def _rounds(self, rows: int, tile_rows: int) -> int:
        """Tiles of the team with most of them."""
        return -(-(-(-rows // tile_rows) * self.groups) // self.teams)

    def _cuts(self, kind: Kind) -> Iterator[Cut]:
        """Every cut of a kind, but heights of tiles that are more than their number of rounds needs."""
        for split in (n for n in RANKS if n <= self.ranks):
            unit = 16 * self.ranks // split
            rounds = 0
            for groups in range(1, MAX_WARP_TILES * WARPS + 1):
                tile_rows = groups * unit
                before, rounds = rounds, self._rounds(kind.rows, tile_rows)
                if rounds == before and kind.name not in STREAM:
                    continue
                for parts in (1, 2, 4, 8):
                    if groups <= MAX_WARP_TILES * (WARPS // parts):
                        yield self._cut(kind, tile_rows, split, parts, rounds)
                if tile_rows >= kind.rows:
                    break

    def _cut(self, kind: Kind, tile_rows: int, split: int, parts: int, rounds: int) -> Cut:
        m = MatrixPlan(kind.name, kind.rows, kind.columns, self.ranks, tile_rows, split, parts, kind.fp8, 0)
        us = self.costs.hop + rounds * sum(
            product_us(m, self.ranks, self.tokens, self.padded, m.slice, self.costs)
        )
        sums = sums_bytes(self.padded, m)
        return Cut(m, rounds, us, _round(sums) if split > 1 else 0, sums if split == 1 else 0)

    def _attention(self) -> tuple[tuple[int, int], float]:
        """(keys of one rank of both kinds of attention, microseconds of a step)."""
        s, slices, total = self.shape, [], 0.0
        rounds = -(-s.batch * s.heads // self.teams)
        for keys, cross, count in ((s.tokens, False, len(s.blocks) - s.contexts), (s.context, True, s.contexts)):
            prices = []
            for active in (n for n in RANKS if n <= self.ranks):
                size = -(-keys // active)
                parts = attend_us(s.tokens, keys, size, cross, s.head_dim, self.ranks, self.costs)
                prices.append((self.costs.hop + rounds * sum(parts), size))
            us, size = min(prices)
            slices.append(size)
            total += count * us
        return (slices[0], slices[1]), total

    # -- choice --------------------------------------------------------------------------------------------------------

    def found(self) -> Iterator[Cuts]:
        """The best for each limit on the inbox, for the chain of stages alone and with weights taken into account."""
        inboxes = {cut.inbox for cuts in self.candidates.values() for cut in cuts}
        limits = {max(self.attend_inbox, 1 << (size - 1).bit_length() if size else 0) for size in inboxes}
        for inbox in sorted(limits):
            for slots in range(ENOUGH_SLOTS, LEAST_SLOTS - 1, -1):
                staging = self.device.shared_memory - FIXED_SHARED - slots * SLOT_BYTES - 2 * _round(inbox)
                chosen = [self._choose(inbox, staging, weight) for weight in (0.0, 0.3, 1.0)]
                if any(chosen):
                    yield from (cuts for cuts in chosen if cuts)
                    break

    def _choose(self, inbox: int, staging: int, weight: float) -> Cuts | None:
        """The best with such an inbox and so much staging; weight: of the time of weights, which the chain may hide."""
        part = staging // (16 * self.padded + 16) * 8 // STEP_COLUMNS * STEP_COLUMNS
        if part < STEP_COLUMNS or self.attend_staging > staging:
            return None
        rate = max(1 / self.costs.sm_stream, self.teams * self.ranks / self.costs.memory) * 1e-6 * WEIGHT_UNIT

        def price(cut: Cut) -> float:
            return self._us(cut, part) + weight * rate * cut.tiles * cut.matrix.rank_units

        stream: dict[int, dict[Kind, Cut]] = defaultdict(dict)
        chosen: dict[Kind, Cut] = {}
        for kind, cuts in self.candidates.items():
            fitting = sorted((c for c in cuts if c.inbox <= inbox and c.sums <= staging), key=price)
            if not fitting:
                return None
            chosen[kind] = fitting[0]
            if kind.name in STREAM:
                for cut in reversed(fitting):
                    stream[cut.matrix.tile_rows][kind] = cut
        shared = [cuts for cuts in stream.values() if len(cuts) == len(STREAM)]
        if not shared:
            return None
        chosen |= min(shared, key=lambda cuts: sum(self.count[kind] * price(cut) for kind, cut in cuts.items()))
        return self._cuts_of(chosen, min(part, max(cut.matrix.slice for cut in chosen.values())))

    def _us(self, cut: Cut, part: int) -> float:
        """Of a stage, with barriers around each part of the activations but the first, which `cut.us` has."""
        return cut.us + cut.tiles * self.costs.sync * 2 * (-(-cut.matrix.slice // part) - 1)

    def _cuts_of(self, chosen: dict[Kind, Cut], part: int) -> Cuts:
        shape = self.shape
        chain = self.attend_us + sum(self.count[kind] * self._us(cut, part) for kind, cut in chosen.items())
        most = sum(self.count[kind] * cut.tiles * cut.matrix.rank_units for kind, cut in chosen.items())
        total = sum(self.count[kind] * self.groups * cut.matrix.units for kind, cut in chosen.items())
        weights = weights_us(total * WEIGHT_UNIT, most * WEIGHT_UNIT, self.costs)
        staging = max(product_staging(self.padded, part, cut.matrix) for cut in chosen.values())
        staging = _round(max(staging, self.attend_staging))
        inbox = _round(max(self.attend_inbox, *(cut.inbox for cut in chosen.values())))
        matrices, offset = {}, 0
        for name, kind in self.named:
            matrices[name] = replace(chosen[kind].matrix, name=name, offset=offset)
            offset += matrices[name].units
        return Cuts(
            ranks=self.ranks,
            teams=self.teams,
            matrices=matrices,
            slices=self.slices,
            part=part,
            slots=min(MOST_SLOTS, (self.device.shared_memory - FIXED_SHARED - staging - 2 * inbox) // SLOT_BYTES),
            staging=staging,
            inbox=inbox,
            us=self.costs.start + shape.steps * max(chain, weights),
        )

    def least(self) -> int:
        """Bytes of shared memory without which there are no cuts."""
        sums = (min(cut.sums for cut in cuts) for cuts in self.candidates.values())
        staging = max(self.attend_staging, STEP_COLUMNS // 8 * (16 * self.padded + 16), *sums)
        return FIXED_SHARED + LEAST_SLOTS * SLOT_BYTES + _round(staging)
