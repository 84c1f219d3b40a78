"""The schedule: every tile of the action head's ODE, who runs it, what it waits for, and where it reads and writes.

One object drives the CUDA kernel and its PyTorch twin. A tile is a record of `RECORD` int32 numbers: opcode, counter to wait
for (-1: none), its target, counter to signal, then the fields of the opcode's tuple below, in order. The structs of
kernels/action_ode_tiles.cuh have the same names in the same order; a test compares them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RECORD = 24
THREADS = 256
SLOT_ELEMENTS = 4096
"""Weights of one pipeline slot: a tile's rows times as many columns as make this number."""
WEIGHT_UNIT = 4096
"""Bytes in which the offset of a slot is counted: a slot of fp8, half a slot of bf16."""
TILE_ROWS = (16, 32, 64)
MAX_TOKENS = 64
MAX_HEAD_DIM = 64
MAX_WIDTH = 2048
COUNTER_STRIDE = 32
"""int32 numbers from one counter to the next: 128 bytes, so that polls of one never meet signals of another."""
NONE = -1


class Opcode(IntEnum):
    """What a tile does."""

    START = 0
    PRODUCT = 1
    ATTEND = 2


class Epilogue(IntEnum):
    """What a product does with its sums, to which the bias has been added. The first four write the activations' dtype."""

    PLAIN = 0
    GELU = 1
    SILU = 2
    RELU = 3
    TOKENS = 4  # a step's tokens -> STREAM and ROUNDED; a bias for each token, and the state's instead of its own
    RESIDUAL = 5  # + STREAM -> STREAM and ROUNDED
    EULER = 6  # the velocity: the sampler's step -> ACTIONS and NOISY, in the last step OUT


class Space(IntEnum):
    """The buffers of the workspace."""

    ACTIONS = 0  # float32: the sampler's state
    NOISY = 1  # the same in the activations' dtype, columns padded with zeros
    EMBEDDED = 2  # first token layer
    STREAM = 3  # float32: the residual stream
    ROUNDED = 4  # the same in the activations' dtype, which is what products read
    PROJECTED = 5  # q, or q | k | v
    ATTENDED = 6  # a plane for each range of keys
    STATS = 7  # float32: of each head its largest score and its sum, a plane for each range of keys
    HIDDEN = 8  # feed-forward
    DECODED = 9  # hidden layer of the action decoder
    OUT = 10  # float32: the actions, written in the last step


class Start(NamedTuple):
    """Noise of one sample -> ACTIONS and NOISY."""

    token: int  # first row of the sample
    tokens: int
    prefix: int  # 1: the first row is the state token
    sample: int


class Product(NamedTuple):
    """`tokens` rows of `source` times `rows` rows of a matrix.

    What it takes: the planes of ranges of keys are merged, and with `norm` each row is layer-normed and modulated first.
    """

    source: int
    token: int
    tokens: int
    planes: int  # of the source; more than 1: ATTENDED
    norm: int  # bits of the float32 eps; 0: rows are taken as they are
    modulation: int  # table row of 1 + scale, then shift; NONE without
    row: int  # first row of the matrix, and first column of the result
    rows: int  # at most tile_rows; the matrix is padded with zeros up to them
    tile_rows: int
    columns: int
    weight: int  # WEIGHT_UNITs from the beginning of the weights
    slots: int
    fp8: int
    bias: int  # floats from the beginning of the constants
    scale: int  # of the rows, fp8 only
    epilogue: int
    out: int
    step: int


class Attend(NamedTuple):
    """One head of one sample over a range of keys -> a plane of ATTENDED and STATS."""

    token: int
    tokens: int
    head: int
    context: int  # which of the cross-attending blocks; NONE: the tokens themselves
    key: int
    keys: int
    sample: int
    plane: int


Operands = Start | Product | Attend
OPERANDS: dict[Opcode, type[Operands]] = {
    Opcode.START: Start,
    Opcode.PRODUCT: Product,
    Opcode.ATTEND: Attend,
}


class Tile(NamedTuple):
    """One record, with names."""

    opcode: Opcode
    wait: int
    target: int
    signal: int
    work: Operands

    def record(self) -> list[int]:
        """RECORD numbers."""
        numbers = [int(self.opcode), self.wait, self.target, self.signal, *self.work]
        return numbers + [0] * (RECORD - len(numbers))

    @classmethod
    def of(cls, record: NDArray[np.int32]) -> Tile:
        numbers = [int(n) for n in record]
        opcode = Opcode(numbers[0])
        kind = OPERANDS[opcode]
        wait, target, signal = numbers[1:4]
        return cls(opcode, wait, target, signal, kind(*numbers[4 : 4 + len(kind._fields)]))


@dataclass(frozen=True)
class HeadShape:
    """All that a schedule depends on in the head and the request.

    Attributes:
        blocks: for each block, whether it attends to the features.
        mlp, decoder: widths of the feed-forward part and of the action decoder's hidden layer.
        horizon, actions: K and A. prefix: there is a state token. context: feature tokens S. batch, steps.
        fp8: weights of the blocks in e4m3 with a scale for each row.
    """

    width: int
    heads: int
    blocks: tuple[bool, ...]
    mlp: int
    decoder: int
    horizon: int
    actions: int
    prefix: bool
    context: int
    batch: int
    steps: int
    fp8: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return self.horizon + self.prefix

    @property
    def rows(self) -> int:
        """Tokens of all samples."""
        return self.batch * self.tokens

    @property
    def padded_actions(self) -> int:
        return -(-self.actions // 16) * 16

    @property
    def contexts(self) -> int:
        """Blocks that attend to the features."""
        return sum(self.blocks)


@dataclass(frozen=True)
class Device:
    """What the planner must know of a GPU: multiprocessors, bytes of shared memory of one block, capability (90)."""

    workers: int
    shared_memory: int
    capability: int

    @property
    def bulk_copies(self) -> bool:
        return self.capability >= 90

    @property
    def warpgroups(self) -> bool:
        return self.capability == 90


@dataclass(frozen=True)
class MatrixPlan:
    """How one matrix lies in the weights: row tiles follow each other, each a row of slots and the work of one product."""

    name: str
    rows: int
    columns: int
    tile_rows: int
    fp8: bool
    offset: int  # WEIGHT_UNITs

    @property
    def slot_columns(self) -> int:
        return SLOT_ELEMENTS // self.tile_rows

    @property
    def slots(self) -> int:
        """Of one row tile."""
        return -(-self.columns // self.slot_columns)

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.tile_rows)

    @property
    def units_per_slot(self) -> int:
        return 1 if self.fp8 else 2

    @property
    def units(self) -> int:
        return self.row_tiles * self.slots * self.units_per_slot


@dataclass(frozen=True)
class Buffer:
    """planes x rows x columns; `wide`: float32, else the activations' dtype. `offset`: bytes (bf16 activations)."""

    planes: int
    rows: int
    columns: int
    wide: bool
    offset: int

    @property
    def bytes(self) -> int:
        return self.planes * self.rows * self.columns * (4 if self.wide else 2)


@dataclass(frozen=True, eq=False)
class Schedule:
    """See the module. Workers' tiles follow each other in `tiles`; worker w has first_tile[w] to first_tile[w + 1].

    Attributes:
        tiles: int32 [tiles, RECORD].
        first_tile: int32 [workers + 1].
        segments: int32 [products, 3]: weight offset, slots, units per slot, in the order of the worker's products.
        first_segment: int32 [workers + 1].
        counters: how many there are; all are zero when a launch begins, and its last worker leaves them so.
        constants: name -> (offset in floats, length); `constant_floats` of them.
        padded_tokens: tokens of one product, a multiple of 8.
        part: columns of activations staged at a time.
        slots, staging: weight slots in shared memory, and bytes of the rest of it that tiles may use.
    """

    shape: HeadShape
    device: Device
    tiles: NDArray[np.int32]
    first_tile: NDArray[np.int32]
    segments: NDArray[np.int32]
    first_segment: NDArray[np.int32]
    counters: int
    buffers: tuple[Buffer, ...]
    matrices: dict[str, MatrixPlan]
    constants: dict[str, tuple[int, int]]
    constant_floats: int
    padded_tokens: int
    part: int
    slots: int
    staging: int

    @property
    def weight_bytes(self) -> int:
        return WEIGHT_UNIT * sum(m.units for m in self.matrices.values())

    @property
    def workspace_bytes(self) -> int:
        last = self.buffers[Space.OUT - 1]
        return last.offset + -(-last.bytes // 256) * 256

    @cached_property
    def stages(self) -> int:
        """Tiles of the longest chain in which each waits for the one before: what a launch takes where weights do not."""
        depth = np.zeros(self.counters, np.int64)
        edges = np.unique(self.tiles[:, [1, 3]], axis=0)
        signals = edges[:, 1] != NONE
        for _ in range(self.counters + 1):
            before = np.where(edges[:, 0] == NONE, 0, depth[edges[:, 0]])
            np.maximum.at(depth, edges[signals, 1], before[signals] + 1)
        return int(before.max()) + 1

    @cached_property
    def decoded(self) -> list[Tile]:
        """The tiles with names, in the order of `tiles`."""
        return [Tile.of(record) for record in self.tiles]


def attend_rows(tokens: int, keys: int) -> tuple[int, int, int]:
    """(rows of queries, rows of keys, keys of one warp) that an attention tile has in shared memory; 64 keys a warp at most."""
    query_tiles = 1 if tokens <= 16 else 2 if tokens <= 32 else 4
    groups = THREADS // 32 // query_tiles
    per_warp = -(-keys // (groups * 16)) * 16
    return query_tiles * 16, groups * per_warp, per_warp


def attend_bytes(tokens: int, keys: int, head_dim: int) -> int:
    """Staging of an attention tile: queries, keys and values, then what the warps found."""
    queries, padded, _ = attend_rows(tokens, keys)
    return max((queries + 2 * padded) * (2 * head_dim + 16), THREADS // 32 * 16 * (2 + head_dim) * 4)


def product_bytes(padded_tokens: int, columns: int, modulated: int) -> int:
    """Staging of a product: `modulated` columns of scale and shift, then so many columns of tokens; last all sums.

    Columns lie in groups of 8, each 16 bytes a token, and 16 more so that neighbours start in another bank.
    """
    return max(8 * modulated + columns // 8 * (16 * padded_tokens + 16), 640 * padded_tokens)


def float_bits(x: float) -> int:
    """The float32 nearest to x as an int32."""
    bits: int = struct.unpack("<i", struct.pack("<f", x))[0]
    return bits


def float_of(bits: int) -> float:
    """The inverse of `float_bits`."""
    x: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return x
