"""Which implementation of an op runs: the first of its list that does not refuse the tensors it is given; before all others
the one that a verdict names (`verdicts`), where a plan has one for the call.

The automatic choice may step down, and says why once. A wish (`backend=`, `use_backend`) that cannot be met raises.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dit4dit.errors import BackendError, did_you_mean
from dit4dit.ops import stand_in
from dit4dit.ops.verdicts import SWITCHES, Files, Verdicts

log = logging.getLogger("dit4dit.ops")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `refuse` and `run` take the op's arguments; `refuse` says why not, or None.

    `device` is the kind of device ("cuda", "cpu") that it was written for, None for any: refusing there is worth a
    warning, refusing elsewhere is not. `measured_only`: unless requested, it runs only where a verdict names it. `prepare` takes
    the op's arguments too: what has to be done once for them before `refuse` is asked, such as laying out a weight. It is
    called inside of `Choices`, where a call is one of many, and does nothing where the implementation could not run.

    `into`: `run` also takes `out=`, a contiguous tensor (for several results a tuple, None where a result is to be a new tensor)
    that it writes and returns. What `run` gives otherwise is copied to where the caller wants it.
    """

    name: str
    refuse: Callable[..., str | None]
    run: Callable[..., Any]
    device: str | None = None
    measured_only: bool = False
    prepare: Callable[..., None] | None = None
    into: bool = False

    def ask(self, args: tuple[Any, ...], *, prepare: bool) -> str | None:
        """Why it cannot run these arguments, or None; prepare: they are prepared before."""
        if prepare and self.prepare is not None:
            self.prepare(*args)
        return self.refuse(*args)


# Per thread and per asyncio task: a wish made in one never reaches another.
_wishes: ContextVar[dict[str, str]] = ContextVar("dit4dit_wishes")  # op -> implementation; "" -> for every op
_trace: ContextVar[dict[str, set[str]] | None] = ContextVar("dit4dit_trace", default=None)
_choices: ContextVar[Choices | None] = ContextVar("dit4dit_choices", default=None)
_listing: ContextVar[list[Call] | None] = ContextVar("dit4dit_listing", default=None)

NOWHERE = torch.device("meta")

Example = Callable[[torch.device], tuple[Any, ...]]
Call = tuple[str, tuple[Any, ...]]
"""An op's name and the arguments of one call."""

_ops: dict[str, Op] = {}
_said: set[tuple[str, str, str]] = set()  # (op, implementation, reason) that has been warned about


Out = torch.Tensor | tuple[torch.Tensor | None, ...] | None
"""Where a result goes: see `Implementation.into`; None: to a new tensor. A caller's tensors need not be contiguous."""


def _run_into(implementation: Implementation, args: tuple[Any, ...], out: Out) -> Any:
    places = out if isinstance(out, tuple) else (out,)
    if implementation.into and all(place is None or place.is_contiguous() for place in places):
        return implementation.run(*args, out=out)
    result = implementation.run(*args)
    if not isinstance(out, tuple):
        return out.copy_(result)  # type: ignore[union-attr]
    return tuple(one if place is None else place.copy_(one) for place, one in zip(out, result, strict=True))


class Op:
    """A named list of implementations, best first. Calling it runs one of them.

    `example(device)` makes small arguments of the usual kind, for `explain`; None until a room above sets it (`set_example`).
    """

    def __init__(self, name: str, implementations: list[Implementation], example: Example | None):
        self.name = name
        self.implementations = {i.name: i for i in implementations}
        self.example = example
        _ops[name] = self

    def __call__(self, *args: Any, backend: str | None = None, out: Out = None) -> Any:
        """Run it; the results are written to `out` where that is given.

        `out` is not among the arguments that are listed and that decide what runs: the same work is done, elsewhere.
        """
        listing = _listing.get()
        if listing is not None:
            listing.append((self.name, args))
        choices = _choices.get()
        chosen = None if choices is None else choices.take(self, args, backend)
        if chosen is None:
            chosen = self._choose_now(args, backend, prepare=choices is not None)
        if choices is not None:
            choices.note(self.name, chosen.name)
        trace = _trace.get()
        if trace is not None:
            trace.setdefault(self.name, set()).add(chosen.name)
        return chosen.run(*args) if out is None else _run_into(chosen, args, out)

    def _choose_now(self, args: tuple, backend: str | None, *, prepare: bool) -> Implementation:
        chosen, refused = self.choose(args, backend, prepare=prepare)
        if chosen is None:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
            raise BackendError(f"{self.name}: every implementation refused: {reasons}")
        if refused:
            self.say_why(chosen, refused, args)
        return chosen

    def choose(
        self, args: tuple, backend: str | None = None, *, preferred: str | None = None, prepare: bool = False
    ) -> tuple[Implementation | None, dict[str, str]]:
        """The implementation for these arguments, and the reasons of those before it.

        preferred: goes before all others. prepare: prepare each (`Implementation.prepare`) before it is asked.
        BackendError: what is requested refuses.
        """
        wish = backend or self.wish()
        reason: str | None
        if wish is not None:
            wished = self._find(wish)
            reason = wished.ask(args, prepare=prepare)
            if reason is not None:
                raise BackendError(f"{self.name}: {wish!r} refused: {reason}")
            return wished, {}
        refused: dict[str, str] = {}
        device = _device(args)
        in_order = list(self.implementations.values())
        if preferred is not None:
            in_order.sort(key=lambda i: i.name != preferred)  # stable: the others keep their order
        for implementation in in_order:
            if _waits(implementation, preferred, device):
                reason = f"no measurement here chooses it: run dit4dit tune; backend={implementation.name!r} runs it"
            else:
                reason = implementation.ask(args, prepare=prepare)
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

    def files(self) -> dict[str, str | None]:
        """Its implementations -> `foreign` of each."""
        return {name: foreign(implementation) for name, implementation in self.implementations.items()}

    def say_why(
        self, chosen: Implementation, refused: dict[str, str], args: tuple, preferred: str | None = None
    ) -> None:
        """Warn, once each, of the implementations that are better for this device and refused."""
        device = _device(args)
        for name, reason in refused.items():
            if _waits(self.implementations[name], preferred, device):
                continue  # nothing better is known to exist
            mine = self.implementations[name].device == device.type or name == preferred
            if mine and (self.name, name, reason) not in _said:
                _said.add((self.name, name, reason))
                log.warning("%s: running %r because %r refused: %s", self.name, chosen.name, name, reason)


def _waits(implementation: Implementation, preferred: str | None, device: torch.device) -> bool:
    """Whether it may only run where a verdict names it, and none does."""
    here = implementation.device in (None, "cuda" if stand_in.on_gpu(device) else device.type)
    return implementation.measured_only and implementation.name != preferred and here


class Choices:
    """Which implementation each op call of one function takes: chosen in its first run, the same in every run after it.

        choices = Choices(verdicts)
        with choices:
            function()

    The first run that ends well looks a verdict up for each call, prepares what is chosen, and keeps the implementations in
    the order of the calls; later runs look nothing up, ask nobody, and open no file. A request (`backend=`, `use_backend`) is
    met where it is made; such a call is chosen for in the first run without one. For one function that makes the same calls in
    each run, of arguments with the same shapes, dtypes, layouts and weights, as a plan of fixed buffers does, in one thread at
    a time. Where the ops differ, these calls are chosen for anew, and so is everything in the run after it; arguments are not
    looked at again.
    """

    def __init__(self, verdicts: Verdicts | None = None) -> None:
        """verdicts: of the device that the function runs on; None: every call takes its op's default."""
        self._verdicts = verdicts
        self._taken: list[tuple[Op, Implementation | None]] | None = None  # None until a run has ended well
        self.ran: dict[str, dict[str, int]] = {}
        """op -> implementation -> number of calls, of the last run that ended well."""

    def __enter__(self) -> Choices:
        self._first, self._position, self._same = self._taken is None, 0, True
        if self._taken is None:
            self._writing: list[tuple[Op, Implementation | None]] = []
        self._counts: dict[str, dict[str, int]] = {}
        self._token = _choices.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _choices.reset(self._token)
        if kind is None:
            self.ran = self._counts
        if self._first:
            self._taken = self._writing if kind is None else None
        elif not self._same or (kind is None and self._position != len(self._taken or ())):
            self._taken = None

    def around(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function` inside of these choices."""

        def run() -> None:
            with self:
                function()

        return run

    def take(self, op: Op, args: tuple[Any, ...], backend: str | None) -> Implementation | None:
        """The implementation of the next call; None leaves it to the call itself, as where one is requested."""
        wished = backend is not None or op.wish() is not None
        if self._taken is None:
            chosen = None if wished else self._choose(op, args)
            self._writing.append((op, chosen))
            return chosen
        i, self._position = self._position, self._position + 1
        if not self._same or i >= len(self._taken) or self._taken[i][0] is not op:
            self._same = False
            return None
        if wished:
            return None
        chosen = self._taken[i][1]
        if chosen is None:  # it was requested until now
            chosen = self._choose(op, args)
            self._taken[i] = op, chosen
        return chosen

    def _choose(self, op: Op, args: tuple[Any, ...]) -> Implementation | None:
        preferred = None if self._verdicts is None else self._verdicts.choice(op.name, args, op.files)
        chosen, refused = op.choose(args, preferred=preferred, prepare=True)
        if chosen is not None and refused:
            op.say_why(chosen, refused, args, preferred)
        return chosen

    def note(self, op: str, implementation: str) -> None:
        """What a call is run by."""
        counts = self._counts.setdefault(op, {})
        counts[implementation] = counts.get(implementation, 0) + 1


def register(op: str, implementation: Implementation) -> None:
    """Add an implementation of one's own to an op: `dit4dit tune --plugin MODULE` tries it, and where it is right and the
    fastest, plans of processes that have registered it too run it there. Without a verdict it runs only where it is requested.

    BackendError: no such op, or it has an implementation of this name from elsewhere.
    """
    known = find(op)
    before = known.implementations.get(implementation.name)
    if before is not None and foreign(before) != foreign(implementation):
        raise BackendError(
            f"{op}: an implementation is called {implementation.name!r} already; give yours another name"
        )
    known.implementations[implementation.name] = replace(implementation, measured_only=True)


def foreign(implementation: Implementation) -> str | None:
    """The file of an implementation that is not this package's own, of whose text its verdicts hang; None for ours."""
    run = implementation.run
    module = getattr(run.func if isinstance(run, partial) else run, "__module__", None) or ""
    if module.partition(".")[0] == "dit4dit":
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    return str(file) if file else f"<{module or 'unknown'}>"


@contextmanager
def listing() -> Iterator[list[Call]]:
    """List every op call made inside, in order. Only calls of the same thread are seen."""
    calls: list[Call] = []
    token = _listing.set(calls)
    try:
        yield calls
    finally:
        _listing.reset(token)


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
    return list(find(op).implementations)


def find(op: str) -> Op:
    """The op of this name. BackendError: no such op."""
    if op not in _ops:
        raise BackendError(f"no op is called {op!r}{did_you_mean(op, names())}; there are: {', '.join(_ops)}")
    return _ops[op]


@contextmanager
def use_backend(backend: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Ask for an implementation: of every op (`use_backend("torch")`) or of some (`use_backend(preprocess="cpp")`).

    The wish for one op goes before the wish for all, the inner context before the outer one. BackendError at once where
    no op has such an implementation, and at the call where its tensors cannot be run by it.
    """
    for name, wish in by_op.items():
        find(name)._find(wish)
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


def files() -> dict[str, Files]:
    """`Op.files` of every op, and of what else has verdicts."""
    return {**{name: op.files() for name, op in _ops.items()}, **SWITCHES}
