"""The planner: the shape of a head and a device -> a schedule.

A step is a chain of stages: products, and attention between them. Norms, the merging of ranges of keys, the residual stream and
the sampler's step are parts of the products around them, because a stage costs a round trip between all multiprocessors, which
is longer than its work; hence no product is cut along its columns either, whose parts would have to be summed. A group is as
many samples as fit into one product's tokens; groups have nothing to do with each other, so that a tile waits for one counter
only: the one of its group's stage before. Rows of weights are the tall operand of every product and tokens the narrow one, so
that few tokens waste no tensor cores. What makes a schedule right is proved by `validate`, not here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode.schedule import (
    MAX_HEAD_DIM,
    MAX_TOKENS,
    MAX_WIDTH,
    NONE,
    OPERANDS,
    TILE_ROWS,
    WEIGHT_UNIT,
    Attend,
    Buffer,
    Device,
    Epilogue,
    HeadShape,
    MatrixPlan,
    Operands,
    Product,
    Schedule,
    Space,
    Start,
    Tile,
    attend_bytes,
    attend_rows,
    float_bits,
    product_bytes,
)
from dit4dit.errors import ConfigError

PADDED_TOKENS = (8, 16, 24, 32, 48, 64)
"""Tokens of one product; each is an instruction of its own on sm_90a."""
COPY_SLOTS = 6
"""Slots where weights come through cp.async: its waits take a number known to the compiler."""
LEAST_BULK_SLOTS, MOST_BULK_SLOTS = 12, 16
FIXED_SHARED = 1536
"""Bytes for records, barriers and reductions: `Fixed` in kernels/action_ode_block.cuh, rounded up."""
_TILE_SLOTS = 4.0
"""What a tile takes besides its weights, in the time of a slot: the activations, and the sums over its warps."""
OPCODES = {kind: opcode for opcode, kind in OPERANDS.items()}

Stage = list[Operands]


def head_shape(
    config: HeadConfig, *, batch: int, context: int, prefix: bool, steps: int, fp8: bool = False
) -> HeadShape:
    """The shape of one request.

    Args:
        batch: samples. context: feature tokens. prefix: with a state token. steps: Euler steps. fp8: e4m3 weights.

    Raises:
        ConfigError: a size that the kernel has no tiles for.
    """
    blocks = tuple(not (i % 2 and config.interleave_self_attention) for i in range(config.num_layers))
    shape = HeadShape(
        width=config.width,
        heads=config.num_heads,
        blocks=blocks,
        mlp=4 * config.width,
        decoder=config.hidden_size,
        horizon=config.action_horizon,
        actions=config.action_dim,
        prefix=prefix,
        context=context,
        batch=batch,
        steps=steps,
        fp8=fp8,
    )
    check(shape)
    return shape


def check(shape: HeadShape) -> None:
    """ConfigError unless the kernel has tiles for this shape."""

    def refuse(name: str, wanted: str, got: object) -> None:
        raise ConfigError(f"action_ode: {name}: expected {wanted}, got {got}; use head='library'")

    for name, value in (("width", shape.width), ("mlp", shape.mlp), ("decoder", shape.decoder)):
        if value % 16 or value < 16:
            refuse(name, "a multiple of 16", value)
    if shape.width > MAX_WIDTH:
        refuse("width", f"at most {MAX_WIDTH}", shape.width)
    if shape.width % shape.heads or shape.head_dim % 16 or shape.head_dim > MAX_HEAD_DIM:
        refuse("head_dim", f"16, 32, 48 or {MAX_HEAD_DIM}", f"{shape.width} / {shape.heads} heads")
    if not 1 <= shape.tokens <= MAX_TOKENS:
        refuse("tokens", f"1 to {MAX_TOKENS} a sample, the state token included", shape.tokens)
    for name in ("horizon", "actions", "context", "batch", "steps"):
        if getattr(shape, name) < 1:
            refuse(name, "at least 1", getattr(shape, name))
    if not shape.blocks:
        refuse("blocks", "at least 1", 0)


def plan(shape: HeadShape, device: Device) -> Schedule:
    """The schedule of `shape` on `device`, the same for the same arguments.

    Raises:
        ConfigError: the shape has no tiles, or the device too little shared memory.
    """
    check(shape)
    if device.workers < 1:
        raise ConfigError(f"action_ode: workers: expected at least 1, got {device.workers}")
    return _Planner(shape, device).schedule()


@dataclass
class _Planner:
    shape: HeadShape
    device: Device
    constants: dict[str, tuple[int, int]] = field(default_factory=dict)
    floats: int = 0

    def __post_init__(self) -> None:
        shape = self.shape
        per_group = min(shape.batch, MAX_TOKENS // shape.tokens)
        count = -(-shape.batch // per_group)
        per_group = -(-shape.batch // count)
        self.groups = [range(b, min(b + per_group, shape.batch)) for b in range(0, shape.batch, per_group)]
        self.padded = next(n for n in PADDED_TOKENS if n >= per_group * shape.tokens)
        self.matrices = self._matrices()
        self.key_ranges = self._key_ranges()
        self._constants()

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _matrices(self) -> dict[str, MatrixPlan]:
        s = self.shape
        wanted = [("encode", s.width, s.padded_actions), ("encode_out", s.width, s.width)]
        for i, cross in enumerate(s.blocks):
            wanted += [
                (f"{i}.project", s.width if cross else 3 * s.width, s.width),
                (f"{i}.out", s.width, s.width),
                (f"{i}.mlp_in", s.mlp, s.width),
                (f"{i}.mlp_out", s.width, s.mlp),
            ]
        wanted += [("decode_in", s.decoder, s.width), ("decode_out", s.actions, s.decoder)]
        found: dict[str, MatrixPlan] = {}
        offset = 0
        for name, rows, columns in wanted:
            # what is outside the blocks is 3 % of the weights, and nearest to the actions
            matrix = self._cut(name, rows, columns, s.fp8 and name[0].isdigit(), offset)
            found[name] = matrix
            offset += matrix.units
        return found

    def _cut(self, name: str, rows: int, columns: int, fp8: bool, offset: int) -> MatrixPlan:
        """The cheapest height of tiles by a rough count in units of the time that one slot takes from memory."""

        def cost(matrix: MatrixPlan) -> float:
            rounds = -(-matrix.row_tiles * len(self.groups) // self.device.workers)
            wide = matrix.tile_rows == 64 and self.device.warpgroups
            return rounds * (matrix.slots * (1.0 if wide else 1 + self.padded / 110) + _TILE_SLOTS)

        return min((MatrixPlan(name, rows, columns, height, fp8, offset) for height in TILE_ROWS), key=cost)

    def _key_ranges(self) -> list[tuple[int, int]]:
        """(first key, keys) of the tiles that share one head of one sample's attention to the features."""
        s = self.shape
        _, step, _ = attend_rows(s.tokens, 1)
        most = max(128, step)  # what the least staging holds
        while most < 4 * step and attend_bytes(s.tokens, most + step, s.head_dim) <= self._room():
            most += step

        def cost(count: int) -> float:
            rounds = -(-s.batch * s.heads * count // self.device.workers)
            # keys are there before their turn; each range is one more plane for all tiles of the product that follows
            return rounds * (-(-s.context // count) / 64 + _TILE_SLOTS) + count * s.tokens * s.width / 13000

        count = min(range(-(-s.context // most), -(-s.context // 16) + 1), key=cost)
        size = -(-s.context // count)
        return [(k, min(size, s.context - k)) for k in range(0, s.context, size)]

    def _constants(self) -> None:
        s = self.shape

        def add(name: str, length: int) -> None:
            self.constants[name] = (self.floats, length)
            self.floats += -(-length // 4) * 4  # read four at a time

        add("times", s.steps)
        add("encode.bias", s.steps * s.width)
        add("encode_out.bias", s.tokens * s.width)
        for i in range(len(s.blocks)):
            add(f"{i}.norm", s.steps * 2 * s.width)
            for part in ("project", "out", "mlp_in", "mlp_out"):
                matrix = self.matrices[f"{i}.{part}"]
                add(f"{matrix.name}.bias", matrix.rows)
                if matrix.fp8:
                    add(f"{matrix.name}.row_scale", matrix.rows)
        add("norm", s.steps * 2 * s.width)
        add("decode_in.bias", s.decoder)
        add("decode_out.bias", s.actions)

    # -- stages --------------------------------------------------------------------------------------------------------

    def _stages(self, group: range) -> Iterator[Stage]:
        """The chain of one group."""
        s = self.shape
        yield [Start(b * s.tokens, s.tokens, int(s.prefix), b) for b in group]
        for step in range(s.steps):
            products = partial(self._products, group, step)
            yield products("encode", Space.NOISY, Space.EMBEDDED, Epilogue.SILU)
            yield products("encode_out", Space.EMBEDDED, Space.STREAM, Epilogue.TOKENS)
            for i, cross in enumerate(s.blocks):
                first = products(
                    f"{i}.project", Space.ROUNDED, Space.PROJECTED, Epilogue.PLAIN, eps=1e-5, table=f"{i}.norm"
                )
                yield first
                ranges = self.key_ranges if cross else [(0, s.tokens)]
                yield self._attention(group, sum(s.blocks[:i]) if cross else NONE, ranges)
                yield products(f"{i}.out", Space.ATTENDED, Space.STREAM, Epilogue.RESIDUAL, planes=len(ranges))
                yield products(f"{i}.mlp_in", Space.ROUNDED, Space.HIDDEN, Epilogue.GELU, eps=1e-5)
                yield products(f"{i}.mlp_out", Space.HIDDEN, Space.STREAM, Epilogue.RESIDUAL)
            yield products("decode_in", Space.ROUNDED, Space.DECODED, Epilogue.RELU, eps=1e-6, table="norm")
            yield products("decode_out", Space.DECODED, Space.ACTIONS, Epilogue.EULER)

    def _products(
        self,
        group: range,
        step: int,
        name: str,
        source: Space,
        out: Space,
        epilogue: Epilogue,
        *,
        planes: int = 1,
        eps: float = 0.0,
        table: str | None = None,
    ) -> Stage:
        """All tiles of a matrix. `eps`: with a norm; `table`: its modulation."""
        matrix, s = self.matrices[name], self.shape
        bias = self.constants[f"{name}.bias"][0] + (step * s.width if name == "encode" else 0)
        scale = self.constants[f"{name}.row_scale"][0] if matrix.fp8 else NONE
        return [
            Product(
                source=source,
                token=group.start * s.tokens,
                tokens=len(group) * s.tokens,
                planes=planes,
                norm=float_bits(eps),
                modulation=NONE if table is None else self.constants[table][0] + step * 2 * s.width,
                row=row,
                rows=min(matrix.tile_rows, matrix.rows - row),
                tile_rows=matrix.tile_rows,
                columns=matrix.columns,
                weight=matrix.offset + i * matrix.slots * matrix.units_per_slot,
                slots=matrix.slots,
                fp8=int(matrix.fp8),
                bias=bias + row,
                scale=scale if scale == NONE else scale + row,
                epilogue=epilogue,
                out=out,
                step=step,
            )
            for i, row in enumerate(range(0, matrix.rows, matrix.tile_rows))
        ]

    def _attention(self, group: range, context: int, ranges: list[tuple[int, int]]) -> Stage:
        s = self.shape
        return [
            Attend(b * s.tokens, s.tokens, h, context, key, keys, b, plane)
            for b in group
            for h in range(s.heads)
            for plane, (key, keys) in enumerate(ranges)
        ]

    # -- the whole -----------------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        chains = [list(self._stages(group)) for group in self.groups]
        count = len(self.groups)
        workers: list[list[Tile]] = [[] for _ in range(self.device.workers)]
        load = [0.0] * self.device.workers
        for position in range(len(chains[0])):
            tiles = []
            for g, chain in enumerate(chains):
                wait, target = NONE, 0
                if position > 0:
                    wait, target = (position - 1) * count + g, len(chain[position - 1])
                # nobody waits for the last stage
                signal = NONE if position == len(chain) - 1 else position * count + g
                tiles += [Tile(OPCODES[type(work)], wait, target, signal, work) for work in chain[position]]
            _share(tiles, workers, load)
        slots, staging, part = self._shared_memory()
        first_tile = np.cumsum([0, *(len(tiles) for tiles in workers)], dtype=np.int32)
        products = [[t.work for t in tiles if isinstance(t.work, Product)] for tiles in workers]
        segments = [(p.weight, p.slots, 1 if p.fp8 else 2) for mine in products for p in mine]
        return Schedule(
            shape=self.shape,
            device=self.device,
            tiles=np.array([tile.record() for tiles in workers for tile in tiles], dtype=np.int32),
            first_tile=first_tile,
            segments=np.array(segments, dtype=np.int32).reshape(-1, 3),
            first_segment=np.cumsum([0, *(len(mine) for mine in products)], dtype=np.int32),
            counters=(len(chains[0]) - 1) * count,
            buffers=self._buffers(),
            matrices=self.matrices,
            constants=self.constants,
            constant_floats=self.floats,
            padded_tokens=self.padded,
            part=part,
            slots=slots,
            staging=staging,
        )

    def _buffers(self) -> tuple[Buffer, ...]:
        s = self.shape
        project = max(m.rows for name, m in self.matrices.items() if name.endswith("project"))
        ranges = len(self.key_ranges)
        sizes = {
            Space.ACTIONS: (1, s.actions, True),
            Space.NOISY: (1, s.padded_actions, False),
            Space.EMBEDDED: (1, s.width, False),
            Space.STREAM: (1, s.width, True),
            Space.ROUNDED: (1, s.width, False),
            Space.PROJECTED: (1, project, False),
            Space.ATTENDED: (ranges, s.width, False),
            Space.STATS: (ranges, 2 * s.heads, True),
            Space.HIDDEN: (1, s.mlp, False),
            Space.DECODED: (1, s.decoder, False),
        }
        found, offset = [], 0
        for space in sorted(sizes):
            depth, columns, wide = sizes[space]
            buffer = Buffer(depth, s.rows, columns, wide, offset)
            found.append(buffer)
            offset += -(-buffer.bytes // 256) * 256
        found.append(Buffer(1, s.batch * s.horizon, s.actions, True, 0))  # OUT is the caller's tensor
        return tuple(found)

    def _room(self) -> int:
        """Staging bytes where weights have all the slots that they want: what is under way counts for more."""
        slots = LEAST_BULK_SLOTS if self.device.bulk_copies else COPY_SLOTS
        return self.device.shared_memory - FIXED_SHARED - slots * 2 * WEIGHT_UNIT

    def _shared_memory(self) -> tuple[int, int, int]:
        """(slots, staging bytes, columns of activations in it)."""
        s = self.shape
        product = partial(product_bytes, self.padded, modulated=s.width)
        keys = max(s.tokens, *(keys for _, keys in self.key_ranges))
        least = max(
            product(256), attend_bytes(s.tokens, s.tokens, s.head_dim), attend_bytes(s.tokens, keys, s.head_dim)
        )
        needed = FIXED_SHARED + COPY_SLOTS * 2 * WEIGHT_UNIT + _round(least)
        if self.device.shared_memory < needed:
            raise ConfigError(
                f"action_ode: shared_memory: expected at least {needed} bytes a block, got {self.device.shared_memory}; "
                "use head='library'"
            )
        longest = max(m.slots * m.slot_columns for m in self.matrices.values())
        columns = 256
        while columns < longest and _round(product(columns + 256)) <= max(_round(least), self._room()):
            columns += 256
        staging = _round(max(least, product(columns)))
        slots = COPY_SLOTS
        if self.device.bulk_copies:
            spare = self.device.shared_memory - FIXED_SHARED - staging
            slots = min(MOST_BULK_SLOTS, spare // (2 * WEIGHT_UNIT))
        return slots, staging, columns


def _round(size: int) -> int:
    return -(-size // 128) * 128


def _share(tiles: list[Tile], workers: list[list[Tile]], load: list[float]) -> None:
    """Give each tile of a stage to the worker that has least of this stage, then least of all."""
    heap = [(0.0, load[w], w) for w in range(len(workers))]
    heapq.heapify(heap)
    for tile in tiles:
        mine, total, w = heapq.heappop(heap)
        cost = _cost(tile.work)
        workers[w].append(tile)
        load[w] = total + cost
        heapq.heappush(heap, (mine + cost, load[w], w))


def _cost(work: Operands) -> float:
    if isinstance(work, Product):
        return work.slots + _TILE_SLOTS
    if isinstance(work, Attend):
        return work.keys / 64 + _TILE_SLOTS
    return 1
