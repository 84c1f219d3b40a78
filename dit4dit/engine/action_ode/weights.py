"""The folded head as the kernel reads it: matrices in the order of tensor core fragments, and one table of constants.

Matrices are cut into blocks of 16 rows x 32 columns, two fragments of 16 x 16 each (mma.sync m16n8k16, operand A), ordered so
that each lane finds its own 16 bytes together: (fragment, lane, element) in bf16, (lane, fragment, element) in fp8. A matrix is
[row tiles, ranks, steps of 32 columns, row groups of 16] of them: what a rank of a team reads of a tile is one piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.engine.action_ode.schedule import STEP_COLUMNS, MatrixPlan, Product, Schedule
from dit4dit.ops.action_ode import FoldedHead, Linear, Modulation

FP8 = torch.float8_e4m3fn
BLOCK = 16 * STEP_COLUMNS
_EXTENTS = (2, 8, 2, 2, 4, 2)
# (half of 16 rows, row, fragment, half of 16 columns, pair, element) -> order in a block
_BF16_ORDER = (2, 1, 4, 3, 0, 5)
_FP8_ORDER = (1, 4, 2, 3, 0, 5)


def to_layout(weight: Tensor, matrix: MatrixPlan) -> Tensor:
    """[rows, columns or fewer] -> [row tiles, ranks, steps, row groups, BLOCK], padded with zeros."""
    m = matrix
    rows, columns = weight.shape
    padded = F.pad(weight, (0, m.split * m.slice - columns, 0, m.row_tiles * m.tile_rows - rows))
    blocks = padded.reshape(m.row_tiles, m.ranks // m.split, m.groups, 16, m.split, m.steps, STEP_COLUMNS)
    blocks = blocks.permute(0, 1, 4, 5, 2, 3, 6)  # row tile, row part, slice, step, row group, 16 rows, 32 columns
    order = _FP8_ORDER if m.fp8 else _BF16_ORDER
    lanes = blocks.reshape(m.row_tiles, m.ranks, m.steps, m.groups, *_EXTENTS).permute(
        0, 1, 2, 3, *(4 + d for d in order)
    )
    return lanes.reshape(m.row_tiles, m.ranks, m.steps, m.groups, BLOCK)


def from_layout(blocks: Tensor, split: int, fp8: bool) -> Tensor:
    """One row tile [ranks, steps, row groups, BLOCK] -> [rows, split * steps * 32]."""
    ranks, steps, groups, _ = blocks.shape
    order = _FP8_ORDER if fp8 else _BF16_ORDER
    back = [order.index(d) for d in range(len(order))]
    parts = blocks.reshape(-1, *(_EXTENTS[d] for d in order)).permute(0, *(1 + d for d in back))
    parts = parts.reshape(ranks // split, split, steps, groups, 16, STEP_COLUMNS).permute(0, 3, 4, 1, 2, 5)
    return parts.reshape(ranks // split * groups * 16, split * steps * STEP_COLUMNS)


@dataclass(frozen=True)
class PackedHead:
    """matrices: `to_layout` of each by name; constants: float32. float32 matrices are for the twin alone."""

    plans: Mapping[str, MatrixPlan]
    matrices: Mapping[str, Tensor]
    constants: Tensor

    def bytes(self) -> Tensor:
        """All matrices as the kernel reads them, uint8."""
        return as_bytes(self.matrices)

    def of(self, work: Product) -> Tensor:
        """The weights of a tile, [tile_rows, split * slice], found by the tile's own numbers; fp8 without its row scale."""
        plan = self._ordered[bisect_right(self._offsets, work.weight) - 1]
        units = 1 if work.fp8 else 2
        steps, groups = work.slice // STEP_COLUMNS, work.tile_rows * work.split // plan.ranks // 16
        blocks = self.matrices[plan.name].view(-1, BLOCK)
        first = (work.weight - plan.offset) // units + torch.arange(plan.ranks) * (work.rank_units // units)
        chosen = (first[:, None] + torch.arange(steps * groups)).to(blocks.device)
        taken = blocks.view(torch.uint8)[chosen].view(FP8) if work.fp8 else blocks[chosen]
        return from_layout(taken.view(plan.ranks, steps, groups, BLOCK), work.split, bool(work.fp8))

    @cached_property
    def _ordered(self) -> list[MatrixPlan]:
        return list(self.plans.values())

    @cached_property
    def _offsets(self) -> list[int]:
        return [plan.offset for plan in self._ordered]


def as_bytes(matrices: Mapping[str, Tensor]) -> Tensor:
    """What `pack_matrices` made, in one piece, uint8."""
    return torch.cat([matrix.reshape(-1).view(torch.uint8) for matrix in matrices.values()])


def pack(head: FoldedHead, schedule: Schedule, dtype: torch.dtype = torch.bfloat16) -> PackedHead:
    """The weights of `head`, folded for the schedule's steps, laid out for it; bfloat16 is what the kernel takes."""
    matrices = pack_matrices(head, schedule.matrices, dtype)
    assert dtype == torch.float32 or as_bytes(matrices).numel() == schedule.weight_bytes
    return PackedHead(schedule.matrices, matrices, pack_constants(head, schedule, dtype))


@torch.no_grad()
def pack_matrices(
    head: FoldedHead, plans: Mapping[str, MatrixPlan], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """`to_layout` of each matrix by name, in the plans' order; float8 where the plan says so, else `dtype`."""
    matrices = matrices_of(head)
    found: dict[str, Tensor] = {}
    for name, plan in plans.items():
        weight = stored(matrices[name].weight, plan.fp8, dtype)
        # nothing pads float8
        found[name] = to_layout(weight.view(torch.uint8), plan).view(FP8) if plan.fp8 else to_layout(weight, plan)
    return found


def stored(weight: Tensor, fp8: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights [N, K] as they are kept; fp8 is to be multiplied by `row_scale`."""
    return (weight.float() / row_scale(weight)[:, None]).to(FP8) if fp8 else weight.to(dtype)


def row_scale(weight: Tensor) -> Tensor:
    """What each row [N] of e4m3 weights is multiplied by."""
    return weight.float().abs().amax(1).clamp_min(1e-12) / torch.finfo(FP8).max


@torch.no_grad()
def pack_constants(head: FoldedHead, schedule: Schedule, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The table of constants, float32, for weights that are kept in `dtype`. A line of a table ends in zeros."""
    constants = torch.zeros(schedule.constant_floats, device=head.decode_out.weight.device)
    values = _constants(head, schedule, dtype)
    assert set(values) == set(schedule.constants)
    for name, value in values.items():
        offset, length = schedule.constants[name]
        lines = constants[offset : offset + length].view(len(value), -1)
        lines[:, : value.shape[1]] = value
    return constants


def matrices_of(head: FoldedHead) -> dict[str, Linear]:
    """The head's products under the schedule's names."""
    found = {"encode": head.encode, "encode_out": head.encode_out}
    for i, block in enumerate(head.blocks):
        for part in ("project", "out", "mlp_in", "mlp_out"):
            found[f"{i}.{part}"] = getattr(block, part)
    return {**found, "decode_in": head.decode_in, "decode_out": head.decode_out}


def _constants(head: FoldedHead, schedule: Schedule, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name, [lines, values of a line]."""
    shape, matrices = schedule.shape, matrices_of(head)
    found = {
        "times": torch.tensor([[1 - i / shape.steps for i in range(shape.steps)]]),
        "encode.bias": head.time_bias,
        "encode_out.bias": _token_bias(head, shape.tokens).reshape(1, -1),
        "decode_out.bias": _bias(head.decode_out),
    }
    modulated: dict[str, Sequence[Modulation]] = {f"{i}.": block.norms for i, block in enumerate(head.blocks)}
    for prefix, norms in {**modulated, "": head.out_norms}.items():
        scale, shift = (torch.cat([getattr(norm, part).float() for norm in norms]) for part in ("scale", "shift"))
        found[f"{prefix}modulation"] = 1 + scale
        name = f"{prefix}project" if prefix else "decode_in"
        found |= _folded(name, matrices[name], schedule.matrices[name].fp8, dtype, 1 + scale, shift)
    for i, block in enumerate(head.blocks):
        found |= {f"{i}.{part}.bias": _bias(matrices[f"{i}.{part}"]) for part in ("out", "mlp_out")}
        one = torch.ones(1, shape.width, device=block.mlp_in.weight.device)
        name = f"{i}.mlp_in"
        found |= _folded(name, block.mlp_in, schedule.matrices[name].fp8, dtype, one, torch.zeros_like(one))
    for name, plan in schedule.matrices.items():
        if plan.fp8:
            found[f"{name}.row_scale"] = row_scale(matrices[name].weight)[None]
    return found


def _folded(
    name: str, matrix: Linear, fp8: bool, dtype: torch.dtype, scale: Tensor, shift: Tensor
) -> dict[str, Tensor]:
    """What a norm with scale and shift [lines, K] leaves to be done behind the product, [lines, N], of the weights as kept."""
    weight = stored(matrix.weight, fp8, dtype).double()
    if fp8:
        weight = weight * row_scale(matrix.weight)[:, None].double()
    return {
        f"{name}.sums": scale.double() @ weight.T,
        f"{name}.bias": _bias(matrix).double() + shift.double() @ weight.T,
    }


def _bias(matrix: Linear) -> Tensor:
    """[1, N]."""
    return matrix.weight.new_zeros(1, len(matrix.weight)) if matrix.bias is None else matrix.bias[None]


def _token_bias(head: FoldedHead, tokens: int) -> Tensor:
    """[tokens of a sample, W]: of the token layer and of the positions; the state token, which has none, comes first."""
    found = _bias(head.encode_out).float().repeat(tokens, 1)
    if head.position is not None:
        found[tokens - len(head.position) :] += head.position.float()
    return found
