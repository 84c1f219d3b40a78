"""A server, its clients and its enemies, each in a process of their own: `python serving_load.py ROLE JSON`.

serve       a stand-in's server, behind what `dit4dit serve` does with one; prints its address
work        well-behaved clients until standard input ends; prints [[end, seconds], ...] of their requests, on the system's clock
harm        hostile clients with the key; prints how often each kind of harm was done
knock       strangers that hold 1000 sockets and never finish a handshake; prints how many they made
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from hostile import HOSTILE, HOSTILE_MESSAGES
from serving_stand import UPGRADE, StandIn
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from dit4dit.errors import DeviceError
from dit4dit.serving import wire
from dit4dit.serving.server import Server
from dit4dit.serving.settings import Settings

BAD = {**HOSTILE, **HOSTILE_MESSAGES}
"""Frames that are refused."""
FRAME = 32 * 2**20
IMAGE = np.zeros((192, 192, 3), np.uint8)


class Role:
    """A process of this file; its first line has come. `end` closes its standard input and gives the JSON that it prints last."""

    def __init__(self, role: str, options: dict, log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, role, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.first = self.process.stdout.readline().strip()
        assert self.first, log.read_text()[-2000:]

    @property
    def port(self) -> int:
        """Of a server, which says so when it serves."""
        return int(self.first.rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, seconds: float):
        return json.loads(self.process.communicate(timeout=seconds)[0])


class Laborious(StandIn):
    """Values above a million are new instructions, each time."""

    def prepare(self, request):
        return self._background.submit(time.sleep, 0.02) if request.instruction > 1e6 else None


def lost(_) -> None:
    raise DeviceError("the device is lost, as the test says")


def serve(options: dict) -> None:
    from dit4dit.commands import serving
    from dit4dit.policy import garbage

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    backend = Laborious(options.get("seconds", 0.0))
    if options.get("hang"):
        backend.run = lambda _: threading.Event().wait()
    if options.get("dead"):  # the device is lost while an instruction is encoded, which never ends
        backend.new, backend.fail = {2}, lost
        backend.ready.wait = lambda _: threading.Event().wait()
        backend.prepare = functools.partial(StandIn.prepare, backend)
    settings = Settings(port=0, **options.get("settings", {}))
    garbage.freeze()  # as the command does
    with settings.listen() as bound:
        serving._run(Server(backend, settings), "stand-in", bound, None)


def tell(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def until_told() -> threading.Event:
    """Set when standard input ends."""
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), told.set()), daemon=True).start()
    return told


def headers(options: dict) -> dict:
    return {"Authorization": f"Api-Key {options['key']}"} if options.get("key") else {}


def work(options: dict) -> None:
    told, found = until_told(), []

    async def one(number: int, ready: asyncio.Semaphore) -> None:
        address = f"ws://127.0.0.1:{options['port']}"
        async with connect_async(
            address, compression=None, max_size=None, open_timeout=60, additional_headers=headers(options)
        ) as connection:
            await connection.recv()
            ready.release()
            for i in itertools.count():
                if told.is_set():
                    return
                value, started = float(1000 * number + i % 1000), time.monotonic()
                await connection.send(wire.pack({"value": value, "image": IMAGE}))
                answer = wire.unpack(await connection.recv())
                assert answer["ok"], answer
                assert answer["data"]["actions"].item() == value, answer
                found.append((time.monotonic(), time.monotonic() - started))

    async def all_of_them() -> None:
        ready = asyncio.Semaphore(0)
        clients = [asyncio.ensure_future(one(number, ready)) for number in range(options["clients"])]
        for _ in clients:
            await ready.acquire()
        tell("connected")
        await asyncio.gather(*clients)

    asyncio.run(all_of_them())
    tell(json.dumps(found))


class Harm:
    """What a hostile client with the key does; every method without an underscore is a kind, and each frame of `BAD` one."""

    def __init__(self, options: dict) -> None:
        self._options = options

    def _kinds(self):
        own = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        return own | {name: (lambda frame=frame: self._bad(frame, 10)) for name, frame in BAD.items()}

    def _connect(self, **more):
        address, more = (
            f"ws://127.0.0.1:{self._options['port']}",
            {"additional_headers": headers(self._options), **more},
        )
        return connect(address, compression=None, max_size=None, close_timeout=1, open_timeout=20, **more)

    def _socket(self) -> socket.socket:
        """A connection as bare as it comes, its handshake done."""
        found = socket.create_connection(("127.0.0.1", self._options["port"]), timeout=20)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = headers(self._options).get("Authorization")
        found.sendall(UPGRADE + (f"Authorization: {key}\r\n".encode() if key else b"") + b"\r\n")
        found.recv(100)
        return found

    def _bad(self, frame, times: int = 1) -> None:
        with self._connect() as connection:
            for _ in range(times):
                connection.send(frame)
                wire.unpack(connection.recv(timeout=20))

    def text(self) -> None:
        self._bad("é" * 1_000_000)

    def huge_frame(self) -> None:
        self._bad(wire.pack({"value": 1, "more": np.zeros(FRAME - 1000, np.uint8)}))

    def huge_list(self) -> None:
        self._bad(wire.pack({"value": 1, "more": [np.float32(1)] * 2800, "large": bytes(2**21)}))

    def frame_beyond_the_limit(self) -> None:
        self._bad(bytes(FRAME + 1))

    def chunks_without_end(self) -> None:
        self._bad(wire.pack({"value": 1, "count": 64}))

    def new_instructions(self) -> None:
        self._bad(wire.pack({"value": [1e7 + i for i in range(8)]}))

    def nonsense_of_the_right_form(self) -> None:
        for message in ({"type": "reset", "seed": -1}, {"type": "x" * 100_000}, {"value": "x" * 100_000}, {}):
            self._bad(wire.pack(message))

    def leave_in_mid_request(self) -> None:
        with self._connect() as connection:
            connection.send(wire.pack({"value": 1, "count": 64}))
            connection.socket.close()

    def leave_in_mid_frame(self) -> None:
        with self._socket() as bare:
            bare.sendall(b"\x82\xff" + struct.pack("!Q", FRAME) + bytes(1_000_000))

    def pause_in_mid_frame(self) -> None:
        with self._socket() as bare:
            bare.sendall(b"\x82\xff" + struct.pack("!Q", FRAME) + bytes(1_000_000))
            time.sleep(2)

    def never_read(self) -> None:
        message = wire.pack({"value": 1, "count": 64})
        with self._socket() as bare:
            bare.settimeout(2)
            for _ in range(20):
                bare.sendall(b"\x82" + bytes([0x80 | len(message)]) + bytes(4) + message)
            time.sleep(1)

    def empty_fragments(self) -> None:
        with self._socket() as bare:
            bare.sendall(b"\x02\x80" + bytes(4) + (b"\x00\x80" + bytes(4)) * 100_000)

    def pings(self) -> None:
        with self._socket() as bare:
            bare.settimeout(2)
            bare.sendall((b"\x89\xfd" + bytes(4) + bytes(125)) * 20_000)

    def unmasked(self) -> None:
        with self._socket() as bare:
            bare.sendall(b"\x82\x01a")
            bare.recv(100)

    def wrong_key(self) -> None:
        self._connect(additional_headers={"Authorization": "Api-Key wrong"})

    def page_of_a_browser(self) -> None:
        self._connect(origin="http://evil.example")

    def no_http(self) -> None:
        with socket.create_connection(("127.0.0.1", self._options["port"])) as bare:
            bare.sendall(b"\x00" * 5000)

    def _go(self, number: int, told: threading.Event, done: Counter) -> None:
        kinds = list(self._kinds().items())
        for name, kind in itertools.islice(itertools.cycle(kinds), number * len(kinds) // 6, None):
            if told.is_set():
                return
            with contextlib.suppress(OSError, WebSocketException, ValueError, EOFError):
                done[name] += 1
                kind()


def harm(options: dict) -> None:
    told, done = until_told(), Counter()
    threads = [
        threading.Thread(target=Harm(options)._go, args=(number, told, done)) for number in range(options["clients"])
    ]
    for thread in threads:
        thread.start()
    tell("begun")
    for thread in threads:
        thread.join()
    tell(json.dumps(done))


def knock(options: dict) -> None:
    """Some say nothing, some a byte a second, some garbage, some are refused and stay, some ask for /healthz and never read.
    Whoever is dropped comes again at once."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wrong = UPGRADE + b"Authorization: Api-Key wrong-wrong-wrong\r\n\r\n"
    greetings = [b"", b"", UPGRADE[:1], b"\x16\x03\x01" * 100, wrong, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"]
    told, made, chosen = until_told(), 0, selectors.DefaultSelector()
    slow: dict[socket.socket, int] = {}  # bytes that it has sent
    stay: dict[socket.socket, float] = {}  # until when

    def make() -> None:
        nonlocal made
        one = socket.socket()
        one.setblocking(False)
        assert one.connect_ex(("127.0.0.1", options["port"])) in (0, errno.EINPROGRESS)
        chosen.register(one, selectors.EVENT_WRITE, greetings[made % len(greetings)])
        made += 1

    for _ in range(options.get("sockets", 1000)):
        make()
    tell("there")
    next_byte = time.monotonic() + 1
    while not told.is_set():
        for key, mask in chosen.select(0.1):
            one, greeting = key.fileobj, key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    one.send(greeting)
                    chosen.modify(one, selectors.EVENT_READ, greeting)
                    if len(greeting) == 1:
                        slow[one] = 1
                elif greeting in greetings[-2:]:  # an answer came: it stays unread
                    chosen.unregister(one)
                    stay[one] = time.monotonic() + 6
                elif not one.recv(1):
                    raise ConnectionError
            except OSError:
                chosen.unregister(one)
                one.close()
                slow.pop(one, None)
                make()
        if time.monotonic() > next_byte:
            next_byte += 1
            for one, at in list(slow.items()):
                with contextlib.suppress(OSError):
                    one.send(UPGRADE[at : at + 1])
                slow[one] = at + 1
            for one in [one for one, end in stay.items() if end < time.monotonic()]:
                del stay[one]
                one.close()
                make()
    tell(json.dumps(made))


if __name__ == "__main__":
    {"serve": serve, "work": work, "harm": harm, "knock": knock}[sys.argv[1]](json.loads(sys.argv[2]))
