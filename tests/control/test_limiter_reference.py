"""The limiter in C++ against its NumPy reference: the same bits, whatever it is compiled with."""

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


@pytest.mark.parametrize("flags", [("-O3", "-march=native"), ("-O2", "-mfma", "-ffp-contract=fast")], ids=" ".join)
def test_the_same_bits_whatever_the_flags(program: Program, tmp_path: Path, flags: tuple[str, ...]) -> None:
    other = Program(tmp_path, *flags)
    lanes = lanes_of(np.random.default_rng(0), 3000, 200, hostile=True)
    assert np.array_equal(other(*lanes[:4]).view(np.int64), program(*lanes[:4]).view(np.int64))
