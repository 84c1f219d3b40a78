"""What a schedule is predicted to take: the model by which the planner chooses, and the head's table of `bench budget`.

A step is a chain of stages, and a stage takes what the team with most of it takes: the word's way from team to team once, then
its tiles. Weights are fetched all the while, so that they count only where they take longer than the whole chain. Everything
here is a prediction from a few numbers of a GPU (`Costs`), not a measurement of the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

from dit4dit.engine.action_ode.schedule import (
    NONE,
    STEP_COLUMNS,
    WARPS,
    WEIGHT_UNIT,
    Attend,
    MatrixPlan,
    Operands,
    Product,
    Schedule,
)
from dit4dit.engine.action_ode.sizes import (
    own_heads,
    panel_bytes,
    query_rows,
    warp_keys,
)

PARTS = ("synchronisation", "staging", "products", "epilogues", "attention")
"""Of a tile, and of the chain."""
_STEP_SIZE = 16 * STEP_COLUMNS * 24
"""Multiplications that `Costs.step` is the time of."""
_PLANES = 32
"""Planes of sums that 256 threads add up, two results each, in the time of one epilogue: a guess."""


@dataclass(frozen=True)
class Costs:
    """Microseconds, and terabytes a second. The defaults are an H200's; measured where it says so.

    Attributes:
        start: of a launch: it begins, the first panel arrives, it ends.
        hop: until another team sees a word; half of the measured round trip of a flag.
        exchange: sums go to the other ranks and are waited for: half of a measured barrier of a cluster of 8, which goes there
            and back, and 0.05 to look. Nothing without a split.
        read: of each KB of activations that a rank stages with all its loads in flight, as fast as its SM can; measured with 4 KB
            in flight: 0.05. flat_rate: what all SMs together read from L2.
        inbox: of each KB that a rank gets from the others; from published rates of distributed shared memory.
        step: a warp multiplies 16 x 32 weights with 24 tokens; a guess from the latency of its instructions.
        sync: a barrier of one block. epilogue: of one tile.
        memory: what all SMs together read; measured. sm_stream: what comes to the slots of one SM; a guess.
    """

    start: float = 3.0
    hop: float = 0.65
    exchange: float = 0.30
    read: float = 0.0171
    flat_rate: float = 5.5
    inbox: float = 0.040
    step: float = 0.022
    sync: float = 0.03
    epilogue: float = 0.12
    memory: float = 4.06
    sm_stream: float = 0.045

    def kilobyte(self, blocks: int) -> float:
        """Of activations, on each of so many blocks at once."""
        return max(self.read, blocks * 1024e-6 / self.flat_rate)


def staged_columns(m: Product | MatrixPlan, part: int) -> int:
    """Columns that the kernel stages at a time where there is room for `part`: all of a slice, without a split whole panels; 0 if
    that does not fit.
    """
    if m.slice <= part:
        return m.slice
    return part // STEP_COLUMNS // m.panel_steps * m.panel_steps * STEP_COLUMNS if m.split == 1 else 0


def product_us(
    m: Product | MatrixPlan, ranks: int, tokens: int, padded_tokens: int, part: int, blocks: int, costs: Costs
) -> tuple[float, float, float, float]:
    """(synchronisation, staging, products, epilogue) of one product on the rank with most of it, in microseconds.

    part: columns of activations that may be staged at a time. blocks: how many have such a product at once.
    """
    own_rows, planes = m.tile_rows // ranks, m.split * m.parts
    # sums of tokens that there are, two at a time, and mean and squares
    received = (m.split - 1) * (m.parts * own_rows * (tokens + tokens % 2) * 4 + tokens * 8)
    exchange = costs.exchange + costs.inbox * received / 1024 if m.split > 1 else 0.0
    syncs = 2 * -(-m.slice // staged_columns(m, part))
    staging = costs.kilobyte(blocks) * min(m.slice, m.columns) * tokens * 2 / 1024
    groups = m.tile_rows * m.split // ranks // 16
    whole, rest = divmod(m.slice // STEP_COLUMNS, m.panel_steps)
    steps = whole * -(-m.panel_steps // m.parts) + -(-rest // m.parts)
    products = costs.step * steps * -(-groups * m.parts // WARPS) * padded_tokens / 24
    passes = -(-own_rows * padded_tokens // (2 * 32 * WARPS))
    return exchange + costs.sync * syncs, staging, products, costs.epilogue * (1 + passes * planes / _PLANES)


def own_attention_us(
    m: Product | MatrixPlan, tokens: int, samples: int, head_dim: int, at_once: int, blocks: int, costs: Costs
) -> tuple[float, float, float]:
    """(synchronisation, staging, attention) that a product takes longer whose rows are attention's results, in microseconds.

    tokens: of one of the samples. at_once: heads of samples that are staged together.
    """
    query_tiles = query_rows(tokens) // 16
    pairs, row = samples * own_heads(m, head_dim), 2 * head_dim
    turns = [min(at_once, pairs - first) for first in range(0, pairs, at_once)]
    kilobytes = (3 * pairs * row * tokens - min(m.slice, m.columns) * samples * tokens * 2) / 1024
    products = costs.step * 2 * 16 * 16 * query_tiles * head_dim / _STEP_SIZE
    rounds = sum(-(-count * query_tiles // WARPS) for count in turns)
    syncs = costs.sync * 2 * len(turns)
    return syncs, costs.kilobyte(blocks) * kilobytes, rounds * (products + costs.epilogue)


def attend_us(
    tokens: int, keys: int, slice_: int, context: bool, head_dim: int, share: int, blocks: int, costs: Costs
) -> tuple[float, float]:
    """(synchronisation, attention) of one head of one sample on each of the `share` ranks that do it, in microseconds.

    Keys and values of the features come with the weights. blocks: how many have a part of some head at once.
    """
    per_warp, groups = warp_keys(tokens, slice_, head_dim, context), WARPS * 16 // query_rows(tokens)
    active, rounds = -(-keys // slice_), -(-slice_ // (per_warp * groups))
    rows = tokens + (0 if context else 2 * slice_)
    reading = costs.kilobyte(blocks) * rows * 2 * head_dim / 1024
    products = costs.step * rounds * 2 * 16 * per_warp * head_dim / _STEP_SIZE
    received = (active - active / share) * tokens * (head_dim / share * 4 + 8)
    exchange = costs.exchange + costs.inbox * received / 1024 if share > 1 else 0.0
    return exchange + costs.sync * 5, reading + products + costs.epilogue


def tile_us(schedule: Schedule, work: Operands, blocks: int, costs: Costs | None = None) -> dict[str, float]:
    """Microseconds of one tile on its rank with most of it, by `PARTS`, without the hop before it.

    blocks: how many work at once.
    """
    costs = costs or Costs()
    found = dict.fromkeys(PARTS, 0.0)
    if isinstance(work, Attend):
        cross, head_dim = work.context != NONE, schedule.shape.head_dim
        parts = attend_us(work.tokens, work.keys, work.slice, cross, head_dim, work.share, blocks, costs)
        found["synchronisation"], found["attention"] = parts
    else:
        numbers = product_us(work, schedule.ranks, work.tokens, schedule.padded_tokens, schedule.part, blocks, costs)
        found.update(zip(("synchronisation", "staging", "products", "epilogues"), numbers, strict=True))
        if work.attend:
            shape = schedule.shape
            samples = work.tokens // shape.tokens
            more = own_attention_us(work, shape.tokens, samples, shape.head_dim, work.attend, blocks, costs)
            for name, us in zip(("synchronisation", "staging", "attention"), more, strict=True):
                found[name] += us
    return found


def stage_us(schedule: Schedule, costs: Costs | None = None) -> list[tuple[str, dict[str, float]]]:
    """(the buffer that it writes, microseconds by `PARTS`) of each stage of one step, of the team with most of it."""
    costs = costs or Costs()
    buffers = sorted(schedule.buffers.items(), key=lambda item: item[1].offset)
    offsets = [buffer.offset for _, buffer in buffers]
    teams: dict[int, dict[int, list[Operands]]] = defaultdict(lambda: defaultdict(list))
    for team in range(schedule.teams):
        for tile in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]:
            teams[bisect_right(offsets, tile.work.out) - 1][team].append(tile.work)
    # the sampler's state is written last
    order = [*sorted(stage for stage in teams if stage), 0]
    found = []
    for stage in order:
        busiest = dict.fromkeys(PARTS, 0.0)
        seen: set[tuple[object, ...]] = set()
        blocks = sum(blocks_of(tiles[0], schedule.ranks) for tiles in teams[stage].values())
        for tiles in teams[stage].values():
            kind = tuple(_kind(work) for work in tiles)
            if kind in seen:
                continue
            seen.add(kind)
            parts = [tile_us(schedule, work, blocks, costs) for work in tiles]
            total = {name: sum(part[name] for part in parts) for name in PARTS}
            total["synchronisation"] += costs.hop
            if sum(total.values()) > sum(busiest.values()):
                busiest = total
        found.append((buffers[stage][0], busiest))
    return found


def blocks_of(work: Operands, ranks: int) -> int:
    """How many blocks of a team have a part of a tile."""
    return ranks if isinstance(work, Product) else work.pairs * -(-work.keys // work.slice)


def _kind(work: Operands) -> tuple[object, ...]:
    """What a tile's time depends on."""
    if isinstance(work, Product):
        cut = work.columns, work.split, work.slice, work.tile_rows, work.parts, work.panel_steps
        return *cut, work.tokens, work.attend
    return work.context == NONE, work.tokens, work.keys, work.slice, work.share


def weights_us(once: float, total: float, most: float, costs: Costs) -> float:
    """Microseconds for weights: `once`, bytes of them all; `total`, what all teams read, of which what is read again for other
    samples in the same stage comes from L2; `most`, what one SM reads.
    """
    return max(once / costs.memory, total / costs.flat_rate, most / costs.sm_stream) * 1e-6


def head_us(schedule: Schedule, costs: Costs | None = None) -> dict[str, float]:
    """Predicted microseconds of one launch: `PARTS`; "chain", their sum, the critical path of all steps; "weights", all of them
    as fast as memory and the SM with most of them allow; "total", the longer of these two and the start.
    """
    costs = costs or Costs()
    steps = schedule.shape.steps
    stages = [parts for _, parts in stage_us(schedule, costs)]
    found = {name: steps * sum(parts[name] for parts in stages) for name in PARTS}
    found["chain"] = sum(found.values())
    read, total = [0] * schedule.teams, 0
    for team in range(schedule.teams):
        for tile in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]:
            size = fetched_bytes(schedule, tile.work)
            read[team] += size
            total += size * blocks_of(tile.work, schedule.ranks)
    found["weights"] = weights_us(steps * schedule.weight_bytes, steps * total, steps * max(read), costs)
    found["total"] = costs.start + max(found["chain"], found["weights"])
    return found


def fetched_bytes(schedule: Schedule, work: Operands) -> int:
    """Bytes that come to the slots of a block for a tile, of the one with most of them."""
    if isinstance(work, Product):
        return WEIGHT_UNIT * work.rank_units
    if work.context == NONE:
        return 0
    return panel_bytes(work.tokens, work.slice, schedule.shape.head_dim, min(work.slice, work.keys))
