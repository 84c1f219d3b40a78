"""A server in a thread, with a policy that does what a test says, and the wire's bytes written by hand."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from waiting import WAIT
from websockets.sync.client import connect

from dit4dit.errors import InputError
from dit4dit.policy.requests import Request
from dit4dit.serving import wire
from dit4dit.serving.server import Server
from dit4dit.serving.settings import Settings
from dit4dit.types import ActionChunk, Noise


class StandIn:
    """Takes {"value": number} and answers with it as the only action; "count": chunks that the request is worth, or "value" a
    list of theirs. `gate` holds passes back, `fail` fails them; a pass takes `seconds`. `new`: values that are prepared first,
    held back by `ready` and failed by `fail_prepare`.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.new, self.prepared = seconds, set(), []
        self.ready, self.preparing, self.fail_prepare = threading.Event(), threading.Semaphore(0), None
        self.ready.set()
        self._background = ThreadPoolExecutor(1)
        self.metadata = {"server": "dit4dit", "embodiment": "stand-in", "action_names": ["x"], "control_hz": 10.0}
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.passes: list[list[float]] = []
        self.noises: list[tuple[int, int]] = []
        self.fail = None

    def check(self, message):
        given, key = message.get("value"), message.get("key")  # requests of different keys are of different kinds
        values = given if isinstance(given, list) else [given] * message.get("count", 1)
        if not values or not all(isinstance(value, (int, float)) for value in values):
            raise InputError(f"value: expected a number, got {given!r:.40}")
        return [Request([], None, value, key, Noise.fresh(), None, "bilinear", False) for value in values]

    def prepare(self, request):
        if request.instruction not in self.new:
            return None
        return self._background.submit(self._prepare, request.instruction)

    def _prepare(self, value) -> None:
        self.preparing.release()
        assert self.ready.wait(WAIT)
        if self.fail_prepare is not None:
            self.fail_prepare(value)
        self.prepared.append(value)
        self.new.discard(value)

    def run(self, requests):
        values = [request.instruction for request in requests]
        self.passes.append(values)
        self.noises += [(request.noise.seed, request.noise.chunk) for request in requests]
        self.entered.release()
        assert self.gate.wait(WAIT)
        time.sleep(self.seconds)
        if self.fail is not None:
            self.fail(values)
        actions = [np.full((1, 1), value, np.float32) for value in values]
        now = time.monotonic_ns()
        return [ActionChunk(a, ("x",), 10.0, a, r.noise, now, now) for a, r in zip(actions, requests, strict=True)]

    def wait_for_pass(self) -> None:
        assert self.entered.acquire(timeout=WAIT)


def connection(port: int, **options):
    """A connection of the published kind; its metadata is still to be received.

    legacy=True, where websockets knows it: not only as a context manager.
    """
    if "legacy" not in inspect.signature(connect).parameters:
        options.pop("legacy", None)
    options.setdefault("open_timeout", WAIT)
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options)


class Running:
    def __init__(self, backend, settings: Settings) -> None:
        self.server, self.backend, self.error = Server(backend, settings), backend, None
        self._bound = settings.listen()
        self.port = self._bound.getsockname()[1]
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self._ready.wait(WAIT)

    def _run(self) -> None:
        try:
            asyncio.run(self.server.run(self._bound, self._ready.set))
        except Exception as error:
            self.error = error

    def end(self) -> None:
        if self.thread.is_alive():
            self.server.stop()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()

    @contextmanager
    def waiting_for_all(self):
        """Passes wait for every connected client, longer than Settings allow: how soon requests come does not matter."""
        batcher = self.server._batcher
        before, batcher._window_s = batcher._window_s, WAIT / 2
        try:
            yield WAIT / 2
        finally:
            batcher._window_s = before

    def raw(self, **options):
        return connection(self.port, **options)

    def health(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=WAIT) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read()


@contextmanager
def running(backend=None, **options):
    found = Running(backend or StandIn(), Settings(port=0, **options))
    try:
        yield found
    finally:
        for gate in ("gate", "ready"):
            if hasattr(found.backend, gate):
                getattr(found.backend, gate).set()
        found.end()


def ask(connection, message):
    """One request on a raw connection; message as a map, or as bytes or text as they are."""
    connection.send(wire.pack(message) if isinstance(message, dict) else message)
    return wire.unpack(connection.recv(timeout=WAIT))


# By hand from the msgpack specification: 0x8n map of n, 0x9n array of n, 0xa0+n text of n bytes, c4 n binary of n bytes,
# c2 false, c3 true, cb float64, and below 0x80 the number itself. Text beside a line is what its bytes say.
NDARRAY = "c40b 5f5f6e6461727261795f5f c3"  # b"__ndarray__": true
DATA, DTYPE, SHAPE = "c404 64617461", "c405 6474797065", "c405 7368617065"
TYPE, REQUEST_ID = "a4 74797065", "aa 726571756573745f6964"
STATUS_OK = "a6 737461747573 a2 6f6b a2 6f6b c3"  # "status": "ok", "ok": true

REQUEST_BYTES = f"""
84 {TYPE} a5 696e666572                                     type: infer
   {REQUEST_ID} a1 61                                       request_id: a
   a8 6578616d706c6573 91 83                                examples: one map of three
      a5 696d616765 91 84 {NDARRAY}                         image: a list of one array
         {DATA} c406 000102030405
         {DTYPE} a3 7c7531                                  |u1
         {SHAPE} 93 01 02 03
      a4 6c616e67 a2 676f                                   lang: go
      a5 7374617465 84 {NDARRAY}                            state: 1.0, -2.0
         {DATA} c408 0000803f 000000c0
         {DTYPE} a3 3c6634                                  <f4
         {SHAPE} 92 01 02
   a9 646f5f73616d706c65 c2                                 do_sample: false
"""
REQUEST = {
    "type": "infer",
    "request_id": "a",
    "examples": [
        {
            "image": [np.arange(6, dtype=np.uint8).reshape(1, 2, 3)],
            "lang": "go",
            "state": np.array([[1.0, -2.0]], np.float32),
        }
    ],
    "do_sample": False,
}
RESPONSE_BYTES = f"""
85 {STATUS_OK} {TYPE} b0 696e666572656e63655f726573756c74   type: inference_result
   {REQUEST_ID} a1 61
   a4 64617461 81                                           data: a map of one
      b2 6e6f726d616c697a65645f616374696f6e73 84 {NDARRAY}  normalized_actions: 0.5, -0.25
         {DATA} c408 0000003f 000080be
         {DTYPE} a3 3c6634
         {SHAPE} 93 01 01 02
"""
RESPONSE = {
    "status": "ok",
    "ok": True,
    "type": "inference_result",
    "request_id": "a",
    "data": {"normalized_actions": np.array([[[0.5, -0.25]]], np.float32)},
}
SCALAR_BYTES = f"""
83 c40d 5f5f6e7067656e657269635f5f c3                       __npgeneric__
   {DATA} cb 3fe0000000000000
   {DTYPE} a3 3c6634
"""
SCALAR = np.float32(0.5)
PING_BYTES = f"82 {TYPE} a4 70696e67 {REQUEST_ID} a1 61"
PONG_BYTES = f"84 {STATUS_OK} {TYPE} a4 70696e67 {REQUEST_ID} a1 61"
UNKNOWN_TYPE_BYTES = f"82 {TYPE} a4 6b696c6c {REQUEST_ID} a1 61"  # type: kill


def hand(text: str) -> bytes:
    """The bytes of lines of hex; what stands after two spaces behind them is a comment."""
    return b"".join(bytes.fromhex(line.strip().partition("  ")[0].replace(" ", "")) for line in text.splitlines())


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
)
"""A handshake up to its last empty line."""


def raw_socket(server, request: bytes = b"") -> socket.socket:
    """A connection that has sent `request` and nothing else."""
    found = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
    found.sendall(request)
    return found
