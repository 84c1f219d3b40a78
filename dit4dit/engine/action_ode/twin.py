"""The twin: the same schedule in PyTorch, tile by tile, on any device; what the kernel is held against.

Every word is NaN and EMPTY until a tile writes it, and knows of which step it is: a tile that comes too early waits, and a
schedule that mixes steps or sets is an error. In bfloat16 it rounds where the kernel rounds: at every word, where a norm
modulates, and the weights of attention's sum. In float32 nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.engine.action_ode.schedule import (
    EMPTY,
    NONE,
    SETS,
    Attend,
    Epilogue,
    Operands,
    Product,
    Schedule,
    float_of,
)
from dit4dit.engine.action_ode.weights import PackedHead
from dit4dit.engine.action_ode.words import Words, pair_out, pair_reads, reads, source, written
from dit4dit.model.flow import GuidanceTensors, guidance_strength

ACTIVATION = {
    Epilogue.PLAIN: lambda y: y,
    Epilogue.GELU: lambda y: F.gelu(y, approximate="tanh"),
    Epilogue.SILU: F.silu,
    Epilogue.RELU: F.relu,
}


class Twin:
    """One launch. `run` may be called once; what it leaves can be looked at after it.

    Attributes:
        out: the actions, float32 [B, K, A]; NaN until a tile writes them.
        private: float32 [private_floats], what blocks keep for themselves.
        tiles_run: how many tiles have run.
    """

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
        words: Words | None = None,
    ) -> None:
        """noise float32 [B, K, A]; context [B, S, 2 * contexts * width], k | v of each block; prefix [B, width].

        words: as the launch before left them; None: the first launch.
        """
        self.schedule, self.packed, self.dtype = schedule, packed, dtype
        self.noise, self.context, self.prefix = noise.float(), context.to(dtype), prefix
        self.guidance = guidance
        self.words = Words(schedule, dtype, noise.device) if words is None else words
        self.first = self.words.done
        self.out = torch.full_like(self.noise, math.nan)
        self.private = torch.full((schedule.private_floats,), math.nan, device=noise.device)
        self.tiles_run = 0

    def run(self, generator: torch.Generator | None = None, stop_after: int | None = None) -> Tensor:
        """The actions, float32 [B, K, A]; those that no tile has written are NaN.

        generator: teams come forward in a random order; else team after team as far as it gets.
        stop_after: run so many tiles and no more.

        Raises:
            RuntimeError: teams wait for each other, or a word is not of the step that it should be of.
        """
        self.first = self.words.done
        for step, work in self._order(generator):
            if self.tiles_run == stop_after:
                return self.out
            if isinstance(work, Product):
                self._product(work, step)
            else:
                self._attend(work, step)
            self.tiles_run += 1
        self.words.done += self.schedule.shape.steps
        return self.out

    def buffer(self, name: str, step: int) -> Tensor:
        """A buffer [rows, columns] as it is in the set of step `step` of this launch."""
        buffer = self.schedule.buffers[name]
        values = self.words.values[(self.first + step) % SETS]
        return values[buffer.offset : buffer.offset + buffer.words].view(buffer.rows, buffer.columns)

    # -- order ---------------------------------------------------------------------------------------------------------

    def _order(self, generator: torch.Generator | None) -> Iterator[tuple[int, Operands]]:
        """(step, tile), each at a time when all that the tile reads is there."""
        schedule, steps = self.schedule, self.schedule.shape.steps
        teams = [schedule.decoded[begin:end] for begin, end in pairwise(schedule.first_tile.tolist())]
        position = [-1] * len(teams)  # tiles that the team has run; -1: it has not begun
        missing: dict[int, int] = {}  # a word that a team's next tile did not find
        waiting = list(range(len(teams)))
        while waiting:
            came = False
            if generator is not None:
                waiting = [waiting[j] for j in torch.randperm(len(waiting), generator=generator).tolist()]
            for team in waiting:
                if position[team] < 0:
                    self._begin(team)
                    position[team], came = 0, True
                while position[team] < steps * len(teams[team]):
                    step, i = divmod(position[team], len(teams[team]))
                    work = teams[team][i].work
                    if not self._ready(team, step, work, missing):
                        break
                    position[team] += 1
                    came = True
                    yield step, work
                    if generator is not None and torch.rand((), generator=generator) < 0.5:
                        break
            waiting = [team for team in waiting if position[team] < steps * len(teams[team])]
            if not came:
                some = ", ".join(f"{team} for word {missing[team]}" for team in sorted(waiting)[:4])
                raise RuntimeError(f"action_ode: {len(waiting)} teams wait for each other: {some}")

    def _ready(self, team: int, step: int, work: Operands, missing: dict[int, int]) -> bool:
        """Whether all that the team's next tile reads is there."""
        now = self.first + step
        if team in missing and self.words.step[now % SETS, missing[team]] == EMPTY:
            return False
        missing.pop(team, None)
        for area in reads(work, self.schedule.shape):
            word = self.words.missing(area, now)
            if word is not None:
                missing[team] = word
                return False
        return True

    def _begin(self, team: int) -> None:
        """The noise, by the team that makes the noisy actions of later steps."""
        first, end = self.schedule.first_tile[team : team + 2].tolist()
        for tile in self.schedule.decoded[first:end]:
            w = tile.work
            if not isinstance(w, Product) or w.epilogue != Epilogue.EULER:
                continue
            acts, sample, k = self._actions(w)
            x = torch.zeros(w.tokens, w.rows, device=self.noise.device)
            x[acts] = self.noise[sample, k, w.row : w.row + w.rows]
            self._private(w).copy_(x)
            self._write(w, self.first, x)

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _product(self, w: Product, step: int) -> None:
        constants, now = self.packed.constants, self.first + step
        x = self._own_attention(w, now) if w.attend else self.words.read(source(w), now).float()
        y = self._multiply(w, x, step)
        if w.scale != NONE:
            y = y * constants[w.scale : w.scale + w.rows]
        if w.norm:
            mean, inverse = statistics(x, w)
            sums = w.sums + step * w.constant_step
            y = (y - mean * constants[sums : sums + w.rows]) * inverse
        if w.epilogue == Epilogue.TOKENS:
            y = self._tokens(w, y)
        else:
            bias = w.bias + step * w.constant_step
            y = y + constants[bias : bias + w.rows]
        if w.epilogue == Epilogue.RESIDUAL:
            y = y + self._private(w)
        if w.epilogue in (Epilogue.TOKENS, Epilogue.RESIDUAL):
            self._private(w).copy_(y)
        if w.epilogue == Epilogue.EULER:
            return self._euler(w, y, step)
        self._write(w, now, ACTIVATION.get(Epilogue(w.epilogue), ACTIVATION[Epilogue.PLAIN])(y))
        self._clear(w, now + SETS - 1)

    def _multiply(self, w: Product, x: Tensor, step: int) -> Tensor:
        """[tokens, rows], sums alone."""
        if w.modulation != NONE:
            scale = w.modulation + step * w.modulation_step
            x = (x * self.packed.constants[scale : scale + w.columns]).to(self.dtype).float()
        x = F.pad(x, (0, w.split * w.slice - w.columns))
        return x @ self.packed.of(w)[: w.rows].float().T

    def _own_attention(self, w: Product, now: int) -> Tensor:
        """The tokens' attention to each other [tokens, K], as it would be in words."""
        shape = self.schedule.shape
        q, k, v = (
            part.view(-1, shape.tokens, shape.heads, shape.head_dim).transpose(1, 2)
            for part in self.words.read(source(w), now).float().chunk(3, 1)
        )
        scores = q @ k.mT / math.sqrt(shape.head_dim)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        y = p.to(self.dtype).float() @ v / p.sum(-1, keepdim=True)
        return y.transpose(1, 2).reshape(w.tokens, shape.width).to(self.dtype).float()

    def _tokens(self, w: Product, y: Tensor) -> Tensor:
        shape = self.schedule.shape
        lines = torch.arange(w.token, w.token + w.tokens, device=y.device) % shape.tokens
        y = y + self.packed.constants[w.bias :].as_strided((shape.tokens, w.rows), (shape.width, 1))[lines]
        if shape.prefix:
            assert self.prefix is not None
            state = (lines == 0).nonzero()[:, 0]
            y[state] = self.prefix[(w.token + state) // shape.tokens, w.row : w.row + w.rows].float()
        return y

    def _attend(self, w: Attend, step: int) -> None:
        for pair in range(w.pair, w.pair + w.pairs):
            self._attend_pair(w, pair, step)

    def _attend_pair(self, w: Attend, pair: int, step: int) -> None:
        shape, now = self.schedule.shape, self.first + step
        d = shape.head_dim
        areas = pair_reads(w, pair, shape)
        q = self.words.read(areas[0], now).float()
        if w.context == NONE:
            k, v = (self.words.read(area, now).float() for area in areas[1:])
        else:
            sample, head = divmod(pair, shape.heads)
            first = 2 * w.context * shape.width + head * d
            k, v = (self.context[sample, : w.keys, first + part * shape.width :][:, :d].float() for part in (0, 1))
        most, total, y = [], [], []
        for begin in range(0, w.keys, w.slice):
            scores = q @ k[begin : begin + w.slice].T / math.sqrt(d)
            most.append(scores.amax(1, keepdim=True))
            p = (scores - most[-1]).exp()
            total.append(p.sum(1, keepdim=True))
            y.append(p.to(self.dtype).float() @ v[begin : begin + w.slice])
        share = (torch.stack(most) - torch.stack(most).amax(0)).exp()
        merged = (share * torch.stack(y)).sum(0) / (share * torch.stack(total)).sum(0)
        area = pair_out(w, pair, shape)
        self.words.write(area, now, merged)
        self.words.clear(area, now + SETS - 1)

    def _euler(self, w: Product, velocity: Tensor, step: int) -> None:
        """velocity [tokens, rows], of actions w.row and on."""
        now, steps, columns = self.first + step, self.schedule.shape.steps, slice(w.row, w.row + w.rows)
        acts, sample, k = self._actions(w)
        actions = self._private(w)
        x, v = actions[acts], velocity[acts]
        if self.guidance is not None:
            t = self.packed.constants[self.schedule.constants["times"][0] + step].item()
            given = self.guidance
            pull = guidance_strength(t, given.max_guidance) * given.weights[k, None]
            v = v - pull * (given.previous[sample, k, columns] - (x - t * v))
        x = x - (1.0 / steps) * v
        actions[acts] = x
        if step < steps - 1:
            self._write(w, now + 1, actions)
        else:
            self.out[sample, k, columns] = x
        self._clear(w, now + SETS)  # of its own step: all have read them

    def _actions(self, w: Product) -> tuple[Tensor, Tensor, Tensor]:
        """(which of a tile's tokens have actions, their samples, their places in the horizon); the state token has none."""
        shape = self.schedule.shape
        tokens = torch.arange(w.token, w.token + w.tokens, device=self.noise.device)
        acts = (tokens % shape.tokens >= shape.prefix).nonzero()[:, 0]
        return acts, tokens[acts] // shape.tokens, tokens[acts] % shape.tokens - int(shape.prefix)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _private(self, w: Product) -> Tensor:
        """[tokens, rows], a view."""
        last = w.stream + (w.rows - 1) * self.schedule.padded_tokens + w.tokens
        assert 0 <= w.stream < last <= len(self.private), w
        return self.private[w.stream :].as_strided((w.tokens, w.rows), (1, self.schedule.padded_tokens))

    def _write(self, w: Product, step: int, y: Tensor) -> None:
        area = written(w, self.schedule.shape)
        self.words.write(area, step, F.pad(y, (0, 2 * area.words - y.shape[1])))

    def _clear(self, w: Product, step: int) -> None:
        self.words.clear(written(w, self.schedule.shape), step)


def statistics(x: Tensor, w: Product) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of x [tokens, K], both [tokens, 1], merged over the ranks' slices."""
    count, mean, squares = 0, torch.zeros_like(x[:, :1]), torch.zeros_like(x[:, :1])
    for begin in range(0, w.columns, w.slice):
        part = x[:, begin : begin + w.slice]
        more, its_mean = part.shape[1], part.mean(1, keepdim=True)
        difference = its_mean - mean
        squares = (
            squares
            + (part - its_mean).square().sum(1, keepdim=True)
            + difference.square() * (count * more / (count + more))
        )
        mean = mean + difference * (more / (count + more))
        count += more
    return mean, (squares / count + float_of(w.norm)).rsqrt()
