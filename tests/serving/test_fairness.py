"""Clients take turns: what one of them asks for, or begins and leaves, holds up no other for longer than a pass."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from serving_stand import StandIn, ask, running
from waiting import WAIT, eventually

from dit4dit.errors import InputError
from dit4dit.serving import wire
from dit4dit.serving.backend import PolicyBackend


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as found:
        yield found


def connected(server, count: int):
    """So many connections that have had the server's greeting."""
    found = [server.raw(legacy=True) for _ in range(count)]
    for connection in found:
        connection.recv(timeout=WAIT)
    return found


def test_a_large_request_holds_up_nobody_for_longer_than_a_pass(pool) -> None:
    backend = StandIn()
    with running(backend, max_batch=4) as server:
        large, small = connected(server, 2)
        backend.gate.clear()
        long = pool.submit(ask, large, {"value": list(range(100, 164))})
        backend.wait_for_pass()
        short = pool.submit(ask, small, {"value": 1})
        eventually(lambda: any(m.requests[0].instruction == 1 for m in server.server._batcher._queue))
        backend.gate.set()
        assert short.result(WAIT)["data"]["actions"].ravel().tolist() == [1]
        answer = long.result(WAIT)
        assert answer["data"]["actions"].ravel().tolist() == list(range(100, 164))  # its own, in order
        assert 1 in backend.passes[1], "the first pass after it came"
        assert max(map(len, backend.passes)) == 4
        assert len(backend.passes) == 17  # 65 chunks: none goes with room to spare
        times = answer["server_timing"]
        assert times["total_ms"] >= times["infer_ms"] + times["queue_ms"] > 0


def test_many_large_requests_share_each_pass_with_a_small_one(pool) -> None:
    backend = StandIn()
    with running(backend, max_batch=4) as server:
        *large, small = connected(server, 4)
        backend.gate.clear()
        long = [pool.submit(ask, one, {"value": [10 * i] * 30}) for i, one in enumerate(large, 1)]
        backend.wait_for_pass()
        eventually(lambda: len(server.server._batcher._queue) == 3)
        short = pool.submit(ask, small, {"value": 1})
        eventually(lambda: any(m.requests[0].instruction == 1 for m in server.server._batcher._queue))
        backend.gate.set()
        assert short.result(WAIT)["ok"]
        assert any(1 in values for values in backend.passes[1:3])
        assert [len(one.result(WAIT)["data"]["actions"]) for one in long] == [30] * 3
        turns = [sorted(set(values)) for values in backend.passes[2:-10]]
        assert all(len(turn) >= 3 for turn in turns), turns  # nobody is passed over


def test_kinds_that_cannot_share_a_pass_take_turns_too(pool) -> None:
    backend = StandIn()
    with running(backend, max_batch=4) as server:
        large, small = connected(server, 2)
        backend.gate.clear()
        long = pool.submit(ask, large, {"value": [7] * 40, "key": "p"})
        backend.wait_for_pass()
        short = pool.submit(ask, small, {"value": 1, "key": "q"})
        eventually(lambda: any(m.requests[0].instruction == 1 for m in server.server._batcher._queue))
        backend.gate.set()
        assert short.result(WAIT)["ok"]
        assert long.result(WAIT)["ok"]
        assert [1] in backend.passes[1:3]


def test_a_part_that_fails_fails_its_request_and_no_other(pool) -> None:
    backend = StandIn()

    def fail(values):
        if 13 in values:
            raise InputError("value 13: unlucky")

    backend.fail = fail
    with running(backend, max_batch=4) as server:
        bad, good = connected(server, 2)
        backend.gate.clear()
        failing = pool.submit(ask, bad, {"value": [0, 1, 2, 3, 4, 13, 6, 7, 8, 9, 10, 11, 12]})
        backend.wait_for_pass()
        fine = pool.submit(ask, good, {"value": [20, 21, 22, 23, 24, 25]})
        eventually(lambda: any(m.requests[0].instruction == 20 for m in server.server._batcher._queue))
        backend.gate.set()
        assert "unlucky" in failing.result(WAIT)["error"]["message"]
        assert fine.result(WAIT)["data"]["actions"].ravel().tolist() == [20, 21, 22, 23, 24, 25]
        assert not any(6 in values for values in backend.passes), "the rest of it was computed"
        assert sum(13 in values for values in backend.passes) == 2  # with another's, and alone
        assert ask(bad, {"value": 1})["noise"]["chunk"] == 0  # a request that failed has used none


def test_who_leaves_takes_the_rest_of_the_request_along(pool) -> None:
    backend = StandIn()
    with running(backend, max_batch=2) as server:
        leaving, good = connected(server, 2)
        backend.gate.clear()
        leaving.send(wire.pack({"value": [5] * 64}))
        backend.wait_for_pass()
        leaving.socket.close()
        eventually(lambda: len(server.server._clients) == 1)
        backend.gate.set()
        assert ask(good, {"value": 1})["ok"]
        assert [values for values in backend.passes if 5 in values] == [[5, 5]]
        eventually(lambda: server.server._batcher.queued == 0)


def test_alone_a_split_request_waits_for_nobody() -> None:
    with running(max_batch=2) as server, server.raw() as alone, server.waiting_for_all() as seconds:
        alone.recv(timeout=WAIT)
        assert ask(alone, {"value": [1, 2, 3, 4, 5]})["server_timing"]["queue_ms"] < 1e3 * seconds / 2
        assert server.backend.passes == [[1, 2], [3, 4], [5]]


def test_a_new_instruction_is_prepared_while_others_pass(pool) -> None:
    backend = StandIn()
    backend.new = {50, 51, 52}
    with running(backend, max_batch=2) as server:
        new, other, second = connected(server, 3)
        backend.ready.clear()
        waits = pool.submit(ask, new, {"value": [50, 7, 51, 52, 50]})
        assert backend.preparing.acquire(timeout=WAIT)
        for value in range(3):
            assert ask(other, {"value": value})["ok"]
        also = pool.submit(ask, second, {"value": 52})
        eventually(lambda: server.server._batcher.queued == 2)
        backend.ready.set()
        answer = waits.result(WAIT)
        assert answer["data"]["actions"].ravel().tolist() == [50, 7, 51, 52, 50]
        assert also.result(WAIT)["ok"]
        assert min(i for i, values in enumerate(backend.passes) if 50 in values) == 3, "not before it was prepared"
        assert backend.prepared[:2] == [50, 52], "the instructions of one request took the turn of another's"
        assert answer["server_timing"]["queue_ms"] > 0


def test_no_more_is_prepared_than_a_pass_needs() -> None:
    """What is prepared long before it runs may be forgotten again by then."""
    backend, before = StandIn(), []
    backend.new = set(range(50, 58))
    run = backend.run
    backend.run = lambda requests: (before.append(len(backend.prepared)), run(requests))[1]
    with running(backend, max_batch=2) as server, server.raw() as alone:
        alone.recv(timeout=WAIT)
        assert ask(alone, {"value": list(range(50, 58))})["ok"]
    assert backend.prepared == list(range(50, 58))
    assert backend.passes == [[50, 51], [52, 53], [54, 55], [56, 57]]
    # one more may be on its way
    assert all(2 * number <= count <= 2 * number + 1 for number, count in enumerate(before, 1)), before


def test_preparations_count_as_waiting_and_leave_with_their_client(pool) -> None:
    backend = StandIn()
    backend.new = set(range(50, 60))
    with running(backend, max_queued=2) as server:
        first, second, refused = connected(server, 3)
        backend.ready.clear()
        going = pool.submit(ask, first, {"value": 50})
        assert backend.preparing.acquire(timeout=WAIT)
        second.send(wire.pack({"value": list(range(51, 60))}))
        eventually(lambda: server.server._batcher.queued == 2)
        assert "2 requests wait already" in ask(refused, {"value": 1})["error"]["message"]
        second.socket.close()
        eventually(lambda: server.server._batcher.queued == 1)
        assert ask(refused, {"value": 1})["ok"]
        backend.ready.set()
        assert going.result(WAIT)["ok"]
        assert ask(first, {"value": 2})["ok"]
        assert backend.prepared == [50], "what a client that has left wanted was prepared"


def test_a_preparation_that_fails_is_that_request_s_error(caplog, pool) -> None:
    backend = StandIn()
    backend.new = {50, 51, 52}

    def fail(value):
        if value == 51:
            raise InputError("instruction 51: no pack of it")
        if value == 52:
            raise RuntimeError("/secret/path")

    backend.fail_prepare = fail
    with running(backend) as server, caplog.at_level(logging.ERROR, "dit4dit.serving"):
        bad, good = connected(server, 2)
        assert "no pack of it" in ask(bad, {"value": [50, 51]})["error"]["message"]
        internal = ask(bad, {"value": 52})["error"]["message"]
        assert "secret" not in internal
        assert internal.split()[2].rstrip(";") in caplog.text
        assert not any(51 in values for values in backend.passes)
        assert ask(good, {"value": 50})["ok"]


def test_stopping_waits_for_no_preparation(pool) -> None:
    backend = StandIn()
    backend.new = {50}
    with running(backend) as server:
        (new,) = connected(server, 1)
        backend.ready.clear()
        waits = pool.submit(ask, new, {"value": 50})
        assert backend.preparing.acquire(timeout=WAIT)
        server.server.stop()
        assert "stopping" in waits.result(WAIT)["error"]["message"]
        server.thread.join(WAIT)
        assert not server.thread.is_alive()
        assert server.server.left_behind


def test_large_answers_are_whole(pool) -> None:
    """The parts of a request come back in one answer, in order, while others' parts are between them."""

    class Wide(StandIn):
        def run(self, requests):
            return [replace(chunk, actions=chunk.actions.repeat(1000, 0)) for chunk in super().run(requests)]

    with running(Wide(), max_batch=3) as server:
        connections = connected(server, 4)
        messages = [{"value": [100 * i + n for n in range(20 + i)]} for i in range(4)]
        for message, answer in zip(messages, pool.map(ask, connections, messages), strict=True):
            assert answer["data"]["actions"].shape == (len(message["value"]), 1000, 1)
            assert answer["data"]["actions"][:, 999, 0].tolist() == message["value"]


def test_a_real_policy_encodes_beside_the_inference_thread(libero_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    kind = type(libero_policy._texts.embedder)
    encode = kind.__call__

    def watched(self, instruction):
        threads.append((instruction, threading.current_thread().name))
        return encode(self, instruction)

    monkeypatch.setattr(kind, "__call__", watched)
    example = {"image": [np.zeros((32, 64, 3), np.uint8)], "lang": "go", "state": np.zeros((1, 16), np.float32)}
    words = [f"an instruction of the test of turns {i}" for i in range(3)]
    backend = PolicyBackend(libero_policy, "libero_tiny", "abc")
    with running(backend, max_batch=2) as server, server.raw() as client:
        client.recv(timeout=WAIT)
        for _ in range(2):
            answer = ask(client, {"examples": [{**example, "lang": lang} for lang in (*words, words[0])]})
            assert answer["data"]["actions"].shape == (4, 8, 7)
    assert [lang for lang, _ in threads] == words  # once each
    assert all(name.startswith("dit4dit-instructions") for _, name in threads), threads
    (request,) = backend.check({"examples": [{**example, "lang": words[0]}]})
    assert backend.prepare(request) is None


def test_a_bug_in_a_turn_ends_the_server_and_leaves_nobody_waiting() -> None:
    class Odd(StandIn):
        def check(self, message):
            return [replace(one, pictures=[np.zeros(3, np.uint8)]) for one in super().check(message)]  # of no kind

    with running(Odd()) as server, server.raw() as client:
        client.recv(timeout=WAIT)
        assert "internal error" in ask(client, {"value": 1})["error"]["message"]
        server.thread.join(WAIT)
        assert isinstance(server.error, IndexError)
