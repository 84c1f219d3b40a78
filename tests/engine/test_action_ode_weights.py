"""Weights and constants of the one-launch head, as the kernel reads them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from head_case import CLUSTERS, DEAR, Case, tiles_of, tiny
from torch import Tensor

from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.schedule import NONE, MatrixPlan, Product
from dit4dit.engine.action_ode.weights import FP8, from_layout, pack, pack_constants, row_scale, to_layout

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
        w = schedule.decoded[tiles_of(schedule, name)[-1]].work
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
        w = schedule.decoded[tiles_of(schedule, name)[0]].work
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
    for name in ("encode", "0.out", "0.mlp_in", "decode_in", "decode_out"):
        for i in tiles_of(schedule, name):
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
