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
    fused = Program(tmp_path, "-O3", "-march=native")
    lanes = lanes_of(np.random.default_rng(0), 10_000, 200, hostile=False)
    off = np.abs(fused(*lanes[:4]) - program(*lanes[:4])).max(0) / lanes.range
    print(f"largest difference: {off.max():.3g} of a channel's range")  # noqa: T201
    assert off.max() < 1e-9
