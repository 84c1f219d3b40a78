"""Python's garbage collector beside a control loop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dit4dit import Policy
from dit4dit.commands.serving import _prepare
from dit4dit.policy import garbage


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """Other tests look at what is collected."""
    gc.unfreeze()
    yield
    gc.unfreeze()


class Node:
    """One end of a reference cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_what_lives_is_frozen_and_what_is_made_later_is_collected() -> None:
    dead, kept = weakref.ref(Node()), Node()
    garbage.freeze()
    assert dead() is None, "garbage of before is collected, not frozen"
    assert len(gc.get_objects()) < 1000 < gc.get_freeze_count(), "a full collection has next to nothing to look at"
    frozen, later = weakref.ref(kept), weakref.ref(Node())
    del kept
    gc.collect()
    assert later() is None
    assert frozen() is not None, "the price: a frozen cycle stays"
    gc.unfreeze()
    gc.collect()
    assert frozen() is None


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_warm_up_freezes_when_it_is_asked_to(small_libero, observation, engine) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu", engine=engine)
    policy.warm_up()
    assert any(known is policy for known in gc.get_objects())
    assert gc.get_freeze_count() == 0, "the whole process is concerned: never unasked"
    policy.warm_up(freeze_gc=True)
    assert not any(known is policy for known in gc.get_objects())
    policy.infer(observation, "open", seed=0)


def test_a_server_freezes_when_it_is_ready(libero_policy: Policy) -> None:
    _prepare(libero_policy, ["open"], 1, {})
    assert gc.get_freeze_count() > 1000
