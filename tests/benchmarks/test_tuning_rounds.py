"""Who wins, by the times of rounds; and how the rounds are taken."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from dit4dit.benchmarks import tuning_rounds
from dit4dit.benchmarks.tuning_rounds import FEWEST, Round, decide, timed


def rounds(ratio: float, noise: float, count: int = 9, pace: float = 0.0) -> list[Round]:
    """Of a default "a" and of "b", which is `ratio` times as fast; the machine's pace changes from round to round by a factor
    up to 1 + pace."""
    source = random.Random(0)
    found = []
    for _ in range(count):
        now = 1e-3 * source.uniform(1, 1 + pace)
        found.append({"a": now * source.uniform(1, 1 + noise), "b": now / ratio * source.uniform(1, 1 + noise)})
    return found


@pytest.mark.parametrize("ratio, chosen", [(1.5, "b"), (1.05, "b"), (1.03, "b"), (1.01, "a"), (1.0, "a"), (0.7, "a")])
def test_two_percent_decide(ratio: float, chosen: str) -> None:
    assert decide(rounds(ratio, noise=0.005), "a").chosen == chosen


def test_a_machine_that_changes_pace_changes_nothing() -> None:
    assert decide(rounds(1.1, noise=0.01, pace=5), "a").chosen == "b"
    assert decide(rounds(1.0, noise=0.01, pace=5), "a").chosen == "a"


def test_it_has_to_be_ahead_in_nearly_all_rounds() -> None:
    slower = [{"a": 1.0, "b": 1.2}] * 2
    faster = [{"a": 1.0, "b": 0.8}] * 7
    found = decide([*slower, *faster], "a")
    assert found.chosen == "a"
    assert found.why == (
        "the default stays: 'b' is 1.250 times as fast, ahead in 7 of 9 rounds, and 1.02 is asked for, and 85% of them"
    )
    assert decide([slower[0], *faster, faster[0]], "a").chosen == "b"


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_noise_seldom_chooses_what_is_no_faster(noise: float) -> None:
    source = random.Random(0)
    wrong = 0
    for _ in range(1000):
        found = [{name: source.lognormvariate(0, noise) for name in "ab"} for _ in range(9)]
        wrong += decide(found, "a").chosen == "b"
    assert wrong < 40


def test_one_round_in_which_all_stood_still_changes_nothing() -> None:
    found = decide([{"a": 1.0, "b": 0.9}] * 8 + [{"a": 1.0, "b": 50.0}], "a")
    assert found.chosen == "b"
    assert found.ms["b"] == pytest.approx(900)


def test_the_fastest_of_several() -> None:
    found = decide([{"a": 1.0, "b": 0.9, "c": 0.8, "d": 2.0}] * 9, "a")
    assert (found.chosen, found.ms) == ("c", {"a": 1000, "b": 900, "c": 800, "d": 2000})
    assert decide([{"a": 1.0, "b": 0.9}] * 3, None).chosen == "b", "without a default the fastest"
    assert decide([{"b": 0.9}] * 3, "b").why == "the only one that is right"


class Machine:
    """Times that are made up, and how often each was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.seconds, self.asked, self.begun = seconds, Counter[str](), list[str]()
        monkeypatch.setattr(tuning_rounds, "_once", lambda call: self.seconds[call()])
        monkeypatch.setattr(tuning_rounds, "time_cpu", self.time)

    def time(self, call, samples: int, warmup: int) -> list[float]:
        self.asked[call()] += samples
        return [self.seconds[call()]] * samples

    def run(self, rounds: int = 9, samples: int = 100, broken: str | None = None) -> list[Round]:
        calls = {name: (lambda name=name: name) for name in self.seconds}

        def after(name: str, error: Exception | None) -> bool:
            return name != broken or self.begun.count(name) < 4

        return timed(calls, gpu=False, seconds=2, rounds=rounds, samples=samples, before=self.begun.append, after=after)


def test_rounds_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=1e-3, b=1.1e-3, c=1.2e-3)
    found = machine.run()
    assert [list(block) for block in found] == [list("abc"), list("cba")] * 4 + [list("abc")]
    assert machine.begun == [*"abc", *("abc" + "cba") * 4, *"abc"]
    taken = sum(machine.asked[name] * machine.seconds[name] for name in "abc")
    assert 1 < taken < 2.2
    assert max(machine.asked.values()) <= 9 * 100


def test_short_calls_are_taken_no_more_than_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=1e-6)
    machine.run(samples=50)
    assert machine.asked["a"] == FEWEST * 50, "nothing to compare with: three rounds are enough"


def test_what_is_far_behind_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Machine(monkeypatch, a=2e-3, b=1e-3, c=1.4e-3).run()
    assert [sorted(block) for block in found] == [list("abc")] * FEWEST + [list("bc")] * (9 - FEWEST)
    assert decide(found, "a").chosen == "b", "though the default is not in all of them"


def test_slow_calls_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Machine(monkeypatch, a=0.4, b=0.5).run()) == 4
    machine = Machine(monkeypatch, a=5.0, b=5.0)
    assert len(machine.run()) == FEWEST
    assert machine.asked == {"a": FEWEST, "b": FEWEST}


def test_what_becomes_wrong_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Machine(monkeypatch, a=1e-3, b=1.1e-3, c=1.2e-3).run(broken="b")
    assert [sorted(block) for block in found] == [list("abc")] * 2 + [list("ac")] * 7
