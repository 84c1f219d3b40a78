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
    attend_rows,
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
        exchange: sums go to the other ranks and are waited for; a measured barrier of a cluster of 8. Nothing without a split.
        read: of each KB of activations that a rank stages with all its loads in flight: a fit of L2's 5.5 TB/s over all SMs;
            measured with 4 KB in flight: 0.05.
        inbox: of each KB that a rank gets from the others; from published rates of distributed shared memory.
        step: a warp multiplies 16 x 32 weights with 24 tokens; a guess from the latency of its instructions.
        sync: a barrier of one block. epilogue: of one tile.
        memory: what all SMs together read; measured. sm_stream: what one SM reads.
    """

    start: float = 3.0
    hop: float = 0.65
    exchange: float = 0.50
    read: float = 0.024
    inbox: float = 0.040
    step: float = 0.022
    sync: float = 0.03
    epilogue: float = 0.12
    memory: float = 4.06
    sm_stream: float = 0.030


def staged_columns(m: Product | MatrixPlan, part: int) -> int:
    """Columns that the kernel stages at a time where there is room for `part`: all of a slice, without a split whole panels; 0 if
    that does not fit.
    """
    if m.slice <= part:
        return m.slice
    return part // STEP_COLUMNS // m.panel_steps * m.panel_steps * STEP_COLUMNS if m.split == 1 else 0


def product_us(
    m: Product | MatrixPlan, ranks: int, tokens: int, padded_tokens: int, part: int, costs: Costs
) -> tuple[float, float, float, float]:
    """(synchronisation, staging, products, epilogue) of one product on the rank with most of it, in microseconds.

    part: columns of activations that may be staged at a time.
    """
    own_rows, planes = m.tile_rows // ranks, m.split * m.parts
    # sums of tokens that there are, two at a time, and mean and squares
    received = (m.split - 1) * (m.parts * own_rows * (tokens + tokens % 2) * 4 + tokens * 8)
    exchange = costs.exchange + costs.inbox * received / 1024 if m.split > 1 else 0.0
    syncs = 2 * -(-m.slice // staged_columns(m, part))
    staging = costs.read * min(m.slice, m.columns) * tokens * 2 / 1024
    groups = m.tile_rows * m.split // ranks // 16
    whole, rest = divmod(m.slice // STEP_COLUMNS, m.panel_steps)
    steps = whole * -(-m.panel_steps // m.parts) + -(-rest // m.parts)
    products = costs.step * steps * -(-groups * m.parts // WARPS) * padded_tokens / 24
    passes = -(-own_rows * padded_tokens // (2 * 32 * WARPS))
    return exchange + costs.sync * syncs, staging, products, costs.epilogue * (1 + passes * planes / _PLANES)


def attend_us(
    tokens: int, keys: int, slice_: int, context: bool, head_dim: int, ranks: int, costs: Costs
) -> tuple[float, float]:
    """(synchronisation, attention) of one head of one sample, in microseconds.

    The first keys and values of the features are fetched before the query has come: what they take longer than a hop counts.
    """
    _, at_once, per_warp = attend_rows(tokens, slice_)
    active, rounds = -(-keys // slice_), -(-slice_ // at_once)
    row = 2 * head_dim
    first = costs.read * min(slice_, at_once) * 2 * row / 1024
    rest = costs.read * max(0, slice_ - at_once) * 2 * row / 1024
    reading = costs.read * tokens * row / 1024 + (max(0.0, first - costs.hop) if context else first) + rest
    products = costs.step * rounds * 2 * 16 * per_warp * head_dim / _STEP_SIZE
    received = (active - active / ranks) * tokens * (head_dim / ranks * 4 + 8)
    exchange = costs.exchange + costs.inbox * received / 1024 if ranks > 1 else 0.0
    return exchange + costs.sync * (2 * rounds + 3), reading + products + costs.epilogue


def tile_us(schedule: Schedule, work: Operands, costs: Costs | None = None) -> dict[str, float]:
    """Microseconds of one tile on its rank with most of it, by `PARTS`, without the hop before it."""
    costs = costs or Costs()
    found = dict.fromkeys(PARTS, 0.0)
    if isinstance(work, Attend):
        cross, head_dim = work.context != NONE, schedule.shape.head_dim
        parts = attend_us(work.tokens, work.keys, work.slice, cross, head_dim, schedule.ranks, costs)
        found["synchronisation"], found["attention"] = parts
    else:
        numbers = product_us(work, schedule.ranks, work.tokens, schedule.padded_tokens, schedule.part, costs)
        found.update(zip(("synchronisation", "staging", "products", "epilogues"), numbers, strict=True))
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
        for tiles in teams[stage].values():
            kind = tuple(_kind(work) for work in tiles)
            if kind in seen:
                continue
            seen.add(kind)
            parts = [tile_us(schedule, work, costs) for work in tiles]
            total = {name: sum(part[name] for part in parts) for name in PARTS}
            total["synchronisation"] += costs.hop
            if sum(total.values()) > sum(busiest.values()):
                busiest = total
        found.append((buffers[stage][0], busiest))
    return found


def _kind(work: Operands) -> tuple[object, ...]:
    """What a tile's time depends on."""
    if isinstance(work, Product):
        return work.columns, work.split, work.slice, work.tile_rows, work.parts, work.panel_steps, work.tokens
    return work.context == NONE, work.tokens, work.keys, work.slice


def weights_us(total: float, most: float, costs: Costs) -> float:
    """Microseconds for `total` bytes of weights of which one SM reads `most`."""
    return max(total / costs.memory, most / costs.sm_stream) * 1e-6


def head_us(schedule: Schedule, costs: Costs | None = None) -> dict[str, float]:
    """Predicted microseconds of one launch: `PARTS`; "chain", their sum, the critical path of all steps; "weights", all of them
    as fast as memory and the SM with most of them allow; "total", the longer of these two and the start.
    """
    costs = costs or Costs()
    steps = schedule.shape.steps
    stages = [parts for _, parts in stage_us(schedule, costs)]
    found = {name: steps * sum(parts[name] for parts in stages) for name in PARTS}
    found["chain"] = sum(found.values())
    read = [0] * schedule.teams
    for team in range(schedule.teams):
        tiles = schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]
        read[team] = sum(tile.work.rank_units for tile in tiles if isinstance(tile.work, Product))
    total = steps * WEIGHT_UNIT * sum(read) * schedule.ranks
    found["weights"] = weights_us(total, steps * WEIGHT_UNIT * max(read), costs)
    found["total"] = costs.start + max(found["chain"], found["weights"])
    return found
