"""A plugin of `dit4dit tune` with implementations of every kind of fault, and some that are right.

Each stands in where the weight of `linear` has the number of rows that is its own (`ROWS`), so that one queue has them all.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.ops import register
from dit4dit.ops.dispatch import Implementation, find

BREAK = "STANDINS_BREAK"
"""Where this variable is set, implementations of the package's own are wrong too: a library with a fault."""
AT = "STANDINS_AT"
"""A file that `hangs` writes its process's number into."""
_calls = itertools.count(1)


def new(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


def right(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return new(x, weight).copy_(F.linear(x, weight, bias))


def segfaults(*_: object) -> Tensor:
    ctypes.string_at(0)
    raise AssertionError("address 0 can be read")


def hangs(*_: object) -> Tensor:
    if os.environ.get(AT):
        Path(os.environ[AT]).write_text(f"{os.getpid()}\n")
    while True:
        time.sleep(60)


def exits(*_: object) -> Tensor:
    os._exit(0)


def raises(*_: object) -> Tensor:
    raise RuntimeError("no tile fits\nand a second line")


def raises_exit(*_: object) -> Tensor:
    sys.exit(0)


def is_wrong_on_the_third_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    if next(_calls) == 3:
        out.view(-1)[0] += 1
    return out


def is_wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return right(x, weight, bias) * 1.01


def has_another_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return right(x, weight, bias)[None]


def returns_no_tensor(*_: object) -> None:
    return None


def _poke(address: int) -> None:
    ctypes.c_float.from_address(address).value = 1.0


def writes_behind(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    _poke(out.data_ptr() + out.nbytes)
    return out


def writes_before(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    _poke(out.data_ptr() - 4)
    return out


def changes_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    x.view(-1)[3] *= -1
    return out


def changes_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    _poke(weight.data_ptr() + weight.nbytes - 4)
    return out


def leaves_one_unwritten(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = new(x, weight)
    out.view(-1)[:-1] = F.linear(x, weight, bias).view(-1)[:-1]
    return out


def adds_to_what_is_there(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Right on NaN, as a maximum that ignores them is, and wherever small numbers are."""
    return torch.fmax(new(x, weight), F.linear(x, weight, bias))


def differs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = right(x, weight, bias)
    out.view(torch.int32).view(-1)[0] ^= next(_calls) & 1
    return out


_kept: dict[int, Tensor] = {}


def remembers(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By where its argument is, as one would that holds a buffer to be a constant."""
    if x.data_ptr() not in _kept:
        _kept[x.data_ptr()] = right(x, weight, bias)
    return _kept[x.data_ptr()].clone()


def prints(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    garbage = b'{"answer": {"reason": null}}\n\xff\x00' * 2000
    os.write(1, garbage)
    os.write(2, garbage)
    sys.stdout.write("garbage" + sys.stdin.read())
    return right(x, weight, bias)


FAULTS: tuple[Callable[..., object], ...] = (
    segfaults,
    hangs,
    exits,
    raises,
    raises_exit,
    is_wrong_on_the_third_call,
    is_wrong,
    has_another_shape,
    returns_no_tensor,
    writes_behind,
    writes_before,
    changes_input,
    changes_weight,
    leaves_one_unwritten,
    adds_to_what_is_there,
    differs,
    remembers,
)
ROWS = {"segfaults": (8,), "hangs": (8, 32), "exits": (8,)}
"""N of the calls of `linear` that a fault is tried on."""
REST = 16
"""N of those of all others."""
GOOD = 24
"""N of the call that `prints` is right on."""


def refuse(rows: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None if weight.shape[0] in rows else "not for this shape"


# -- unnormalize: right ones, in float32, whose arithmetic is that of half the bytes ------------------------------------


Pair = tuple[Tensor, Tensor]


def quick(actions: Tensor, table: Tensor) -> Pair:
    at, low, high, scale, offset = table.float()
    y = actions[..., : table.shape[1]]
    y = torch.where(at.isnan(), y, (y >= at).to(y.dtype))
    return torch.addcmul(offset, y.clamp(low, high), scale), actions


def row_by_row(actions: Tensor, table: Tensor) -> Pair:
    return torch.stack([quick(row, table)[0] for row in actions.unbind(1)], 1), actions


QUICK = 8192
"""Actions of a step, for which `by_shape` is quick."""


def by_shape(actions: Tensor, table: Tensor) -> Pair:
    return (quick if table.shape[1] == QUICK else row_by_row)(actions, table)


def _always(*_: object) -> None:
    return None


for _fault in FAULTS:
    _name = _fault.__name__
    register("linear", Implementation(_name, partial(refuse, ROWS.get(_name, (REST,))), _fault))
register("linear", Implementation("prints", partial(refuse, (GOOD,)), prints))
register("unnormalize", Implementation("by_shape", _always, by_shape))
register("unnormalize", Implementation("row_by_row", _always, row_by_row))


def _crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get(BREAK):
    gelu, step = find("linear_gelu").implementations, find("euler_step").implementations
    wrong, plain = gelu["onednn"].run, step["torch"].run
    gelu["onednn"] = replace(gelu["onednn"], run=lambda *args: wrong(*args) * 1.01)
    step["torch"] = replace(step["torch"], run=lambda *args: plain(*args) + 1e-6 * next(_calls))
    norm = find("adaln").implementations
    norm["torch"] = replace(norm["torch"], run=_crash)
