"""The one-launch head: what it has ready for a kind of request is there for as long as somebody's graph reads it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from head_case import Case, tiny

from dit4dit.engine.action_ode import Device, program
from dit4dit.engine.action_ode.program import KINDS, OneLaunchHead
from dit4dit.errors import OutputError
from dit4dit.ops import device_tables

CPU = torch.device("cpu")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> OneLaunchHead:
    """One whose schedules and tensors are made, on a CPU, for a GPU that is not there."""
    monkeypatch.setattr(program, "device_of", lambda _: Device(13, 99 << 10, 80))
    monkeypatch.setattr(program, "expect_residency", lambda *_: None)
    case = Case(tiny())
    return OneLaunchHead(case.folded, case.config, case.steps)


def test_a_kind_goes_with_the_last_graph_that_reads_it(head: OneLaunchHead) -> None:
    with device_tables.collected() as read:
        first = weakref.ref(head.prepare(CPU, 1, 40, True))
    assert read == [first()]
    assert read[0].nbytes > first().tensors["words"].nbytes
    others = [weakref.ref(head.prepare(CPU, 1, 41 + n, True)) for n in range(KINDS + 2)]
    gc.collect()
    assert [ref() is not None for ref in others] == [False] * 2 + [True] * KINDS
    assert head.prepare(CPU, 1, 40, True) is first()
    assert first().tensors["weights"] is head.prepare(CPU, 1, 42, True).tensors["weights"], "kinds cut alike share them"
    first().status[0] = 3
    with pytest.raises(OutputError, match=r"block 2 .* waited"):
        head.check()
    for n in range(KINDS):
        head.prepare(CPU, 1, 60 + n, True)
    assert first() is not None
    del read
    gc.collect()
    assert first() is None


def test_what_is_not_collected_is_not_kept(head: OneLaunchHead) -> None:
    kinds = [weakref.ref(head.prepare(CPU, 1, 40 + n, True)) for n in range(KINDS + 1)]
    weights = weakref.ref(kinds[-1]().tensors["weights"])
    assert kinds[0]() is None
    head._last.clear()
    gc.collect()
    assert all(ref() is None for ref in kinds)
    assert weights() is None
    assert len(head._ready) == len(head._weights) == 0
