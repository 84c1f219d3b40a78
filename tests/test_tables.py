"""Quantiles: each is a sample, and one that too few samples show is not given."""

from __future__ import annotations

import json
import math

import pytest

from dit4dit.serving.statistics import Statistics
from dit4dit.tables import LEAST, backed, number, quantiles, quantiles_ms


def test_quantiles_are_samples() -> None:
    found = quantiles(float(i) for i in range(1000, 0, -1))
    assert found == {"p50": 500, "p95": 950, "p99": 990, "p999": 999, "max": 1000, "jitter": 999 / 500}
    assert quantiles([3.0]) == {"p50": 3, "p95": None, "p99": None, "p999": None, "max": 3, "jitter": None}
    assert quantiles(range(1, 1001), ["p50", "p90"]) == {"p50": 500, "p90": 900, "max": 1000, "jitter": 999 / 500}
    with pytest.raises(ValueError, match="at least one value"):
        quantiles([])


@pytest.mark.parametrize(("name", "share"), [("p90", 0.1), ("p95", 0.05), ("p99", 0.01), ("p999", 0.001)])
def test_a_quantile_has_samples_beyond_it_or_is_not_given(name, share) -> None:
    """The rule in words: with one sample fewer it would be the maximum under another name."""
    least = LEAST[name]
    assert least == math.ceil(1 / share - 1e-9)
    with_enough = quantiles(range(1, least + 1), [name])
    assert with_enough[name] < with_enough["max"]
    assert quantiles(range(1, least), [name])[name] is None


def test_jitter_comes_with_the_quantile_that_it_is_made_of() -> None:
    few, many = quantiles([1.0] * 999), quantiles([1.0] * 1000)
    assert (few["p999"], few["jitter"]) == (None, None)
    assert (many["p999"], many["jitter"]) == (1.0, 1.0)


def test_times_are_in_milliseconds_with_their_number() -> None:
    found = quantiles_ms([0.001] * 999 + [0.004])
    assert found["p50"] == found["p999"] == pytest.approx(1.0)
    assert (found["max"], found["jitter"], found["samples"]) == (pytest.approx(4.0), pytest.approx(1.0), 1000)


def test_a_result_from_before_the_rule_is_read_by_it() -> None:
    old = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "p999": 4.0, "max": 4.0, "jitter": 4.0, "samples": 100}
    assert backed(old, 100) == {**old, "p999": None, "jitter": None}
    assert backed({"p50": 1.0, "samples": 3}, 3) == {"p50": 1.0, "samples": 3}
    assert (number(None), number(1.234), number(1.234, ".0f")) == ("-", "1.23", "1")


def test_a_server_says_the_quantiles_that_its_requests_show() -> None:
    statistics = Statistics()
    for seconds, count in ((0.001, 19), (0.002, 81)):
        for _ in range(count):
            statistics.add(1, queue=0.0, infer=seconds, total=seconds)
        line, found = statistics.line(), statistics.summary()["total_ms"]
        assert found["samples"] == statistics.counts["requests"]
        json.dumps(found)
        shown = "total p50 1.0, max 1.0 ms" if count == 19 else "total p50 2.0, p95 2.0, p99 2.0, max 2.0 ms"
        assert shown in line
    assert found["p999"] is None
