"""The end of a server: what is finished is answered, and nothing that is not holds it up."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving_load import BAD, Role
from serving_stand import UPGRADE, StandIn, ask, connection, raw_socket, running
from waiting import WAIT, eventually
from websockets.exceptions import ConnectionClosed

from dit4dit.serving import server as module
from dit4dit.serving import wire
from dit4dit.types import ActionChunk

FRAME = wire.pack({"value": 1, "more": np.zeros(30 * 2**20, np.uint8)})


def ends(server) -> bool:
    server.thread.join(WAIT)
    return not server.thread.is_alive()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINISH_S", 0.2)


def test_a_pass_that_does_not_end_is_left_behind(soon) -> None:
    backend = StandIn()
    with running(backend) as server, ThreadPoolExecutor(1) as pool, server.raw() as client:
        client.recv(timeout=WAIT)
        backend.gate.clear()
        pending = pool.submit(ask, client, {"value": 1})
        backend.wait_for_pass()
        server.server.stop()
        assert "stopping" in pending.result(WAIT)["error"]["message"]
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=WAIT)
        assert closed.value.rcvd.code == 1001
        assert ends(server)
        assert server.server.left_behind
        assert not backend.gate.is_set()


def test_a_server_whose_threads_are_done_leaves_nothing_behind() -> None:
    with running() as server, server.raw() as client:
        client.recv(timeout=WAIT)
        assert ask(client, {"value": 1, "more": bytes(2 * module.LARGE_FRAME)})["ok"]
        server.server.stop()
        assert ends(server)
        assert not server.server.left_behind


def test_who_does_not_read_or_close_holds_up_no_end(soon) -> None:
    class Large(StandIn):
        def run(self, requests):
            self.entered.release()
            large = np.zeros(20_000_000, np.uint8)
            return [ActionChunk(large[:1], ("x",), 10.0, large, request.noise) for request in requests]

    with running(Large()) as server, raw_socket(server, UPGRADE + b"\r\n") as deaf, raw_socket(server) as silent:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        message = wire.pack({"value": 1})
        deaf.sendall(b"\x82" + bytes([0x80 | len(message)]) + bytes(4) + message)
        server.backend.wait_for_pass()
        eventually(lambda: server.server._busy and not server.server._batcher.running)
        server.server.stop()
        assert ends(server)
        assert not server.server.left_behind
        assert silent.recv(1) == b""


def test_a_frame_that_is_being_read_holds_up_no_end(soon) -> None:
    backend = StandIn()
    looking, look = backend.check, []

    def check(message):
        look.append(message)
        assert backend.gate.wait(WAIT)
        return looking(message)

    backend.check = check
    with running(backend) as server, server.raw() as client:
        client.recv(timeout=WAIT)
        backend.gate.clear()
        client.send(FRAME)
        eventually(lambda: look)
        server.server.stop()
        assert ends(server)
        assert server.server.left_behind


def clients(port: int, count: int) -> list:
    found = [connection(port, close_timeout=1, legacy=True) for _ in range(count)]
    for one in found:
        one.recv(timeout=WAIT)
    return found


def terminate(process: subprocess.Popen, log: Path) -> float:
    """SIGTERM; seconds until the process is gone, with exit code 0."""
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT) == 0, log.read_text()[-3000:]
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.serial
def test_sigterm_ends_the_command_whatever_the_pass_and_64_clients_do(tmp_path: Path) -> None:
    """A pass that never ends, large frames on the way, and clients that do not read. The time is that of the same command with
    nothing to do, and what it gives a pass."""
    with Role("serve", {}, tmp_path / "idle") as server:
        idle = terminate(server.process, tmp_path / "idle")
    log = tmp_path / "hanging"
    with Role("serve", {"hang": True}, log) as server:
        found = clients(server.port, 64)
        for one in found[:40]:
            one.send(wire.pack({"value": 1, "count": 64}))
        for one in found[40:44]:
            one.send(FRAME)
        seconds = terminate(server.process, log)
    assert seconds - idle < 2 * (module.FINISH_S + 3 * module.CLOSE_S)
    assert re.search(r"0 requests; \d+ errors; 64 connections", log.read_text()), "the statistics are not lost"


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Role("serve", {"hang": True}, log) as server:
        (one,) = clients(server.port, 1)
        one.send(wire.pack({"value": 1}))
        eventually(lambda: b'"running": true' in health(server.port))
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "once more ends it at once" in log.read_text())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT) == -signal.SIGTERM


def health(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as asking:
        asking.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return asking.makefile("rb").read()


@pytest.mark.slow
@pytest.mark.serial
def test_the_command_outlives_every_bad_frame_and_ends_on_sigterm(small_libero: Path, tmp_path: Path) -> None:
    """Each on a connection of its own, and after it a good request of another."""
    command = [str(Path(sys.executable).with_name("dit4dit")), "serve", "--checkpoint", str(small_libero), "--port", "0",
               "--device", "cpu", "--max-frame-mib", "32", "--json", str(tmp_path / "report.json")]  # fmt: skip
    example = {"image": [np.zeros((32, 64, 3), np.uint8)], "lang": "go", "state": np.zeros((1, 16), np.float32)}
    frames = BAD | {"text": "é" * 1_000_000, "large": FRAME}
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            line = server.stdout.readline()
            assert line.startswith("serving libero at ws://"), log.read_text()
            port = int(line.rpartition(":")[2])
            (good,) = clients(port, 1)
            for name, frame in frames.items():
                (bad,) = clients(port, 1)
                refused = ask(bad, frame)
                assert refused["ok"] is False, name
                assert "Traceback" not in refused["error"]["message"]
                assert ask(good, {"examples": [example]})["ok"], name
                bad.close()
            assert json.loads(health(port).rpartition(b"\r\n")[2])["clients"] == 1
            terminate(server, log)
        finally:
            server.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["errors"]) == (len(frames), len(frames))
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_lost_device_ends_the_command_whatever_its_threads_do(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Role("serve", {"dead": True}, log) as server:
        waiting, dying = clients(server.port, 2)
        waiting.send(wire.pack({"value": 2}))
        while json.loads(health(server.port).rpartition(b"\r\n")[2])["queued"] != 1:
            pass
        dying.send(wire.pack({"value": 1}))
        assert server.process.wait(WAIT) == 1
    assert "as the test says" in log.read_text()
