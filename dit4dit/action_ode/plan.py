"""The planner: the shape of a head and a device -> a schedule.

A step is a chain of stages (norm, products, attention, ...). A group is as many samples as fit into one product's tokens;
groups have nothing to do with each other, so that a tile waits for one counter only: the one of its group's stage before.
Rows of weights are the tall operand of every product and tokens the narrow one, so that few tokens waste no tensor cores and
each weight is read once. What makes a schedule right is proved by `validate`, not here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dit4dit.action_ode.schedule import (
    MAX_HEAD_DIM,
    MAX_KEYS,
    MAX_TOKENS,
    MAX_WIDTH,
    NONE,
    OPERANDS,
    SLOT_ELEMENTS,
    TILE_ROWS,
    WEIGHT_UNIT,
    Attend,
    Buffer,
    Combine,
    Device,
    Epilogue,
    Euler,
    HeadShape,
    MatrixPlan,
    Norm,
    Operands,
    Product,
    Schedule,
    Space,
    Start,
    Tile,
    float_bits,
)
from dit4dit.config import HeadConfig
from dit4dit.errors import ConfigError

PADDED_TOKENS = (8, 16, 24, 32, 48, 64)
"""Tokens of one product; each is an instruction of its own on sm_90a."""
COPY_SLOTS = 6
"""Slots where weights come through cp.async: its waits take a number known to the compiler."""
LEAST_BULK_SLOTS, MOST_BULK_SLOTS = 12, 16
FIXED_SHARED = 1536
"""Bytes for records, barriers and reductions: `Fixed` in kernels/action_ode_block.cuh, rounded up."""
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
        wanted = [("encode", s.width, s.padded_actions, False), ("encode_out", s.width, s.width, True)]
        for i, cross in enumerate(s.blocks):
            wanted += [
                (f"{i}.project", s.width if cross else 3 * s.width, s.width, False),
                (f"{i}.out", s.width, s.width, True),
                (f"{i}.mlp_in", s.mlp, s.width, False),
                (f"{i}.mlp_out", s.width, s.mlp, True),
            ]
        wanted += [("decode_in", s.decoder, s.width, False), ("decode_out", s.actions, s.decoder, True)]
        found: dict[str, MatrixPlan] = {}
        offset = 0
        for name, rows, columns, split in wanted:
            # what is outside the blocks is 3 % of the weights, and nearest to the actions
            matrix = self._cut(name, rows, columns, split, s.fp8 and name[0].isdigit(), offset)
            found[name] = matrix
            offset += matrix.units
        return found

    def _cut(self, name: str, rows: int, columns: int, split: bool, fp8: bool, offset: int) -> MatrixPlan:
        """The cheapest cut by a rough count in units of the time that one slot takes from memory."""
        best: tuple[float, MatrixPlan] | None = None
        for tile_rows in TILE_ROWS:
            slots = -(-columns // (SLOT_ELEMENTS // tile_rows))
            for splits in range(1, slots + 1 if split else 2):
                matrix = MatrixPlan(name, rows, columns, tile_rows, splits, fp8, offset)
                if (splits - 1) * matrix.slots_per_split >= slots:
                    continue  # the last slice would be empty
                rounds = -(-matrix.row_tiles * splits * len(self.groups) // self.device.workers)
                wide = tile_rows == 64 and self.device.warpgroups
                slot = 1.0 if wide else 1 + self.padded / 110
                cost = rounds * (matrix.slots_per_split * slot + 1) + 0.15 * splits
                if best is None or cost < best[0] - 1e-9:
                    best = cost, matrix
        assert best is not None
        return best[1]

    def _key_ranges(self) -> list[tuple[int, int]]:
        """(first key, keys) of the tiles that share one head of one sample's attention to the features."""
        keys, tiles = self.shape.context, self.shape.batch * self.shape.heads
        best: tuple[float, int] | None = None
        for count in range(-(-keys // MAX_KEYS), -(-keys // 16) + 1):
            rounds = -(-tiles * count // self.device.workers)
            cost = rounds * (-(-keys // count) / 32 + 1) + 0.1 * count + 2 * (count > 1)
            if best is None or cost < best[0]:
                best = cost, count
        assert best is not None
        size = -(-keys // best[1])
        size = -(-size // 8) * 8 if size < MAX_KEYS - 8 else size
        return [(k, min(size, keys - k)) for k in range(0, keys, size)]

    def _constants(self) -> None:
        s = self.shape

        def add(name: str, length: int) -> None:
            self.constants[name] = (self.floats, length)
            self.floats += -(-length // 4) * 4  # read four at a time

        add("times", s.steps)
        add("encode.bias", s.steps * s.width)
        add("encode_out.bias", s.tokens * s.width)
        for i in range(len(s.blocks)):
            add(f"{i}.scale", s.steps * s.width)
            add(f"{i}.shift", s.steps * s.width)
            for part in ("project", "out", "mlp_in", "mlp_out"):
                matrix = self.matrices[f"{i}.{part}"]
                add(f"{matrix.name}.bias", matrix.rows)
                if matrix.fp8:
                    add(f"{matrix.name}.row_scale", matrix.rows)
        add("scale", s.steps * s.width)
        add("shift", s.steps * s.width)
        add("decode_in.bias", s.decoder)
        add("decode_out.bias", s.actions)

    def _offset(self, name: str, row: int = 0, width: int = 0) -> int:
        return self.constants[name][0] + row * width

    # -- stages --------------------------------------------------------------------------------------------------------

    def _stages(self, group: range) -> Iterator[Stage]:
        """The chain of one group. The residual branch of a product is added by the norm that follows it."""
        s = self.shape
        tokens = [b * s.tokens + i for b in group for i in range(s.tokens)]
        yield [Start(b * s.tokens, s.tokens, int(s.prefix), b) for b in group]
        for step in range(s.steps):
            bias = self._offset("encode.bias", step, s.width)
            yield self._products("encode", group, Space.NOISY, Space.EMBEDDED, Epilogue.SILU, bias)
            yield self._products("encode_out", group, Space.EMBEDDED, Space.PARTIAL, Epilogue.PARTIAL)
            branch = "encode_out"
            for i, cross in enumerate(s.blocks):
                yield [self._norm(t, branch, f"{i}.", step, 1e-5) for t in tokens]
                yield self._products(f"{i}.project", group, Space.NORMED, Space.PROJECTED, Epilogue.PLAIN)
                yield from self._attention(group, sum(s.blocks[:i]) if cross else NONE)
                yield self._products(f"{i}.out", group, Space.ATTENDED, Space.PARTIAL, Epilogue.PARTIAL)
                yield [self._norm(t, f"{i}.out", None, step, 1e-5) for t in tokens]
                yield self._products(f"{i}.mlp_in", group, Space.NORMED, Space.HIDDEN, Epilogue.GELU)
                branch = f"{i}.mlp_out"
                yield self._products(branch, group, Space.HIDDEN, Space.PARTIAL, Epilogue.PARTIAL)
            yield [self._norm(t, branch, "", step, 1e-6) for t in tokens]
            yield self._products("decode_in", group, Space.NORMED, Space.DECODED, Epilogue.RELU)
            yield self._products("decode_out", group, Space.DECODED, Space.PARTIAL, Epilogue.PARTIAL)
            planes, bias = self.matrices["decode_out"].splits, self._offset("decode_out.bias")
            last = int(step == s.steps - 1)
            yield [Euler(b * s.tokens, s.tokens, int(s.prefix), b, planes, bias, step, last) for b in group]

    def _products(
        self, name: str, group: range, source: Space, out: Space, epilogue: Epilogue, bias: int | None = None
    ) -> Stage:
        matrix, tokens = self.matrices[name], self.shape.tokens
        if bias is None:
            bias = NONE if epilogue == Epilogue.PARTIAL else self._offset(f"{name}.bias")
        stage: Stage = []
        for i in range(matrix.row_tiles):
            row = i * matrix.tile_rows
            for plane in range(matrix.splits):
                first = plane * matrix.slots_per_split
                slots = min(matrix.slots_per_split, matrix.slots - first)
                column = first * matrix.slot_columns
                stage.append(
                    Product(
                        source=source,
                        token=group.start * tokens,
                        tokens=len(group) * tokens,
                        row=row,
                        rows=min(matrix.tile_rows, matrix.rows - row),
                        tile_rows=matrix.tile_rows,
                        column=column,
                        columns=min(slots * matrix.slot_columns, matrix.columns - column),
                        weight=matrix.offset + (i * matrix.slots + first) * matrix.units_per_slot,
                        slots=slots,
                        fp8=int(matrix.fp8),
                        out=out,
                        plane=plane,
                        epilogue=epilogue,
                        bias=bias if bias == NONE else bias + row,
                        scale=self._offset(f"{name}.row_scale") + row if matrix.fp8 else NONE,
                    )
                )
        return stage

    def _norm(self, token: int, branch: str, table: str | None, step: int, eps: float) -> Norm:
        """`branch` is the product whose planes are added; `table` the prefix of the modulation's names."""
        s = self.shape
        sample, place = divmod(token, s.tokens)
        first = 0
        bias = self._offset(f"{branch}.bias")
        if branch == "encode_out":
            first = 2 if s.prefix and place == 0 else 1
            bias += place * s.width
        scale = shift = NONE
        if table is not None:
            scale = self._offset(f"{table}scale", step, s.width)
            shift = self._offset(f"{table}shift", step, s.width)
        return Norm(token, self.matrices[branch].splits, bias, scale, shift, float_bits(eps), first, sample)

    def _attention(self, group: range, context: int) -> Iterator[Stage]:
        s = self.shape
        ranges = [(0, s.tokens)] if context == NONE else self.key_ranges
        each = [(b, h) for b in group for h in range(s.heads)]
        yield [
            Attend(b * s.tokens, s.tokens, h, context, key, keys, b, plane if len(ranges) > 1 else NONE)
            for b, h in each
            for plane, (key, keys) in enumerate(ranges)
        ]
        if len(ranges) > 1:
            yield [Combine(b * s.tokens, s.tokens, h, len(ranges)) for b, h in each]

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
        planes = max(m.splits for m in self.matrices.values())
        ranges = len(self.key_ranges)
        sizes = {
            Space.ACTIONS: (1, s.actions, True),
            Space.NOISY: (1, s.padded_actions, False),
            Space.EMBEDDED: (1, s.width, False),
            Space.STREAM: (1, s.width, True),
            Space.NORMED: (1, s.width, False),
            Space.PROJECTED: (1, project, False),
            Space.ATTENDED: (1, s.width, False),
            Space.HIDDEN: (1, s.mlp, False),
            Space.DECODED: (1, s.decoder, False),
            Space.PARTIAL: (planes, -(-max(s.width, s.actions) // 4) * 4, True),
            Space.HEADS: (ranges, s.width, True),
            Space.STATS: (ranges, 2 * s.heads, True),
        }
        found, offset = [], 0
        for space in sorted(sizes):
            depth, columns, wide = sizes[space]
            buffer = Buffer(depth, s.rows, columns, wide, offset)
            found.append(buffer)
            offset += -(-buffer.bytes // 256) * 256
        found.append(Buffer(1, s.batch * s.horizon, s.actions, True, 0))  # OUT is the caller's tensor
        return tuple(found)

    def _shared_memory(self) -> tuple[int, int, int]:
        """(slots, staging bytes, columns of activations in it)."""
        s = self.shape
        row = 2 * s.head_dim + 16
        least = max(640 * self.padded, (2 * MAX_KEYS + MAX_TOKENS) * row, self._part_bytes(256))
        least = -(-least // 128) * 128
        slots = COPY_SLOTS
        room = self.device.shared_memory - FIXED_SHARED - slots * 2 * WEIGHT_UNIT
        if room < least:
            raise ConfigError(
                f"action_ode: shared_memory: expected at least {self.device.shared_memory + least - room} bytes a block, "
                f"got {self.device.shared_memory}; use head='library'"
            )
        if self.device.bulk_copies:  # weights that are under way count for more than activations in one piece
            room = max(least, room - (LEAST_BULK_SLOTS - slots) * 2 * WEIGHT_UNIT)
        longest = max(m.slots_per_split * m.slot_columns for m in self.matrices.values())
        part = 256
        while part < longest and self._part_bytes(part + 256) <= room:
            part += 256
        staging = max(least, -(-self._part_bytes(part) // 128) * 128)
        if self.device.bulk_copies:
            spare = self.device.shared_memory - FIXED_SHARED - staging
            slots = max(slots, min(MOST_BULK_SLOTS, spare // (2 * WEIGHT_UNIT)))
        return slots, staging, part

    def _part_bytes(self, columns: int) -> int:
        """Groups of 8 columns, each 16 bytes a token, and 16 more so that neighbours start in another bank."""
        return columns // 8 * (16 * self.padded + 16)


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
        return work.slots + 1
    if isinstance(work, Attend):
        return math.ceil(work.keys / 32) + 1
    return 1
