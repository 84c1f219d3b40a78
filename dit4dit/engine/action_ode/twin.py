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

from dit4dit.engine.action_ode.schedule import (
    NONE,
    Attend,
    Epilogue,
    Product,
    Schedule,
    Space,
    Start,
    float_of,
)
from dit4dit.engine.action_ode.weights import PackedHead
from dit4dit.model.flow import GuidanceTensors, guidance_strength

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
        guidance: GuidanceTensors | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """noise float32 [B, K, A]; context [B, S, 2 * contexts * width], k | v of each block; prefix [B, width]."""
        self.schedule, self.packed, self.dtype = schedule, packed, dtype
        self.noise, self.context, self.prefix = noise, context.to(dtype), prefix
        self.guidance = guidance
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
        rows, x = slice(w.token, w.token + w.tokens), F.pad(self.noise[w.sample].float(), (0, 0, w.prefix, 0))
        noisy = self.buffers[Space.NOISY][0, rows]
        self.buffers[Space.ACTIONS][0, rows] = x
        noisy.copy_(F.pad(x, (0, noisy.shape[1] - x.shape[1])))

    def _product(self, w: Product) -> None:
        constants, rows = self.packed.constants, slice(w.token, w.token + w.tokens)
        y = self._source(w).float() @ self.packed.of(w)[: w.rows, : w.columns].float().T
        if w.scale != NONE:
            y = y * constants[w.scale : w.scale + w.rows]
        if w.epilogue == Epilogue.TOKENS:
            return self._to_stream(w, self._tokens(w, y))
        y = y + constants[w.bias : w.bias + w.rows]
        columns = slice(w.row, w.row + w.rows)
        if w.epilogue == Epilogue.RESIDUAL:
            return self._to_stream(w, y + self.buffers[Space.STREAM][0, rows, columns])
        if w.epilogue == Epilogue.EULER:
            return self._euler(w, y)
        self.buffers[w.out][0, rows, columns] = ACTIVATION[Epilogue(w.epilogue)](y).to(self.dtype)

    def _source(self, w: Product) -> Tensor:
        """[tokens, columns] as the product takes them."""
        planes = self.buffers[w.source][: w.planes, w.token : w.token + w.tokens, : w.columns]
        if w.planes > 1:
            return self._merged(w, planes)
        if not w.norm:
            return planes[0]
        x = F.layer_norm(planes[0].float(), (w.columns,), eps=float_of(w.norm))
        if w.modulation != NONE:
            scale, shift = self.packed.constants[w.modulation :][: 2 * w.columns].view(2, w.columns)
            x = x * scale + shift
        return x.to(self.dtype)

    def _merged(self, w: Product, planes: Tensor) -> Tensor:
        """Ranges of keys, each weighted with its part of the sum over all keys."""
        stats = self.buffers[Space.STATS][: w.planes, w.token : w.token + w.tokens]
        most, total = stats.unflatten(-1, (-1, 2)).unbind(-1)
        share = (most - most.amax(0)).exp() * total
        heads = planes.float().unflatten(-1, (most.shape[-1], -1))
        x = torch.zeros_like(heads[0])
        for plane in range(w.planes):
            x = x + share[plane][..., None] * heads[plane]
        return (x / share.sum(0)[..., None]).flatten(1).to(self.dtype)

    def _tokens(self, w: Product, y: Tensor) -> Tensor:
        shape, first = self.schedule.shape, w.bias - w.row
        table = self.packed.constants[first : first + shape.tokens * shape.width].view(shape.tokens, shape.width)
        x = (y.view(-1, shape.tokens, w.rows) + table[:, w.row : w.row + w.rows]).clone()
        if shape.prefix:
            assert self.prefix is not None
            sample = w.token // shape.tokens
            x[:, 0] = self.prefix[sample : sample + len(x), w.row : w.row + w.rows].float()
        return x.flatten(0, 1)

    def _to_stream(self, w: Product, x: Tensor) -> None:
        rows, columns = slice(w.token, w.token + w.tokens), slice(w.row, w.row + w.rows)
        self.buffers[Space.STREAM][0, rows, columns] = x
        self.buffers[Space.ROUNDED][0, rows, columns] = x.to(self.dtype)

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
        self.buffers[Space.ATTENDED][w.plane, rows, columns] = (y / total).to(self.dtype)
        self.buffers[Space.STATS][w.plane, rows, 2 * w.head : 2 * w.head + 2] = torch.cat([most, total], 1)

    def _euler(self, w: Product, velocity: Tensor) -> None:
        """velocity [tokens, rows], of actions w.row and on."""
        shape, columns = self.schedule.shape, slice(w.row, w.row + w.rows)
        for first in range(w.token, w.token + w.tokens, shape.tokens):
            sample, rows = first // shape.tokens, slice(first + shape.prefix, first + shape.tokens)
            x, v = self.buffers[Space.ACTIONS][0, rows, columns], velocity[rows.start - w.token : rows.stop - w.token]
            if self.guidance is not None:
                t = self.packed.constants[self.schedule.constants["times"][0] + w.step].item()
                given = self.guidance
                pull = guidance_strength(t, given.max_guidance) * given.weights[:, None]
                v = v - pull * (given.previous[sample, :, columns] - (x - t * v))
            x = x - (1.0 / shape.steps) * v
            self.buffers[Space.ACTIONS][0, rows, columns] = x
            noisy = self.buffers[Space.NOISY][0, rows, w.row : w.row + w.tile_rows]
            noisy.copy_(F.pad(x, (0, noisy.shape[1] - w.rows)))
            if w.step == shape.steps - 1:
                out = self.buffers[Space.OUT][0].view(shape.batch, shape.horizon, shape.actions)
                out[sample, :, columns] = x
