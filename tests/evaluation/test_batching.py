"""One policy for many players."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from eval_standin import StandIn
from waiting import WAIT, eventually

from dit4dit import Noise, Observation
from dit4dit.errors import ConfigError, InputError, OutputError
from dit4dit.evaluation import batching
from dit4dit.evaluation.batching import Answer, BatchedPolicy


def seen(number: int, side: int = 8) -> Observation:
    state = {name: np.float32([number / 10]) for name in ("x", "y", "grip")}
    return Observation({"top": np.zeros((side, side, 3), np.uint8)}, state)


def with_players(server: BatchedPolicy, *plays: Callable[[], Any], together: bool = False) -> list[Any]:
    """Each play in a thread of its own, this thread serving; what they return or raise.

    together: serve once all of them have asked.
    """
    results: list[Any] = [None] * len(plays)

    def run(i: int) -> None:
        try:
            results[i] = plays[i]()
        except Exception as error:
            results[i] = error
        server.leave()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(plays))]
    for thread in threads:
        thread.start()
    if together:
        eventually(lambda: len(server._waiting) == len(plays))
    server.serve(until=lambda: not any(thread.is_alive() for thread in threads))
    for thread in threads:
        thread.join()
    return results


def asker(
    server: BatchedPolicy, number: int, times: int = 1, away: Callable[[], object] = lambda: None
) -> Callable[[], list[Answer]]:
    """away: what it does after each answer."""

    def play() -> list[Answer]:
        answers = []
        for chunk in range(times):
            answers.append(server.ask(seen(number), "go", Noise.from_seed(number, chunk)))
            away()
        return answers

    return play


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_pass_has_the_same_size_and_answers_go_where_they_belong(batch: int) -> None:
    policy = StandIn()
    server = BatchedPolicy(policy, batch)
    results = with_players(server, *(asker(server, i, times=3) for i in range(5)))
    assert set(policy.sizes) == {batch}
    for i, answers in enumerate(results):
        for chunk, answer in enumerate(answers):
            want = policy.chunk(seen(i), "go", Noise.from_seed(i, chunk), 0)
            assert np.array_equal(answer.chunk.actions, want.actions)
    assert server.rows == 15
    assert server.independent is True


class TakesLong(StandIn):
    """A pass takes four minutes, on a clock that nothing else moves."""

    now = 0.0

    def run(self, requests: Any) -> Any:
        self.now += 2 * WAIT
        return super().run(requests)


def test_passes_are_full_where_waiting_pays_and_not_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = TakesLong()
    server = BatchedPolicy(slow, 4)

    def last() -> None:
        """Back when the others are, or have been served without it."""
        before = server.passes
        eventually(lambda: len(server._waiting) == 3 or server.passes > before or server.rows == 32)

    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: slow.now))
    plays = [asker(server, 0, times=8, away=last), *(asker(server, i, times=8) for i in (1, 2, 3))]
    with_players(server, *plays, together=True)
    assert (server.passes, server.rows) == (8, 32)

    quick = StandIn()
    server, over = BatchedPolicy(quick, 4), threading.Event()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def often() -> None:
        asker(server, 0, times=40)()
        over.set()

    def seldom() -> None:
        assert over.wait(WAIT), "the other player was held up by this one, which is away"

    results = with_players(server, often, asker(server, 1, times=2, away=seldom))
    assert results[0] is None
    assert not isinstance(results[1], Exception), results[1]
    assert server.passes >= 41


def test_a_result_that_is_none_is_its_own_requests() -> None:
    policy = StandIn(broken=(2,))
    server = BatchedPolicy(policy, 4)
    results = with_players(server, *(asker(server, i, times=2) for i in range(4)))
    assert isinstance(results[2], OutputError)
    assert all(len(results[i]) == 2 for i in (0, 1, 3))
    assert set(policy.sizes) == {4}


def test_pictures_of_another_size_go_in_a_pass_of_their_own() -> None:
    policy = StandIn()
    server = BatchedPolicy(policy, 4)
    small = lambda: server.ask(seen(0, 8), "go", Noise.from_seed(0))  # noqa: E731
    large = lambda: server.ask(seen(1, 16), "go", Noise.from_seed(1))  # noqa: E731
    answers = with_players(server, small, large, small)
    for answer, observation, seed in zip(answers, (seen(0, 8), seen(1, 16), seen(0, 8)), (0, 1, 0), strict=True):
        want = policy.chunk(observation, "go", Noise.from_seed(seed), 0)
        assert np.array_equal(answer.chunk.actions, want.actions)
    assert len(server._warm) == 2


def test_rows_that_depend_on_their_place_are_told(caplog: pytest.LogCaptureFixture) -> None:
    server = BatchedPolicy(StandIn(width=1), 3)
    with caplog.at_level(logging.WARNING, "dit4dit.evaluation"):
        with_players(server, asker(server, 0))
    assert server.independent is False
    assert "rows of a pass of 3 differ" in caplog.text


def test_what_is_wrong_with_a_request_ends_the_serving() -> None:
    class Refuses(StandIn):
        def run(self, requests: Any) -> Any:
            raise InputError("image 'top': missing")

    server = BatchedPolicy(Refuses(), 2)
    results: list[Any] = []

    def play() -> None:
        try:
            server.ask(seen(0), "go", Noise.from_seed(0))
        except InputError as error:
            results.append(error)

    thread = threading.Thread(target=play)
    thread.start()
    with pytest.raises(InputError, match="top"):
        server.serve(until=lambda: False)
    thread.join()
    assert len(results) == 1
    server.close(RuntimeError("over"))
    with pytest.raises(RuntimeError, match="over"):
        server.ask(seen(0), "go", Noise.from_seed(0))


def test_batch_sizes_that_no_pass_can_have_are_refused() -> None:
    for batch in (0, 17):
        with pytest.raises(ConfigError, match="batch: expected 1 to 16"):
            BatchedPolicy(StandIn(), batch)
