"""The client: what it says when something goes wrong, the published server, and a real Python 3.8."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from serving_stand import StandIn, running
from waiting import WAIT
from websockets.sync.server import serve

import dit4dit.serving.client as module
from dit4dit.serving.client import (
    Client,
    ConnectError,
    ConnectionLost,
    ProtocolError,
    RequestTimeout,
    ServerError,
    ServingError,
)

KEY = "a-key-of-more-than-16-letters"


class Observing(StandIn):
    """Takes raw observations; the action is the state's x."""

    def check(self, message):
        if "examples" in message:
            count = len(message["examples"])
            return super().check({"value": float(count), "count": count})
        return super().check({"value": float(np.asarray(message["observation"]["state"]["x"]).item())})


@contextmanager
def published(answer):
    """A server as the published one: metadata of its own, and what `answer` makes of each message; None says nothing."""

    def handle(connection):
        connection.send(module.pack({"env": "libero"}))
        for frame in connection:
            found = answer(module.unpack(frame))
            if found is not None:
                connection.send(found if isinstance(found, (str, bytes)) else module.pack(found))

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(WAIT)


def infer(client: Client, x: float = 1.0):
    return client.infer({"images": {}, "state": {"x": [x]}}, "go")


def test_stamps_are_of_the_clients_own_clock() -> None:
    """The server's own stamps (`StandIn` makes some) mean nothing on another machine and are not handed on."""
    with running(Observing()) as server, Client(port=server.port) as client:
        before = time.monotonic_ns()
        chunk = infer(client)
        assert before <= chunk.observed_at_ns < chunk.computed_at_ns <= time.monotonic_ns()
        own = client.infer({"images": {}, "state": {"x": [1.0]}}, "go", observed_at_ns=before - 5)
        assert own.observed_at_ns == before - 5 < chunk.computed_at_ns < own.computed_at_ns
        for wrong, error in ((time.time_ns(), ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(error, match=r"observed_at_ns: expected time\.monotonic_ns\(\)"):
                client.infer({"images": {}, "state": {"x": [1.0]}}, "go", observed_at_ns=wrong)
        assert infer(client).seed is not None  # nothing was sent


def test_a_session_goes_on_after_a_lost_connection() -> None:
    with running(Observing()) as server:
        with Client(port=server.port) as client:
            assert client.reset(7) == 7
            first = infer(client, 2.5)
            assert (first.actions.tolist(), first.names, first.control_hz) == ([[2.5]], ("x",), 10.0)
            assert (first.seed, first.chunk, infer(client).chunk) == (7, 0, 1)
            assert set(first.timing) == {"encode", "network", "queue", "infer", "server", "decode", "total"}
            assert first.timing["total"] >= first.timing["server"] >= first.timing["infer"]
            client._connection.socket.shutdown(socket.SHUT_RDWR)
            with pytest.raises(ConnectionLost):
                infer(client)
            with pytest.raises(ConnectionLost, match=r"call connect\(\)"):
                infer(client)
            client.connect()
            assert (infer(client).seed, infer(client).chunk) == (7, 3)
            assert client.predict_action([{"lang": "go"}] * 2)["actions"].tolist() == [[[2.0]], [[2.0]]]
            assert infer(client).chunk == 6
            assert client.ping() < WAIT
        assert "closed" in repr(client)
        client.close()  # again


def test_the_server_s_refusal_leaves_the_connection_open() -> None:
    with running(Observing()) as server, Client(port=server.port) as client:
        with pytest.raises(ServerError, match="internal error"):
            client.infer({"images": {}, "state": {"y": [1]}}, "go")
        with pytest.raises(TypeError, match="cannot be sent"):
            client.infer({"images": {"a": object()}}, "go")
        assert infer(client).actions.shape == (1, 1)


def test_an_answer_that_does_not_come_is_not_taken_for_the_next() -> None:
    backend = Observing()
    with running(backend) as server, Client(port=server.port, timeout_s=0.3) as client:
        backend.gate.clear()
        with pytest.raises(RequestTimeout, match=r"no answer in 0\.3 s"):
            infer(client, 1.0)
        backend.gate.set()
        client.timeout_s = WAIT
        client.connect()
        assert infer(client, 2.0).actions.item() == 2.0


def test_a_server_that_does_not_read_holds_nobody_up() -> None:
    stop, gave_up = threading.Event(), threading.Event()

    def wait(_data=b"") -> None:
        if not stop.wait(WAIT):
            gave_up.set()

    def handle(connection):
        connection.send(module.pack({"server": "dit4dit"}))
        connection.recv_bufsize = 1
        connection.protocol.receive_data = wait  # and never looks at the rest
        wait()

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(port=server.socket.getsockname()[1], timeout_s=0.5)
        with pytest.raises((RequestTimeout, ConnectionLost)):
            client.predict_action({"image": np.zeros(30_000_000, np.uint8), "lang": "go"})
        assert not gave_up.is_set(), "the client ended the request before the server ended the connection"
        stop.set()
        server.shutdown()


def test_connecting_says_what_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectError, match="no policy server there"):
            Client(port=port, connect_timeout_s=0.2)
    with socket.socket() as bound:  # nobody else takes the port, and nobody listens there
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectError, match="no policy server there"):
            Client(port=bound.getsockname()[1])
    with pytest.raises(ConnectError, match="not an address"):
        Client("http://127.0.0.1")
    with running(api_key=KEY) as server:
        for given, wanted in (
            (None, "pass the server's key as api_key="),
            (KEY + "s", "the api_key is not the server's"),
        ):
            with pytest.raises(ConnectError, match=f"401.*{wanted}"):
                Client(port=server.port, api_key=given, wait_s=WAIT, backoff_s=WAIT)
        assert server.server.statistics.counts["refused"] == 2  # waiting does not help here
        with Client(port=server.port, api_key=KEY) as client:
            client.ping()
    endless = [{name: bad} for name in ("timeout_s", "wait_s") for bad in (float("inf"), float("nan"))]
    for bad in (*endless, {"timeout_s": 0}, {"connect_timeout_s": 0}, {"wait_s": -1}, {"backoff_s": 0}):
        with pytest.raises(ValueError, match="must be more than 0, wait_s 0 or more"):
            Client(port=port, **bad)


def test_it_waits_for_a_server_that_is_still_loading() -> None:
    bound = socket.socket()  # it does not listen yet: nobody is there, and nobody else takes the port
    bound.bind(("127.0.0.1", 0))
    found, tried = [], threading.Semaphore(0)

    class Counting(Client):
        def _attempt(self, seconds):
            try:
                return super()._attempt(seconds)
            finally:
                tried.release()

    port = bound.getsockname()[1]
    waiting = threading.Thread(target=lambda: found.append(Counting(port=port, wait_s=WAIT, backoff_s=0.05)))
    waiting.start()
    for _ in range(3):
        assert tried.acquire(timeout=WAIT)
    assert not found
    bound.listen()

    def handle(connection):
        connection.send(module.pack({"ready": True}))
        connection.recv()

    with serve(handle, sock=bound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        waiting.join(WAIT)
        assert found[0].metadata == {"ready": True}
        found[0].close()
        server.shutdown()


def test_a_request_over_the_server_s_bound_is_not_sent() -> None:
    with running(Observing(), max_frame_bytes=2000) as server, Client(port=server.port) as client:
        with pytest.raises(ServerError, match="takes 2000; send smaller images"):
            client.predict_action({"image": np.zeros(3000, np.uint8), "lang": "go"})
        client.ping()


def test_the_published_server() -> None:
    def answer(message):
        if message["type"] == "ping":
            return {"status": "ok", "ok": True, "type": "ping", "request_id": message["request_id"]}
        assert message["type"] == "predict_action"
        if message["examples"][0]["lang"] == "crash":
            return "Traceback (most recent call last): ..."
        if message["examples"][0]["lang"] == "another":
            return {"status": "ok", "ok": True, "type": "inference_result", "request_id": "other", "data": {}}
        if message["examples"][0]["lang"] == "bad":
            return {"status": "error", "ok": False, "type": "inference_result", "request_id": message["request_id"],
                    "error": {"message": "no such thing"}}  # fmt: skip
        data = {"normalized_actions": np.ones((1, 8, 7), np.float32)}
        return {
            "status": "ok",
            "ok": True,
            "type": "inference_result",
            "request_id": message["request_id"],
            "data": data,
        }

    with published(answer) as port, Client(port=port) as client:
        assert client.metadata == {"env": "libero"}
        client.ping()
        assert client.predict_action({"lang": "go"})["normalized_actions"].shape == (1, 8, 7)
        assert set(client.timing) == {"encode", "decode", "total"}
        for call in (lambda: infer(client), lambda: client.reset(1)):
            with pytest.raises(ProtocolError, match="published dialect only"):
                call()
        with pytest.raises(ServerError, match="no such thing"):
            client.predict_action({"lang": "bad"})
        with pytest.raises(ServerError, match="Traceback"):  # after which that server hangs up
            client.predict_action({"lang": "crash"})
        client.connect()
        with pytest.raises(ProtocolError, match="another request"):
            client.predict_action({"lang": "another"})


def test_every_error_is_one_kind() -> None:
    kinds = (ConnectError, ConnectionLost, RequestTimeout, ServerError, ProtocolError)
    assert all(issubclass(kind, ServingError) for kind in kinds)


@pytest.mark.parametrize("there", ["none", "an old one"])
def test_without_a_websockets_that_serves_it_says_what_to_install(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is missing, by which pytest knows a machine without it (tests/conftest.py)."""
    missing = "websockets" if there == "none" else "websockets.sync.client"
    for name in [name for name in sys.modules if name.partition(".")[0] == "websockets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("robots_copy", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"needs pip install 'websockets>=13\.1'") as raised:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    cause = raised.value.__cause__
    assert isinstance(cause, ModuleNotFoundError)
    assert cause.name is not None
    assert cause.name.startswith("websockets")


def test_the_file_stands_alone_and_is_python_3_8() -> None:
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "contextlib", "inspect", "logging", "math", "re", "socket", "ssl", "threading", "time",
                        "typing", "msgpack", "numpy", "websockets"}  # fmt: skip


SCRIPT = """
import json, sys
import numpy as np
import client
from serving_golden import REQUEST_BYTES, RESPONSE_BYTES
for text in (REQUEST_BYTES, RESPONSE_BYTES):
    frame = bytes.fromhex(text)
    assert client.pack(client.unpack(frame)) == frame
try:
    client.Client(port=1)
except client.ConnectError:
    pass
with client.Client(port=int(sys.argv[1]), wait_s=5) as policy:
    policy.ping()
    policy.reset(3)
    chunk = policy.infer({"images": {"a": np.zeros((4, 4, 3), np.uint8)}, "state": {"x": np.float32(1.5)}}, "go")
    found = policy.predict_action([{"lang": "go"}])
    try:
        policy.infer({"images": {}, "state": {}}, "go")
    except client.ServerError:
        pass
print(json.dumps([sys.version_info[:2], chunk.actions.tolist(), chunk.seed, found["actions"].tolist()]))
"""


def python_38() -> str | None:
    """An interpreter with the client's three packages: DIT4DIT_CLIENT_PYTHON, as .ci/run makes it."""
    return shutil.which(os.environ.get("DIT4DIT_CLIENT_PYTHON", ""))


@pytest.mark.skipif(python_38() is None, reason="DIT4DIT_CLIENT_PYTHON names no Python with numpy, msgpack, websockets")
def test_under_a_real_python_38(tmp_path: Path) -> None:
    from serving_stand import REQUEST_BYTES, RESPONSE_BYTES, hand

    shutil.copy(module.__file__, tmp_path / "client.py")  # alone, as on a robot
    golden = {"REQUEST_BYTES": hand(REQUEST_BYTES).hex(), "RESPONSE_BYTES": hand(RESPONSE_BYTES).hex()}
    (tmp_path / "serving_golden.py").write_text("".join(f"{name} = {text!r}\n" for name, text in golden.items()))
    (tmp_path / "script.py").write_text(SCRIPT)
    with running(Observing()) as server:
        command = [str(python_38()), "-W", "error", "script.py", str(server.port)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=4 * WAIT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[3, 8], [[1.5]], 3, [[[1.0]]]]
