"""The policy server: the published WebSocket dialect, with actions in robot units, raw observations, and `reset` beside it.

One event loop answers connections, pings and GET /healthz; one thread computes (`batching.py`). A client that sends garbage, goes
away, or does not read costs itself an answer and nobody else.
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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from websockets.asyncio.server import Server as WebSocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse

from dit4dit.errors import DeviceError, InputError, OutputError
from dit4dit.noise import Noise
from dit4dit.serving import protocol, wire
from dit4dit.serving.backend import Backend
from dit4dit.serving.batching import Answer, Batcher, BusyError
from dit4dit.serving.settings import Settings
from dit4dit.serving.statistics import Statistics

log = logging.getLogger("dit4dit.serving")
# its own lines are tracebacks of every port scan; what matters is logged here
_quiet = logging.getLogger("dit4dit.serving.websockets")
_quiet.setLevel(logging.CRITICAL)

SEND_TIMEOUT_S = 30.0
"""A client that does not read its answer for so long is cut off."""
SPARE_CONNECTIONS = 32
"""TCP connections beyond the clients: for /healthz, and for saying that the server is full."""


class _GoneError(Exception):
    """A client left before its answer."""


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
        self._clients: set[ServerConnection] = set()
        self._busy: set[ServerConnection] = set()
        self._open = 0
        self._last_message = time.monotonic()
        self._dead: DeviceError | None = None
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(
        self, bound: socket.socket, on_ready: Callable[[], None] = lambda: None, *, signals: bool = False
    ) -> None:
        """Serve on a bound socket.

        Args:
            on_ready: called when clients can connect.
            signals: end well on SIGTERM and Ctrl-C; a second one ends at once.

        Raises:
            DeviceError: the device is lost; nothing more can be computed in this process.
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
        options.update(origins=[None], process_request=self._on_http, create_connection=self._connection())
        async with serve(self._serve_client, sock=bound, logger=_quiet, server_header=None, **options) as listening:
            on_ready()
            idle = asyncio.create_task(self._watch_idle())
            await self._stop.wait()
            idle.cancel()
            await self._drain(listening)
        if self._dead is not None:
            raise self._dead

    def stop(self) -> None:
        """Finish the running pass, answer it, close every connection with 1001 and return from `run`; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: finishing the running request; once more ends at once", number.name)
        for each in (signal.SIGTERM, signal.SIGINT):
            assert self._loop is not None
            self._loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        self._stop.set()

    def _on_dead(self, error: DeviceError) -> None:
        log.error("the device is lost, the server ends: %s", error)
        self._dead = error
        self._stop.set()

    async def _drain(self, listening: WebSocketServer) -> None:
        self._stopping = True
        if self._dead is None:
            await self._batcher.stop()
        end = time.monotonic() + SEND_TIMEOUT_S
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.01)
        listening.close()
        await listening.wait_closed()

    async def _watch_idle(self) -> None:
        """As published: the server ends when no message has come for the idle time."""
        limit = self.settings.idle_timeout_s
        while limit is not None:
            await asyncio.sleep(min(5.0, limit / 4))
            if not self._busy and time.monotonic() - self._last_message > limit:
                log.info("no message for %g s (idle timeout): the server ends", limit)
                self._stop.set()
                return

    def _connection(self) -> type[ServerConnection]:
        """Connections that are counted from their first byte, so that those that never ask for anything are bounded too."""
        server, most = self, self.settings.max_clients + SPARE_CONNECTIONS

        class Counted(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                server._open += 1
                if server._open > most:
                    self.transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                server._open -= 1
                super().connection_lost(exc)

        return Counted

    def _on_http(self, connection: ServerConnection, request: HttpRequest) -> HttpResponse | None:
        """Answer /healthz, and refuse who may not or cannot be served; None lets the client in."""
        if request.path.partition("?")[0] == "/healthz":
            return self._health(connection)
        key = self.settings.api_key
        if key is not None:
            given = request.headers.get_all("Authorization")
            wanted = f"Api-Key {key}".encode()
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), wanted):
                self.statistics.counts["refused"] += 1
                log.warning("%s: refused, no or a wrong key", connection.remote_address)
                return connection.respond(
                    http.HTTPStatus.UNAUTHORIZED, "send the server's key: Authorization: Api-Key KEY\n"
                )
        if self._stopping or len(self._clients) >= self.settings.max_clients:
            self.statistics.counts["refused"] += 1
            why = "stopping" if self._stopping else f"full ({self.settings.max_clients} clients)"
            log.warning("%s: refused, the server is %s", connection.remote_address, why)
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"the server is {why}\n")
        return None

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
        if len(self._clients) >= self.settings.max_clients:  # several were let in at the same moment
            await connection.close(1013, f"the server is full ({self.settings.max_clients} clients)")
            return
        self._clients.add(connection)
        self.statistics.counts["connections"] += 1
        log.info("%s: connected", peer)
        session = Session(self.settings.seed)
        try:
            await self._send(connection, self._greeting)
            while True:
                frame = await connection.recv()
                self._last_message = time.monotonic()
                self._busy.add(connection)
                try:
                    await self._send(connection, await self._reply(connection, session, frame))
                finally:
                    self._busy.discard(connection)
                    self._last_message = time.monotonic()
        except ConnectionClosed as closed:
            log.info("%s: closed (%s)", peer, closed)
        except _GoneError:
            log.info("%s: left before its answer", peer)
        except asyncio.TimeoutError:
            log.warning("%s: did not read its answer for %g s; cut off", peer, SEND_TIMEOUT_S)
            connection.transport.abort()
        finally:
            self._clients.discard(connection)

    async def _send(self, connection: ServerConnection, frame: bytes) -> None:
        await asyncio.wait_for(connection.send(frame), SEND_TIMEOUT_S)

    async def _reply(self, connection: ServerConnection, session: Session, frame: str | bytes) -> bytes:
        """The answer to one frame, whatever it holds."""
        started = time.perf_counter()
        kind = "unknown"
        identity: str | int = protocol.NO_ID
        try:
            if isinstance(frame, str):
                raise InputError("message: a text frame; send msgpack in a binary frame")
            message = wire.unpack(frame)
            identity = protocol.identity_of(message)
            request = protocol.read(message)
            if request.kind == "ping":
                return wire.pack(protocol.ok("ping", identity))
            if request.kind == "reset":
                session.reset(*protocol.seed_of(request.message))
                return wire.pack(protocol.ok("reset", identity, noise=_noise(session)))
            kind = "inference_result"
            return await self._infer(connection, session, request, started)
        except (InputError, BusyError, OutputError) as error:
            why = str(error)
            log.info("%s: request %r refused: %.300s", connection.remote_address, identity, why)
        except (_GoneError, asyncio.CancelledError):
            raise
        except Exception:
            # a bug, or a device that failed: the peer gets a number, the log the rest, and the others their answers
            number = secrets.token_hex(4)
            why = f"internal error {number}; the server's log has it under this number"
            log.exception("%s: internal error %s, request %r", connection.remote_address, number, identity)
        self.statistics.counts["errors"] += 1
        return wire.pack(protocol.failed(kind, identity, why))

    async def _infer(
        self, connection: ServerConnection, session: Session, request: protocol.Request, started: float
    ) -> bytes:
        found = self._backend.check(request.message)
        noise, noises = _noise(session), session.noises(len(found))
        asked = [replace(one, noise=own) for one, own in zip(found, noises, strict=True)]
        answer = await self._while_connected(connection, self._batcher.submit(asked))
        session.chunk += len(asked)  # a request that failed has used none
        total = time.perf_counter() - started
        self.statistics.add(answer.batch, queue=answer.queue_s, infer=answer.infer_s, total=total)
        timing = {"queue_ms": answer.queue_s * 1e3, "infer_ms": answer.infer_s * 1e3, "total_ms": total * 1e3}
        more = {"data": protocol.data(answer.chunks), "server_timing": timing, "batch": answer.batch, "noise": noise}
        return wire.pack(protocol.ok("inference_result", request.identity, **more))

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
