"""A small head with random weights and one request of it, for the tests of action_ode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, HeadShape, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import AttendCut, Cut, Kind, _Search
from dit4dit.engine.action_ode.plan import _Planner
from dit4dit.engine.action_ode.schedule import Product
from dit4dit.engine.action_ode.twin import Twin
from dit4dit.engine.action_ode.weights import pack
from dit4dit.engine.fold import fold_head
from dit4dit.model.action_head import ActionHead
from dit4dit.model.flow import GuidanceTensors
from dit4dit.ops.action_ode import loop

SMALL = Device(7, 99 << 10, 80)
A100 = Device(108, 163 << 10, 80)
H200 = Device(132, 227 << 10, 90, (66, 30, 15))
CLUSTERS = Device(64, 227 << 10, 90, (28, 12, 5))
"""Small, with teams of every size."""
DEVICES = {"copies": Device(13, 99 << 10, 80), "bulk": Device(16, 227 << 10, 90, (8, 3, 2))}
"""Small devices for the emulation, by its variants."""
DEAR = Costs(read=0.5, inbox=0.0, exchange=0.05, step=0.4)
"""Prices by which the planner cuts the columns of small heads as it does those of large ones."""
FREE = replace(DEAR, exchange=0.0, sync=0.0, step=4.0)
"""Prices by which ranks share all heads, that of attention to tokens too."""

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 tokens, no state": (dict(num_layers=1), dict(prefix=False, context=33)),
    "9 tokens": (dict(num_layers=2), dict(batch=1, context=600)),
    "9 tokens, batch 3": (dict(num_layers=2, num_heads=2, head_dim=32, interleave_self_attention=False), dict(batch=3)),
    "9 tokens, batch 4": (dict(num_layers=2, num_heads=2, head_dim=64, hidden_size=256), dict(batch=4, context=70)),
    "17 tokens, heads of 48": (
        dict(num_layers=2, num_heads=8, head_dim=48, hidden_size=512, action_dim=36, action_horizon=16),
        dict(batch=1, context=300, steps=1),
    ),
    "17 tokens, batch 4": (dict(num_layers=2, add_pos_embed=False, action_horizon=16), dict(batch=4, steps=1)),
    "51 tokens": (dict(num_layers=2, num_heads=3, head_dim=32, action_horizon=50), dict(batch=2, context=130)),
    "51 tokens, norms in parts": (
        dict(num_layers=2, num_heads=8, head_dim=48, action_horizon=50),
        dict(batch=1, steps=1),
    ),
    "no state": (dict(num_layers=2, action_dim=1), dict(batch=2, prefix=False, context=150)),
}
"""Heads and requests that reach every path of the kernel, each of PADDED_TOKENS: changes of `tiny`, arguments of `Case`."""

PARTS = "51 tokens, norms in parts"
"""Of SIZES, for devices whose shared memory does not hold all columns of a product."""

CUTS = {
    "8 tokens, no state": (4, 1, False, DEAR),
    "9 tokens": (8, 1, True, FREE),
    "9 tokens, batch 3": (2, 3, False, DEAR),
    "9 tokens, batch 4": (4, 2, True, DEAR),
    "17 tokens, heads of 48": (8, 1, False, FREE),
    "17 tokens, batch 4": (2, 4, True, DEAR),
    "51 tokens": (4, 1, True, DEAR),
    PARTS: (2, 1, False, DEAR),
    "no state": (1, 1, False, DEAR),
}
"""Blocks of a team, samples of one product, whether attention to tokens is part of one, and prices, where the device has
clusters; for each of SIZES.
"""


class Attention(NamedTuple):
    """How a head's attention is cut, whatever that is predicted to take: a config, a request, and what `cut` is given.

    share, active: of attention to the tokens themselves and to the features, how many ranks do a head, and how many of them have
    keys. split: of the product that attends, where attention to tokens is part of one. memory: shared memory of a device without
    clusters; where it is scarce, keys come where a product's sums lie.
    """

    config: dict[str, Any]
    request: dict[str, Any]
    ranks: int
    share: tuple[int, int]
    active: tuple[int, int]
    split: int | None = None
    group: int = 1
    slots: int | None = None
    memory: int = 99 << 10


ATTENTION = {
    "columns end inside heads of 64": Attention(
        dict(num_heads=3, head_dim=64), dict(context=70), 8, (1, 4), (1, 3), split=2
    ),
    "four samples, few slots": Attention(
        dict(num_heads=3, head_dim=64), dict(batch=4, context=70), 4, (1, 4), (1, 3), split=2, group=4, slots=3
    ),
    "columns inside heads of 48": Attention(
        dict(num_heads=4, head_dim=48), dict(context=33), 8, (1, 8), (1, 5), split=8
    ),
    "slices past the end, two samples": Attention(
        dict(num_heads=5, head_dim=32), dict(batch=2), 4, (1, 1), (1, 1), split=4, group=2
    ),
    "all columns in several rounds": Attention(
        dict(num_heads=6, action_horizon=16), dict(batch=2), 2, (1, 2), (1, 2), split=1, group=2
    ),
    "ranks without a head": Attention(
        dict(num_heads=5, head_dim=32), dict(batch=2), 8, (4, 4), (3, 4), memory=76 << 10
    ),
    "panels of 48 keys": Attention(
        dict(num_heads=2, head_dim=64, action_horizon=16), dict(context=300), 8, (8, 1), (6, 1)
    ),
}
"""Small heads of one block that attends to the features and one to the tokens, for a device with clusters."""

TINY: dict[str, Any] = dict(
    num_layers=3, num_heads=4, head_dim=16, hidden_size=96, output_dim=80, action_dim=7, state_dim=16, context_dim=64
)


class Case:
    """A head with random weights, large enough for the velocity to matter, and one request."""

    def __init__(
        self, config: HeadConfig, batch: int = 1, context: int = 40, steps: int = 2, prefix: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.steps = config, batch, steps
        self.head = ActionHead(config).eval()
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.noise = torch.randn(batch, config.action_horizon, config.action_dim)
        self.features = torch.randn(batch, context, config.context_dim)
        self.state = torch.randn(batch, 1, config.state_dim) if prefix and config.state_dim else None
        self.shape = head_shape(config, batch=batch, context=context, prefix=self.state is not None, steps=steps)
        self.folded = fold_head(self.head, steps)

    @torch.no_grad()
    def want(self, guidance: GuidanceTensors | None = None) -> Tensor:
        x, every = self.noise, self.config.num_timestep_buckets
        for i in range(self.steps):
            t = 1 - i / self.steps
            index = torch.full((self.batch,), int(t * every))
            v = self.head.velocity(x, index, self.features, self.state)
            rest = {} if guidance is None else {"t": t, **vars(guidance)}
            x = ops.euler_step(x, v, 1 / self.steps, **rest)
        return x

    @torch.no_grad()
    def given(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """noise, context, prefix, as the op takes them."""
        prefix = None if self.state is None else self.head.state_encoder(self.state)[:, 0]
        return self.noise, self.folded.context(self.features), prefix

    @torch.no_grad()
    def want_in_bf16(self) -> Tensor:
        """The actions of PyTorch, op by op, all in bfloat16."""
        folded = fold_head(copy.deepcopy(self.head).bfloat16(), self.steps)
        noise, context, prefix = self.given()
        with ops.use_backend("torch"):
            return loop(folded, noise, context.bfloat16(), None if prefix is None else prefix.bfloat16(), None)

    def twin(self, schedule: Schedule, dtype: torch.dtype = torch.float32, **rest: Any) -> Twin:
        """`rest`: guidance, and the words that a launch before has left."""
        return Twin(schedule, pack(self.folded, schedule, dtype), *self.given(), dtype=dtype, **rest)

    def error(self, got: Tensor, want: Tensor) -> float:
        """Relative to what the head did, not to the noise that is in both."""
        return ((got - want).abs().max() / (want - self.noise).abs().max()).item()


def planned(size: str, shape: HeadShape, device: Device) -> Schedule:
    """The schedule of one of SIZES; with all of them teams of every size take part, and every way of cutting."""
    ranks, group, fused, costs = CUTS[size]
    if size == PARTS:
        device = replace(device, shared_memory=min(device.shared_memory, (112 if shape.fp8 else 104) << 10))
    if not device.clusters:
        ranks, fused = 1, False
    return plan(shape, device, costs, ranks=ranks, group=group, fused=fused)


class _Wanted(_Search):
    """Cuts as one of ATTENTION has them."""

    def __init__(self, shape: HeadShape, device: Device, wanted: Attention) -> None:
        self.wanted = wanted
        super().__init__(shape, device, wanted.ranks, wanted.group, wanted.split is not None, DEAR)

    def _attend_cut(self, keys: int, cross: bool) -> tuple[AttendCut, float]:
        return AttendCut(self.wanted.share[cross], -(-keys // self.wanted.active[cross])), 0.0

    def _cuts(self, kind: Kind) -> Iterator[Cut]:
        return (cut for cut in super()._cuts(kind) if not kind.attends or cut.matrix.split == self.wanted.split)


def attention_case(name: str, steps: int = 1) -> Case:
    """Of one of ATTENTION."""
    wanted = ATTENTION[name]
    return Case(tiny(num_layers=2, **wanted.config), steps=steps, **wanted.request)


def attention_schedule(name: str, shape: HeadShape, device: Device) -> Schedule:
    """Of one of ATTENTION; on a device without clusters one block has whole heads."""
    wanted = ATTENTION[name]
    if not device.clusters:
        return plan(shape, replace(device, shared_memory=wanted.memory), DEAR)
    search = _Wanted(shape, device, wanted)
    best = min(search.found(), key=lambda choice: choice.chain_us)
    schedule = _Planner(shape, device, search.cuts_of(best)).schedule()
    return replace(schedule, slots=wanted.slots or schedule.slots)


def tiles_of(schedule: Schedule, name: str) -> list[int]:
    """The tiles of a matrix."""
    matrix = schedule.matrices[name]
    inside = range(matrix.offset, matrix.offset + matrix.units)
    works = [tile.work for tile in schedule.decoded]
    return [i for i, work in enumerate(works) if isinstance(work, Product) and work.weight in inside]


def tiny(horizon: int = 8, **change: Any) -> HeadConfig:
    return HeadConfig(**{**TINY, "action_horizon": horizon, **change})


def small_head(horizon: int) -> HeadConfig:
    """What the benchmarks of the head take instead of a released one."""
    return HeadConfig(num_layers=2, num_heads=2, head_dim=16, hidden_size=32, output_dim=32, action_horizon=horizon)
