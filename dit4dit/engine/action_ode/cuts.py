"""How the work of a head is cut: ranks of a team, rows, columns and warps of each matrix, heads and keys of each rank, shared
memory.

All cuts that the kernel can run are priced by `cost`, and the ones that are predicted to take least are taken. Prices of
matrices do not depend on each other but for what they share: ranks, shared memory, and the owners of the residual stream.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import le
from typing import NamedTuple, TypeVar

from dit4dit.engine.action_ode.cost import (
    Costs,
    attend_us,
    own_attention_us,
    product_us,
    staged_columns,
    weights_us,
)
from dit4dit.engine.action_ode.schedule import (
    FIXED_SHARED,
    MAX_TOKENS,
    PADDED_TOKENS,
    RANKS,
    SLOT_BYTES,
    STEP_COLUMNS,
    WARPS,
    WEIGHT_UNIT,
    Device,
    HeadShape,
    MatrixPlan,
)
from dit4dit.engine.action_ode.sizes import (
    attend_bytes,
    attend_inbox,
    own_at_once,
    own_attention_bytes,
    panel_bytes,
    product_staging,
    sums_bytes,
    warp_tiles,
)
from dit4dit.errors import ConfigError

T = TypeVar("T", int, bool)
LEAST_SLOTS, ENOUGH_SLOTS, MOST_SLOTS = 3, 6, 16
"""Of weights: the fewest, the most that cuts leave room for on purpose, and as many as the kernel has barriers for."""
STREAM = ("encode_out", "out", "mlp_out")
"""Matrices whose results are the residual stream: they have the same rows in the same teams."""


class Kind(NamedTuple):
    """Matrices that are cut alike."""

    name: str  # without the block
    rows: int
    columns: int
    fp8: bool
    attends: bool = False  # its rows are the tokens' attention to each other


class Cut(NamedTuple):
    """One way to run a kind of matrix. All but `matrix` and `tiles` one would rather have less of."""

    matrix: MatrixPlan
    tiles: int  # of the team with most
    us: float  # of a stage on that team, without the barriers around parts of the activations
    units: int  # of weights that each rank of that team reads
    inbox: int
    behind: int  # bytes of staging for sums, in a team of one, or for attention
    columns: int  # that must be staged at a time
    slice: int


class AttendCut(NamedTuple):
    """How many ranks do one head of one sample, and how many of its keys each of them takes."""

    share: int
    slice: int


class Choice(NamedTuple):
    """Cuts of all kinds; times of a step."""

    chain_us: float
    weights_us: float
    part: int
    cuts: dict[Kind, Cut]
    search: _Search


@dataclass(frozen=True)
class Cuts:
    """What was chosen. `group`: samples of one product. `attention`: to the tokens themselves and to the features."""

    ranks: int
    teams: int
    fused: bool
    group: int
    padded_tokens: int
    matrices: dict[str, MatrixPlan]
    attention: tuple[AttendCut, AttendCut]
    part: int
    slots: int
    staging: int
    inbox: int


def group_sizes(shape: HeadShape) -> list[int]:
    """How many samples' tokens one product may take together, evenly: the last group may have fewer. Larger groups read
    weights less often, smaller ones are more tiles to share out, of fewer tokens each.
    """
    most = min(shape.batch, MAX_TOKENS // shape.tokens)
    counts = range(-(-shape.batch // most), shape.batch + 1)
    return sorted({-(-shape.batch // count) for count in counts}, reverse=True)


def kinds_of(shape: HeadShape, fused: bool) -> list[tuple[str, Kind]]:
    """All matrices with their names, in the order of the weights; fused: as of `Schedule`."""
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
    inside = {f"{i}.out" for i, cross in enumerate(s.blocks) if fused and not cross}
    return [
        (name, Kind(name.split(".")[-1], rows, columns, s.fp8 and name[0].isdigit(), name in inside))
        for name, rows, columns in found
    ]


def choose(
    shape: HeadShape,
    device: Device,
    costs: Costs,
    ranks: int | None = None,
    group: int | None = None,
    fused: bool | None = None,
) -> Cuts:
    """The cuts with the least predicted time; of equal ones those with fewer ranks and larger groups. ranks, group, fused: only
    these.

    Raises:
        ConfigError: the device has too little shared memory for any, or what is asked for is not possible.
    """
    ways = list(
        product(
            _possible("ranks", ranks, [n for n in RANKS if device.teams(n)]),
            _possible("group", group, group_sizes(shape)),
            _possible("fused", fused, sorted({False, device.bulk_copies and not all(shape.blocks)})),
        )
    )

    def found(size: int) -> list[Choice]:
        with_memory = replace(device, shared_memory=size)
        return [choice for way in ways for choice in _Search(shape, with_memory, *way, costs).found()]

    every = found(device.shared_memory)
    if not every:
        sizes = range(0, 1 << 20, 1024)
        least = sizes[bisect_left(sizes, True, key=lambda size: bool(found(size)))]
        raise ConfigError(
            f"action_ode: shared_memory: expected at least {least} bytes a block, got {device.shared_memory}; "
            "use head='library'"
        )
    best = min(every, key=lambda choice: max(choice.chain_us, choice.weights_us))
    return best.search.cuts_of(best)


def _possible(name: str, wanted: T | None, possible: list[T]) -> list[T]:
    """Those, or the one that is asked for."""
    if wanted is None:
        return possible
    if wanted not in possible:
        raise ConfigError(f"action_ode: {name}: expected one of {possible} here, got {wanted}")
    return [wanted]


def _undominated(cuts: Iterator[Cut], apart: bool) -> list[Cut]:
    """Without those to which another is no worse in anything. apart: among those with tiles of the same height."""
    kept: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: cut[2:]):
        for other in kept:
            if apart and other.matrix.tile_rows != cut.matrix.tile_rows:
                continue
            if all(map(le, other[2:], cut[2:])):
                break
        else:
            kept.append(cut)
    return kept


def _limit(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _round(size: int) -> int:
    return -(-size // 128) * 128


class _Search:
    """All cuts with so many ranks, and so many samples in a group; fused: as of `Schedule`."""

    def __init__(self, shape: HeadShape, device: Device, ranks: int, group: int, fused: bool, costs: Costs) -> None:
        self.shape, self.device, self.ranks, self.group, self.fused = shape, device, ranks, group, fused
        self.costs = costs
        self.teams = device.teams(ranks)
        self.groups, self.tokens = -(-shape.batch // group), group * shape.tokens
        self.padded = next(n for n in PADDED_TOKENS if n >= self.tokens)
        self.named = kinds_of(shape, fused)
        self.count: dict[Kind, int] = defaultdict(int)
        for _, kind in self.named:
            self.count[kind] += 1
        self.candidates = {kind: _undominated(self._cuts(kind), kind.name in STREAM) for kind in self.count}
        self.attention, self.attend_us = self._attention()
        self.panel_units = shape.contexts * self._panel_units(self.attention[True])
        tiles = list(zip((False, True), self.attention, strict=True))[fused:]
        self.attend_staging = max(attend_bytes(shape.tokens, cut.slice, shape.head_dim, cross) for cross, cut in tiles)
        self.attend_inbox = max(attend_inbox(shape.tokens, cut.share, shape.head_dim) for _, cut in tiles)

    # -- candidates ----------------------------------------------------------------------------------------------------

    def _rounds(self, rows: int, tile_rows: int) -> int:
        """Tiles of the team with most of them."""
        return -(-(-(-rows // tile_rows) * self.groups) // self.teams)

    def _cuts(self, kind: Kind) -> Iterator[Cut]:
        for split in (n for n in RANKS if n <= self.ranks):
            unit = 16 * self.ranks // split
            for groups in range(1, warp_tiles(self.padded) * WARPS + 1):
                tile_rows = groups * unit
                # the last tile must have rows for each part: a rank shows by its words that it has read its own
                if -kind.rows % tile_rows >= groups * 16:
                    continue
                rounds = self._rounds(kind.rows, tile_rows)
                for parts in (1, 2, 4, 8):
                    if groups <= warp_tiles(self.padded) * (WARPS // parts):
                        yield self._cut(kind, tile_rows, split, parts, rounds)
                if tile_rows >= kind.rows:
                    break

    def _cut(self, kind: Kind, tile_rows: int, split: int, parts: int, rounds: int) -> Cut:
        m = MatrixPlan(kind.name, kind.rows, kind.columns, self.ranks, tile_rows, split, parts, kind.fp8, 0)
        blocks = self.ranks * min(self.teams, m.row_tiles * self.groups)
        us = sum(product_us(m, self.ranks, self.tokens, self.padded, m.slice, blocks, self.costs))
        attention, columns = 0, m.slice
        if kind.attends:
            per_sample, dim = self.shape.tokens, self.shape.head_dim
            at_once = own_at_once(m, per_sample, self.group, dim)
            us += sum(own_attention_us(m, per_sample, self.group, dim, at_once, blocks, self.costs))
            attention = self._attention_bytes(m)
        elif split == 1:
            columns = min(m.slice, m.panel_steps * STEP_COLUMNS)
        sums = sums_bytes(self.padded, m)
        inbox, behind = (_round(sums), attention) if self.ranks > 1 else (0, max(sums, attention))
        us = self.costs.hop + rounds * us
        return Cut(m, rounds, us, rounds * m.rank_units, inbox, behind, columns, m.slice)

    def _attention_bytes(self, m: MatrixPlan) -> int:
        """Staging of attention that is part of a product."""
        tokens, dim = self.shape.tokens, self.shape.head_dim
        return own_at_once(m, tokens, self.group, dim) * own_attention_bytes(tokens, dim)

    def _attention(self) -> tuple[tuple[AttendCut, AttendCut], float]:
        """(cuts of both kinds of attention, microseconds of a step)."""
        s = self.shape
        own, own_us = self._attend_cut(s.tokens, False)
        features, features_us = self._attend_cut(s.context, True)
        return (own, features), (len(s.blocks) - s.contexts) * own_us * (not self.fused) + s.contexts * features_us

    def _attend_cut(self, keys: int, cross: bool) -> tuple[AttendCut, float]:
        """The cut with the least predicted time, and the microseconds of its stage."""
        s = self.shape
        prices: list[tuple[float, AttendCut]] = []
        for share in (n for n in RANKS if n <= self.ranks):
            rounds, at_once = self._attend_rounds(share), min(self.group * s.heads, self.ranks // share)
            for active in range(share // 2 + 1, share + 1):
                size = -(-keys // active)
                blocks = min(s.batch * s.heads, at_once * self.teams) * -(-keys // size)
                parts = attend_us(s.tokens, keys, size, cross, s.head_dim, share, blocks, self.costs)
                prices.append((self.costs.hop + rounds * sum(parts), AttendCut(share, size)))
        us, cut = min(prices)
        return cut, us

    def _attend_rounds(self, share: int) -> int:
        """Tiles of attention of the team with most of them."""
        s = self.shape
        sizes = [min(self.group, s.batch - first) for first in range(0, s.batch, self.group)]
        return -(-sum(-(-size * s.heads * share // self.ranks) for size in sizes) // self.teams)

    def _panel_units(self, cut: AttendCut) -> int:
        """Of keys and values that a block of that team fetches, a WEIGHT_UNIT each."""
        s = self.shape
        size = panel_bytes(s.tokens, cut.slice, s.head_dim, min(cut.slice, s.context))
        return self._attend_rounds(cut.share) * -(-size // WEIGHT_UNIT)

    # -- choice --------------------------------------------------------------------------------------------------------

    def found(self) -> Iterator[Choice]:
        """The best for each limit on the inbox, on what lies behind staged activations and on slots: first for the chain of
        stages alone; where weights take longer, with their time counted too.
        """
        every = [cut for cuts in self.candidates.values() for cut in cuts]
        inboxes = sorted({max(self.attend_inbox, _limit(cut.inbox)) for cut in every})
        for inbox, behind in product(inboxes, sorted({_limit(cut.behind) for cut in every})):
            for slots in range(ENOUGH_SLOTS, LEAST_SLOTS - 1, -1):
                staging = self.device.shared_memory - FIXED_SHARED - slots * SLOT_BYTES - 2 * _round(inbox)
                best = self._choose(inbox, behind, staging, 0.0)
                if best is None:
                    continue
                yield best
                if best.weights_us > best.chain_us:
                    yield from filter(None, (self._choose(inbox, behind, staging, weight) for weight in (0.3, 1.0)))

    def _choose(self, inbox: int, behind: int, staging: int, weight: float) -> Choice | None:
        """The best with such an inbox, and staging in which `behind` are for sums or attention; weight: of the time of weights,
        which the chain may hide.
        """
        part = (staging - behind) // (16 * self.padded + 16) * 8 // STEP_COLUMNS * STEP_COLUMNS
        if part < STEP_COLUMNS or self.attend_staging > staging:
            return None
        rate = max(1 / self.costs.sm_stream, self.teams * self.ranks / self.costs.memory) * 1e-6 * WEIGHT_UNIT

        def price(cut: Cut) -> float:
            return self._us(cut, part) + weight * rate * cut.units

        stream: dict[int, dict[Kind, Cut]] = defaultdict(dict)
        chosen: dict[Kind, Cut] = {}
        for kind, cuts in self.candidates.items():
            fitting = sorted(
                (cut for cut in cuts if cut.inbox <= inbox and cut.behind <= behind and cut.columns <= part),
                key=price,
            )
            if not fitting:
                return None
            chosen[kind] = fitting[0]
            if kind.name in STREAM:
                for cut in reversed(fitting):
                    stream[cut.matrix.tile_rows][kind] = cut
        wanted = sum(kind.name in STREAM for kind in self.candidates)
        shared = [cuts for cuts in stream.values() if len(cuts) == wanted]
        if not shared:
            return None

        def all_of(same: dict[Kind, Cut]) -> float:
            return sum(self.count[kind] * price(cut) for kind, cut in same.items())

        cheapest = min(shared, key=all_of)
        chosen |= cheapest
        chain = self.attend_us + sum(self.count[kind] * self._us(cut, part) for kind, cut in chosen.items())
        most = self.panel_units + sum(self.count[kind] * cut.units for kind, cut in chosen.items())
        once = WEIGHT_UNIT * sum(self.count[kind] * cut.matrix.units for kind, cut in chosen.items())
        weights = weights_us(once, self.groups * once, most * WEIGHT_UNIT, self.costs)
        return Choice(chain, weights, min(part, max(cut.slice for cut in chosen.values())), chosen, self)

    def _us(self, cut: Cut, part: int) -> float:
        """Of a stage, with barriers around each part of the activations but the first, which `cut.us` has."""
        if cut.slice <= part:
            return cut.us
        times = -(-cut.slice // staged_columns(cut.matrix, part))
        return cut.us + cut.tiles * self.costs.sync * 2 * (times - 1)

    def cuts_of(self, choice: Choice) -> Cuts:
        """With a place in the weights for each matrix, and shared memory: what activations leave is for weights."""
        chosen = choice.cuts
        staging = self.attend_staging
        for kind, cut in chosen.items():
            behind = self._attention_bytes(cut.matrix) if kind.attends else 0
            staging = max(staging, product_staging(self.padded, choice.part, cut.matrix, behind))
        staging = _round(staging)
        inbox = _round(max(self.attend_inbox, *(cut.inbox for cut in chosen.values())))
        matrices, offset = {}, 0
        for name, kind in self.named:
            matrices[name] = replace(chosen[kind].matrix, name=name, offset=offset)
            offset += matrices[name].units
        return Cuts(
            ranks=self.ranks,
            teams=self.teams,
            fused=self.fused,
            group=self.group,
            padded_tokens=self.padded,
            matrices=matrices,
            attention=self.attention,
            part=choice.part,
            slots=min(MOST_SLOTS, (self.device.shared_memory - FIXED_SHARED - staging - 2 * inbox) // SLOT_BYTES),
            staging=staging,
            inbox=inbox,
        )
