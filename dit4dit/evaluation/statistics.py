"""What a number of episodes says: success rates with intervals, paired comparisons, and how many episodes a question needs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

from dit4dit.errors import InputError, shown

CONFIDENCE = 0.95
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Rate:
    """A success rate with its interval, all in 0..1."""

    successes: int
    episodes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """successes / episodes; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    def percent(self) -> str:
        """`"57.0 % [47.2, 66.3], 57 of 100"`, or `"no episodes"`."""
        if not self.episodes:
            return "no episodes"
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.1f} % [{low:.1f}, {high:.1f}], {self.successes} of {self.episodes}"


@dataclass(frozen=True)
class Paired:
    """Two runs on the same episodes.

    Attributes:
        both, only_first, only_second, neither: episodes by who succeeded.
        difference: success rate of the second run minus that of the first, -1..1.
        low, high: its interval.
        p_value: exact McNemar test, two-sided: how likely so uneven a split of the episodes where the runs differ is by
            chance if they are equally good.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def episodes(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def wilson(successes: int, episodes: int, confidence: float = CONFIDENCE) -> Rate:
    """The rate with Wilson's score interval (1927), without continuity correction; 0..1 without episodes.

    Raises:
        InputError: counts that are negative or contradict each other, or a confidence outside 0..1.
    """
    if not 0 <= successes <= episodes:
        raise InputError(f"wilson: expected 0 <= successes <= episodes, got {successes} of {episodes}")
    if not episodes:
        return Rate(0, 0, 0.0, 1.0)
    low, high = _score_interval(successes / episodes, episodes, _z(confidence))
    return Rate(successes, episodes, 0.0 if successes == 0 else low, 1.0 if successes == episodes else high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact McNemar test: the binomial test of the discordant episodes against one half."""
    fewer, trials = min(only_first, only_second), only_first + only_second
    if fewer < 0:
        raise InputError(f"mcnemar: expected counts >= 0, got {only_first} and {only_second}")
    tail = sum(math.comb(trials, k) for k in range(fewer + 1))  # integers, so exact whatever the size
    return min(1.0, 2 * tail / 2**trials)


def paired(both: int, only_first: int, only_second: int, neither: int, confidence: float = CONFIDENCE) -> Paired:
    """The comparison of two runs on the same episodes.

    The interval of the difference is Newcombe's score interval for paired data (Statistics in Medicine 17, 1998, method 10):
    Wilson's intervals of both rates, joined with the correlation phi of the two runs.

    Raises:
        InputError: a negative count, or no episodes at all.
    """
    counts = (both, only_first, only_second, neither)
    n = sum(counts)
    if min(counts) < 0 or not n:
        raise InputError(f"paired: expected counts >= 0 of at least one episode, got {counts}")
    first, second = wilson(both + only_first, n, confidence), wilson(both + only_second, n, confidence)
    difference = (only_second - only_first) / n
    phi = _phi(*counts)
    up, down = second.high - second.value, second.value - second.low  # of the second run
    up_first, down_first = first.high - first.value, first.value - first.low
    low = difference - math.sqrt(max(0.0, down**2 - 2 * phi * down * up_first + up_first**2))
    high = difference + math.sqrt(max(0.0, up**2 - 2 * phi * up * down_first + down_first**2))
    return Paired(*counts, difference, max(-1.0, low), min(1.0, high), mcnemar(only_first, only_second))


def compare(first: Mapping[Key, bool], second: Mapping[Key, bool], confidence: float = CONFIDENCE) -> Paired | None:
    """`paired` over the episodes that both runs have (key -> success); None where they share none."""
    shared = [key for key in first if key in second]
    if not shared:
        return None
    outcomes = [(first[key], second[key]) for key in shared]
    return paired(*(outcomes.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))


def episodes_for_width(width: float, rate: float = 0.5, confidence: float = CONFIDENCE) -> int:
    """The smallest number of episodes whose Wilson interval around `rate` is at most `width` wide from end to end.

    Args:
        width: 0.1 is from five points below to five points above, about.
        rate: the success rate that is expected; 0.5 needs the most.

    Raises:
        InputError: width or confidence outside 0..1 (ends excluded), or a rate outside 0..1.
    """
    if not 0.0 < width < 1.0:
        raise InputError(f"width: expected a number between 0 and 1 (0.1 is 10 points), got {shown(width)}")
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"rate: expected a success rate in 0..1, got {shown(rate)}")
    z = _z(confidence)

    def too_wide(episodes: int) -> bool:
        low, high = _score_interval(rate, episodes, z)
        return high - low > width

    above = 1
    while too_wide(above):
        above *= 2
    below = above // 2
    while above - below > 1:  # the width falls with the number of episodes
        middle = (above + below) // 2
        below, above = (middle, above) if too_wide(middle) else (below, middle)
    return above


def _z(confidence: float) -> float:
    """Two-sided normal quantile."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence: expected a number between 0 and 1, such as 0.95, got {shown(confidence)}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _score_interval(rate: float, n: int, z: float) -> tuple[float, float]:
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _phi(a: int, b: int, c: int, d: int) -> float:
    """Correlation of a two by two table, with Newcombe's correction where it is positive; 0 where it has an empty margin."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    excess = float(a * d - b * c)
    if excess > 0:
        excess = max(excess - (a + b + c + d) / 2, 0.0)
    return excess / math.sqrt(margins)
