"""The validator: proof that a schedule may run, whatever the order in which its teams and ranks come forward.

A step is a chain of stages (chain.py): the products with one matrix, or one block's attention. Each reads one buffer and writes
one. A group is the samples whose tokens one product takes; groups have nothing to do with each other.

1. Words. Every number of every record is the one that the chain demands, and each row tile of each matrix has one tile a group,
   each head of a sample one a block. So every word is written by one tile of a step (of NOISY by an EULER tile, before the first
   step by the same one), and products read all columns of all their tokens, attention all of its head, and nobody anything else.
2. It ends. Teams that run their tiles in order, each after all tiles of its group's stage before it, run all of them: this is
   tried out. No other order can fail where one succeeds, as no word is taken back before it has been read (3). A tile waits for
   words of its own step alone, of NOISY for the step before: when each step ends, all do. The noise is written before the first
   step by the tiles at the end of each team, so EULER tiles are last.
3. The rotation of SETS is sound. A word is stored after all reads of the ranks whose sums are in it, those of its part; each part
   of each tile has words. All words of a stage are read by the next: products read whole buffers (of q | k | v a block reads the
   heads that its columns belong to, of all columns), and each column of queries, keys, values and attention's results belongs to
   one head. So before any EULER tile of a group stores a word, all tiles of the
   group's earlier stages are done with their reads of this step, in all ranks. Then
   - this step's NOISY has been read by all when EULER makes it EMPTY;
   - whatever is stored for the group in the next step waits, by the chain, for all of the group's new NOISY, thus until all of
     this step has been read: then this step's words are made EMPTY.
   And nobody finds an older step's word: who reads a word in step s + 2 has read it in step s + 1, when it was stored by the
   thread that in step s had made EMPTY what is read in s + 2; of NOISY it is one step more. That holds from launch to launch, as
   each begins with the set at which the one before has ended.
4. Private memory. All tiles that add to one part of the residual stream have the team, rows, tokens and memory of the TOKENS
   tile that begins it, so that the thread which wrote an element is the one that reads it. They follow each other, since each
   depends, by the chain, on what the one before it wrote. EULER tiles have memory of their own, and no two ranges overlap.
5. Exchange. Matrices are cut as `Product` demands, what is staged and sums fit into shared memory, and all teams can run at
   once. Ranks of a team wait for each other's sums of the same tile, or for room that an earlier tile frees. They cover all keys.
6. Bounds. Buffers, constants and matrices lie in their memory, do not overlap, and are aligned for loads of 16 bytes.

Taken from the kernel: a thread stores its words after the reads and sums of its tile; the same thread stores a word in all steps;
what it stored in one step is seen before what it stores in the next. Not proved: what weights and constants are, which the twin
shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dit4dit.engine.action_ode.chain import (
    ScheduleError,
    Stage,
    chain,
    check_buffers,
    check_constants,
    check_matrices,
    check_sizes,
    need,
)
from dit4dit.engine.action_ode.schedule import (
    NONE,
    OPERANDS,
    RANKS,
    RECORD,
    Epilogue,
    MatrixPlan,
    Opcode,
    Schedule,
    Tile,
    float_bits,
)
from dit4dit.engine.action_ode.sizes import (
    attend_bytes,
    attend_inbox,
    own_attention_bytes,
    product_staging,
    query_rows,
)

__all__ = ["ScheduleError", "validate"]

Integers = NDArray[np.int64]


def validate(schedule: Schedule) -> None:
    """Nothing, if the schedule may run.

    Raises:
        ScheduleError: it may not.
    """
    stages = chain(schedule.shape, schedule.fused)
    check_sizes(schedule)
    check_buffers(schedule, stages)
    check_matrices(schedule, stages)
    check_constants(schedule, stages)
    _check_records(schedule)
    tiles = _Tiles(schedule, stages)
    tiles.check_products()
    tiles.check_attention()
    tiles.check_private()
    tiles.check_end()


def _check_records(schedule: Schedule) -> None:
    tiles, first = schedule.tiles, schedule.first_tile
    right = tiles.dtype == first.dtype == np.int32 and tiles.shape[1:] == (RECORD,)
    need(right, "tiles and first_tile", f"int32, [tiles, {RECORD}]", f"{tiles.dtype}, {first.dtype}, {tiles.shape}")
    right = first.shape == (schedule.teams + 1,) and first[0] == 0 and first[-1] == len(tiles)
    right = right and bool((np.diff(first) >= 0).all())
    need(right, "first_tile", f"{schedule.teams + 1} rising numbers from 0 to {len(tiles)}", first.tolist())
    _refuse(schedule, ~np.isin(tiles[:, 0], list(Opcode)), "no such opcode")


def _refuse(schedule: Schedule, wrong: NDArray[np.bool_], what: str, among: Integers | None = None) -> None:
    """ScheduleError for the first tile that is `wrong`; `among`: the tiles that it tells of."""
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ScheduleError(f"{_name(schedule, i if among is None else int(among[i]))}: {what}")


def _name(schedule: Schedule, i: int) -> str:
    record = schedule.tiles[i]
    return f"tile {i} {Tile.of(record).work if record[0] in list(Opcode) else record.tolist()}"


# -- tiles -------------------------------------------------------------------------------------------------------------


class _Kind:
    """All tiles of one opcode: `tiles`, and each field as a column."""

    def __init__(self, schedule: Schedule, opcode: Opcode) -> None:
        self.schedule = schedule
        self.tiles = np.flatnonzero(schedule.tiles[:, 0] == opcode)
        records = schedule.tiles[self.tiles].astype(np.int64)
        self.fields = {name: records[:, 1 + i] for i, name in enumerate(OPERANDS[opcode]._fields)}

    def __getitem__(self, name: str) -> Integers:
        return self.fields[name]

    def refuse(self, wrong: NDArray[np.bool_], what: str) -> None:
        _refuse(self.schedule, wrong, what, self.tiles)

    def compare(self, name: str, wanted: Integers, why: str = "") -> None:
        wrong = self[name] != wanted
        if wrong.any():
            at = int(np.argmax(wrong))
            self.refuse(wrong, f"{name}: expected {int(wanted[at])}{why}, got {int(self[name][at])}")


class _Tiles:
    """What the tiles are, as it is proved.

    Attributes:
        team, stage, group: of each tile. groups: first token of each, and the end.
    """

    def __init__(self, schedule: Schedule, stages: Sequence[Stage]) -> None:
        self.schedule, self.stages = schedule, stages
        self.team = np.repeat(np.arange(schedule.teams), np.diff(schedule.first_tile))
        self.stage, self.group = (np.full(len(schedule.tiles), NONE, np.int64) for _ in range(2))
        self.products, self.attends = _Kind(schedule, Opcode.PRODUCT), _Kind(schedule, Opcode.ATTEND)

    def check_products(self) -> None:
        p, schedule = self.products, self.schedule
        which = [k for k, stage in enumerate(self.stages) if stage.epilogue is not None]
        which.sort(key=lambda k: schedule.matrices[self.stages[k].name].offset)
        matrices = [schedule.matrices[self.stages[k].name] for k in which]
        offset = np.array([m.offset for m in matrices])
        mine = np.searchsorted(offset, p["weight"], side="right") - 1
        p.refuse(mine < 0, "weight: no matrix begins before it")
        tile, rest = np.divmod(p["weight"] - offset[mine], np.array([m.tile_units for m in matrices])[mine])
        row_tiles = np.array([m.row_tiles for m in matrices])
        p.refuse((rest != 0) | (tile >= row_tiles[mine]), "weight: no row tile of a matrix begins there")
        stage = np.array(which)[mine]
        self.stage[p.tiles] = stage
        self._check_groups()
        bases = [self._bases(self.stages[k], m) for k, m in zip(which, matrices, strict=True)]
        base = {name: np.array([b[name] for b in bases])[mine] for name in bases[0]}
        row = tile * base["tile_rows"]
        rows = np.minimum(base["tile_rows"], np.array([m.rows for m in matrices])[mine] - row)
        moved = {
            "row": row,
            "rows": rows,
            "source": base["source"] + p["token"] * base["source_stride"],
            "out": base["out"] + p["token"] * base["out_stride"] + row // 2,
        }
        for name in ("sums", "bias", "scale"):
            moved[name] = np.where(base[name] == NONE, NONE, base[name] + row)
        for name, wanted in {**moved, **{name: base[name] for name in base.keys() - moved.keys()}}.items():
            p.compare(name, wanted, " by its weight")
        self._check_once(p.tiles, np.stack([stage, self.group[p.tiles], tile]), self._wanted_products())
        self._check_own_attention(np.array([self.stages[k].attend for k in which])[mine], matrices, mine)
        # EULER writes up to the padded actions
        end = np.where(p["epilogue"] == Epilogue.EULER, schedule.shape.padded_actions, row + rows)
        last_part = p["tile_rows"] - p["tile_rows"] * p["split"] // schedule.ranks
        p.refuse(end - row <= last_part, "rows: none for the last part of its ranks: no word tells when they have read")

    def _check_own_attention(self, attends: NDArray[np.bool_], matrices: Sequence[MatrixPlan], mine: Integers) -> None:
        """Results of attention are staged at once, and what they are worked out from lies behind them.

        attends: of each product, whether its rows are such.
        """
        p, schedule, shape = self.products, self.schedule, self.schedule.shape
        p.refuse(np.where(attends, p["attend"] < 1, p["attend"] != 0), "attend: not as its stage is")
        p.refuse(attends & (p["slice"] > schedule.part), "attend: its columns are not staged at once")
        rows = query_rows(shape.tokens)
        p.refuse(attends & (shape.tokens > rows), f"attend: more than {rows} tokens of a sample")
        each = own_attention_bytes(shape.tokens, shape.head_dim)
        for matrix, at_once in set(zip(mine[attends].tolist(), p["attend"][attends].tolist(), strict=True)):
            size = product_staging(schedule.padded_tokens, schedule.part, matrices[matrix], at_once * each)
            wrong = attends & (mine == matrix) & (p["attend"] == at_once) & (size > schedule.staging)
            p.refuse(wrong, f"attend: expected a staging of at least {size}")

    def _bases(self, stage: Stage, matrix: MatrixPlan) -> dict[str, int]:
        """What all products with a matrix have in common, and what begins where the first of them begins."""
        schedule = self.schedule
        buffers, constants, steps = schedule.buffers, schedule.constants, schedule.shape.steps
        assert stage.epilogue is not None

        def table(name: str, there: bool) -> tuple[int, int]:
            return constants[name] if there else (NONE, 0)

        bias, length = constants[f"{stage.name}.bias"]
        modulation, modulations = table(f"{stage.modulation}", stage.modulation is not None)
        cut = ("columns", "split", "slice", "tile_rows", "parts", "rank_units", "panel_steps", "fp8")
        return {
            **{name: int(getattr(matrix, name)) for name in cut},
            "epilogue": stage.epilogue,
            "source": buffers[stage.source].offset,
            "source_stride": buffers[stage.source].columns // 2,
            "out": buffers[stage.out].offset,
            "out_stride": buffers[stage.out].columns // 2,
            "norm": float_bits(stage.eps),
            "modulation": modulation,
            "modulation_step": modulations // steps,
            "sums": table(f"{stage.name}.sums", stage.eps > 0)[0],
            "bias": bias,
            "constant_step": length // steps if stage.stepwise else 0,
            "scale": table(f"{stage.name}.row_scale", matrix.fp8)[0],
        }

    def _check_groups(self) -> None:
        """Groups are the tokens that most products have, as many for each; all others must have them too."""
        p, shape = self.products, self.schedule.shape
        ranges, count = np.unique(np.stack([p["token"], p["token"] + p["tokens"]], 1), axis=0, return_counts=True)
        ranges = ranges[2 * count > count.max(initial=0)]
        self.groups, ends = np.append(ranges[:, 0], shape.rows), np.append(0, ranges[:, 1])
        right = np.array_equal(self.groups, ends) and not (ends % shape.tokens).any()
        need(right, "tokens of products", f"whole samples up to {shape.rows}, each once", ranges.tolist())
        group = np.searchsorted(self.groups[:-1], p["token"], side="right") - 1
        p.compare("token", self.groups[group], ", the first of a group")
        p.compare("tokens", self.groups[group + 1] - self.groups[group], ", those of a group")
        most = self.schedule.padded_tokens
        p.refuse(p["tokens"] > most, f"tokens: more than {most}")
        self.group[p.tiles] = group

    def _wanted_products(self) -> Iterator[tuple[tuple[int, ...], str]]:
        for k, stage in enumerate(self.stages):
            for g in range(len(self.groups) - 1):
                tokens = f"tokens {self.groups[g]} to {self.groups[g + 1] - 1}"
                tiles = range(self.schedule.matrices[stage.name].row_tiles) if stage.epilogue is not None else ()
                yield from (((k, g, i), f"row tile {i} of matrix {stage.name!r} for {tokens}") for i in tiles)

    def _check_once(self, tiles: Integers, keys: Integers, wanted: Iterator[tuple[tuple[int, ...], str]]) -> None:
        """Each of `wanted` has one tile; keys [3, tiles]."""
        seen: dict[tuple[int, ...], int] = {}
        for i, key in zip(tiles.tolist(), map(tuple, keys.T.tolist()), strict=True):
            if key in seen:
                raise ScheduleError(f"{_name(self.schedule, i)}: writes the same words as tile {seen[key]}")
            seen[key] = i
        for key, what in wanted:
            if key not in seen:
                raise ScheduleError(f"no tile has {what}: nobody writes its words")

    def check_attention(self) -> None:
        a, schedule, shape = self.attends, self.schedule, self.schedule.shape
        which = [k for k, stage in enumerate(self.stages) if stage.epilogue is None]
        which.sort(key=lambda k: schedule.buffers[self.stages[k].out].offset)
        stages = [self.stages[k] for k in which]
        sources = [schedule.buffers[stage.source] for stage in stages]
        outs = [schedule.buffers[stage.out] for stage in stages]
        mine = np.searchsorted(np.array([b.offset for b in outs]), a["out"], side="right") - 1
        a.refuse(mine < 0, "out: before all buffers of attention")
        context = np.array([stage.context for stage in stages])[mine]
        query = np.array([b.offset for b in sources])[mine]
        alone = context == NONE
        wanted = {
            "out": np.array([b.offset for b in outs])[mine],
            "out_stride": np.full_like(mine, shape.width // 2),
            "context": context,
            "query": query,
            "key": np.where(alone, query + shape.width // 2, NONE),
            "value": np.where(alone, query + shape.width, NONE),
            "stride": np.array([b.columns // 2 for b in sources])[mine],
            "tokens": np.full_like(mine, shape.tokens),
            "keys": np.where(alone, shape.tokens, shape.context),
        }
        for name, numbers in wanted.items():
            a.compare(name, numbers, " by its block")
        a.refuse(
            ~np.isin(a["share"], RANKS) | (a["share"] > schedule.ranks), f"share: not one of {RANKS} up to the ranks"
        )
        most = schedule.ranks // a["share"]
        a.refuse((a["pairs"] < 1) | (a["pairs"] > most), "pairs: not 1 to the ranks by the share")
        pairs = shape.batch * shape.heads
        a.refuse((a["pair"] < 0) | (a["pair"] + a["pairs"] > pairs), f"pair: not all of {pairs} heads of samples")
        first, last = (self._group_of(pair // shape.heads) for pair in (a["pair"], a["pair"] + a["pairs"] - 1))
        a.refuse(first != last, "pairs: of samples of several groups")
        self.group[a.tiles] = first
        self.stage[a.tiles] = np.array(which)[mine]
        self._check_keys()
        self._check_pairs(which)

    def _group_of(self, sample: Integers) -> Integers:
        return np.searchsorted(self.groups[:-1], sample * self.schedule.shape.tokens, side="right") - 1

    def _check_pairs(self, which: Sequence[int]) -> None:
        """Each head of each sample has one tile in each of the stages `which`."""
        a, shape = self.attends, self.schedule.shape
        of = np.repeat(np.arange(len(a.tiles)), a["pairs"])
        first = np.cumsum(a["pairs"]) - a["pairs"]
        pair = a["pair"][of] + np.arange(len(of)) - first[of]
        self._check_once(
            a.tiles[of],
            np.stack([self.stage[a.tiles][of], pair // shape.heads, pair % shape.heads]),
            (
                ((k, b, h), f"head {h} of sample {b} of {self.stages[k].name!r}")
                for k in which
                for b in range(shape.batch)
                for h in range(shape.heads)
            ),
        )

    def _check_keys(self) -> None:
        a, schedule, shape = self.attends, self.schedule, self.schedule.shape
        a.refuse((a["slice"] < 1) | (a["slice"] * a["share"] < a["keys"]), "slice: ranks do not cover the keys")
        a.refuse(a["slice"] > a["keys"], "slice: more than the keys")
        for share in np.unique(a["share"]).tolist():
            inbox = attend_inbox(shape.tokens, share, shape.head_dim)
            a.refuse((a["share"] == share) & (inbox > schedule.inbox), f"share: expected an inbox of at least {inbox}")
        rows = query_rows(shape.tokens)
        a.refuse(a["tokens"] > rows, f"tokens: more than {rows} rows of queries")
        features = a["context"] != NONE
        for keys, cross in set(zip(a["slice"].tolist(), features.tolist(), strict=True)):
            staging = attend_bytes(shape.tokens, keys, shape.head_dim, cross)
            wrong = (a["slice"] == keys) & (features == cross) & (staging > schedule.staging)
            a.refuse(wrong, f"staging: expected at least {staging}")

    def check_private(self) -> None:
        """The residual stream's memory is that of encode_out's tiles, which have the same rows."""
        p, schedule = self.products, self.schedule
        group, team, epilogue = self.group[p.tiles], self.team[p.tiles], p["epilogue"]
        size = schedule.matrices["encode_out"].tile_rows
        adds, begins = epilogue == Epilogue.RESIDUAL, epilogue == Epilogue.TOKENS
        p.refuse(
            adds & (p["tile_rows"] != size),
            f"tile_rows: expected {size} as encode_out's tiles have, whose stream it adds to",
        )
        owner = np.zeros((len(self.groups) - 1, schedule.matrices["encode_out"].row_tiles), np.int64)
        owner[group[begins], p["row"][begins] // size] = np.flatnonzero(begins)
        mine = np.arange(len(p.tiles))
        mine[adds] = owner[group[adds], p["row"][adds] // size]
        p.refuse(team != team[mine], "adds to the residual stream of another team")
        own = begins | (epilogue == Epilogue.EULER)
        p.compare("stream", np.where(own | adds, p["stream"][mine], NONE), " where the residual stream is kept")
        first = p["stream"]
        end = first + p["tile_rows"] * schedule.padded_tokens
        p.refuse(
            own & ((first < 0) | (end > schedule.private_floats)),
            f"stream: outside the {schedule.private_floats} floats of private memory",
        )
        order = np.flatnonzero(own)[np.argsort(first[own], kind="stable")]
        over = np.zeros_like(own)
        over[order[1:]] = first[order[1:]] < end[order[:-1]]
        p.refuse(over, "stream: private memory of two owners overlaps")

    def check_end(self) -> None:
        """Run all teams as far as they get; EULER tiles are a team's last."""
        schedule, groups = self.schedule, len(self.groups) - 1
        number = self.stage * groups + self.group
        left = np.bincount(number, minlength=len(self.stages) * groups).tolist()
        needs, numbers = (number - groups).tolist(), number.tolist()
        at, end = schedule.first_tile[:-1].tolist(), schedule.first_tile[1:].tolist()
        early = (
            (self.stage[:-1] == len(self.stages) - 1) & (self.stage[1:] != self.stage[:-1]) & (np.diff(self.team) == 0)
        )
        _refuse(schedule, early, "a tile that is not EULER's follows it in its team: its noise is not written")
        waiting, moved = list(range(schedule.teams)), True
        while moved:
            moved = False
            for team in waiting:
                while at[team] < end[team] and (needs[at[team]] < 0 or not left[needs[at[team]]]):
                    left[numbers[at[team]]] -= 1
                    at[team] += 1
                    moved = True
            waiting = [team for team in waiting if at[team] < end[team]]
        if waiting:
            # the furthest of them has come too early
            i = max((at[team] for team in waiting), key=lambda i: numbers[i])
            source = self.stages[int(self.stage[i])].source
            raise ScheduleError(
                f"{_name(schedule, i)}: comes before a tile of its team that {source!r} depends on: "
                f"{len(waiting)} teams wait for each other and never end"
            )
