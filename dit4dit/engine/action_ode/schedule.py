"""The schedule: every tile of one Euler step of the action head, which team runs it, and where it reads and writes.

One object drives the CUDA kernel and its PyTorch twin. The blocks of a launch are teams of `ranks` blocks each (a thread block
cluster, where there is more than one). A team runs its tiles in order, once for each Euler step, all its blocks the same tile at
the same time. A tile is a record of `RECORD` int32 numbers: opcode, then the fields of the opcode's tuple below, in order. The
structs of kernels/action_ode_tiles.cuh have the same names in the same order; a test compares them.

Teams exchange activations through buffers of 32-bit words, two bfloat16 columns each. **A word is its own flag**: it is `EMPTY`
until its value is there, and whoever needs it reads it until it is not. No tile waits for anything else of another team. All
buffers exist in `SETS` sets. In step s, counted on over launches, tiles read and write set s % 3 and make the words that they
write EMPTY in set (s + 2) % 3, which held the step before and is used again two steps later. NOISY alone is written one step
ahead: a step's velocity makes the next step's noisy actions, and this step's EMPTY.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RECORD = 32
WARPS = 8
"""Warps of a block that compute; one more fetches weights."""
THREADS = 32 * (WARPS + 1)
STEP_COLUMNS = 32
"""Columns of a matrix in one step of a product's loop: two tensor core fragments of 16."""
WEIGHT_UNIT = 512
"""Bytes in which weights are counted: 16 rows x 32 columns in fp8, half of them in bf16."""
SLOT_BYTES = 16384
"""Of one panel of weights in shared memory."""
MAX_TOKENS = 72
PADDED_TOKENS = (16, 24, 40, 56, 72)
"""Tokens of one product; the kernel has code of its own for each."""
WARP_KEYS = 64
"""Keys that one warp of an attention tile takes at a time, at most."""
MAX_HEAD_DIM = 64
MAX_WIDTH = 2048
MAX_WARP_TILES = 2
"""Row groups of 16 that one warp may have of a product; with more than MOST_TOKENS_OF_TWO padded tokens it is one."""
MOST_TOKENS_OF_TWO = 40
RANKS = (1, 2, 4, 8)
SETS = 3
EMPTY = -1
"""The word (as int32) that no pair of bfloat16 results ever is: 0xffffffff is a NaN that the kernel does not make."""
NONE = -1


class Opcode(IntEnum):
    """What a tile does."""

    PRODUCT = 0
    ATTEND = 1


class Epilogue(IntEnum):
    """What a product does with its sums, to which the bias has been added. The first four write the activations' dtype."""

    PLAIN = 0
    GELU = 1
    SILU = 2
    RELU = 3
    TOKENS = 4  # a step's tokens -> STREAM and its words; a bias for each token, and the state's instead of its own
    RESIDUAL = 5  # + STREAM -> STREAM and its words
    EULER = 6  # the velocity: the sampler's step -> ACTIONS and NOISY of the next step, after the last step the result


class Product(NamedTuple):
    """`tokens` rows of a buffer times `rows` rows of a matrix, by all ranks of a team.

    The team's R = ranks blocks are R / split row parts; block r works for part r // split, whose tile_rows * split / R rows its
    `split` blocks share by columns: block r takes columns (r % split) * slice to + slice - 1 of K (none are left for some; what
    lies past K is zero). Sums of a part are then exchanged: of the tile's rows, block r finishes r * tile_rows / R and on.

    Within a block, warp w takes row groups of 16 `w % (8 // parts)`, + 8 // parts, ... and of the slice's steps of 32 columns
    those with step % parts == w // (8 // parts), counted from each panel's beginning. Planes of sums: split * parts.

    With a norm, layer norm and modulation are y = (sum_k W[n, k] x[k] (1 + scale[k]) - mean * sums[n]) * inverse + bias[n] with
    sums[n] = sum_k W[n, k] (1 + scale[k]) and shift @ W in the bias: no norm has to wait for a whole row.

    With `attend` the rows that are multiplied are the tokens' attention to each other: the source has q | k | v, each of K
    columns, and a block works out its own columns, of all heads that they belong to, before it multiplies them.
    """

    source: int  # word of the first token's first column in a set
    source_stride: int  # words from token to token
    columns: int  # K
    split: int
    slice: int  # a multiple of STEP_COLUMNS
    row: int  # first row of the matrix, and first column of the result
    rows: int  # at most tile_rows; the matrix is padded with zeros up to them
    tile_rows: int  # a multiple of 16 * ranks / split
    parts: int  # 1, 2, 4 or 8
    weight: int  # WEIGHT_UNITs from the beginning of the weights: the tile's; rank after rank
    rank_units: int  # WEIGHT_UNITs of one rank
    panel_steps: int  # steps of 32 columns that one slot of shared memory holds; a slice's last panel may have fewer
    fp8: int
    token: int  # first row of all samples' tokens
    tokens: int
    norm: int  # bits of the float32 eps; 0: rows are taken as they are
    modulation: int  # floats: 1 + scale of all K columns; NONE without
    modulation_step: int  # floats from step to step
    sums: int  # floats: of row `row`; NONE without norm
    bias: int  # floats: of row `row`; TOKENS: of token 0, rows of the width
    constant_step: int  # floats from step to step, of `sums` and `bias`
    scale: int  # floats: of row `row`, fp8 only, else NONE
    epilogue: int
    out: int  # word of the first token's column `row` in a set
    out_stride: int
    stream: int  # floats of the private memory: [tile_rows, padded tokens] of STREAM or ACTIONS; else NONE
    attend: int  # heads of samples that the staging memory holds at a time; 0: the source has what is multiplied


class Attend(NamedTuple):
    """Heads of samples, each by `share` ranks of a team. Pair p is head p % heads of sample p // heads.

    Rank r takes pair `pair` + r // share, none from `pair` + `pairs` on. Of it the rank's i = r % share takes keys i * slice to
    + slice - 1 (none are left for some); of the result, columns i * head_dim / share and on. With a share of one it needs nothing
    of other ranks.
    """

    query: int  # word of the first sample's first token, first column of the first head, in a set
    key: int  # the same of keys and of values: the tokens themselves; NONE: the features
    value: int
    stride: int  # words from token to token of all three
    context: int  # which of the cross-attending blocks; NONE: the tokens themselves
    pair: int
    pairs: int
    share: int  # 1, 2, 4 or 8 of the team's ranks
    tokens: int  # of one sample
    keys: int
    slice: int
    out: int  # as `query`
    out_stride: int


Operands = Product | Attend
OPERANDS: dict[Opcode, type[Operands]] = {Opcode.PRODUCT: Product, Opcode.ATTEND: Attend}


class Tile(NamedTuple):
    """One record, with names."""

    opcode: Opcode
    work: Operands

    def record(self) -> list[int]:
        """RECORD numbers."""
        numbers = [int(self.opcode), *(int(n) for n in self.work)]
        return numbers + [0] * (RECORD - len(numbers))

    @classmethod
    def of(cls, record: NDArray[np.int32]) -> Tile:
        numbers = [int(n) for n in record]
        opcode = Opcode(numbers[0])
        kind = OPERANDS[opcode]
        return cls(opcode, kind(*numbers[1 : 1 + len(kind._fields)]))


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
    """What the planner must know of a GPU.

    Attributes:
        sms: SMs. shared_memory: bytes that one block may have. capability: 90 for 9.0.
        clusters: how many clusters of 2, 4 and 8 blocks can be resident at once with all of that shared memory; (): no clusters.
    """

    sms: int
    shared_memory: int
    capability: int
    clusters: tuple[int, ...] = ()

    @property
    def bulk_copies(self) -> bool:
        return self.capability >= 90

    def teams(self, ranks: int) -> int:
        """How many teams of so many blocks can run at once; 0: none."""
        if ranks == 1:
            return self.sms
        index = RANKS.index(ranks) - 1
        return self.clusters[index] if self.bulk_copies and index < len(self.clusters) else 0


@dataclass(frozen=True)
class MatrixPlan:
    """How one matrix is cut and lies in the weights: row tile after row tile, in each rank after rank, in each step after step of
    32 columns, in each row group after row group of 16. `Product` says what the numbers mean.
    """

    name: str
    rows: int
    columns: int
    ranks: int
    tile_rows: int
    split: int
    parts: int
    fp8: bool
    offset: int  # WEIGHT_UNITs

    @property
    def slice(self) -> int:
        """Columns of one rank."""
        return -(-self.columns // (self.split * STEP_COLUMNS)) * STEP_COLUMNS

    @property
    def steps(self) -> int:
        """Of 32 columns, in a slice."""
        return self.slice // STEP_COLUMNS

    @property
    def rank_rows(self) -> int:
        """Rows of the tile that one rank multiplies."""
        return self.tile_rows * self.split // self.ranks

    @property
    def own_rows(self) -> int:
        """Rows of the tile that one rank finishes."""
        return self.tile_rows // self.ranks

    @property
    def groups(self) -> int:
        """Of 16 rows, of one rank."""
        return self.rank_rows // 16

    @property
    def step_units(self) -> int:
        """WEIGHT_UNITs of one step of a rank."""
        return self.groups * (1 if self.fp8 else 2)

    @property
    def panels(self) -> int:
        """Of one rank."""
        return -(-self.steps // (SLOT_BYTES // WEIGHT_UNIT // self.step_units))

    @property
    def panel_steps(self) -> int:
        return -(-self.steps // self.panels)

    @property
    def rank_units(self) -> int:
        return self.steps * self.step_units

    @property
    def tile_units(self) -> int:
        return self.ranks * self.rank_units

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.tile_rows)

    @property
    def units(self) -> int:
        return self.row_tiles * self.tile_units

    @property
    def planes(self) -> int:
        """Of partial sums that are added up for one result."""
        return self.split * self.parts


@dataclass(frozen=True)
class Buffer:
    """Activations that teams exchange: [rows, columns], two columns a word; `offset`: words from the beginning of a set."""

    rows: int
    columns: int
    offset: int

    @property
    def words(self) -> int:
        return self.rows * self.columns // 2


@dataclass(frozen=True, eq=False)
class Schedule:
    """See the module. Teams' tiles follow each other in `tiles`; team t has first_tile[t] to first_tile[t + 1].

    Attributes:
        teams, ranks: the launch has teams * ranks blocks; those of team t are t * ranks and on.
        tiles: int32 [tiles, RECORD], of one step.
        first_tile: int32 [teams + 1].
        fused: attention of tokens to each other is part of the products that follow it; such blocks have no "{i}.attended". Only
            from Hopper on.
        buffers: what is exchanged, by name: "noisy" (the sampler's state in the activations' dtype, columns padded with zeros),
            "embedded", "tokens", and of block i "{i}.project" (q, or q | k | v), "{i}.attended", "{i}.out", "{i}.hidden",
            "{i}.mlp_out", last "decoded". "tokens", "{i}.out" and "{i}.mlp_out" are the rounded residual stream.
        set_words: of one of the SETS sets. private_floats: memory that each block keeps for itself, of all blocks.
        constants: name -> (offset in floats, length); `constant_floats` of them.
        padded_tokens: tokens of one product, one of PADDED_TOKENS.
        part: columns of activations that a rank stages at a time, a multiple of 32; a slice is longer only with split 1.
        slots: panels of weights that shared memory holds. staging: bytes of staged activations, and behind them of what
            attention inside a product is worked out from, or with one rank of sums; or of what attention stages. inbox: bytes of
            sums, from other ranks or a rank's own, twice; 0 with one rank.
    """

    shape: HeadShape
    device: Device
    teams: int
    ranks: int
    fused: bool
    tiles: NDArray[np.int32]
    first_tile: NDArray[np.int32]
    buffers: Mapping[str, Buffer]
    set_words: int
    private_floats: int
    matrices: Mapping[str, MatrixPlan]
    constants: Mapping[str, tuple[int, int]]
    constant_floats: int
    padded_tokens: int
    part: int
    slots: int
    staging: int
    inbox: int

    @property
    def blocks(self) -> int:
        return self.teams * self.ranks

    @property
    def weight_bytes(self) -> int:
        return WEIGHT_UNIT * sum(m.units for m in self.matrices.values())

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return FIXED_SHARED + self.slots * SLOT_BYTES + self.staging + 2 * self.inbox

    @property
    def stages(self) -> int:
        """Stages of one Euler step: how often what one team has written must reach another before work can start."""
        return len(self.buffers)

    @cached_property
    def decoded(self) -> list[Tile]:
        """The tiles with names, in the order of `tiles`."""
        return [Tile.of(record) for record in self.tiles]


FIXED_SHARED = 2048
"""Bytes for records and barriers: `Fixed` in kernels/action_ode_block.cuh, rounded up."""


def float_bits(x: float) -> int:
    """The float32 nearest to x as an int32."""
    bits: int = struct.unpack("<i", struct.pack("<f", x))[0]
    return bits


def float_of(bits: int) -> float:
    """The inverse of `float_bits`."""
    x: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return x
