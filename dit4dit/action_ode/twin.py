"""The twin: the same schedule in PyTorch, tile by tile, on any device; what the kernel is held against.

Every buffer is NaN until a tile writes it, so that a tile that comes too early shows. In bfloat16 it rounds where the kernel
rounds: at every buffer of activations, and the weights of attention's sum. In float32 nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.action_ode.epilogue import Guidance, Units
from dit4dit.action_ode.schedule import (
    NONE,
    Attend,
    Combine,
    Epilogue,
    Euler,
    Norm,
    Product,
    Schedule,
    Space,
    Start,
    float_of,
)
from dit4dit.action_ode.weights import PackedHead
from dit4dit.ops.euler_step import guidance as strength

ACTIVATION = {
    Epilogue.PLAIN: lambda y: y,
    Epilogue.GELU: lambda y: F.gelu(y, approximate="tanh"),
    Epilogue.SILU: F.silu,
    Epilogue.RELU: F.relu,
}


class Twin:
    """One launch. `run` may be called once; `buffers` can be looked at after it."""

    def __init__(
        self,
        schedule: Schedule,
        packed: PackedHead,
        noise: Tensor,
        context: Tensor,
        prefix: Tensor | None = None,
        *,
        guidance: Guidance | None = None,
        units: Units | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """noise float32 [B, K, A]; context [B, S, 2 * contexts * width], k | v of each block; prefix [B, width]."""
        self.schedule, self.packed, self.dtype = schedule, packed, dtype
        self.noise, self.context, self.prefix = noise, context.to(dtype), prefix
        self.guidance, self.units = guidance, units
        nan = torch.full((), math.nan, device=noise.device)
        self.buffers = [
            nan.expand(b.planes, b.rows, b.columns).to(torch.float32 if b.wide else dtype).clone()
            for b in schedule.buffers
        ]
        self.counters = [0] * schedule.counters
        self.cursor = schedule.first_tile[:-1].tolist()

    def run(self, generator: torch.Generator | None = None, stop_after: int | None = None) -> Tensor:
        """The actions, float32 [B, K, A]; those that no tile has written are NaN.

        generator: workers come forward in a random order; else worker after worker as far as it gets.
        stop_after: run so many tiles and no more.
        """
        for count, i in enumerate(self._order(generator)):
            if count == stop_after:
                break
            tile = self.schedule.decoded[i]
            getattr(self, f"_{tile.opcode.name.lower()}")(tile.work)
            if tile.signal != NONE:
                self.counters[tile.signal] += 1
        shape = self.schedule.shape
        return self.buffers[Space.OUT][0].view(shape.batch, shape.horizon, shape.actions)

    def _order(self, generator: torch.Generator | None) -> Iterator[int]:
        """Tiles, each at a time when its counter has its target."""
        end = self.schedule.first_tile[1:].tolist()
        open_workers = [w for w in range(len(end)) if self.cursor[w] < end[w]]
        while open_workers:
            came = False
            chosen = open_workers
            if generator is not None:
                chosen = [open_workers[j] for j in torch.randperm(len(open_workers), generator=generator).tolist()]
            for w in chosen:
                while self.cursor[w] < end[w] and self._may_run(self.cursor[w]):
                    came = True
                    self.cursor[w] += 1
                    yield self.cursor[w] - 1
                    if generator is not None and torch.rand((), generator=generator) < 0.5:
                        break
            if not came:
                raise RuntimeError(f"action_ode: the workers {open_workers[:4]} wait for each other")
            open_workers = [w for w in open_workers if self.cursor[w] < end[w]]

    def _may_run(self, i: int) -> bool:
        wait, target = self.schedule.tiles[i, 1:3].tolist()
        return wait == NONE or self.counters[wait] >= target

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _start(self, w: Start) -> None:
        rows = slice(w.token, w.token + w.tokens)
        self._set_actions(rows, F.pad(self.noise[w.sample].float(), (0, 0, w.prefix, 0)))

    def _set_actions(self, rows: slice, x: Tensor) -> None:
        self.buffers[Space.ACTIONS][0, rows] = x
        noisy = self.buffers[Space.NOISY][0, rows]
        noisy.copy_(F.pad(x, (0, noisy.shape[1] - x.shape[1])))

    def _product(self, w: Product) -> None:
        source = self.buffers[w.source][0, w.token : w.token + w.tokens, w.column : w.column + w.columns]
        weight = self.packed.of(w)[: w.rows, : source.shape[1]]
        y = source.float() @ weight.float().T
        constants = self.packed.constants
        if w.scale != NONE:
            y = y * constants[w.scale : w.scale + w.rows]
        if w.epilogue != Epilogue.PARTIAL:
            y = ACTIVATION[Epilogue(w.epilogue)](y + constants[w.bias : w.bias + w.rows])
        self.buffers[w.out][w.plane, w.token : w.token + w.tokens, w.row : w.row + w.rows] = y.to(
            self.buffers[w.out].dtype
        )

    def _norm(self, w: Norm) -> None:
        width, constants = self.schedule.shape.width, self.packed.constants
        if w.first == 2:
            assert self.prefix is not None
            x = self.prefix[w.sample].float()
        else:
            x = constants[w.bias : w.bias + width]
            if w.first == 0:
                x = self.buffers[Space.STREAM][0, w.token] + x
            for plane in range(w.planes):
                x = x + self.buffers[Space.PARTIAL][plane, w.token, :width]
        self.buffers[Space.STREAM][0, w.token] = x
        y = F.layer_norm(x, (width,), eps=float_of(w.eps))
        if w.scale != NONE:
            y = y * constants[w.scale : w.scale + width] + constants[w.shift : w.shift + width]
        self.buffers[Space.NORMED][0, w.token] = y.to(self.dtype)

    def _attend(self, w: Attend) -> None:
        shape = self.schedule.shape
        d, rows = shape.head_dim, slice(w.token, w.token + w.tokens)
        projected = self.buffers[Space.PROJECTED][0, rows]
        q, first = projected[:, w.head * d :][:, :d].float(), w.head * d
        if w.context == NONE:
            k, v = (projected[:, part * shape.width + first :][:, :d].float() for part in (1, 2))
        else:
            first += 2 * w.context * shape.width
            keys = self.context[w.sample, w.key : w.key + w.keys]
            k, v = (keys[:, part * shape.width + first :][:, :d].float() for part in (0, 1))
        scores = q @ k.T / math.sqrt(d)
        most = scores.amax(1, keepdim=True)
        p = (scores - most).exp()
        total = p.sum(1, keepdim=True)
        y = p.to(self.dtype).float() @ v
        columns = slice(w.head * d, (w.head + 1) * d)
        if w.plane == NONE:
            self.buffers[Space.ATTENDED][0, rows, columns] = (y / total).to(self.dtype)
        else:
            self.buffers[Space.HEADS][w.plane, rows, columns] = y
            self.buffers[Space.STATS][w.plane, rows, 2 * w.head : 2 * w.head + 2] = torch.cat([most, total], 1)

    def _combine(self, w: Combine) -> None:
        d, rows = self.schedule.shape.head_dim, slice(w.token, w.token + w.tokens)
        columns = slice(w.head * d, (w.head + 1) * d)
        most, total = self.buffers[Space.STATS][: w.planes, rows, 2 * w.head : 2 * w.head + 2].unbind(-1)
        share = (most - most.amax(0)).exp()
        y = torch.zeros_like(self.buffers[Space.HEADS][0, rows, columns])
        whole = torch.zeros_like(share[0])
        for plane in range(w.planes):
            y = y + share[plane][:, None] * self.buffers[Space.HEADS][plane, rows, columns]
            whole = whole + share[plane] * total[plane]
        self.buffers[Space.ATTENDED][0, rows, columns] = (y / whole[:, None]).to(self.dtype)

    def _euler(self, w: Euler) -> None:
        shape, constants = self.schedule.shape, self.packed.constants
        rows = slice(w.token + w.prefix, w.token + w.tokens)
        v = constants[w.bias : w.bias + shape.actions]
        for plane in range(w.planes):
            v = v + self.buffers[Space.PARTIAL][plane, rows, : shape.actions]
        x = self.buffers[Space.ACTIONS][0, rows]
        if self.guidance is not None:
            t = constants[self.schedule.constants["times"][0] + w.step].item()
            given = self.guidance
            pull = strength(t, given.max_guidance) * given.weights[:, None]
            v = v - pull * (given.previous[w.sample] - (x - t * v))
        x = x - (1.0 / shape.steps) * v
        self._set_actions(rows, x)
        if w.last:
            y = x if self.units is None else self.units(x)
            self.buffers[Space.OUT][0, w.sample * shape.horizon :][: shape.horizon] = y
