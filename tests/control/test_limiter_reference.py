"""The limiter in C++ against its NumPy reference: the same bits as the package is built, almost with fused arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from limiter_program import Lanes, Program, lanes_of
from limiter_reference import limited


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("exact"))


def agree(program: Program, lanes: Lanes) -> None:
    sent = program(*lanes[:4])
    expected = limited(*lanes[:4])
    other = (sent.view(np.int64) != expected.view(np.int64)).any(0)
    lane = int(np.argmax(other))
    assert not other.any(), f"{other.sum()} lanes differ; lane {lane}: {lanes.limits[lane]}"
    moved = np.abs(np.diff(sent, axis=0)).max(0) > 0
    exact = (sent == lanes.targets).mean()
    assert moved.mean() > 0.9
    assert 0.02 < exact < 0.5  # both ways of a tick


def test_the_same_bits_as_the_reference(program: Program) -> None:
    agree(program, lanes_of(np.random.default_rng(0), 1000, 200, hostile=True))


@pytest.mark.long
def test_the_same_bits_as_the_reference_for_many_chunks(program: Program) -> None:
    for seed in range(10):
        agree(program, lanes_of(np.random.default_rng(1 + seed), 10_000, 200, hostile=True))


def test_nearly_the_same_with_fused_arithmetic(program: Program, tmp_path: Path) -> None:
    """While a target is out of reach the limiter is at its bounds, one way or the other, and rounding errors grow: one lane is
    allowed to differ by more."""
    fused = Program(tmp_path, "-O3", "-march=native")
    lanes = lanes_of(np.random.default_rng(0), 3000, 200, hostile=False)
    plain = program(*lanes[:4])
    off = np.abs(fused(*lanes[:4]) - plain).max(0) / lanes.range
    print(f"largest differences: {np.sort(off)[-4:]} of a channel's range")  # noqa: T201
    assert (off > 1e-9).sum() <= 1
    assert off.max() > 0  # it is fused
    followed = (plain == lanes.targets).all(0)
    assert followed.sum() > 5
    assert off[followed].max() == 0
