"""Which command runs a test: `make test`, `make test-all`, or `pytest -m long`; never two of them, never none."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COSTS = ("kernels", "slow", "sim", "long", "gpu")


def expressions() -> dict[str, str]:
    """QUICK and REST of the Makefile; what pytest takes for -m is Python too."""
    found = dict(re.findall(r"^(QUICK|REST) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(found) == {"QUICK", "REST"}
    return found


@pytest.mark.parametrize("has", list(product([False, True], repeat=len(COSTS))))
def test_every_test_has_one_command(has: tuple[bool, ...]) -> None:
    marks = dict(zip(COSTS, has, strict=True))
    chosen = {name: bool(eval(expression, {}, marks)) for name, expression in expressions().items()}
    assert [*chosen.values(), marks["long"]].count(True) == 1, (marks, chosen)
    assert chosen["QUICK"] == (not any(has))
