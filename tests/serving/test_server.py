"""The server over loopback: the published wire, batches, and all that a bad client can do."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import HOSTILE
from serving_stand import (
    PING_BYTES,
    PONG_BYTES,
    REQUEST_BYTES,
    UNKNOWN_TYPE_BYTES,
    UPGRADE,
    StandIn,
    ask,
    hand,
    raw_socket,
    running,
)
from waiting import WAIT, eventually
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dit4dit.errors import DeviceError
from dit4dit.serving import server as module
from dit4dit.serving import wire
from dit4dit.types import ActionChunk


def test_the_published_wire() -> None:
    with running() as server, server.raw() as connection:
        metadata = wire.unpack(connection.recv(timeout=WAIT))
        assert metadata["server"] == "dit4dit"
        connection.send(hand(PING_BYTES))
        assert connection.recv(timeout=WAIT).hex(" ") == hand(PONG_BYTES).hex(" ")
        answer = ask(connection, {"value": 2.5, "request_id": "a", "do_sample": False, "use_ddim": True, "more": [1]})
        assert list(answer)[:5] == ["status", "ok", "type", "request_id", "data"]
        assert answer["type"] == "inference_result"  # without a type it is an inference
        assert (answer["status"], answer["ok"], answer["request_id"]) == ("ok", True, "a")
        assert answer["data"]["normalized_actions"].tolist() == [[[2.5]]]
        assert set(answer["server_timing"]) == {"queue_ms", "infer_ms", "total_ms"}
        assert ask(connection, {"type": "predict_action", "value": 1})["request_id"] == "default"
        refused = ask(connection, {"type": "infer", "request_id": 7})
        assert refused == {
            "status": "error",
            "ok": False,
            "type": "inference_result",
            "request_id": 7,
            "error": {"message": "value: expected a number, got None"},
        }
        unknown = ask(connection, hand(UNKNOWN_TYPE_BYTES))
        assert (unknown["status"], unknown["ok"], unknown["type"], unknown["request_id"]) == (
            "error",
            False,
            "unknown",
            "a",
        )
        assert "kill" in unknown["error"]["message"]


def test_noise_is_a_function_of_seed_and_chunk() -> None:
    with running(seed=5) as server, server.raw() as a, server.raw() as b:
        for connection in (a, b):
            connection.recv()
        assert ask(a, {"value": 1})["noise"] == {"seed": 5, "chunk": 0}
        assert ask(a, {"value": None})["ok"] is False  # uses none
        assert ask(a, {"value": 1})["noise"] == {"seed": 5, "chunk": 1}
        assert ask(a, {"type": "reset", "seed": 2**64 - 1, "chunk": 3})["noise"] == {"seed": 2**64 - 1, "chunk": 3}
        ask(a, {"value": 1})
        assert ask(b, {"value": 1})["noise"] == {"seed": 5, "chunk": 0}  # another's reset is not its own
        assert server.backend.noises == [(5, 0), (5, 1), (2**64 - 1, 3), (5, 0)]
        fresh = {ask(a, {"type": "reset"})["noise"]["seed"] for _ in range(3)}
        assert len(fresh) == 3
        for bad in ({"seed": -1}, {"seed": 2**64 - 1, "chunk": -1}, {"seed": True}, {"seed": "7"}, {"chunk": None}):
            assert ask(a, {"type": "reset", **bad})["type"] == "unknown"
        ask(a, {"type": "reset", "seed": 1, "chunk": 2**64 - 1})
        assert ask(a, {"value": 1})["ok"]
        assert "chunk" in ask(a, {"value": 1})["error"]["message"]  # there is no chunk 2^64


def test_clients_share_passes_and_never_wait_alone() -> None:
    with running() as server, ThreadPoolExecutor(2) as pool:
        with server.raw() as a, server.raw() as b:
            for connection in (a, b):
                connection.recv()
            with server.waiting_for_all():
                answers = list(pool.map(ask, (a, b), ({"value": 1}, {"value": 2})))
            assert sorted(server.backend.passes[0]) == [1, 2]
            assert [answer["batch"] for answer in answers] == [2, 2]
            assert [answer["data"]["actions"].item() for answer in answers] == [1, 2]
            answers = list(pool.map(ask, (a, b), ({"value": 1, "key": "p"}, {"value": 2, "key": "q"})))
            assert [answer["batch"] for answer in answers] == [1, 1]  # of different sizes
        eventually(lambda: not server.server._clients)
        with server.raw() as alone, server.waiting_for_all() as seconds:
            alone.recv()
            assert ask(alone, {"value": 3})["server_timing"]["queue_ms"] < 1e3 * seconds / 2


def test_a_pass_has_no_more_chunks_than_it_may() -> None:
    with (
        running(batch_window_ms=20, max_batch=4) as server,
        ThreadPoolExecutor(2) as pool,
        server.raw() as a,
        server.raw() as b,
    ):
        for connection in (a, b):
            connection.recv()

        def batches(*counts: int) -> list[int]:
            requests = ({"value": value, "count": count} for value, count in enumerate(counts))
            return [answer["batch"] for answer in pool.map(ask, (a, b), requests)]

        with server.waiting_for_all():
            assert batches(3, 1) == [2, 2]
            assert batches(3, 2) == [2, 2]
        assert [len(values) for values in server.backend.passes] == [4, 4, 1]


def test_what_cannot_share_a_pass_gets_the_next_one() -> None:
    """Also while another client is connected and says nothing, for which each pass waits its window."""
    with running(batch_window_ms=20) as server, server.raw() as a, server.raw() as b, server.raw() as idle:
        for connection in (a, b, idle):
            connection.recv(timeout=WAIT)
        server.backend.gate.clear()
        idle.send(wire.pack({"value": 0}))
        server.backend.wait_for_pass()
        for connection, key in ((a, "small picture"), (b, "large picture")):
            connection.send(wire.pack({"value": 1, "key": key}))
        eventually(lambda: json.loads(server.health()[2])["queued"] == 2)
        time.sleep(0.2)
        server.backend.gate.set()
        first, *waited = (wire.unpack(connection.recv(timeout=WAIT)) for connection in (idle, a, b))
        assert all(answer["ok"] for answer in (first, *waited))
        assert first["server_timing"]["infer_ms"] >= 200
        assert min(answer["server_timing"]["queue_ms"] for answer in waited) >= 200
        assert sorted(map(len, server.backend.passes)) == [1, 1, 1]


def test_a_running_chunk_holds_up_no_ping_and_no_health() -> None:
    backend = StandIn()
    with running(backend) as server, ThreadPoolExecutor(1) as pool, server.raw() as slow, server.raw() as quick:
        for connection in (slow, quick):
            connection.recv()
        backend.gate.clear()
        pending = pool.submit(ask, slow, {"value": 1})
        backend.wait_for_pass()
        assert ask(quick, {"type": "ping"})["type"] == "ping"
        assert slow.ping().wait(WAIT)  # the WebSocket's own, on the busy connection
        status, kind, body = server.health()
        assert (status, kind) == (200, "application/json")
        assert json.loads(body) | {"uptime_s": 0} == {
            "status": "ok", "uptime_s": 0, "clients": 2, "queued": 0, "running": True, "requests": 0
        }  # fmt: skip
        assert not pending.done()
        backend.gate.set()
        assert pending.result(WAIT)["ok"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_frame_gets_the_published_error_and_the_connection_goes_on(name: str, shared) -> None:
    with shared.raw() as bad:
        bad.recv()
        answer = ask(bad, HOSTILE[name])
        assert (answer["status"], answer["ok"], answer["type"], answer["request_id"]) == (
            "error",
            False,
            "unknown",
            "default",
        )
        assert "Traceback" not in answer["error"]["message"]
        assert ask(bad, {"value": 1})["ok"]


@pytest.fixture(scope="module")
def shared():
    with running() as server:
        yield server


def test_other_bad_messages(shared) -> None:
    with shared.raw() as bad:
        bad.recv()
        for message in ([1, 2], None, 5, "text", {"type": 5}, {"type": "x" * 100_000}, {"type": ["infer"]}):
            answer = ask(bad, wire.pack(message) if not isinstance(message, str) else message)
            assert (answer["type"], answer["ok"]) == ("unknown", False)
            assert len(answer["error"]["message"]) < 300
        long = ask(bad, {"type": "ping", "request_id": "x" * 1000})
        assert long["request_id"] == "default"


def test_what_is_no_websocket_stops_nobody(shared) -> None:
    for request in (b"\x00" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"POST /healthz HTTP/1.1\r\n\r\n", b"A" * 100_000, b""):
        with raw_socket(shared) as garbage:
            try:
                garbage.sendall(request)
                garbage.shutdown(socket.SHUT_WR)
                while garbage.recv(4096):
                    pass
            except ConnectionError:
                pass
    with raw_socket(shared, UPGRADE + b"\r\n") as half:
        half.recv(4096)
        half.sendall(b"\x82\xff" + struct.pack("!Q", 2**62) + b"aaaa")  # a frame of 2^62 bytes
        while half.recv(4096):
            pass
    with pytest.raises(InvalidStatus, match="403"):
        shared.raw(origin="http://evil.example", legacy=True)  # a page in a browser
    with shared.raw() as good:
        good.recv()
        assert ask(good, {"value": 1})["ok"]


def test_frames_are_bounded() -> None:
    with running(max_frame_bytes=2000) as server, server.raw() as large, server.raw() as good:
        assert wire.unpack(large.recv())["max_frame_bytes"] == 2000
        good.recv()
        with pytest.raises(ConnectionClosed) as closed:
            ask(large, {"value": 1, "more": bytes(2000)})
        assert closed.value.rcvd.code == 1009
        assert "2000" in closed.value.rcvd.reason
        assert ask(good, {"value": 1, "more": bytes(1000)})["ok"]


def test_a_full_server_says_so() -> None:
    with running(max_clients=1) as server:
        with server.raw() as first:
            first.recv()
            with pytest.raises(InvalidStatus) as refused:
                server.raw(legacy=True)
            assert refused.value.response.status_code == 503
            assert b"full (1 clients)" in refused.value.response.body
            assert server.health()[0] == 200
        eventually(lambda: not server.server._clients)
        with server.raw() as second:
            second.recv()
            assert ask(second, {"value": 1})["ok"]


def test_clients_that_are_let_in_at_the_same_moment_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Server, "_on_http", lambda *_: None)  # as where none of them was there yet
    with running(max_clients=1) as server, server.raw() as first, server.raw() as second:
        first.recv()
        with pytest.raises(ConnectionClosed, match="1013"):
            second.recv()
        assert ask(first, {"value": 1})["ok"]


def test_the_queue_is_bounded_and_who_leaves_leaves_it() -> None:
    backend = StandIn()
    with running(backend, max_queued=1, max_batch=1) as server, ThreadPoolExecutor(4) as pool:
        connections = [server.raw(legacy=True) for _ in range(4)]
        for connection in connections:
            connection.recv()
        running_one, leaving, refused, last = connections
        backend.gate.clear()
        first = pool.submit(ask, running_one, {"value": 1})
        backend.wait_for_pass()
        leaving.send(wire.pack({"value": 2}))
        eventually(lambda: server.server._batcher.queued == 1)
        assert "1 requests wait already" in ask(refused, {"value": 3})["error"]["message"]
        leaving.socket.close()  # without a word
        eventually(lambda: len(server.server._clients) == 3)
        third = pool.submit(ask, last, {"value": 4})
        time.sleep(0.05)
        backend.gate.set()
        assert first.result(WAIT)["ok"]
        answer = third.result(WAIT)
        assert answer["ok"] or "wait already" in answer["error"]["message"]
        assert ask(last, {"value": 5})["ok"]
        assert [2] not in backend.passes  # nobody wanted it any more
        for connection in connections:
            connection.close()


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(StandIn):
        def run(self, requests):
            self.entered.release()
            large = np.zeros(20_000_000, np.uint8)
            return [ActionChunk(large[:1], ("x",), 10.0, large, request.noise) for request in requests]

    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.5)
    with running(Large()) as server, raw_socket(server, UPGRADE + b"\r\n") as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        message = wire.pack({"value": 1})
        slow.sendall(b"\x82" + bytes([0x80 | len(message)]) + bytes(4) + message)
        server.backend.wait_for_pass()
        eventually(lambda: not server.server._clients)
        assert server.health()[0] == 200


def test_a_failure_is_a_number_for_the_peer_and_a_traceback_in_the_log(caplog) -> None:
    backend = StandIn()

    def fail(values):
        if 13 in values:
            raise RuntimeError("/secret/path of the server")

    backend.fail = fail
    with (
        running(backend) as server,
        ThreadPoolExecutor(2) as pool,
        server.raw() as bad,
        server.raw() as good,
        caplog.at_level(logging.ERROR, "dit4dit.serving"),
    ):
        bad.recv(), good.recv()
        with server.waiting_for_all():
            failed, fine = pool.map(ask, (bad, good), ({"value": 13}, {"value": 2}))
        assert (len(server.backend.passes[0]), fine["ok"], failed["ok"]) == (
            2,
            True,
            False,
        )  # one pass, then each alone
        message = failed["error"]["message"]
        assert failed["type"] == "inference_result"
        assert "secret" not in message
        assert message.split()[2].rstrip(";") in caplog.text
        assert "/secret/path" in caplog.text
        assert ask(bad, {"value": 3})["noise"]["chunk"] == 0  # the failure has used none


def test_a_lost_device_ends_the_server() -> None:
    backend = StandIn()

    def fail(values):
        raise DeviceError("CUDA error: an illegal memory access")

    backend.fail = fail
    with running(backend) as server, server.raw() as connection:
        connection.recv()
        assert "internal error" in ask(connection, {"value": 1})["error"]["message"]
        server.thread.join(WAIT)
        assert isinstance(server.error, DeviceError)


def test_stopping_answers_what_runs_refuses_what_waits_and_closes_with_1001() -> None:
    backend = StandIn()
    with running(backend, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        with server.raw() as first, server.raw() as second, server.raw() as idle:
            for connection in (first, second, idle):
                connection.recv()
            backend.gate.clear()
            runs = pool.submit(ask, first, {"value": 1})
            backend.wait_for_pass()
            waits = pool.submit(ask, second, {"value": 2})
            eventually(lambda: server.server._batcher.queued == 1)
            server.server.stop()
            assert "stopping" in waits.result(WAIT)["error"]["message"]
            assert server.health()[0] == 503
            with pytest.raises(InvalidStatus) as refused_at_the_door:
                server.raw(legacy=True)
            assert refused_at_the_door.value.response.status_code == 503
            assert "stopping" in ask(idle, {"value": 3})["error"]["message"]
            backend.gate.set()
            assert runs.result(WAIT)["ok"]
            with pytest.raises(ConnectionClosed) as closed:
                first.recv(timeout=WAIT)
            assert closed.value.rcvd.code == 1001
        server.thread.join(WAIT)
        assert not server.thread.is_alive()


def test_the_idle_timeout_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [0.0], []

    def clock() -> float:
        looks.append(now[0])
        return now[0]

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter))
    with running(idle_timeout_s=0.4) as server, server.raw() as connection:
        connection.recv()
        for _ in range(4):
            now[0] += 0.3
            ask(connection, {"type": "ping"})
            before = len(looks)
            eventually(lambda before=before: len(looks) >= before + 3)  # one may still be the ping's
            assert server.thread.is_alive()
        now[0] += 0.5
        server.thread.join(WAIT)
        assert not server.thread.is_alive()


def test_many_clients_good_and_bad_at_once() -> None:
    """Every good request is answered with its own value while others send garbage and leave in the middle."""
    with running(max_clients=16, max_queued=64) as server:
        stop = threading.Event()
        sent: list[int] = []  # by whom, of the bad ones

        def bad(number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(40):
                if stop.is_set():
                    return
                with server.raw(close_timeout=1) as connection:
                    frame = bytearray(hand(REQUEST_BYTES))
                    frame[int(rng.integers(len(frame)))] = int(rng.integers(256))
                    connection.send(bytes(frame) if rng.random() < 0.5 else wire.pack({"value": 999}))
                    sent.append(number)
                    if rng.random() < 0.5:
                        connection.socket.close()

        def good(number: int) -> None:
            with server.raw() as connection:
                connection.recv()
                for i in range(50):
                    answer = ask(connection, {"value": number * 1000 + i})
                    assert answer["data"]["actions"].item() == number * 1000 + i

        with ThreadPoolExecutor(6) as pool:
            vandals = [pool.submit(bad, number) for number in range(3)]
            eventually(lambda: set(sent) == {0, 1, 2})
            for future in [pool.submit(good, number) for number in range(1, 4)]:
                future.result(2 * WAIT)
            stop.set()
            for future in vandals:
                future.exception(WAIT)
        assert server.health()[0] == 200


def test_statistics() -> None:
    with running() as server, connect(f"ws://127.0.0.1:{server.port}") as connection:
        connection.recv()
        for value in (1, 2, None):
            ask(connection, {"value": value})
        found = server.server.statistics.summary()
        assert (found["requests"], found["errors"], found["connections"]) == (2, 1, 1)
        assert found["requests_by_batch"] == {"1": 2}
        assert found["total_ms"]["samples"] == 2
        assert found["total_ms"]["max"] >= found["total_ms"]["p50"] >= found["infer_ms"]["p50"] * 0.5
        json.dumps(found)
        assert "2 requests" in server.server.statistics.line()
