"""Before and after the handshake: strangers keep nobody out, and who is paused is not taken for dead."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import numpy as np
import pytest
from serving_load import BAD, Role
from serving_stand import UPGRADE, StandIn, ask, raw_socket, running
from waiting import WAIT, eventually
from websockets.exceptions import ConnectionClosed

from dit4dit.serving import connections, lines, wire
from dit4dit.serving import server as module

KEY = "a-key-of-more-than-16-letters"
ALLOWED = {"additional_headers": {"Authorization": f"Api-Key {KEY}"}}


def closed(peer: socket.socket) -> bool:
    """Whether the server ends the connection; waits for it."""
    try:
        while peer.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.slow
@pytest.mark.serial
def test_the_key_gets_in_while_a_thousand_sockets_are_held(tmp_path) -> None:
    with running(api_key=KEY) as server, Role("knock", {"port": server.port}, tmp_path / "log") as knocking:
        eventually(lambda: len(server.server._handshakes) == connections.MAX_HANDSHAKES)
        for _ in range(20):
            with server.raw(**ALLOWED) as connection:
                connection.recv(timeout=WAIT)
                assert ask(connection, {"value": 1})["ok"]
            assert server.health()[0] == 200
            assert len(server.server._handshakes) <= connections.MAX_HANDSHAKES
        assert knocking.process.poll() is None
        assert knocking.end(WAIT) > 1000, "they did not come again"
    eventually(lambda: len(server.server._handshakes) == 0)


def test_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_HANDSHAKES", 4)
    monkeypatch.setattr(module, "HANDSHAKE_S", WAIT)
    with running(max_clients=2) as server, server.raw() as client:
        client.recv(timeout=WAIT)
        idle = []
        for count in range(1, 5):
            idle.append(raw_socket(server))
            eventually(lambda count=count: len(server.server._handshakes) == count)
        more = raw_socket(server, UPGRADE)
        assert closed(idle[0])
        idle[1].sendall(UPGRADE + b"\r\n")  # late, and not the oldest
        assert idle[1].recv(12) == b"HTTP/1.1 101"
        assert ask(client, {"value": 1})["ok"]  # who is in is not among them
        for one in (*idle, more):
            one.close()


def test_a_handshake_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.5)
    with running(api_key=KEY) as server:
        silent, slow = raw_socket(server), raw_socket(server)
        refused = raw_socket(server, UPGRADE + b"\r\n")  # reads nothing, and stays
        health = raw_socket(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        for byte in UPGRADE:
            try:
                slow.sendall(bytes([byte]))
            except ConnectionError:
                break
            threading.Event().wait(0.05)
        else:
            pytest.fail("a byte at a time is taken for ever")
        assert closed(silent)
        eventually(lambda: len(server.server._handshakes) == 0)
        for one in (silent, slow, refused, health):
            one.close()


@pytest.mark.parametrize("frame", [b"\x00\x80" + bytes(4), b"\x89\x80" + bytes(4), b"\x8a\x80" + bytes(4)])
def test_thousands_of_frames_at_once_end_the_connection(frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty fragments, pings and pongs: each costs the event loop as much as a small request."""
    counted = []
    monkeypatch.setattr(connections, "MAX_FRAMES", 20)
    monkeypatch.setattr(connections, "CLOSING_S", 0.1)
    with running() as server, server.raw() as good, raw_socket(server, UPGRADE + b"\r\n") as bad:
        good.recv(timeout=WAIT)
        eventually(lambda: len(server.server._clients) == 2)
        for one in server.server._clients:
            take = one._take
            one._take = lambda frame, take=take: (counted.append(frame), take(frame))
        bad.settimeout(WAIT)
        with contextlib.suppress(ConnectionError):
            bad.sendall(b"\x02\x80" + bytes(4) + frame * 50_000)
        assert closed(bad)
        eventually(lambda: len(server.server._clients) == 1)
        assert len(counted) <= 40, "they were looked at"  # one read may have had a few
        assert ask(good, {"value": 1})["ok"]


def test_pings_into_the_void_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CLOSING_S", 0.1)
    with running() as server, raw_socket(server, UPGRADE + b"\r\n") as bad:
        bad.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: server.server._clients)
        (connection,) = server.server._clients
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        take, read = connection._take, []
        connection._take = lambda frame: (read.append(frame), take(frame))
        sent = 0
        while server.server._clients:  # never many at once: each few are read before the next are sent
            with contextlib.suppress(ConnectionError):
                bad.sendall((b"\x89\xfd" + bytes(4) + bytes(125)) * 50)
            sent += 50
            eventually(lambda sent=sent: len(read) >= sent or not server.server._clients)
            assert connection.transport.get_write_buffer_size() < 2**20


def test_the_kernel_is_told_when_a_peer_is_dead() -> None:
    for seconds, expected in ((200, 200), (None, module.DEAD_AFTER_S)):
        with running(ping_timeout_s=seconds) as server, server.raw() as client:
            client.recv(timeout=WAIT)
            (connection,) = server.server._clients
            peer = connection.transport.get_extra_info("socket")
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * expected
            if hasattr(socket, "TCP_KEEPIDLE"):
                found = [
                    peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{n}"))
                    for n in ("IDLE", "INTVL", "CNT")
                ]
                assert found[0] + found[1] * found[2] == expected


def test_who_is_paused_is_not_cut_off_and_who_answers_no_ping_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(module, "CLOSING_S", 0.1)
    pings = threading.Semaphore(0)

    class Noticed(connections.Handshakes):
        def connection_type(self):
            class Connection(super().connection_type()):
                async def ping(self, *given):
                    pings.release()
                    return await super().ping(*given)

            return Connection

    monkeypatch.setattr(module, "Handshakes", Noticed)
    with running() as server, raw_socket(server, UPGRADE + b"\r\n") as paused:
        assert pings.acquire(timeout=WAIT)
        (connection,) = server.server._clients
        assert connection.ping_timeout == server.server.settings.ping_timeout_s == 300
        paused.sendall(b"\x8a\x80" + bytes(4))  # wakes up; what it sends is no answer to that ping
        message = wire.pack({"value": 1})
        paused.sendall(b"\x82" + bytes([0x80 | len(message)]) + bytes(4) + message)
        server.backend.wait_for_pass()
        assert server.server._clients
    with running(ping_timeout_s=1) as server, raw_socket(server, UPGRADE + b"\r\n") as paused:
        paused.settimeout(WAIT)
        assert closed(paused)
        eventually(lambda: not server.server._clients)
    with running(ping_timeout_s=None) as server, raw_socket(server, UPGRADE + b"\r\n"):
        eventually(lambda: server.server._clients)
        assert next(iter(server.server._clients)).ping_timeout is None


@pytest.mark.serial
def test_no_frame_holds_up_the_event_loop_for_longer_than_a_good_one_of_its_size() -> None:
    """Time of its thread alone: at most three times as much, and 15 ms; a slow core takes 12 for the worst."""
    values = [wire.pack({"value": 1, "more": [np.float32(1)] * 2800}), wire.pack({"value": 1, "more": [0] * 19_900})]
    frames = [*BAD.values(), *values, *(frame + bytes(2 * module.LARGE_FRAME) for frame in values), "é" * 4_000_000]
    with running() as server, server.raw() as connection:
        connection.recv(timeout=WAIT)
        clock = time.pthread_getcpuclockid(server.thread.ident)

        def cost(frame) -> float:
            found = []
            for _ in range(3):
                started = time.clock_gettime(clock)
                ask(connection, frame)
                found.append(time.clock_gettime(clock) - started)
            return min(found)

        for frame in frames:
            size = len(frame.encode() if isinstance(frame, str) else frame)
            good = wire.pack({"value": 1, "more": bytes(max(0, size - 20))})
            assert cost(frame) <= 3 * cost(good) + 0.015, frame[:60]


def test_large_frames_are_read_beside_the_event_loop() -> None:
    class Watched(StandIn):
        def check(self, message):
            threads.append(threading.current_thread().name)
            assert held.wait(WAIT) or "more" not in message
            return super().check(message)

    threads, held = [], threading.Event()
    with running(Watched()) as server, server.raw() as large, server.raw() as small:
        for connection in (large, small):
            connection.recv(timeout=WAIT)
        held.set()
        assert ask(small, {"value": 1})["ok"]
        held.clear()
        large.send(wire.pack({"value": 2, "more": bytes(2 * module.LARGE_FRAME)}))
        eventually(lambda: len(threads) == 2)
        assert ask(small, {"type": "ping"})["ok"]
        held.set()
        assert wire.unpack(large.recv(timeout=WAIT))["data"]["actions"].item() == 2
        assert threads[0] != threads[1]
        assert threads[1].startswith("dit4dit-decode")
        refused = ask(large, {"value": "two", "request_id": 7, "more": bytes(2 * module.LARGE_FRAME)})
        assert (refused["type"], refused["request_id"]) == ("inference_result", 7)
        assert "expected a number" in refused["error"]["message"]
        unread = ask(large, b"\xc1" * 2 * module.LARGE_FRAME)
        assert (unread["ok"], unread["type"]) == (False, "unknown")
        with pytest.raises(ConnectionClosed):
            ask(large, bytes(server.server.settings.max_frame_bytes + 1))


def test_no_peer_fills_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "AT_ONCE", 2)
    monkeypatch.setattr(lines, "PER_SECOND", 0.0)
    with caplog.at_level(logging.INFO, "dit4dit.serving"), running(api_key=KEY) as server:

        def each(times: int) -> None:
            for _ in range(times):
                with raw_socket(server, UPGRADE + b"\r\n") as stranger:
                    assert b"401" in stranger.recv(100)
                with server.raw(**ALLOWED) as client:
                    client.recv(timeout=WAIT)
                    assert not ask(client, b"\xc1")["ok"]
                eventually(lambda: not server.server._clients)

        each(5)
        kinds = ("no or a wrong key", ": connected", "refused: message", "closed (")
        assert [sum(kind in line for line in caplog.messages) for kind in kinds] == [2] * 4
        monkeypatch.setattr(lines, "PER_SECOND", 1e9)
        each(1)
        for kind in kinds:
            said = [line for line in caplog.messages if kind in line]
            assert len(said) == 3, kind
            assert said[-1].endswith("(3 more like this before)")
        assert server.server.statistics.counts["refused"] == 6
