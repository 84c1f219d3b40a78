"""Values that are made once and kept within a budget, and what is left of them in a process that was forked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values of a function, least recently used out first when their cost exceeds the budget.

    The one that was made last stays whatever it costs, and what was asked for by `keep` stays for good. Safe to call from several
    threads: each value is made by one of them, and making one never holds up those that are there. An interrupt leaves nothing
    behind that others would wait for. A value that is left out is freed when nobody has it any more.
    """

    def __init__(self, make: Callable[[Key], Value], budget: int, cost: Callable[[Value], int]) -> None:
        """cost: looked at anew each time a value is made; it may depend on which others are there."""
        self._make, self.budget, self._cost = make, budget, cost
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._kept: dict[Key, Value] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: what other threads were making nobody makes any more, and locks that they held nobody opens."""
        self._turns: WeakValueDictionary[Key, Lock] = WeakValueDictionary()
        self._lock = Lock()

    def __contains__(self, key: Key) -> bool:
        """Whether `get` would return at once."""
        with self._lock:
            return key in self._values or key in self._kept

    def __len__(self) -> int:
        """How many values are there."""
        return len(self._values) + len(self._kept)

    def get(self, key: Key) -> Value:
        """The value; made by the caller's thread, or waited for where another thread is making it."""
        with self._lock:
            if (value := self._there(key)) is not None:
                return value
            turn = self._turns.get(key)
            if turn is None:
                turn = self._turns[key] = Lock()
        with turn:
            with self._lock:
                if (value := self._there(key)) is not None:
                    return value
            value = self._make(key)
            with self._lock:
                self._values[key] = value
                while len(self._values) > 1 and self.total_cost > self.budget:
                    self._values.popitem(last=False)
            return value

    def keep(self, key: Key) -> Value:
        """As `get`, and from now on the value stays: the budget is for the others."""
        value = self.get(key)
        with self._lock:
            self._kept[key] = value
            self._values.pop(key, None)
        return value

    def _there(self, key: Key) -> Value | None:
        """By whoever has the lock: the value, which is the one last used."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        return self._kept.get(key)

    @property
    def total_cost(self) -> int:
        """Cost of all values that are there, those that stay for good left out."""
        return sum(self._cost(value) for value in list(self._values.values()))


class Forked(Protocol):
    """What has locks or threads."""

    def after_fork(self) -> None:
        """Make them anew: in the child there is one thread, and what others held stays locked."""


_here: WeakSet[Forked] = WeakSet()


def renew_after_fork(owner: Forked) -> None:
    """Call its `after_fork` in every process that is forked from this one."""
    _here.add(owner)


def _in_child() -> None:
    owners = list(_here)
    for owner in owners:
        owner.after_fork()
    if owners:
        # GNU's OpenMP waits for ever for the parent's threads; a pass of one thread needs none of them
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
