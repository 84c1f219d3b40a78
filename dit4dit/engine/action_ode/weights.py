"""The folded head as the kernel reads it: matrices in the order of tensor core fragments, and one table of constants.

A slot holds `tile_rows` x `slot_columns` weights. Warp w of a block takes row group w % (tile_rows / 16) and columns
32 * (w / (tile_rows / 16)) to + 31, as two fragments of 16 x 16 (mma.sync m16n8k16, operand A). A slot is ordered so that
each lane finds its own 16 bytes together: (warp, fragment, lane, element) in bf16, (warp, lane, fragment, element) in fp8.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.engine.action_ode.schedule import SLOT_ELEMENTS, MatrixPlan, Product, Schedule
from dit4dit.ops.action_ode import FoldedHead, Linear

FP8 = torch.float8_e4m3fn
# (row group, half of 16 rows, row) x (warp of columns, fragment, half of 16 columns, pair, element) -> slot order
_BF16_ORDER = (3, 0, 4, 2, 6, 5, 1, 7)
_FP8_ORDER = (3, 0, 2, 6, 4, 5, 1, 7)


def to_slots(weight: Tensor, matrix: MatrixPlan) -> Tensor:
    """[rows, columns] -> [row tiles, slots, SLOT_ELEMENTS], padded with zeros."""
    down = matrix.row_tiles * matrix.tile_rows - matrix.rows
    right = matrix.slots * matrix.slot_columns - matrix.columns
    tiles = F.pad(weight.contiguous(), (0, right, 0, down))
    tiles = tiles.view(matrix.row_tiles, matrix.tile_rows, matrix.slots, matrix.slot_columns).transpose(1, 2)
    parts = tiles.reshape(matrix.row_tiles, matrix.slots, *_extents(matrix))
    return parts.permute(0, 1, *(2 + d for d in _order(matrix))).reshape(matrix.row_tiles, matrix.slots, SLOT_ELEMENTS)


def from_slots(slots: Tensor, matrix: MatrixPlan) -> Tensor:
    """[n, SLOT_ELEMENTS], neighbours in one row tile -> [tile_rows, n * slot_columns]."""
    order, extents = _order(matrix), _extents(matrix)
    back = [order.index(d) for d in range(8)]
    parts = slots.view(len(slots), *(extents[d] for d in order)).permute(0, *(1 + d for d in back))
    return parts.reshape(len(slots), matrix.tile_rows, -1).transpose(0, 1).reshape(matrix.tile_rows, -1)


def _extents(matrix: MatrixPlan) -> tuple[int, ...]:
    return matrix.tile_rows // 16, 2, 8, matrix.slot_columns // 32, 2, 2, 4, 2


def _order(matrix: MatrixPlan) -> tuple[int, ...]:
    return _FP8_ORDER if matrix.fp8 else _BF16_ORDER


@dataclass(frozen=True)
class PackedHead:
    """slots: [row tiles, slots, SLOT_ELEMENTS] by matrix; constants: float32. float32 slots are for the twin alone."""

    plans: dict[str, MatrixPlan]
    slots: dict[str, Tensor]
    constants: Tensor

    def bytes(self) -> Tensor:
        """All matrices as the kernel reads them, uint8."""
        return as_bytes(self.slots)

    def of(self, work: Product) -> Tensor:
        """The weights of a tile, [tile_rows, slots * slot_columns]; fp8 without its row scale."""
        plan = self._ordered[bisect_right(self._offsets, work.weight) - 1]
        slot, rest = divmod(work.weight - plan.offset, plan.units_per_slot)
        assert rest == 0
        row, first = divmod(slot, plan.slots)
        return from_slots(self.slots[plan.name][row, first : first + work.slots], plan)

    @cached_property
    def _ordered(self) -> list[MatrixPlan]:
        return list(self.plans.values())

    @cached_property
    def _offsets(self) -> list[int]:
        return [plan.offset for plan in self._ordered]


def as_bytes(slots: dict[str, Tensor]) -> Tensor:
    """What `pack_matrices` made, in one piece, uint8."""
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in slots.values()])


def pack(head: FoldedHead, schedule: Schedule, dtype: torch.dtype = torch.bfloat16) -> PackedHead:
    """The weights of `head`, folded for the schedule's steps, laid out for it; bfloat16 is what the kernel takes."""
    slots = pack_matrices(head, schedule.matrices, dtype)
    assert dtype == torch.float32 or as_bytes(slots).numel() == schedule.weight_bytes
    return PackedHead(schedule.matrices, slots, pack_constants(head, schedule))


@torch.no_grad()
def pack_matrices(
    head: FoldedHead, plans: dict[str, MatrixPlan], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """[row tiles, slots, SLOT_ELEMENTS] by name, in the plans' order."""
    matrices = matrices_of(head)
    slots: dict[str, Tensor] = {}
    for name, plan in plans.items():
        weight = matrices[name].weight
        weight = F.pad(weight, (0, plan.columns - weight.shape[1]))
        if plan.fp8:
            quantised = (weight.float() / row_scale(weight)[:, None]).to(FP8)
            slots[name] = to_slots(quantised.view(torch.uint8), plan).view(FP8)
        else:
            slots[name] = to_slots(weight.to(dtype), plan)
    return slots


def row_scale(weight: Tensor) -> Tensor:
    """What each row [N] of e4m3 weights is multiplied by."""
    return weight.float().abs().amax(1).clamp_min(1e-12) / torch.finfo(FP8).max


@torch.no_grad()
def pack_constants(head: FoldedHead, schedule: Schedule) -> Tensor:
    """The table of constants, float32."""
    constants = torch.zeros(schedule.constant_floats, device=head.decode_out.weight.device)
    values = _constants(head, schedule)
    matrices = matrices_of(head)
    values |= {f"{n}.row_scale": row_scale(matrices[n].weight) for n, plan in schedule.matrices.items() if plan.fp8}
    assert set(values) == set(schedule.constants)
    for name, value in values.items():
        offset, length = schedule.constants[name]
        constants[offset : offset + length] = value.float().reshape(length)
    return constants


def matrices_of(head: FoldedHead) -> dict[str, Linear]:
    """The head's products under the schedule's names."""
    found = {"encode": head.encode, "encode_out": head.encode_out}
    for i, block in enumerate(head.blocks):
        for part in ("project", "out", "mlp_in", "mlp_out"):
            found[f"{i}.{part}"] = getattr(block, part)
    return {**found, "decode_in": head.decode_in, "decode_out": head.decode_out}


def _constants(head: FoldedHead, schedule: Schedule) -> dict[str, Tensor]:
    shape, matrices = schedule.shape, matrices_of(head)
    found = {
        f"{name}.bias": matrix.bias
        for name, matrix in matrices.items()
        if matrix.bias is not None and name != "encode_out"
    }
    found["times"] = torch.tensor([1 - i / shape.steps for i in range(shape.steps)])
    found["encode.bias"] = head.time_bias
    bias = head.encode_out.bias
    assert bias is not None
    tokens = bias.float().expand(shape.tokens, -1).clone()
    if head.position is not None:
        tokens[shape.prefix :] += head.position.float()
    found["encode_out.bias"] = tokens
    norms = {f"{i}.": block.norms for i, block in enumerate(head.blocks)} | {"": head.out_norms}
    for prefix, rows in norms.items():
        found[f"{prefix}norm"] = torch.cat([part.flatten() for row in rows for part in (1 + row.scale, row.shift)])
    return found
