"""The policy server: the published WebSocket dialect, with actions in robot units, raw observations, and `reset` beside it.

One event loop answers connections, pings and GET /healthz; one thread computes (`batching.py`), and a few decode large frames. A
client that sends garbage, goes away, or does not read costs itself an answer and nobody else; one that has not finished its
handshake keeps nobody out (`connections.py`).
"""

from __future__ import annotations

import asyncio
import hmac
import http
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse

from dit4dit.errors import DeviceError, InputError, OutputError
from dit4dit.noise import Noise
from dit4dit.policy.requests import Request
from dit4dit.serving import protocol, wire
from dit4dit.serving.backend import Backend
from dit4dit.serving.batching import Answer, Batcher, BusyError
from dit4dit.serving.connections import ACCEPTED_AT_ONCE, BACKLOG, CLOSING_S, HANDSHAKE_S, Handshakes, notice_death
from dit4dit.serving.lines import Lines
from dit4dit.serving.settings import Settings
from dit4dit.serving.statistics import Statistics

log = logging.getLogger("dit4dit.serving")
# its own lines are tracebacks of every port scan; what matters is logged here
_quiet = logging.getLogger("dit4dit.serving.websockets")
_quiet.setLevel(logging.CRITICAL)

SEND_TIMEOUT_S = 30.0
"""A client that does not read its answer for so long is cut off."""
PING_INTERVAL_S = 20.0
DEAD_AFTER_S = 300.0
"""A peer whose machine does not answer for so long is gone, where `Settings.ping_timeout_s` is None."""
LARGE_FRAME = 2**20
"""Bytes of a frame that is not decoded in the event loop."""
DECODERS = 2
"""Threads that decode such frames; more would only wait for Python's lock."""
FINISH_S = 2.0
"""What a stopping server gives the running pass and its answers."""
CLOSE_S = 0.25
"""What it then gives its clients to take their last answers, and again to close."""


class _GoneError(Exception):
    """A client left before its answer."""


@dataclass
class _Asked:
    """What one frame asks for, as far as it could be read."""

    kind: str = "unknown"  # of the answer
    identity: str | int = protocol.NO_ID
    reset: tuple[int | None, int] | None = None
    chunks: list[Request] = field(default_factory=list)

    def read(self, frame: str | bytes, backend: Backend) -> None:
        """In any thread. Of an inference nothing but what the policy takes is kept; InputError where the frame is none."""
        if isinstance(frame, str):
            raise InputError("message: a text frame; send msgpack in a binary frame")
        message = wire.unpack(frame)
        self.identity = protocol.identity_of(message)
        request = protocol.read(message)
        if request.kind == "ping":
            self.kind = "ping"
        elif request.kind == "reset":
            self.reset = protocol.seed_of(request.message)
            self.kind = "reset"
        else:
            self.kind = "inference_result"
            self.chunks = backend.check(request.message)


class Session:
    """One connection's noise: chunk n of a session is a function of its seed and n."""

    def __init__(self, seed: int | None) -> None:
        self.reset(seed, 0)

    def reset(self, seed: int | None, chunk: int) -> None:
        self.seed = secrets.randbits(63) if seed is None else seed
        self.chunk = chunk

    def noises(self, count: int) -> list[Noise]:
        """Those of the next chunks; they count as used when `chunk` is moved on."""
        return [Noise.from_seed(self.seed, self.chunk + i) for i in range(count)]


class Server:
    """Serve `backend` until `stop`, a signal, the idle time, or the loss of the device."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.settings, self.statistics = settings, Statistics()
        self._backend = backend
        limits = {"max_frame_bytes": settings.max_frame_bytes, "max_batch": settings.max_batch, "protocol": 1}
        self._greeting = wire.pack({**backend.metadata, "request_types": list(protocol.TYPES), **limits})
        self._clients: dict[ServerConnection, asyncio.Task[None]] = {}
        self._busy: set[ServerConnection] = set()
        self._handshakes = Handshakes()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="dit4dit-decode")
        self._decoding: set[Future[None]] = set()
        self.left_behind = False
        self._last_message = time.monotonic()
        self._dead: Exception | None = None
        self._stopping = False
        self._lines = Lines(log)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(
        self, bound: socket.socket, on_ready: Callable[[], None] = lambda: None, *, signals: bool = False
    ) -> None:
        """Serve on a bound socket.

        It returns at most 3 s after `stop` or a signal, whatever its threads do: `left_behind` says whether one is still at
        work, which the end of Python would wait for.

        Args:
            on_ready: called when clients can connect.
            signals: end well on SIGTERM and Ctrl-C; a second one ends at once.

        Raises:
            DeviceError: the device is lost; nothing more can be computed in this process. Another exception is a bug, after
                which no pass can run.
        """
        settings = self.settings
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._on_signal, number)
        self._batcher = Batcher(
            self._backend,
            most=settings.max_batch,
            window_s=settings.batch_window_ms / 1e3,
            queued=settings.max_queued,
            clients=lambda: len(self._clients),
            on_dead=self._on_dead,
        )
        options: dict[str, Any] = {"compression": None, "max_size": settings.max_frame_bytes, "max_queue": 1}
        # a page in a browser sends its Origin: no web page on this machine talks to the robot
        options.update(
            origins=[None], process_request=self._on_http, create_connection=self._handshakes.connection_type()
        )
        options.update(
            open_timeout=HANDSHAKE_S,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=settings.ping_timeout_s,
            close_timeout=CLOSING_S,
        )
        options.update(sock=bound, backlog=ACCEPTED_AT_ONCE, logger=_quiet, server_header=None)
        listening = await serve(self._serve_client, **options)
        bound.listen(BACKLOG)  # asyncio takes as many at once as it lets wait
        on_ready()
        idle = asyncio.create_task(self._watch_idle())
        try:
            await self._stop.wait()
        finally:
            idle.cancel()
            await self._drain(listening)
        if self._dead is not None:
            raise self._dead

    def stop(self) -> None:
        """Take nothing new, answer what is finished within `FINISH_S`, close every connection with 1001 and return from `run`;
        from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: the server ends within 3 s; once more ends it at once", number.name)
        for each in (signal.SIGTERM, signal.SIGINT):
            assert self._loop is not None
            self._loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        self._stop.set()

    def _on_dead(self, error: Exception) -> None:
        what = "the device is lost" if isinstance(error, DeviceError) else "no pass can run any more"
        log.error("%s, the server ends: %s", what, error)
        self._dead = error
        self._stop.set()

    async def _drain(self, listening: WebSocketServer) -> None:
        self._stopping = True
        end = time.monotonic() + FINISH_S
        await self._batcher.stop(FINISH_S)
        end = max(end, time.monotonic() + CLOSE_S)
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self._handshakes.drop()
        listening.close()
        closed = asyncio.ensure_future(listening.wait_closed())
        await asyncio.wait({closed}, timeout=CLOSE_S)
        if not closed.done():  # peers that do not close, or threads that are at work for them
            self._handshakes.drop()
            for connection, task in list(self._clients.items()):
                connection.transport.abort()
                task.cancel()
            await asyncio.wait({closed}, timeout=CLOSE_S)
        closed.cancel()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self.left_behind = bool(self._batcher.at_work or self._decoding)

    async def _watch_idle(self) -> None:
        """As published: the server ends when no message has come for the idle time."""
        limit = self.settings.idle_timeout_s
        while limit is not None:
            await asyncio.sleep(min(5.0, limit / 4))
            if not self._busy and time.monotonic() - self._last_message > limit:
                log.info("no message for %g s (idle timeout): the server ends", limit)
                self._stop.set()
                return

    def _on_http(self, connection: ServerConnection, request: HttpRequest) -> HttpResponse | None:
        """Answer /healthz, and refuse who may not or cannot be served; None lets the client in."""
        if request.path.partition("?")[0] == "/healthz":
            return self._health(connection)
        key = self.settings.api_key
        if key is not None:
            given = request.headers.get_all("Authorization")
            wanted = f"Api-Key {key}".encode()
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), wanted):
                self._refused(connection, "no or a wrong key")
                return connection.respond(
                    http.HTTPStatus.UNAUTHORIZED, "send the server's key: Authorization: Api-Key KEY\n"
                )
        if self._stopping or len(self._clients) >= self.settings.max_clients:
            why = "stopping" if self._stopping else f"full ({self.settings.max_clients} clients)"
            self._refused(connection, f"the server is {why}")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"the server is {why}\n")
        return None

    def _refused(self, connection: ServerConnection, why: str) -> None:
        self.statistics.counts["refused"] += 1
        self._lines.add(logging.WARNING, "%s: refused, %s", connection.remote_address, why)

    def _health(self, connection: ServerConnection) -> HttpResponse:
        status = http.HTTPStatus.SERVICE_UNAVAILABLE if self._stopping or self._dead else http.HTTPStatus.OK
        found = {
            "status": "stopping" if self._stopping or self._dead else "ok",
            "uptime_s": round(self.statistics.uptime_s, 1),
            "clients": len(self._clients),
            "queued": self._batcher.queued,
            "running": self._batcher.running,
            "requests": self.statistics.counts["requests"],
        }
        response = connection.respond(status, json.dumps(found) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    async def _serve_client(self, connection: ServerConnection) -> None:
        peer = connection.remote_address
        task = asyncio.current_task()
        assert task is not None
        self._handshakes.end(connection)
        if len(self._clients) >= self.settings.max_clients:  # several were let in at the same moment
            await connection.close(1013, f"the server is full ({self.settings.max_clients} clients)")
            return
        self._clients[connection] = task
        self.statistics.counts["connections"] += 1
        self._lines.add(logging.INFO, "%s: connected", peer)
        session = Session(self.settings.seed)
        try:
            notice_death(connection, self.settings.ping_timeout_s or DEAD_AFTER_S)
            await self._send(connection, self._greeting)
            while True:
                frames = [await connection.recv()]
                self._last_message = time.monotonic()
                self._busy.add(connection)
                try:
                    await self._send(connection, await self._reply(connection, session, frames))
                finally:
                    self._busy.discard(connection)
                    self._last_message = time.monotonic()
        except ConnectionClosed as closed:
            self._lines.add(logging.INFO, "%s: closed (%s)", peer, closed)
        except _GoneError:
            self._lines.add(logging.INFO, "%s: left before its answer", peer)
        except asyncio.TimeoutError:  # before OSError, which it is one of from Python 3.11 on
            self._lines.add(logging.WARNING, "%s: did not read its answer for %g s; cut off", peer, SEND_TIMEOUT_S)
            connection.transport.abort()
        except OSError as error:  # it was gone before its socket was set up
            self._lines.add(logging.INFO, "%s: left (%s)", peer, error)
        finally:
            self._clients.pop(connection, None)

    async def _send(self, connection: ServerConnection, frame: bytes) -> None:
        await asyncio.wait_for(connection.send(frame), SEND_TIMEOUT_S)

    async def _reply(self, connection: ServerConnection, session: Session, frames: list[str | bytes]) -> bytes:
        """The answer to one frame, whatever it holds; the frame is taken out of the list, so that it is not kept while its
        request waits."""
        started = time.perf_counter()
        asked = _Asked()
        try:
            if len(frames[0]) > LARGE_FRAME:
                await self._read_elsewhere(asked, frames)
            else:
                asked.read(frames.pop(), self._backend)
            more: Mapping[str, Any] = {}
            if asked.reset is not None:
                session.reset(*asked.reset)
                more = {"noise": _noise(session)}
            elif asked.chunks:
                more = await self._infer(connection, session, asked.chunks, started)
            return wire.pack(protocol.ok(asked.kind, asked.identity, **more))
        except (InputError, BusyError, OutputError) as error:
            why = str(error)
            text = "%s: request %r refused: %.300s"
            self._lines.add(logging.INFO, text, connection.remote_address, asked.identity, why)
            _forget_calls(error)
        except (_GoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            # a bug, or a device that failed: the peer gets a number, the log the rest, and the others their answers
            number = secrets.token_hex(4)
            why = f"internal error {number}; the server's log has it under this number"
            log.exception("%s: internal error %s, request %r", connection.remote_address, number, asked.identity)
            _forget_calls(error)
        self.statistics.counts["errors"] += 1
        return wire.pack(protocol.failed(asked.kind, asked.identity, why))

    async def _read_elsewhere(self, asked: _Asked, frames: list[str | bytes]) -> None:
        reading = self._decoders.submit(asked.read, frames.pop(), self._backend)
        self._decoding.add(reading)
        reading.add_done_callback(self._decoding.discard)
        await asyncio.wrap_future(reading)

    async def _infer(
        self, connection: ServerConnection, session: Session, found: list[Request], started: float
    ) -> dict[str, Any]:
        """What the answer to an inference holds."""
        noise, noises = _noise(session), session.noises(len(found))
        asked = [replace(one, noise=own) for one, own in zip(found, noises, strict=True)]
        answer = await self._while_connected(connection, self._batcher.submit(asked))
        session.chunk += len(asked)  # a request that failed has used none
        total = time.perf_counter() - started
        self.statistics.add(answer.batch, queue=answer.queue_s, infer=answer.infer_s, total=total)
        timing = {"queue_ms": answer.queue_s * 1e3, "infer_ms": answer.infer_s * 1e3, "total_ms": total * 1e3}
        return {"data": protocol.data(answer.chunks), "server_timing": timing, "batch": answer.batch, "noise": noise}

    async def _while_connected(self, connection: ServerConnection, coming: Any) -> Answer:
        """The answer; a client that leaves takes its request out of the queue."""
        answer: asyncio.Task[Answer] = asyncio.ensure_future(coming)
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise _GoneError
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()


def _noise(session: Session) -> dict[str, int]:
    return {"seed": session.seed, "chunk": session.chunk}


def _forget_calls(error: BaseException | None) -> None:
    """Its traceback knows every call that failed, with all that came with the request, and tasks that those calls know have the
    error: together they would stay until a garbage collection."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
