"""Which implementation of an op runs: the first of its list that does not refuse the tensors it is given; before all others
the one that measured.py names for the chip.

The automatic choice may step down, and says why once. A wish (`backend=`, `use_backend`) that cannot be met raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from dit4dit.errors import BackendError, did_you_mean
from dit4dit.ops import launch, measured, tiles
from dit4dit.ops.aot import loader

log = logging.getLogger("dit4dit.ops")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `refuse` and `run` take the op's arguments; `refuse` says why not, or None.

    `device` is the kind of device ("cuda", "cpu") that it was written for, None for any: refusing there is worth a
    warning, refusing elsewhere is not. `measured_only`: without a wish it runs only where measured.py names it.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Callable[..., Any]
    device: str | None = None
    measured_only: bool = False


@dataclass(frozen=True)
class Explanation:
    """What `op` would run on a device (None: nothing), why each implementation before that would not, and, where a Triton
    kernel would run, which table its block sizes come from and whether it was compiled ahead of time.
    """

    op: str
    chosen: str | None
    refused: dict[str, str] = field(default_factory=dict)
    tiles: str | None = None
    kernels: str | None = None


# Per thread and per asyncio task: a wish made in one never reaches another.
_wishes: ContextVar[dict[str, str]] = ContextVar("dit4dit_wishes")  # op -> implementation; "" -> for every op
_trace: ContextVar[dict[str, set[str]] | None] = ContextVar("dit4dit_trace", default=None)

NOWHERE = torch.device("meta")

Example = Callable[[torch.device], tuple[Any, ...]]

_ops: dict[str, Op] = {}
_said: set[tuple[str, str, str]] = set()  # (op, implementation, reason) that has been warned about


class Op:
    """A named list of implementations, best first. Calling it runs one of them.

    `example(device)` makes small arguments of the usual kind, for `explain`; None until a room above sets it (`set_example`).
    """

    def __init__(self, name: str, implementations: list[Implementation], example: Example | None):
        self.name = name
        self.implementations = {i.name: i for i in implementations}
        self.example = example
        _ops[name] = self

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        chosen, refused = self.choose(args, backend)
        if chosen is None:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
            raise BackendError(f"{self.name}: every implementation refused: {reasons}")
        if refused:
            self._say_why(chosen, refused, args)
        trace = _trace.get()
        if trace is not None:
            trace.setdefault(self.name, set()).add(chosen.name)
        return chosen.run(*args)

    def choose(self, args: tuple, backend: str | None = None) -> tuple[Implementation | None, dict[str, str]]:
        """The implementation for these arguments, and the reasons of those before it. BackendError: a refused wish."""
        wish = backend or self.wish()
        reason: str | None
        if wish is not None:
            reason = self._find(wish).refuse(*args)
            if reason is not None:
                raise BackendError(f"{self.name}: {wish!r} refused: {reason}")
            return self.implementations[wish], {}
        refused: dict[str, str] = {}
        device = _device(args)
        best = measured.choice(self.name, device)
        in_order = list(self.implementations.values())
        if best is not None:
            in_order.sort(key=lambda i: i.name != best)  # stable: the others keep their order
        for implementation in in_order:
            if implementation.measured_only and implementation.name != best and implementation.device == device.type:
                reason = measured.missing(implementation.name, device)
            else:
                reason = implementation.refuse(*args)
            if reason is None:
                return implementation, refused
            refused[implementation.name] = reason
        return None, refused

    def wish(self) -> str | None:
        """What `use_backend` asks of this op here."""
        wishes = _wishes.get({})
        return wishes.get(self.name) or wishes.get("")

    def _find(self, backend: str) -> Implementation:
        if backend not in self.implementations:
            known = list(self.implementations)
            raise BackendError(
                f"{self.name}: no implementation is called {backend!r}{did_you_mean(backend, known)}; "
                f"there are: {', '.join(known)}"
            )
        return self.implementations[backend]

    def _say_why(self, chosen: Implementation, refused: dict[str, str], args: tuple) -> None:
        device = _device(args)
        best = measured.choice(self.name, device)
        for name, reason in refused.items():
            if self.implementations[name].measured_only and name != best:
                continue  # nothing better is known to exist
            if self.implementations[name].device == device.type and (self.name, name, reason) not in _said:
                _said.add((self.name, name, reason))
                log.warning("%s: running %r because %r refused: %s", self.name, chosen.name, name, reason)


def _device(args: tuple) -> torch.device:
    """The device of the first tensor among the arguments, looking into lists and tuples; "meta" where there is none."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)):
            inner = _device(tuple(arg))
            if inner != NOWHERE:
                return inner
    return NOWHERE


def names() -> list[str]:
    """Every op, in the order of the data's way through the model."""
    return list(_ops)


def set_example(op: str, example: Example) -> None:
    """The example of an op whose arguments only a room above can make."""
    _ops[op].example = example


def implementations(op: str) -> list[str]:
    """Names of the implementations of `op`, best first. BackendError: no such op."""
    if op not in _ops:
        raise BackendError(f"no op is called {op!r}{did_you_mean(op, names())}; there are: {', '.join(_ops)}")
    return list(_ops[op].implementations)


@contextmanager
def use_backend(backend: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Ask for an implementation: of every op (`use_backend("torch")`) or of some (`use_backend(preprocess="cpp")`).

    The wish for one op goes before the wish for all, the inner context before the outer one. BackendError at once where
    no op has such an implementation, and at the call where its tensors cannot be run by it.
    """
    for name, wish in by_op.items():
        if name not in _ops:
            raise BackendError(f"no op is called {name!r}{did_you_mean(name, names())}; there are: {', '.join(_ops)}")
        _ops[name]._find(wish)
    wishes = dict(by_op)
    if backend is not None:
        known = sorted({name for op in _ops.values() for name in op.implementations})
        if backend not in known:
            raise BackendError(
                f"no op has an implementation called {backend!r}{did_you_mean(backend, known)}; "
                f"there are: {', '.join(known)}"
            )
        wishes[""] = backend
        outer: dict[str, str] = {}  # a wish for all replaces what outer contexts asked of single ops
    else:
        outer = _wishes.get({})
    token = _wishes.set({**outer, **wishes})
    try:
        yield
    finally:
        _wishes.reset(token)


@contextmanager
def trace() -> Iterator[dict[str, set[str]]]:
    """Record what runs inside: op -> names of the implementations that ran. Only calls of the same thread are seen."""
    ran: dict[str, set[str]] = {}
    token = _trace.set(ran)
    try:
        yield ran
    finally:
        _trace.reset(token)


def explain(op: str | None = None, device: str | torch.device = "cpu") -> list[Explanation]:
    """For `op`, or for every op, what would run on `device` with usual arguments, and why the better ones would not.

    Wishes made with `use_backend` count. BackendError: no such op; ConfigError: the table that DIT4DIT_TILES names is broken.
    """
    if op is not None and op not in _ops:
        raise BackendError(f"no op is called {op!r}{did_you_mean(op, names())}; there are: {', '.join(_ops)}")
    return [_explain(_ops[name], torch.device(device)) for name in ([op] if op else _ops)]


def _explain(op: Op, device: torch.device) -> Explanation:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reason = f"torch sees {torch.cuda.device_count()} CUDA devices, so not {device}"
        return Explanation(op.name, None, dict.fromkeys(op.implementations, reason))
    if op.example is None:
        reason = "unknown: import dit4dit.engine first, which makes an example of the op's arguments"
        return Explanation(op.name, None, dict.fromkeys(op.implementations, reason))
    args = op.example(device)
    wish = op.wish()
    if wish is not None:
        refusal = op._find(wish).refuse(*args)
        if refusal:
            return Explanation(op.name, None, {wish: refusal})
        return Explanation(op.name, wish, {}, *_origin(op, wish, device))
    chosen, refused = op.choose(args)
    if chosen is None:
        return Explanation(op.name, None, refused)
    return Explanation(op.name, chosen.name, refused, *_origin(op, chosen.name, device))


def _origin(op: Op, chosen: str, device: torch.device) -> tuple[str | None, str | None]:
    """`tiles` and `kernels` of an explanation."""
    if chosen != "triton":
        return None, None
    chip = launch.architecture(device)
    kernels = "interpreted" if device.type == "cpu" else loader.explain(chip)
    return tiles.source(op.name, chip), kernels
