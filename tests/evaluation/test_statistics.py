"""Intervals and tests of success rates, against scipy and by enumeration."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit4dit.cli import main
from dit4dit.errors import InputError
from dit4dit.evaluation import statistics, summary

scipy_stats = pytest.importorskip("scipy.stats")
COUNTS = [(0, 1), (1, 1), (0, 50), (1, 50), (29, 50), (50, 50), (493, 500), (1133, 2000)]


@pytest.mark.parametrize("successes,episodes", COUNTS)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_wilson_is_scipys(successes: int, episodes: int, confidence: float) -> None:
    rate = statistics.wilson(successes, episodes, confidence)
    theirs = scipy_stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    assert (rate.low, rate.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0.0 <= rate.low <= rate.value <= rate.high <= 1.0


def test_no_episodes_say_nothing() -> None:
    rate = statistics.wilson(0, 0)
    assert (rate.low, rate.high) == (0.0, 1.0)
    assert math.isnan(rate.value)
    assert rate.percent() == "no episodes"


@pytest.mark.parametrize("only_first,only_second", [(0, 0), (0, 1), (5, 5), (12, 2), (3, 40), (700, 800)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    trials = only_first + only_second
    theirs = scipy_stats.binomtest(only_first, trials).pvalue if trials else 1.0
    assert statistics.mcnemar(only_first, only_second) == pytest.approx(theirs, rel=1e-10)


def test_paired_difference_points_from_the_first_to_the_second_run() -> None:
    better = statistics.paired(both=36, only_first=2, only_second=12, neither=0)
    worse = statistics.paired(both=36, only_first=12, only_second=2, neither=0)
    assert better.difference == 0.2
    assert (better.low, better.high) == pytest.approx((-worse.high, -worse.low))
    assert 0 < better.low < 0.2 < better.high
    assert better.p_value == worse.p_value < 0.05
    same = statistics.paired(both=20, only_first=0, only_second=0, neither=30)
    assert same.low < 0 == same.difference < same.high


@pytest.mark.parametrize("table", [(53, 8, 2, 27), (36, 12, 2, 0), (10, 5, 5, 10), (40, 0, 3, 7)])
def test_paired_interval_is_newcombes_method_10(table: tuple[int, int, int, int]) -> None:
    """Written out once more from scipy's Wilson intervals; the second table has a negative, the third a corrected-away phi."""
    a, b, c, d = table
    n, margins = sum(table), (a + b) * (c + d) * (a + c) * (b + d)
    excess = a * d - b * c
    phi = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(margins) if margins else 0.0
    ends = [scipy_stats.binomtest(k, n).proportion_ci(method="wilson") for k in (a + b, a + c)]
    (l1, u1), (l2, u2) = ((abs(e.low - k / n), abs(e.high - k / n)) for e, k in zip(ends, (a + b, a + c), strict=True))
    found = statistics.paired(*table)
    assert found.difference == pytest.approx((c - b) / n)
    assert found.difference - found.low == pytest.approx(math.sqrt(l2**2 - 2 * phi * l2 * u1 + u1**2))
    assert found.high - found.difference == pytest.approx(math.sqrt(u2**2 - 2 * phi * u2 * l1 + l1**2))


def test_paired_interval_covers_what_it_promises() -> None:
    """By enumeration of every table of 30 episodes, for several truths: at 95 %, between 93 and 99."""
    n = 30
    tables = [t for t in itertools.product(range(n + 1), repeat=3) if sum(t) <= n]
    counts = np.array([(*t, n - sum(t)) for t in tables])
    found = [statistics.paired(*map(int, row)) for row in counts]
    low, high = (np.array([getattr(one, end) for one in found]) for end in ("low", "high"))
    for truth in ([0.5, 0.1, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25], [0.8, 0.02, 0.1, 0.08], [0.1, 0.4, 0.1, 0.4]):
        chance = scipy_stats.multinomial(n, truth).pmf(counts)
        assert chance.sum() == pytest.approx(1.0)
        difference = truth[2] - truth[1]
        covered = chance[(low <= difference) & (difference <= high)].sum()
        assert 0.93 <= covered <= 0.99, (truth, covered)


def test_compare_takes_the_shared_episodes() -> None:
    first = {("a", 0): True, ("a", 1): True, ("a", 2): False, ("b", 0): True}
    second = {("a", 0): True, ("a", 1): False, ("a", 2): True, ("c", 0): True}
    found = statistics.compare(first, second)
    assert found is not None
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, 1, 1, 0)
    assert statistics.compare(first, {("c", 0): True}) is None


@pytest.mark.parametrize("width,rate", [(0.1, 0.5), (0.05, 0.98), (0.02, 0.0), (0.3, 1.0), (0.9, 0.5)])
def test_episodes_for_width_is_the_smallest_number(width: float, rate: float) -> None:
    count = statistics.episodes_for_width(width, rate)

    def wide(n: int) -> float:
        """scipy's interval at a success count that need not be whole, through its own formula's two roots."""
        z = scipy_stats.norm.ppf(0.975)
        roots = np.roots([1 + z * z / n, -(2 * rate + z * z / n), rate * rate])
        return float(abs(roots[0] - roots[1]))

    assert wide(count) <= width + 1e-9
    assert count == 1 or wide(count - 1) > width


@pytest.mark.parametrize("words", [["--width", "0"], ["--rate", "1.2"], ["--confidence", "95"]])
def test_episodes_command_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["eval", "episodes", *words])
    assert end.value.code == 2
    assert f"{words[0].lstrip('-')}: expected" in capsys.readouterr().err


def test_episodes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as end:
        main(["eval", "episodes", "--width", "0.1", "--json", str(out)])
    assert end.value.code == 0
    assert json.loads(out.read_text())["episodes"] == 381
    assert "381 episodes" in capsys.readouterr().out


def test_rows_of_a_summary_have_a_line_for_all_where_there_are_several() -> None:
    def record(suite: str, task: str, success: bool | None) -> dict[str, Any]:
        return {"suite": suite, "task": task, "success": success, "error": None if success is not None else {}}

    records = [record("a", "t", True), record("b", "u", True), record("b", "u", False), record("b", "v", None)]
    found = summary.rows(summary.summarise(records))
    assert [(suite, task, errors) for suite, task, _, errors in found] == [
        ("a", "t", "0"),
        ("b", "u", "0"),
        ("b", "v", "1"),
        ("b", "all tasks", "1"),
        ("all suites", "", "1"),
    ]
    assert [percent.partition("]")[2] for _, _, percent, _ in found] == [
        ", 1 of 1",
        ", 1 of 2",
        "",
        ", 1 of 2",
        ", 2 of 3",
    ]
    assert found[2][2] == "no episodes"
    assert summary.rows(summary.summarise(records[:1])) == [found[0]]


def test_negative_counts_are_refused() -> None:
    for call in (
        lambda: statistics.wilson(3, 2),
        lambda: statistics.paired(0, 0, 0, 0),
        lambda: statistics.mcnemar(-1, 2),
    ):
        with pytest.raises(InputError, match="expected"):
            call()
