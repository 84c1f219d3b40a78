"""What tests/cuda_emulation says of clusters, barriers and words: small kernels, right ones and ones with a fault."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulator import compile_for_cpu, needs_compiler

ZEROS = "0 0 0 0 0 0 0 0 "


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clusters")
    found = {variant: folder / variant for variant in ("copies", "bulk")}
    for variant, program in found.items():
        compile_for_cpu("clusters.cpp", program, variant=variant)
    return found


def said(program: Path, kernel: str, seeds: int = 8) -> set[str]:
    """What the kernel left or the error, for some orders of threads."""
    runs = (subprocess.run([program, kernel, str(s)], capture_output=True, text=True, check=True) for s in range(seeds))
    return {done.stdout for done in runs}


@needs_compiler
@pytest.mark.parametrize(
    ("variant", "kernel", "wanted"),
    [
        ("bulk", "exchange", ZEROS),
        ("bulk", "bulk", "6 6 6 6 6 6 6 6 "),
        ("copies", "copies", "6 6 6 6 6 6 6 6 "),
        ("bulk", "message", "0 1 0 0 0 0 0 0 "),
        ("copies", "message", "0 1 0 0 0 0 0 0 "),
        ("copies", "message of a block", "0 1 0 0 0 0 0 0 "),
        ("copies", "own words", "1 1 0 0 0 0 0 0 "),
    ],
)
def test_a_kernel_without_a_fault(programs: dict[str, Path], variant: str, kernel: str, wanted: str) -> None:
    assert said(programs[variant], kernel) == {wanted}


@needs_compiler
@pytest.mark.parametrize(
    ("variant", "kernel", "error"),
    [
        ("bulk", "push after the end", "a push to a block that has ended|a push outlives the block that it goes to"),
        ("bulk", "no beginning", "a push to a block that has not begun|a barrier that is not initialised"),
        ("bulk", "other barrier", "a push with the barrier of another block"),
        ("bulk", "odd address", "a push to a bad address"),
        ("bulk", "rank too far", "at_rank of a block that the cluster does not have"),
        ("bulk", "some at sync_cluster", "deadlock: 2302 threads wait for others that never come"),
        ("copies", "copies left behind", "a copy into shared memory outlives its block"),
        ("copies", "never", "endless: threads ask again and again for what never comes"),
        ("bulk", "never", "endless: threads ask again and again for what never comes"),
        ("copies", "no such barrier", "a barrier that is not initialised"),
        ("copies", "twice", "a barrier is initialised twice"),
        ("bulk", "an arrival too many", "more arrivals than the barrier expects"),
        ("copies", "all at sync_computing", "sync_computing by other than the first 256 threads"),
        ("copies", "some at sync_computing", "deadlock: 2040 threads wait for others that never come"),
    ],
)
def test_a_misuse_is_an_error(programs: dict[str, Path], variant: str, kernel: str, error: str) -> None:
    for message in said(programs[variant], kernel, seeds=2):
        assert re.match(error, message)


@needs_compiler
@pytest.mark.parametrize(
    ("variant", "kernel", "sound"),
    [
        ("bulk", "no wait", ZEROS),
        ("bulk", "no room", ZEROS),
        ("bulk", "no end", ZEROS),
        ("bulk", "few bytes", ZEROS),
        ("bulk", "many arrivals", ZEROS),
        ("bulk", "arrival after the end", ZEROS),
        ("bulk", "bulk left behind", "6 6 6 6 6 6 6 6 "),
        ("copies", "no wait", "6 6 6 6 6 6 6 6 "),
        ("bulk", "message without a fence", "0 1 0 0 0 0 0 0 "),
        ("copies", "message without a fence", "0 1 0 0 0 0 0 0 "),
        ("copies", "message of a block without a fence", "0 1 0 0 0 0 0 0 "),
    ],
)
def test_what_is_forgotten_shows_in_some_order(
    programs: dict[str, Path], variant: str, kernel: str, sound: str
) -> None:
    """A wait, a credit, a fence: without it another result or an error."""
    assert said(programs[variant], kernel) - {sound}


@needs_compiler
def test_a_copy_that_nobody_waits_for_is_an_error(programs: dict[str, Path]) -> None:
    assert "a copy into shared memory outlives its block" in said(programs["bulk"], "bulk left behind")
