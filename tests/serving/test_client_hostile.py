"""The client against servers that do everything wrong: raw sockets, bytes by hand.

Whatever comes, and at whatever stage, a `ServingError` leaves the client within its time limits. It needs the client, its three
packages and pytest, nothing else of the project: this is how other versions of websockets are tested.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import signal
import socket
import struct
import threading

import numpy as np
import pytest
from waiting import WAIT

import dit4dit.serving.client as module
from dit4dit.serving.client import (
    Client,
    ConnectError,
    ConnectionLost,
    ProtocolError,
    RequestTimeout,
    ServerError,
    pack,
)

SHORT = 0.15
"""A time limit that a test lets pass."""
GREETING = {"server": "dit4dit", "action_names": ["x", "y"], "control_hz": 10.0}


class Peer:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._read = sock, sock.makefile("rb")

    def request(self) -> dict[str, str]:
        """The handshake that came."""
        self._read.readline()
        lines = iter(self._read.readline, b"\r\n")
        return dict(line.decode().strip().split(": ", 1) for line in lines)

    def upgrade(self, accept: str | None = None, more: str = "") -> None:
        key = self.request()["Sec-WebSocket-Key"]
        right = base64.b64encode(
            hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        ).decode()
        self.sock.sendall(
            f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{more}"
            f"Sec-WebSocket-Accept: {accept or right}\r\n\r\n".encode()
        )

    def greet(self, **more: object) -> None:
        self.upgrade()
        self.sock.sendall(frame(pack({**GREETING, **more})))

    def message(self) -> dict:
        """The next message of the client; EOFError where it has hung up."""
        opcode, length = 0, 0
        while opcode != 2:
            if opcode == 8:
                raise EOFError
            first, second = self._exactly(2)
            opcode, length = first & 15, second & 127
            if length >= 126:
                length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
            mask, data = self._exactly(4), np.frombuffer(self._exactly(length), np.uint8)
        return module.unpack((data ^ np.resize(np.frombuffer(mask, np.uint8), length)).tobytes())

    def reset(self) -> None:
        """The connection ends with a RST, as where a process dies or a proxy has nobody behind it."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._read.close()
        self.sock.close()

    def wait(self) -> None:
        """Until the client has hung up, or says goodbye."""
        while self._read.read1(65536)[:1] not in (b"", b"\x88"):
            pass

    def hold(self) -> None:
        """Until the client has hung up, whatever it says."""
        while self._read.read1(65536):
            pass

    def _exactly(self, count: int) -> bytes:
        found = self._read.read(count)
        if len(found) < count:
            raise EOFError
        return found


class Fake:
    """A port where `behave(peer, number)` answers each connection, in a thread each."""

    def __init__(self, behave) -> None:
        self.count, self._behave = 0, behave
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.count += 1
                threading.Thread(target=self._answer, args=(Peer(sock), self.count), daemon=True).start()

    def _answer(self, peer: Peer, number: int) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            self._behave(peer, number)
            peer.wait()
        peer._read.close()
        peer.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def frame(data: bytes, first: int = 0x82, masked: bool = False, length: int | None = None) -> bytes:
    """One WebSocket frame; `first` is 0x80 for a last fragment, with its opcode: 2 binary, 1 text, 0 goes on, 8 9 control."""
    size = len(data) if length is None else length
    mark = 0x80 if masked else 0
    head = bytes([first, mark | size]) if size < 126 else bytes([first, mark | 127]) + size.to_bytes(8, "big")
    return head + (bytes(4) if masked else b"") + data


def closing(code: int, reason: str = "") -> bytes:
    return frame(code.to_bytes(2, "big") + reason.encode(), 0x88)


def text(value: str) -> bytes:
    return b"\xdb" + len(value).to_bytes(4, "big") + value.encode()


def array(dtype: object, shape: object, data: object = b"") -> dict:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def raw(*parts: bytes):
    return lambda peer: [peer.sock.sendall(part) for part in parts]


def closed_with(code: int):
    return lambda peer: (raw(closing(code))(peer), peer.hold())


def status(line: str, *headers: str, body: str = ""):
    lines = "\r\n".join([f"HTTP/1.1 {line}", f"Content-Length: {len(body)}", *headers])

    def answer(peer: Peer) -> None:
        peer.request()
        peer.sock.sendall(f"{lines}\r\n\r\n{body}".encode())
        peer.sock.shutdown(socket.SHUT_WR)

    return answer


def after_request(*parts: bytes, then: str = "end"):
    def answer(peer: Peer) -> None:
        peer.request()
        raw(*parts)(peer)
        peer.reset() if then == "reset" else peer.sock.shutdown(socket.SHUT_WR)

    return answer


# what cannot be a message, whichever message it is
UNREADABLE = {
    "empty": b"",
    "cut short": pack({"a": "text"})[:-2],
    "more behind it": pack({}) + b"\0",
    "not msgpack": b"\xc1",
    "an extension": b"\xd4\x05\x00",
    "bad utf-8": b"\x81\xa1a\xa1\xff",
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\x81\xa1a\xdf\xff\xff\xff\xff",
    "text of four gigabytes": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "a million values": b"\x81\xa1a\xdd\x00\x0f\x42\x40" + bytes(1_000_000),
    "deep lists": b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a map as key": b"\x81\x80\xc0",
    "a number as key": b"\x81\x01\xc0",
    "objects": pack({"a": array("|O", [1], bytes(8))}),
    "a structure": pack({"a": array("(9999,9999)f8,O", [1], bytes(8))}),
    "empty text of 7^22": pack({"a": array("|S0", [7] * 22)}),
    "no dtype": pack({"a": {b"__ndarray__": True}}),
    "a dtype that is a map": pack({"a": array({"f": 1}, [1], b"1")}),
    "a long dtype": pack({"a": array("<f4" * 10_000, [1], b"1234")}),
    "a shape that is text": pack({"a": array("<f4", "1", b"1234")}),
    "a negative shape": pack({"a": array("<f4", [-1, -1], b"1234")}),
    "65 dimensions": pack({"a": array("|u1", [1] * 65, b"1")}),
    "a shape over its data": pack({"a": array("|u1", [2**31 - 1] * 5, b"1")}),
    "nothing, of endless size": pack({"a": array("|u1", [2**31 - 1] * 5 + [0])}),
    "data that is text": pack({"a": array("|u1", [1], "1")}),
    "a long scalar": pack({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<U9999999"}}),
    "a scalar out of range": pack({"a": {b"__npgeneric__": True, b"data": 2**40, b"dtype": "|i1"}}),
}
# what cannot be a WebSocket frame
WRONG_FRAMES = {
    "masked": frame(pack({}), masked=True),
    "an unknown opcode": frame(b"", 0x83),
    "a reserved bit": frame(pack({}), 0xC2),
    "goes on with nothing": frame(b"", 0x80),
    "a control frame in parts": frame(b"", 0x09),
    "a long control frame": frame(bytes(200), 0x89),
    "a new message in the midst": frame(b"a", 0x02) + frame(b"b", 0x82),
    "text that is no utf-8": frame(b"\xff", 0x81),
    "longer than is taken": frame(b"", length=2**30),
    "longer than there is": frame(b"", length=2**62),
    "a close code that is none": closing(999),
    "a close frame of one byte": frame(b"\x03", 0x88),
}
NO_HTTP = {
    "a banner": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "zeros": after_request(bytes(10_000)),
    "an endless line": after_request(b"HTTP/1.1 200 " + b"x" * 100_000),
    "endless headers": after_request(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000),
    "a header that is none": after_request(b"HTTP/1.1 101 Switching Protocols\r\nno colon\r\n\r\n"),
    "another HTTP": after_request(b"HTTP/9.9 101 Switching Protocols\r\n\r\n"),
}
NO_HANDSHAKE = {
    "a wrong accept key": lambda peer: peer.upgrade("AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
    "extensions nobody asked for": lambda peer: peer.upgrade(more="Sec-WebSocket-Extensions: permessage-deflate\r\n"),
    "a subprotocol nobody asked for": lambda peer: peer.upgrade(more="Sec-WebSocket-Protocol: chat\r\n"),
    "no upgrade": status("101 Switching Protocols"),
    "200": status("200 OK", body="<html>" + "x" * 10_000),
    "301": status("301 Moved Permanently", "Location: ws://127.0.0.1:1/"),
    "401": status("401 Unauthorized", body="send the key"),
    "403": status("403 Forbidden"),
    "404": status("404 Not Found"),
    "500": status("500 Internal Server Error", body="\x1b[2J" * 99),
}


def greeted_with(data: bytes):
    def answer(peer: Peer) -> None:
        peer.upgrade()
        peer.sock.sendall(data)
        peer.hold()

    return answer


FINAL = {
    **NO_HTTP,
    **NO_HANDSHAKE,
    **{f"greeting: {name}": greeted_with(frame(data)) for name, data in UNREADABLE.items()},
    **{f"greeting: {name}": greeted_with(data) for name, data in WRONG_FRAMES.items()},
    "greeting: a list": greeted_with(frame(pack([1]))),
    "greeting: text": greeted_with(frame(b"hello", 0x81)),
    "greeting: too large": greeted_with(frame(bytes(2**20 + 1))),
    "greeting: a key of 30 MB": greeted_with(frame(b"\x81" + text("k" * 30_000_000) + b"\xc0")),
    "greeting: not for you": greeted_with(closing(1008, "policy violation")),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_is_no_policy_server_fails_at_once(name: str) -> None:
    with Fake(lambda peer, _: FINAL[name](peer)) as fake:
        with pytest.raises(ConnectError) as caught:
            Client(port=fake.port, wait_s=WAIT, backoff_s=WAIT, connect_timeout_s=WAIT, max_frame_bytes=2**20)
        assert fake.count == 1
        assert len(str(caught.value)) < 700
        assert str(caught.value).isprintable()


def hanging(peer: Peer) -> None:
    peer.request()
    peer.wait()


def never_greeting(peer: Peer) -> None:
    peer.upgrade()
    raw(frame(b"x", 0x02))(peer)
    while not threading.Event().wait(0.01):  # parts that never end, and pings, until the client has hung up
        raw(frame(b"x", 0x00), frame(b"still there", 0x89))(peer)


PASSING = {
    "reset at once": Peer.reset,
    "reset after the request": after_request(then="reset"),
    "half an answer, reset": after_request(b"HTTP/1.1 101 Switching Pro", then="reset"),
    "headers, reset": after_request(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n", then="reset"),
    "end at once": lambda peer: peer.sock.shutdown(socket.SHUT_RDWR),
    "end after the request": after_request(),
    "half an answer, end": after_request(b"HTTP/1.1 101 Swi"),
    "502": status("502 Bad Gateway"),
    "503": status("503 Service Unavailable", body="the server is full (2 clients)"),
    "504": status("504 Gateway Timeout"),
    "end before the greeting": lambda peer: (peer.upgrade(), peer.sock.shutdown(socket.SHUT_RDWR)),
    "reset before the greeting": lambda peer: (peer.upgrade(), peer.reset()),
    "1000": greeted_with(closing(1000)),
    "1001": greeted_with(closing(1001)),
    "1011": greeted_with(closing(1011)),
    "1013": greeted_with(closing(1013, "the server is full (2 clients)")),
    "half a greeting": lambda peer: (peer.upgrade(), raw(frame(b"", length=100))(peer), peer.reset()),
}
SLOW = {
    "says nothing": lambda peer: peer.wait(),
    "hangs in the handshake": hanging,
    "hangs in the answer": lambda peer: (peer.request(), raw(b"HTTP/1.1 101 Swi")(peer), peer.wait()),
    "does not greet": lambda peer: (peer.upgrade(), peer.wait()),
    "never ends its greeting": never_greeting,
}


@pytest.mark.parametrize("name", PASSING)
def test_it_waits_however_the_connection_fails(name: str) -> None:
    def behave(peer: Peer, number: int) -> None:
        PASSING[name](peer) if number <= 2 else peer.greet()

    with Fake(behave) as fake:
        with pytest.raises(ConnectError):
            Client(port=fake.port, connect_timeout_s=WAIT)
        with Client(port=fake.port, wait_s=WAIT, backoff_s=0.01, connect_timeout_s=WAIT) as client:
            assert client.metadata == GREETING
            assert fake.count == 3


@pytest.mark.parametrize("name", SLOW)
def test_it_waits_for_what_hangs_one_attempt_long(name: str) -> None:
    done = threading.Event()

    def behave(peer: Peer, _: int) -> None:
        peer.greet() if done.is_set() else SLOW[name](peer)

    class Attempts(Client):
        def _attempt(self, seconds: float) -> None:
            try:
                super()._attempt(WAIT if done.is_set() else seconds)
            finally:
                done.set()

    with Fake(behave) as fake:
        with pytest.raises(ConnectError, match="no policy server there"):
            Attempts(port=fake.port, connect_timeout_s=SHORT)
        done.clear()
        with Attempts(port=fake.port, connect_timeout_s=SHORT, wait_s=WAIT, backoff_s=0.01) as client:
            assert client.metadata == GREETING


def test_the_last_attempts_are_cut_to_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits = [100.0], []

    class Hanging(Client):
        def _attempt(self, seconds: float) -> None:
            limits.append(seconds)
            now[0] += seconds
            raise module._NotYet("hangs")

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with pytest.raises(ConnectError, match="hangs"):
        Hanging(wait_s=25, connect_timeout_s=10, backoff_s=0.001)
    assert (limits, now[0]) == ([10, 10, 5], 125)
    with pytest.raises(ConnectError, match="hangs"):
        Hanging(connect_timeout_s=10)
    assert limits == [10, 10, 5, 10]


def test_a_lookup_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(module.socket, "getaddrinfo", lambda *_, **__: stop.wait(WAIT))
        with pytest.raises(ConnectError, match="looking up robot took too long"):
            Client("robot", connect_timeout_s=SHORT)
        stop.set()
    names = []

    def unknown(*_: object, **__: object) -> None:
        names.append(1)
        if len(names) < 3:
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return real("127.0.0.1", fake.port, type=socket.SOCK_STREAM)

    real = socket.getaddrinfo
    with Fake(lambda peer, _: peer.greet()) as fake:
        monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
        with Client("robot", wait_s=WAIT, backoff_s=0.01) as client:
            assert (len(names), client.metadata) == (3, GREETING)


@pytest.mark.parametrize(
    "bad", ["ws://h:abc", "ws://h:99999", "http://h", "bad host", "a" * 70 + ".com", "[::1", "\0", " "]
)
def test_a_bad_address_fails_at_once(bad: str) -> None:
    with pytest.raises(ConnectError, match="not an address"):
        Client(bad, wait_s=WAIT, backoff_s=WAIT)


def answer_of(message: dict, **changes: object) -> bytes:
    """A good answer to `infer`, but for what is changed."""
    actions, normalized = np.zeros((1, 4, 2), np.float32), np.zeros((1, 4, 7), np.float32)
    good = {"status": "ok", "ok": True, "type": "inference_result", "request_id": message["request_id"],
            "data": {"actions": actions, "normalized_actions": normalized}, "noise": {"seed": 7, "chunk": 0},
            "server_timing": {"queue_ms": 1.0, "infer_ms": 2, "total_ms": 3.0}}  # fmt: skip
    return frame(pack({name: value for name, value in {**good, **changes}.items() if value is not ...}))


def infer(client: Client):
    return client.infer({"images": {}, "state": {}}, "go")


def data_with(**changes: object) -> dict:
    data = {
        "actions": np.zeros((1, 4, 2), np.float32),
        "normalized_actions": np.zeros((1, 4, 7), np.float32),
        **changes,
    }
    return {"data": {name: value for name, value in data.items() if value is not ...}}


WRONG_ANSWERS = {
    "no data": {"data": ...},
    "data that is a list": {"data": [1]},
    "data that is text": {"data": "x" * 1_000_000},
    "no actions": data_with(actions=...),
    "no normalized actions": data_with(normalized_actions=...),
    "actions as a list": data_with(actions=[[[0.0, 0.0]] * 4]),
    "actions of two dimensions": data_with(actions=np.zeros((4, 2), np.float32)),
    "actions of two requests": data_with(actions=np.zeros((2, 4, 2), np.float32)),
    "no rows": data_with(actions=np.zeros((1, 0, 2), np.float32)),
    "three columns for two names": data_with(actions=np.zeros((1, 4, 3), np.float32)),
    "other rows than normalized": data_with(actions=np.zeros((1, 5, 2), np.float32)),
    "actions in float64": data_with(actions=np.zeros((1, 4, 2))),
    "actions in whole numbers": data_with(actions=np.zeros((1, 4, 2), np.int32)),
    "actions that are text": data_with(actions=np.zeros((1, 4, 2), "S4")),
    "actions that are not finite": data_with(actions=np.full((1, 4, 2), np.nan, np.float32)),
    "no noise": {"noise": ...},
    "noise that is text": {"noise": "7"},
    "no seed": {"noise": {"chunk": 0}},
    "a seed that is text": {"noise": {"seed": "7", "chunk": 0}},
    "a chunk below 0": {"noise": {"seed": 7, "chunk": -1}},
    "a chunk that is true": {"noise": {"seed": 7, "chunk": True}},
    "timing that is text": {"server_timing": {"total_ms": "3"}},
    "timing that is a list": {"server_timing": [3.0]},
    "timing of an array": {"server_timing": {"total_ms": np.zeros(3)}},
    "another type": {"type": "ping"},
    "no type": {"type": ...},
    "a type that is an array": {"type": np.zeros(9)},
    "a type of a megabyte": {"type": "x" * 1_000_000},
    "another request's": {"request_id": "999"},
    "no request's": {"request_id": ...},
    "a request that nobody has": {"request_id": "default"},
    "a request that is an array": {"request_id": np.zeros(9)},
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_an_answer_that_is_not_as_promised(name: str) -> None:
    def behave(peer: Peer, number: int) -> None:
        peer.greet()
        while True:
            peer.sock.sendall(answer_of(peer.message(), **(WRONG_ANSWERS[name] if number == 1 else {})))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT) as client:
        with pytest.raises(ProtocolError) as caught:
            infer(client)
        assert len(str(caught.value)) < 400
        with pytest.raises(ConnectionLost, match=r"call connect\(\)"):
            infer(client)
        client.connect()
        chunk = infer(client)
        assert (chunk.actions.shape, chunk.names, chunk.seed, chunk.timing["infer"]) == ((4, 2), ("x", "y"), 7, 2.0)
        chunk.actions[0] = 1.0  # the caller's own


@pytest.mark.parametrize("greeting", [{"action_names": "xy"}, {"action_names": None}, {"action_names": [1, 2]},
                                      {"control_hz": "10"}, {"control_hz": 0},
                                      {"control_hz": float("nan")}], ids=str)  # fmt: skip
def test_a_greeting_that_names_no_actions(greeting: dict) -> None:
    def behave(peer: Peer, _: int) -> None:
        peer.greet(**greeting)
        peer.sock.sendall(answer_of(peer.message()))

    with Fake(behave) as fake, Client(port=fake.port) as client, pytest.raises(ProtocolError, match="the greeting's"):
        infer(client)


def test_a_greeting_of_another_server() -> None:
    with Fake(lambda peer, _: peer.greet(server=np.zeros(9))) as fake, Client(port=fake.port) as client:
        assert not client.knows_observations


LOST = {
    "reset": Peer.reset,
    "end": lambda peer: peer.sock.shutdown(socket.SHUT_RDWR),
    "half an answer, reset": lambda peer: (raw(frame(b"", length=100))(peer), peer.reset()),
    "1000": closed_with(1000),
    "1001": closed_with(1001),
    "1011": closed_with(1011),
}
UNTAKEN = {
    **{name: frame(data) for name, data in UNREADABLE.items()},
    **WRONG_FRAMES,
    "a list": frame(pack([1])),
    "too large": frame(bytes(2**20 + 1)),
    "a key of 30 MB": frame(b"\x81" + text("k" * 30_000_000) + b"\xc0"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_session_goes_on_after_a_reset_in_the_midst_of_an_answer(name: str) -> None:
    asked = []

    def behave(peer: Peer, number: int) -> None:
        peer.greet()
        while True:
            message = peer.message()
            asked.append((number, message["type"], message.get("seed"), message.get("chunk")))
            if message["type"] == "reset":
                noise = {"seed": message["seed"], "chunk": message["chunk"]}
                peer.sock.sendall(answer_of(message, type="reset", noise=noise))
            elif number == 1 and len(asked) == 3:
                LOST[name](peer)
                return
            else:
                peer.sock.sendall(answer_of(message, noise={"seed": 7, "chunk": 3 + number}))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT, wait_s=WAIT) as client:
        assert client.reset(7, 4) == 7
        assert infer(client).chunk == 4
        with pytest.raises(ConnectionLost):
            infer(client)
        client.connect()
        assert infer(client).chunk == 5
        assert asked[-2:] == [(2, "reset", 7, 5), (2, "infer", None, None)]


@pytest.mark.parametrize("name", UNTAKEN)
def test_an_answer_that_cannot_be_taken(name: str) -> None:
    def behave(peer: Peer, _: int) -> None:
        peer.greet()
        peer.message()
        peer.sock.sendall(UNTAKEN[name])
        peer.hold()

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT, max_frame_bytes=2**20) as client:
        with pytest.raises(ProtocolError) as caught:
            client.ping()
        assert len(str(caught.value)) < 500
        assert "closed" in repr(client)


def test_refusals_are_of_bounded_length_and_leave_the_connection_open() -> None:
    refusals = iter([{"message": "no such view"}, {"message": "x" * 1_000_000}, {"message": [1]}, "text", None, {}])

    def behave(peer: Peer, _: int) -> None:
        peer.greet()
        for refusal in refusals:
            peer.sock.sendall(answer_of(peer.message(), ok=False, error=refusal))
        peer.message()
        peer.sock.sendall(frame(b"Traceback" + b"\n" * 100_000 + b"KeyError: 'lang'\x1b[2J", 0x81))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT) as client:
        for wanted in ("no such view", "xxx", "no reason given", "text", "no reason given", "no reason given"):
            with pytest.raises(ServerError, match=wanted) as caught:
                client.ping()
            assert len(str(caught.value)) < 9000
        with pytest.raises(ServerError, match=r"KeyError: 'lang'\?\[2J") as caught:  # and hangs up
            client.ping()
        assert len(str(caught.value)) < 9000
        with pytest.raises(ConnectionLost):
            client.ping()


def test_a_server_that_reads_a_byte_at_a_time_or_pings_for_ever_holds_nobody_up() -> None:
    def reads(peer: Peer, _: int) -> None:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.greet()
        while peer.sock.recv(1):
            pass

    def pings(peer: Peer, _: int) -> None:
        peer.greet()
        peer.message()
        while True:
            peer.sock.sendall(frame(b"x" * 100, 0x89))

    for behave, size in ((reads, 30_000_000), (pings, 1)):
        with Fake(behave) as fake, Client(port=fake.port, timeout_s=SHORT) as client:
            with pytest.raises(RequestTimeout, match=r"no answer in 0\.15 s"):
                client.predict_action({"image": np.zeros(size, np.uint8), "lang": "go"})
            assert "closed" in repr(client)


def test_an_interrupt_leaves_no_answer_behind() -> None:
    asked, late, hung_up = threading.Event(), threading.Event(), threading.Event()

    def behave(peer: Peer, number: int) -> None:
        peer.greet()
        message = peer.message()
        if number == 1:
            asked.set()
            assert late.wait(WAIT)
            with contextlib.suppress(OSError):
                peer.sock.sendall(answer_of(message, noise={"seed": 1, "chunk": 1}))
            peer.wait()
            hung_up.set()
            return
        peer.sock.sendall(answer_of(message, noise={"seed": 2, "chunk": 2}))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT) as client:
        receive = client._connection.recv

        def interrupted(timeout: float):
            assert asked.wait(WAIT)
            signal.raise_signal(signal.SIGINT)
            return receive(timeout)

        client._connection.recv = interrupted
        with pytest.raises(KeyboardInterrupt):
            infer(client)
        late.set()
        assert hung_up.wait(WAIT)
        with pytest.raises(ConnectionLost, match=r"call connect\(\)"):
            infer(client)
        client.connect()
        assert infer(client).seed == 2


def test_close_ends_what_other_threads_wait_for() -> None:
    asked, ended = threading.Event(), threading.Event()
    errors = []

    def behave(peer: Peer, _: int) -> None:
        peer.greet()
        peer.message()
        asked.set()
        peer.wait()
        ended.set()

    def call(what) -> None:
        try:
            what()
        except Exception as error:
            errors.append(error)

    with Fake(behave) as fake:
        client = Client(port=fake.port, timeout_s=10 * WAIT)
        waiting = threading.Thread(target=call, args=(client.ping,), daemon=True)
        waiting.start()
        assert asked.wait(WAIT)
        client.close()
        waiting.join(WAIT)
        assert ended.wait(WAIT)
        assert [type(error) for error in errors] == [ConnectionLost]
        assert "close() was called" in str(errors[0])
        assert "closed" in repr(client)
        client.connect()  # it can be used again
        client.close()

    tried = threading.Event()

    class Trying(Client):
        def _attempt(self, seconds: float) -> None:
            tried.set()
            super()._attempt(seconds)

    client.__class__ = Trying
    client.wait_s, client.backoff_s = 10 * WAIT, 10 * WAIT
    waiting = threading.Thread(target=call, args=(client.connect,), daemon=True)
    waiting.start()  # nobody listens there any more
    assert tried.wait(WAIT)
    client.close()
    waiting.join(WAIT)
    assert isinstance(errors[1], ConnectError)
    assert "close() was called" in str(errors[1])


def test_close_at_the_very_end_of_a_request_closes() -> None:
    def behave(peer: Peer, number: int) -> None:
        peer.greet()
        peer.sock.sendall(answer_of(peer.message(), noise={"seed": number, "chunk": 0}))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT) as client:
        with client._lock:  # as a request that has looked for the last time whether close() was called
            client.close()
        client.connect()
        assert infer(client).seed == 2, "another connection"


@pytest.mark.parametrize("key", ["a key of words", "a-key-of-a-file\n", "clé-secrète", "a\r\nX: y"])
def test_a_key_that_no_header_carries(key: str) -> None:
    with pytest.raises(ValueError, match=r"\.strip\(\)"):
        Client(port=1, api_key=key)


def test_what_the_caller_cannot_send_is_a_type_error() -> None:
    endless: list = []
    endless.append(endless)

    def behave(peer: Peer, _: int) -> None:
        peer.greet()
        peer.sock.sendall(answer_of(peer.message()))

    with Fake(behave) as fake, Client(port=fake.port, timeout_s=WAIT) as client:
        for value in (object(), np.array([None]), 2**70, endless, "\ud800", {1, 2}, 1j):
            with pytest.raises(TypeError, match=r"infer: \['observation'\]\['images'\]\['front'\]"):
                client.infer({"images": {"front": value}, "state": {}}, "go")
        with pytest.raises(TypeError, match=r"observation\['images'\]: expected a mapping of names, got a list"):
            client.infer({"images": [np.zeros(3)], "state": {}}, "go")
        assert infer(client).seed == 7  # nothing of it was sent
