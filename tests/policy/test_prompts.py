"""The cache of what depends on the instruction: budget, order, threads, errors."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from waiting import WAIT

from dit4dit.policy.recent import Recent


def test_least_recently_used_goes_first() -> None:
    made: list[str] = []
    cache = Recent(lambda text: made.append(text) or text, budget=5, cost=len)
    for text in ("aa", "bb", "aa", "cc"):
        assert cache.get(text) == text
    assert made == ["aa", "bb", "cc"]
    assert "bb" not in cache
    assert "aa" in cache
    assert cache.total_cost == 4
    cache.get("longer than the budget")
    assert "longer than the budget" in cache, "the value in use stays, whatever it costs"
    assert cache.total_cost == len("longer than the budget")


def test_a_failure_is_raised_and_not_kept() -> None:
    attempts = []

    def make(text: str) -> str:
        attempts.append(text)
        if len(attempts) == 1:
            raise ValueError("once")
        return text

    cache = Recent(make, budget=10, cost=len)
    with pytest.raises(ValueError, match="once"):
        cache.get("a")
    assert "a" not in cache
    assert cache.get("a") == "a"


def test_one_thread_makes_the_others_wait_and_known_values_are_not_held_up() -> None:
    started, release, made = threading.Event(), threading.Event(), []

    def make(text: str) -> str:
        made.append(text)
        if text == "slow":
            started.set()
            # nobody releases it while a call for another value is held up
            return text if release.wait(WAIT) else "the others were held up"
        return text

    cache = Recent(make, budget=100, cost=len)
    cache.get("known")
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(cache.get("slow"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(WAIT)
    assert cache.get("known") == "known"
    assert cache.get("new") == "new"
    assert "slow" not in cache
    release.set()
    for thread in threads:
        thread.join(WAIT)
    assert results == ["slow"] * 3
    assert made.count("slow") == 1


class Interrupted(str):
    """A key at whose `left`-th look-up Ctrl-C is pressed."""

    left = sys.maxsize

    def __hash__(self) -> int:
        Interrupted.left -= 1
        if Interrupted.left == 0:
            raise KeyboardInterrupt
        return super().__hash__()

    __eq__ = str.__eq__


# where it hits what cleans up behind a weak reference, Python can only say so
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_look_up_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = 0
    for number in range(1, 100):
        cache = Recent(lambda text: text * 2, budget=100, cost=len)
        monkeypatch.setattr(Interrupted, "left", number)
        try:
            cache.get(Interrupted("go"))
            break
        except KeyboardInterrupt:
            interrupts += 1
        found: list[str] = []
        other = threading.Thread(target=lambda: found.append(cache.get("go")), daemon=True)  # noqa: B023
        other.start()
        other.join(WAIT)
        assert found == ["gogo"], number
    assert interrupts > 3


def test_the_interrupt_of_one_thread_is_not_that_of_another_which_waits() -> None:
    making, interrupt, made = threading.Event(), threading.Event(), []

    def make(text: str) -> str:
        made.append(text)
        making.set()
        assert interrupt.wait(WAIT)
        if len(made) == 1:
            raise KeyboardInterrupt
        return text

    cache = Recent(make, budget=100, cost=len)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "go")
        assert making.wait(WAIT)
        second = pool.submit(cache.get, "go")
        interrupt.set()
        assert isinstance(first.exception(WAIT), KeyboardInterrupt)
        assert second.result(WAIT) == "go"
