"""The planner: the shape of a head and a device -> a schedule.

A step is a chain of stages, all of a kind: a product, or attention. What is not one of these is part of the products around it
(norms, the residual stream, the sampler's step), because a stage costs the way of words from team to team. In every stage all
teams have the same work, as far as the matrices' sizes allow: `cuts` chooses how to cut so that the predicted time is least, and
row tiles then go to the teams in turn. Who owns a part of the residual stream owns it in every stage. What makes a schedule
right is proved by `validate`, not here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import Cuts, choose
from dit4dit.engine.action_ode.schedule import (
    MAX_HEAD_DIM,
    MAX_WIDTH,
    NONE,
    OPERANDS,
    PADDED_TOKENS,
    Attend,
    Buffer,
    Device,
    Epilogue,
    HeadShape,
    MatrixPlan,
    Operands,
    Product,
    Schedule,
    Tile,
    float_bits,
)
from dit4dit.engine.action_ode.sizes import (
    own_at_once,
    query_rows,
)
from dit4dit.errors import ConfigError

OPCODES = {kind: opcode for opcode, kind in OPERANDS.items()}
BLOCK_EPS, LAST_EPS = 1e-5, 1e-6
"""Of the norms in the blocks and before the decoder."""
ALIGNED_WORDS = 32
"""Buffers begin at multiples of these."""

Placed = tuple[int, Operands]
"""Team and work."""


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
    most = query_rows(PADDED_TOKENS[-1])
    if not 1 <= shape.tokens <= most:
        refuse("tokens", f"1 to {most} a sample, the state token included", shape.tokens)
    for name in ("horizon", "actions", "context", "batch", "steps"):
        if getattr(shape, name) < 1:
            refuse(name, "at least 1", getattr(shape, name))
    if not shape.blocks:
        refuse("blocks", "at least 1", 0)


def plan(
    shape: HeadShape,
    device: Device,
    costs: Costs | None = None,
    *,
    ranks: int | None = None,
    group: int | None = None,
    fused: bool | None = None,
) -> Schedule:
    """The schedule of `shape` on `device` with the least predicted time, the same for the same arguments.

    Args:
        costs: of the GPU, by which times are predicted; an H200's if None.
        ranks: blocks of a team. group: samples whose tokens one product takes. fused: as of `Schedule`. None: what is predicted
            to take least.

    Raises:
        ConfigError: the shape has no tiles, the device too little shared memory, or what is asked for is not possible.
    """
    check(shape)
    if device.sms < 1:
        raise ConfigError(f"action_ode: sms: expected at least 1 SM, got {device.sms}")
    return _Planner(shape, device, choose(shape, device, costs or Costs(), ranks, group, fused)).schedule()


class _Planner:
    """The tables and tiles of what `choose` has chosen."""

    def __init__(self, shape: HeadShape, device: Device, cuts: Cuts) -> None:
        self.shape, self.device, self.cuts = shape, device, cuts
        self.padded = cuts.padded_tokens
        firsts = range(0, shape.batch, cuts.group)
        self.groups = [range(first, min(first + cuts.group, shape.batch)) for first in firsts]
        self.buffers: dict[str, Buffer] = {}
        self.set_words = 0
        self.constants: dict[str, tuple[int, int]] = {}
        self.floats = 0
        self._buffers()
        self._constants()
        self.stream_floats = self._private(self.cuts.matrices["encode_out"])
        self.private_floats = self.stream_floats + self._private(self.cuts.matrices["decode_out"])

    # -- tables --------------------------------------------------------------------------------------------------------

    def _buffers(self) -> None:
        s = self.shape
        sizes = {"noisy": s.padded_actions, "embedded": s.width, "tokens": s.width}
        for i, cross in enumerate(s.blocks):
            sizes[f"{i}.project"] = s.width if cross else 3 * s.width
            if cross or not self.cuts.fused:
                sizes[f"{i}.attended"] = s.width
            sizes |= {f"{i}.out": s.width, f"{i}.hidden": s.mlp, f"{i}.mlp_out": s.width}
        sizes["decoded"] = s.decoder
        for name, columns in sizes.items():
            self.buffers[name] = Buffer(s.rows, columns, self.set_words)
            self.set_words += -(-self.buffers[name].words // ALIGNED_WORDS) * ALIGNED_WORDS

    def _constants(self) -> None:
        s, padded = self.shape, {name: m.row_tiles * m.tile_rows for name, m in self.cuts.matrices.items()}

        def add(name: str, length: int) -> None:
            self.constants[name] = (self.floats, length)
            self.floats += -(-length // 4) * 4  # read four at a time

        add("times", s.steps)
        add("encode.bias", s.steps * padded["encode"])
        # rows of the width; only what follows the last one is padding
        add("encode_out.bias", (s.tokens - 1) * s.width + padded["encode_out"])
        for i in range(len(s.blocks)):
            add(f"{i}.modulation", s.steps * s.width)
            for name, repeat in (("project", s.steps), ("out", 0), ("mlp_in", 1), ("mlp_out", 0)):
                rows = padded[f"{i}.{name}"]
                if repeat:
                    add(f"{i}.{name}.sums", repeat * rows)
                add(f"{i}.{name}.bias", max(1, repeat) * rows)
                if s.fp8:
                    add(f"{i}.{name}.row_scale", rows)
        add("modulation", s.steps * s.width)
        add("decode_in.sums", s.steps * padded["decode_in"])
        add("decode_in.bias", s.steps * padded["decode_in"])
        add("decode_out.bias", padded["decode_out"])

    def _private(self, matrix: MatrixPlan) -> int:
        """Floats of private memory of all tiles of a matrix."""
        return len(self.groups) * matrix.row_tiles * matrix.tile_rows * self.padded

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _stages(self) -> Iterator[list[Placed]]:
        s = self.shape
        yield self._products("encode", "noisy", "embedded", Epilogue.SILU, per_step=True)
        yield self._products("encode_out", "embedded", "tokens", Epilogue.TOKENS)
        stream = "tokens"
        for i, cross in enumerate(s.blocks):
            project, attended, out = f"{i}.project", f"{i}.attended", f"{i}.out"
            yield self._products(
                project, stream, project, Epilogue.PLAIN, BLOCK_EPS, modulation=f"{i}.modulation", per_step=True
            )
            inside = self.cuts.fused and not cross
            if not inside:
                yield self._attention(project, attended, sum(s.blocks[:i]) if cross else NONE)
            yield self._products(out, project if inside else attended, out, Epilogue.RESIDUAL, attend=inside)
            yield self._products(f"{i}.mlp_in", out, f"{i}.hidden", Epilogue.GELU, BLOCK_EPS)
            stream = f"{i}.mlp_out"
            yield self._products(stream, f"{i}.hidden", stream, Epilogue.RESIDUAL)
        yield self._products(
            "decode_in", stream, "decoded", Epilogue.RELU, LAST_EPS, modulation="modulation", per_step=True
        )
        yield self._products("decode_out", "decoded", "noisy", Epilogue.EULER)

    def _products(
        self,
        name: str,
        source: str,
        out: str,
        epilogue: Epilogue,
        eps: float = 0.0,
        *,
        modulation: str | None = None,
        per_step: bool = False,
        attend: bool = False,
    ) -> list[Placed]:
        """All tiles of a matrix. eps: with a norm. per_step: sums and bias differ from step to step. attend: as of `Product`."""
        m = self.cuts.matrices[name]
        at_once = own_at_once(m, self.shape.tokens, self.cuts.group, self.shape.head_dim) if attend else 0
        read, written, tokens = self.buffers[source], self.buffers[out], self.shape.tokens
        tile_floats = m.tile_rows * self.padded
        private = {Epilogue.TOKENS: 0, Epilogue.RESIDUAL: 0, Epilogue.EULER: self.stream_floats}.get(epilogue, NONE)

        def constant(suffix: str, row: int) -> int:
            return self.constants[f"{name}.{suffix}"][0] + row

        placed: list[Placed] = []
        for group in self.groups:
            token = group.start * tokens
            for i, row in enumerate(range(0, m.rows, m.tile_rows)):
                number = len(placed)
                work = Product(
                    source=read.offset + token * read.columns // 2,
                    source_stride=read.columns // 2,
                    columns=m.columns,
                    split=m.split,
                    slice=m.slice,
                    row=row,
                    rows=min(m.tile_rows, m.rows - row),
                    tile_rows=m.tile_rows,
                    parts=m.parts,
                    weight=m.offset + i * m.tile_units,
                    rank_units=m.rank_units,
                    panel_steps=m.panel_steps,
                    fp8=int(m.fp8),
                    token=token,
                    tokens=len(group) * tokens,
                    norm=float_bits(eps),
                    modulation=NONE if modulation is None else self.constants[modulation][0],
                    modulation_step=0 if modulation is None else self.shape.width,
                    sums=constant("sums", row) if eps else NONE,
                    bias=constant("bias", row),
                    constant_step=m.row_tiles * m.tile_rows if per_step else 0,
                    scale=constant("row_scale", row) if m.fp8 else NONE,
                    epilogue=epilogue,
                    out=written.offset + (token * written.columns + row) // 2,
                    out_stride=written.columns // 2,
                    stream=NONE if private == NONE else private + number * tile_floats,
                    attend=at_once,
                )
                placed.append((number % self.cuts.teams, work))
        return placed

    def _attention(self, project: str, attended: str, context: int) -> list[Placed]:
        """All heads of all samples, as many of a group in a tile as a team has ranks for. The last teams, which have least
        weights, come first.
        """
        s, cross = self.shape, context != NONE
        read, written = self.buffers[project], self.buffers[attended]
        cut = self.cuts.attention[cross]
        at_once = self.cuts.ranks // cut.share
        placed: list[Placed] = []
        for pair, end in (
            (pair, group.stop * s.heads)
            for group in self.groups
            for pair in range(group.start * s.heads, group.stop * s.heads, at_once)
        ):
            work = Attend(
                query=read.offset,
                key=NONE if cross else read.offset + s.width // 2,
                value=NONE if cross else read.offset + s.width,
                stride=read.columns // 2,
                context=context,
                pair=pair,
                pairs=min(at_once, end - pair),
                share=cut.share,
                tokens=s.tokens,
                keys=s.context if cross else s.tokens,
                slice=cut.slice,
                out=written.offset,
                out_stride=s.width // 2,
            )
            placed.append((self.cuts.teams - 1 - len(placed) % self.cuts.teams, work))
        return placed

    def schedule(self) -> Schedule:
        cuts = self.cuts
        teams: list[list[list[int]]] = [[] for _ in range(cuts.teams)]
        for stage in self._stages():
            for team, work in stage:
                teams[team].append(Tile(OPCODES[type(work)], work).record())
        return Schedule(
            shape=self.shape,
            device=self.device,
            teams=cuts.teams,
            ranks=cuts.ranks,
            fused=cuts.fused,
            tiles=np.array([record for tiles in teams for record in tiles], dtype=np.int32),
            first_tile=np.cumsum([0, *(len(tiles) for tiles in teams)], dtype=np.int32),
            buffers=self.buffers,
            set_words=self.set_words,
            private_floats=self.private_floats,
            matrices=cuts.matrices,
            constants=self.constants,
            constant_floats=self.floats,
            padded_tokens=self.padded,
            part=cuts.part,
            slots=cuts.slots,
            staging=cuts.staging,
            inbox=cuts.inbox,
        )
