"""Which part of a step is running: named where it runs, read by what lists or predicts launches (`dit4dit bench budget`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of a step. `beside`: the stage that it runs in parallel with on a GPU, on a branch of the same graph."""

    name: str
    beside: str | None = None


_current: ContextVar[Stage | None] = ContextVar("dit4dit_stage", default=None)


def current() -> Stage | None:
    """The innermost stage here, or None outside of a step."""
    return _current.get()


@contextmanager
def stage(name: str, beside: str | None = None) -> Iterator[None]:
    """What is called inside belongs to this stage."""
    token = _current.set(Stage(name, beside))
    try:
        yield
    finally:
        _current.reset(token)
