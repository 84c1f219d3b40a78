"""Values that are made once and kept within a budget, and what is left of them in a process that was forked."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import torch

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values of a function, least recently used out first when their cost exceeds the budget.

    The one that was made last stays whatever it costs. Safe to call from several threads: each value is made once, and making one
    never holds up those that are there. A value that is left out is freed when nobody has it any more.
    """

    def __init__(self, make: Callable[[Key], Value], budget: int, cost: Callable[[Value], int]) -> None:
        """cost: looked at anew each time a value is made; it may depend on which others are there."""
        self._make, self.budget, self._cost = make, budget, cost
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: what other threads were making nobody makes any more, and locks that they held nobody opens."""
        self._making: dict[Key, Future[Value]] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        """Whether `get` would return at once."""
        with self._lock:
            return key in self._values

    def __len__(self) -> int:
        """How many values are there."""
        return len(self._values)

    def get(self, key: Key) -> Value:
        """The value; made by the caller's thread, or waited for where another thread is making it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.get(key)
            mine = making is None
            if making is None:
                making = self._making[key] = Future()
        if not mine:
            return making.result()
        try:
            value = self._make(key)
        except BaseException as error:
            with self._lock:
                del self._making[key]
            making.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._values[key] = value
            while len(self._values) > 1 and self.total_cost > self.budget:
                self._values.popitem(last=False)
        making.set_result(value)
        return value

    @property
    def total_cost(self) -> int:
        """Cost of all values that are there."""
        return sum(self._cost(value) for value in list(self._values.values()))


class Forked(Protocol):
    """What has locks or threads."""

    def after_fork(self) -> None:
        """Make them anew: in the child there is one thread, and what others held stays locked."""


_here: weakref.WeakSet[Forked] = weakref.WeakSet()


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
