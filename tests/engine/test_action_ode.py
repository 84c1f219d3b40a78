"""The one-launch action head without its kernel: the twin against the model's head, and the layout of weights and constants."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from head_case import A100, DEAR, DEVICES, H200, SIZES, SMALL, Case, planned, tiny
from torch import Tensor

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, Schedule, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.schedule import (
    ATTEND_KEYS,
    EMPTY,
    NONE,
    PADDED_TOKENS,
    RANKS,
    SETS,
    Attend,
    Epilogue,
    MatrixPlan,
    Opcode,
    Product,
    Tile,
)
from dit4dit.engine.action_ode.twin import Area, Twin, Words
from dit4dit.engine.action_ode.validate import validate
from dit4dit.engine.action_ode.weights import FP8, from_layout, pack, pack_constants, row_scale, to_layout
from dit4dit.model.flow import GuidanceTensors, prefix_weights

CLUSTERS = Device(64, 227 << 10, 90, (28, 12, 5))
"""Small, with teams of every size."""


def sound(case: Case, device: Device, ranks: int | None = None, costs: Costs = DEAR) -> Schedule:
    schedule = plan(case.shape, device, costs, ranks=ranks)
    validate(schedule)
    return schedule


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("horizon", [8, 16, 50])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_the_twin_is_the_head(horizon: int, batch: int, steps: int) -> None:
    """9, 17 and 51 tokens; one rank takes the features' keys in more than one go, of several ranks some have none."""
    case = Case(tiny(horizon), batch, context=150, steps=steps)
    ranks = RANKS[(batch + steps) % len(RANKS)]
    for schedule in (sound(case, SMALL), sound(case, CLUSTERS, ranks)):
        got = case.twin(schedule).run(torch.Generator().manual_seed(3))
        assert case.error(got, case.want()) < 1e-5


@pytest.mark.parametrize("costs", [Costs(), DEAR], ids=["usual", "dear"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", SIZES)
def test_teams_of_every_size(size: str, ranks: int, costs: Costs) -> None:
    config, request = SIZES[size]
    case = Case(tiny(**config), **request)
    schedule = sound(case, CLUSTERS, ranks, costs)
    assert (schedule.ranks, schedule.teams) == (ranks, CLUSTERS.teams(ranks))
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


def test_the_sizes_reach_every_way_of_cutting() -> None:
    schedules = {
        name: [
            planned(size, Case(tiny(**config), **request).shape, device) for size, (config, request) in SIZES.items()
        ]
        for name, device in DEVICES.items()
    }
    for name, found in schedules.items():
        matrices = [matrix for schedule in found for matrix in schedule.matrices.values()]
        assert {schedule.padded_tokens for schedule in found} == {*PADDED_TOKENS}
        ranks = RANKS if name == "bulk" else (1,)
        assert {matrix.ranks for matrix in matrices} == {*ranks}
        assert {matrix.split for matrix in matrices} == {*ranks}
        assert {matrix.parts for matrix in matrices} >= {1, 2, 4}
        assert any(1 < matrix.split < matrix.ranks for matrix in matrices) == (name == "bulk")
        assert any(schedule.part < schedule.shape.width for schedule in found), "a norm in several parts"
        works = [tile.work for schedule in found for tile in schedule.decoded]
        products = [work for work in works if isinstance(work, Product)]
        assert {work.epilogue for work in products} == {*Epilogue}
        assert any(work.token for work in products)
        assert any(work.rows < work.tile_rows for work in products)
        heads = [work for work in works if isinstance(work, Attend)]
        assert any(work.keys > work.slice for work in heads) == (name == "bulk")
        assert any(work.slice > ATTEND_KEYS for work in heads)


@pytest.mark.parametrize(
    "change",
    [
        {"interleave_self_attention": False},
        {"add_pos_embed": False},
        {"state_dim": None},
        {"num_layers": 1, "action_dim": 1, "action_horizon": 1},
        {"head_dim": 48, "num_heads": 2, "action_dim": 36},
        {"head_dim": 64, "num_heads": 1, "action_horizon": 63},
    ],
    ids=str,
)
def test_other_heads(change: dict[str, Any]) -> None:
    case = Case(tiny(**change), batch=2)
    for device in (SMALL, CLUSTERS):
        assert case.error(case.twin(sound(case, device)).run(), case.want()) < 1e-5


@pytest.mark.parametrize("horizon", [9, 16])
def test_a_request_without_state(horizon: int) -> None:
    case = Case(tiny(horizon), batch=3, prefix=False)
    assert case.shape.tokens == horizon
    for device in (SMALL, CLUSTERS):
        assert case.error(case.twin(sound(case, device)).run(), case.want()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device", [A100, H200], ids=["a100", "h200"])
@pytest.mark.parametrize("size", ["dit_b", "dit_l"])
def test_true_sizes(size: str, device: Device) -> None:
    """True widths; DiT-B in its full depth on one device."""
    make = HeadConfig.dit_b if size == "dit_b" else HeadConfig.dit_l
    deep = size == "dit_b" and device is H200
    config = make(action_horizon=16, **({} if deep else {"num_layers": 2}))
    case = Case(config, batch=1, context=588, steps=4 if deep else 1)
    schedule = sound(case, device)
    assert case.error(case.twin(schedule).run(), case.want()) < 1e-5


@pytest.mark.parametrize("steps", [1, 4])
def test_guidance(steps: int) -> None:
    case = Case(tiny(), batch=2, steps=steps)
    guidance = GuidanceTensors(torch.randn_like(case.noise), prefix_weights("exp", 2, 6, 8), 5.0)
    want = case.want(guidance)
    for device in (SMALL, CLUSTERS):
        got = case.twin(sound(case, device), guidance=guidance).run()
        assert case.error(got, want) < 1e-5
    assert case.error(case.want(), want) > 1e-2


@pytest.mark.parametrize("ranks", RANKS)
def test_the_twin_in_bfloat16_is_as_near_as_pytorch(ranks: int) -> None:
    case = Case(tiny(16), batch=2, context=150, steps=4)
    want = case.want()
    error = case.error(case.twin(sound(case, CLUSTERS, ranks), torch.bfloat16).run(), want)
    assert 1e-4 < error < 2 * case.error(case.want_in_bf16(), want)


@pytest.mark.parametrize("device", [SMALL, CLUSTERS], ids=["blocks", "clusters"])
def test_fp8_weights_are_near(device: Device) -> None:
    case = Case(tiny(), batch=2)
    exact = plan(case.shape, device)
    case.shape = replace(case.shape, fp8=True)
    schedule = sound(case, device)
    assert case.error(case.twin(schedule).run(), case.want()) < 0.15
    assert schedule.weight_bytes < 0.75 * exact.weight_bytes


# -- order, words and sets ---------------------------------------------------------------------------------------------


def test_the_order_of_the_teams_does_not_matter() -> None:
    case = Case(tiny(), batch=2, context=150)
    schedule = plan(case.shape, SMALL)
    runs = [case.twin(schedule).run(torch.Generator().manual_seed(seed)) for seed in range(4)]
    runs.append(case.twin(schedule).run())
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_launches_follow_each_other(steps: int) -> None:
    """Each begins in the set where the one before ended; what it leaves are the words of its last step, the noisy ones EMPTY."""
    case = Case(tiny(), steps=steps)
    schedule = plan(case.shape, SMALL)
    want, words = case.twin(schedule).run(), None
    for launch in range(1, 5):
        twin = case.twin(schedule, words=words)
        assert torch.equal(twin.run(torch.Generator().manual_seed(launch)), want)
        words = twin.words
        last = launch * steps - 1
        assert words.done == last + 1
        found = [words.step[(last + ahead) % SETS] for ahead in range(SETS)]
        used = sum(buffer.words for name, buffer in schedule.buffers.items() if name != "noisy")
        assert ((found[0] == last).sum(), (found[1] != EMPTY).sum(), (found[2] != EMPTY).sum()) == (used, 0, 0)
        assert not twin.buffer("tokens", steps - 1).isnan().any()
        assert twin.buffer("noisy", steps - 1).isnan().all()


def test_the_twin_stops_after_any_tile() -> None:
    case = Case(tiny(), steps=1)
    schedule = plan(case.shape, SMALL)
    whole = case.twin(schedule)
    assert not whole.run().isnan().any()
    assert whole.tiles_run == len(schedule.tiles)
    for count in (0, 1, 5, 40, len(schedule.tiles) - 1):
        part = case.twin(schedule)
        assert part.run(stop_after=count).isnan().all()
        assert part.tiles_run == count
    early = case.twin(schedule)
    early.run(stop_after=40)
    assert not early.buffer("tokens", 0).isnan().any()
    assert early.buffer("decoded", 0).isnan().all()
    assert not early.private.isnan().all()


def products(schedule: Schedule, name: str) -> list[int]:
    """The tiles of a matrix."""
    matrix = schedule.matrices[name]
    works = [tile.work for tile in schedule.decoded]
    inside = range(matrix.offset, matrix.offset + matrix.units)
    return [i for i, w in enumerate(works) if isinstance(w, Product) and w.weight in inside]


def changed(schedule: Schedule, i: int, **change: int) -> Schedule:
    tiles = schedule.tiles.copy()
    tile = schedule.decoded[i]
    tiles[i] = Tile(tile.opcode, tile.work._replace(**change)).record()
    return replace(schedule, tiles=tiles)


def team_of(schedule: Schedule, i: int) -> int:
    return int(np.searchsorted(schedule.first_tile, i, side="right")) - 1


def test_a_tile_that_is_missing_is_waited_for() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    lost = products(schedule, "1.mlp_in")[0]
    first_tile = schedule.first_tile.copy()
    first_tile[team_of(schedule, lost) + 1 :] -= 1
    broken = replace(schedule, tiles=np.delete(schedule.tiles, lost, axis=0), first_tile=first_tile)
    with pytest.raises(RuntimeError, match="wait for each other"):
        case.twin(broken).run()


def test_tiles_in_a_wrong_order_wait_for_each_other() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    begin, end = schedule.first_tile[:2]
    tiles = schedule.tiles.copy()
    tiles[begin:end] = tiles[begin:end][::-1]
    with pytest.raises(RuntimeError, match="wait for each other"):
        case.twin(replace(schedule, tiles=tiles)).run(torch.Generator().manual_seed(0))


def test_a_word_that_is_written_twice_is_an_error() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    one, other = products(schedule, "0.mlp_in")[:2]
    broken = changed(schedule, one, out=schedule.decoded[other].work.out)
    with pytest.raises(RuntimeError, match="overwrites a word of step 0 in step 0"):
        case.twin(broken).run()


@pytest.mark.parametrize(
    "own,message",
    [
        (True, "clears a word of step 0 for step 0"),
        (False, "expected words of step 3, got one of step 0|overwrites a word of step 0 in step 3"),
    ],
)
@pytest.mark.parametrize("steps", [2, 4])
def test_a_wrong_set_is_an_error(own: bool, message: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are made EMPTY in the step's own set, or not at all: seen in one launch, or in the next."""
    clear = Words.clear

    def wrong(self: Words, area: Area, step: int) -> None:
        if own:
            clear(self, area, step - (SETS - 1))

    monkeypatch.setattr(Words, "clear", wrong)
    case = Case(tiny(), steps=steps)
    schedule = plan(case.shape, SMALL)
    first = case.twin(schedule)
    again = case.twin(schedule, words=first.words)

    def run() -> None:
        first.run()
        again.run()

    with pytest.raises(RuntimeError, match=message):
        run()


WRONG = {
    "another rank's weights": lambda w: {"weight": w.weight + w.rank_units},
    "slices too far apart": lambda w: {"rank_units": 0},
    "half of the columns": lambda w: {"columns": w.columns // 2},
    "no norm": lambda w: {"norm": 0},
    "no modulation": lambda w: {"modulation": NONE},
    "the first step's modulation": lambda w: {"modulation_step": 0},
    "the first step's constants": lambda w: {"constant_step": 0},
    "another row's sums": lambda w: {"sums": w.sums + 1},
    "another row's bias": lambda w: {"bias": w.bias + 1},
    "no activation": lambda w: {"epilogue": Epilogue.GELU},
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_record_shows(change: str) -> None:
    """The comparison with the model sees one tile of many that is wrong."""
    case = Case(tiny(), steps=2)
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=4)
    i = products(schedule, "1.project")[0]
    work = schedule.decoded[i].work
    assert isinstance(work, Product)
    got = case.twin(changed(schedule, i, **WRONG[change](work))).run()
    assert not case.error(got, case.want()) < 1e-4


def test_a_slice_that_a_rank_does_not_have_shows() -> None:
    """Of two ranks that share K the second takes the first's columns."""
    case = Case(tiny())
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=8)
    name = next(name for name, m in schedule.matrices.items() if m.columns > m.slice)
    packed = pack(case.folded, schedule, torch.float32)
    packed.matrices[name][0, 1] = packed.matrices[name][0, 0]
    got = Twin(schedule, packed, *case.given()).run()
    assert not case.error(got, case.want()) < 1e-4


# -- weights and constants ---------------------------------------------------------------------------------------------

CUTS = [(1, 1, 16), (1, 1, 64), (2, 1, 32), (2, 2, 32), (4, 2, 96), (8, 1, 128), (8, 4, 32), (8, 8, 16)]


@pytest.mark.parametrize("rows,columns", [(7, 96), (64, 64), (80, 272), (300, 528)])
@pytest.mark.parametrize("ranks,split,tile_rows", CUTS)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_layout_goes_both_ways(fp8: bool, ranks: int, split: int, tile_rows: int, rows: int, columns: int) -> None:
    matrix = MatrixPlan("some", rows, columns, ranks, tile_rows, split, 1, fp8, 0)
    weight = torch.arange(1, rows * columns + 1, dtype=torch.float32).view(rows, columns)
    blocks = to_layout(weight, matrix)
    assert blocks.shape[:4] == (matrix.row_tiles, ranks, matrix.steps, matrix.groups)
    assert blocks[0].numel() * (1 if fp8 else 2) == 512 * matrix.tile_units
    assert torch.equal(blocks[blocks > 0].sort().values, weight.flatten())
    back = torch.cat([from_layout(tile, split, fp8) for tile in blocks])
    assert torch.equal(back[:rows, :columns], weight)


@pytest.mark.parametrize("fp8", [False, True])
def test_each_lane_has_its_operands(fp8: bool) -> None:
    """As PTX defines operand A of mma.m16n8k16, and the plan says which rank has which step of which row group."""
    matrix = MatrixPlan("some", 256, 512, 8, 128, 4, 1, fp8, 0)
    weight = torch.arange(256 * 512, dtype=torch.float32).view(256, 512)
    blocks = to_layout(weight, matrix).view(2, 8, matrix.steps, matrix.groups, *((32, 2, 8) if fp8 else (2, 32, 8)))
    if not fp8:
        blocks = blocks.transpose(4, 5)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        tile, rank, step, group, lane, fragment, element = (
            int(torch.randint(size, (), generator=random)) for size in blocks.shape
        )
        row = tile * 128 + rank // 4 * matrix.rank_rows + group * 16 + lane // 4 + 8 * (element // 2 % 2)
        column = rank % 4 * matrix.slice + step * 32 + fragment * 16 + lane % 4 * 2 + element % 2 + 8 * (element // 4)
        assert blocks[tile, rank, step, group, lane, fragment, element] == weight[row, column]


def test_matrices_follow_each_other_in_the_weights() -> None:
    """A tile's numbers lead to its rows, whatever lies before it."""
    case = Case(tiny(), context=150)
    case.shape = replace(case.shape, fp8=True)
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=4)
    packed = pack(case.folded, schedule)
    data = packed.bytes()
    assert data.numel() == schedule.weight_bytes
    for name in ("encode", "0.project", "2.mlp_out", "decode_out"):
        w = schedule.decoded[products(schedule, name)[-1]].work
        assert isinstance(w, Product)
        piece = data[512 * w.weight :][: 512 * w.rank_units * schedule.ranks]
        blocks = piece.view(FP8 if w.fp8 else torch.bfloat16).view(schedule.ranks, w.slice // 32, -1, 512)
        found = from_layout(blocks.float(), w.split, bool(w.fp8))
        assert torch.equal(found, packed.of(w).float())
        assert torch.equal(found[: w.rows, : w.columns], kept(case, name, w))


def kept(case: Case, name: str, w: Product) -> Tensor:
    matrix = getattr(case.folded, name, None)
    if matrix is None:
        i, part = name.split(".")
        matrix = getattr(case.folded.blocks[int(i)], part)
    weight = matrix.weight
    weight = (weight / row_scale(weight)[:, None]).to(FP8).float() if w.fp8 else weight.bfloat16().float()
    rows = weight[w.row : w.row + w.rows]
    return torch.nn.functional.pad(rows, (0, w.columns - rows.shape[1]))


@pytest.mark.parametrize("fp8", [False, True])
def test_what_a_norm_leaves_is_of_the_weights_as_they_are_kept(fp8: bool) -> None:
    """A row that is all mean comes out as the bias, to float32, although its weights are rounded."""
    case = Case(tiny(), steps=4)
    case.shape = replace(case.shape, fp8=fp8)
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=2)
    constants = pack_constants(case.folded, schedule)
    for step, name in ((3, "0.project"), (0, "1.mlp_in"), (2, "decode_in")):
        w = schedule.decoded[products(schedule, name)[0]].work
        assert isinstance(w, Product)
        prefix, block = ("", None) if name == "decode_in" else (name[:2], case.folded.blocks[int(name[0])])
        norms = case.folded.out_norms if block is None else block.norms
        modulated = w.modulation != NONE
        one = 1 + norms[step].scale[0] if modulated else torch.ones(w.columns)
        if modulated:
            found = constants[schedule.constants[f"{prefix}modulation"][0] + step * w.modulation_step :][: w.columns]
            assert torch.equal(found, one)
        weight = kept(case, name, w).double()
        if w.fp8:
            weight = weight * constants[w.scale : w.scale + w.rows, None].double()
        shift = norms[step].shift[0] if modulated else torch.zeros(w.columns)
        bias = (case.folded.decode_in if block is None else getattr(block, name[2:])).bias[w.row : w.row + w.rows]
        sums, biases = (constants[at + step * w.constant_step :][: w.rows] for at in (w.sums, w.bias))
        torch.testing.assert_close(sums, (weight @ one.double()).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(biases, (bias + weight @ shift.double()).float(), rtol=1e-6, atol=1e-6)


def test_padded_rows_read_zeros() -> None:
    case = Case(tiny(), steps=2)
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=8)
    constants = pack_constants(case.folded, schedule)
    for name in ("decode_out", "0.mlp_in", "decode_in"):
        for i in products(schedule, name):
            w = schedule.decoded[i].work
            assert isinstance(w, Product)
            for step in range(case.steps if w.constant_step else 1):
                for at in {w.bias, w.sums} - {NONE}:
                    line = constants[at + step * w.constant_step :][: w.tile_rows]
                    assert len(line) == w.tile_rows
                    assert not line[w.rows :].any()
                    assert line[: w.rows].any()


def test_bytes_of_a_matrix_are_the_plans() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, CLUSTERS, DEAR, ranks=4)
    packed = pack(case.folded, schedule)
    offsets = [m.offset for m in schedule.matrices.values()] + [schedule.weight_bytes // 512]
    for (name, matrix), (begin, end) in zip(packed.matrices.items(), pairwise(offsets), strict=True):
        assert matrix.nbytes == 512 * (end - begin), name
    assert {tile.opcode for tile in schedule.decoded} == {*Opcode}
