"""Client of a DiT4DiT policy server. One self-contained file: copy it to the robot.

It needs Python 3.8 or later, numpy, msgpack >= 1.0 and websockets >= 13.1, and no checkpoint: images and state go out as the
robot has them, actions come back in its units.

    with Client("127.0.0.1", api_key=key, wait_s=60) as policy:
        policy.metadata["views"], policy.metadata["state_keys"]     # what an observation must hold
        policy.reset(seed=7)                                        # chunk n of a session is a function of (seed, n)
        chunk = policy.infer({"images": {"primary_image": image, ...}, "state": {"x": [0.1], ...}}, "open the drawer")
        chunk.actions                                               # float32 [K, A], robot units

`predict_action` speaks the published dialect, to the published server too. What a server or a connection does wrong is a
`ServingError`, whatever it is and whatever library noticed it; what the caller passes wrong is a `TypeError` or `ValueError`, and
nothing is sent.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import re
import socket
import ssl
import threading
import time
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import msgpack
import numpy as np

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
    from websockets.sync.client import ClientConnection, connect
    from websockets.uri import parse_uri
except ImportError as error:  # what a robot's distribution ships is often older
    raise ImportError(f"{error}; the client needs pip install 'websockets>=13.1'") from error

PORT = 10093
MAX_BACKOFF_S = 5.0
LAST_ATTEMPT_S = 0.25
"""The last attempt of a wait gets this long, however little of the wait is left."""
CLOSE_S = 2.0
WATCH_S = 0.25
"""How often it is looked whether a send takes too long."""
MAX_OBJECTS = 20_000
"""Values in one message, arrays not counted by their elements; an answer has about 20."""
MAX_DEPTH = 32
MAX_TEXT = 8000

_PASSING_STATUS = (502, 503, 504)  # full, stopping, or a proxy whose server is not up yet
_OUR_CODES = (1002, 1007, 1009)  # what websockets closes with when frames are wrong, no UTF-8, or too large
# websockets logs tracebacks of strangers' bytes; what they mean is in the error that the caller gets
_quiet = logging.getLogger("dit4dit.serving.client.websockets")
_quiet.setLevel(logging.CRITICAL)


class ServingError(Exception):
    """Base of all errors of this client."""


class ConnectError(ServingError, ConnectionError):
    """The server cannot be reached, or does not let this client in."""


class ConnectionLost(ServingError, ConnectionError):
    """The connection ended; `connect()` makes another, which goes on at the session's next chunk."""


class RequestTimeout(ServingError, TimeoutError):
    """No answer in time. The connection is closed, so that a late answer is not taken for the next one's."""


class ServerError(ServingError, RuntimeError):
    """The server refused the request; the message is its own. The connection goes on, except after the traceback that the
    published server sends before it hangs up.
    """


class ProtocolError(ServingError, RuntimeError):
    """What came is not an answer to what was asked, and the connection is closed; or the server does not know this kind of
    request, and nothing was sent.
    """


class Chunk(NamedTuple):
    """The next K actions.

    Attributes:
        actions: float32 [K, A] in robot units.
        names: A names, one per column.
        control_hz: how many of them the robot executes per second.
        normalized: float32 [K, A_model], what the model wrote.
        seed, chunk: of the noise that led to them.
        timing: milliseconds, as in `Client.timing`.
        observed_at_ns, computed_at_ns: when the observation was made (the request, where the caller has not said it), and when
            the answer was there: ns of this machine's CLOCK_MONOTONIC (`time.monotonic_ns`). Row i is meant for i / control_hz
            seconds after the first.
    """

    actions: np.ndarray
    names: tuple[str, ...]
    control_hz: float
    normalized: np.ndarray
    seed: int
    chunk: int
    timing: dict[str, float]
    observed_at_ns: int
    computed_at_ns: int


def pack(message: Any) -> bytes:
    """The message as bytes: msgpack, with NumPy arrays and scalars as marked maps (the published codec, openpi's too)."""
    packed: bytes = msgpack.packb(message, default=_marked)
    return packed


def unpack(frame: bytes) -> Any:
    """The message of one frame; its arrays are read-only.

    Raises:
        ValueError: not msgpack, cut short, too many or too deeply nested values, or an array that contradicts itself.
    """
    _check_structure(frame)
    try:
        return msgpack.unpackb(frame, object_hook=_restored)
    # bad UTF-8, a map's key that is neither text nor bytes, numbers that their dtype cannot hold
    except Exception as error:
        raise ValueError(f"not readable msgpack: {_said(error)}") from None


def _marked(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} cannot be sent; expected arrays, numbers, text, lists and dicts")
    if value.dtype.kind in "OVc":
        raise TypeError(f"an array of dtype {value.dtype} cannot be sent; no object, void or complex dtypes")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


# msgpack's first byte -> bytes of the value (https://github.com/msgpack/msgpack/blob/master/spec.md)
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED.update((first, 1 << first % 4) for first in range(0xCC, 0xD4))
# -> bytes of the length that follows, and how many values each unit of it announces; 0: it counts bytes
_COUNTED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_COUNTED.update({0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)})
_DTYPE = re.compile(r"[<>|=]?(?:[biufSU][0-9]{1,7}|[mM]8\[[0-9]{0,4}[A-Za-z]{1,2}\])")


def _check_structure(frame: bytes) -> None:
    """Walk over the headers without making anything of them, as the server does: ten bytes can claim a list of four billion."""
    position, found, coming = 0, 0, [1]  # coming: values still to come in each open list or map
    while coming:
        if coming[-1] == 0:
            coming.pop()
            continue
        coming[-1] -= 1
        if position >= len(frame):
            raise ValueError("the message is cut short")
        first, position, inside = frame[position], position + 1, 0
        if 0x80 <= first < 0x90:
            inside = 2 * (first & 0x0F)
        elif 0x90 <= first < 0xA0:
            inside = first & 0x0F
        elif 0xA0 <= first < 0xC0:
            position += first & 0x1F
        elif first in _FIXED:
            position += _FIXED[first]
        elif first in _COUNTED:
            width, each = _COUNTED[first]
            length = int.from_bytes(frame[position : position + width], "big")
            position, inside = position + width + (0 if each else length), each * length
        elif 0xC0 <= first < 0xE0:
            raise ValueError(f"msgpack type 0x{first:02x} is not part of the protocol")
        found += 1
        if found + inside > MAX_OBJECTS or len(coming) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_OBJECTS} values, or nested more than {MAX_DEPTH} deep")
        if inside:
            coming.append(inside)
    if position != len(frame):
        raise ValueError("the message is cut short, or there are bytes after its end")


def _restored(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in found and b"__npgeneric__" not in found:
        return found
    text, data, shape = found.get(b"dtype"), found.get(b"data"), found.get(b"shape")
    # only these forms: np.dtype reads whole structures from text, and pointers
    dtype = np.dtype(text) if isinstance(text, str) and _DTYPE.fullmatch(text) else None
    if dtype is None or dtype.itemsize == 0:
        raise ValueError(f"expected a dtype like '|u1' or '<f4', got {_short(text)}")
    if b"__npgeneric__" in found:
        # text would come as such; made to a long text dtype here, a few bytes could fill the memory
        if dtype.kind not in "biuf" or not isinstance(data, (bool, int, float)):
            raise ValueError(f"expected a number as {dtype}, got {_short(data)}")
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= data <= np.iinfo(dtype).max:  # older NumPy lets it wrap
            raise ValueError(f"{data} is no {dtype}")
        return np.array(data, dtype)[()]
    sizes: list[Any] = shape if isinstance(shape, list) and len(shape) <= 32 else [None]
    if not isinstance(data, bytes) or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ValueError("expected an array's data as bytes and its shape as a list of sizes")
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not a {dtype} array of shape {str(sizes)[:60]}")
    return np.ndarray(tuple(sizes), dtype, buffer=data)


def _is(value: Any, text: str) -> bool:
    """Whether a stranger's value is this text; compared with an array, == is no answer."""
    return isinstance(value, str) and value == text


def _short(value: Any) -> str:
    """What a stranger sent, in bounded work: text is cut before it is printed, arrays are dtype and shape, the rest its type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def _said(error: object, most: int = 300) -> str:
    """An error's or a server's text, of bounded length and printable; of a traceback, the end says most."""
    text = str(error) or type(error).__name__
    cut = text if len(text) <= most else "... " + text[-most:]
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in cut).strip()


class Client:
    """A connection to a policy server. Requests of several threads wait for each other; make a client each to share passes.
    `close` may be called from any thread, and ends what the others wait for.

    Attributes:
        metadata: what the server said on connecting; this project's tells views, state_keys, action_names, control_hz,
            action_horizon, steps, checkpoint_hash and versions.
        timing: of the last request, milliseconds: encode, network (this project's server only), queue, infer, server (all of its
            time), decode, total.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = PORT,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        wait_s: float = 0.0,
        backoff_s: float = 0.25,
        max_frame_bytes: int = 64 * 2**20,
    ) -> None:
        """Connect.

        Args:
            host: address, or a whole ws:// or wss:// address (then `port` is not used).
            api_key: the server's key, where it has one.
            timeout_s: of one request.
            connect_timeout_s: of one attempt to connect, from the name's lookup to the server's greeting.
            wait_s: how long to try again while there is no server yet, it is full or stopping, its port resets, or a proxy says
                so (502, 503, 504); 0 tries once. A wrong key or certificate, a bad address and what is no policy server fail at
                once. It lasts at most wait_s + connect_timeout_s.
            backoff_s: pause after the first attempt; it doubles up to 5 s.
            max_frame_bytes: largest answer that is taken.

        Raises:
            ConnectError: not reachable, or not let in.
            ValueError: a time that is none, or a key that no server can have.
        """
        most = threading.TIMEOUT_MAX / 2
        if not all(0 < given <= most for given in (timeout_s, connect_timeout_s, backoff_s)) or not 0 <= wait_s <= most:
            raise ValueError(
                "timeout_s, connect_timeout_s and backoff_s must be more than 0, wait_s 0 or more, and none endless"
            )
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ValueError("api_key: expected ASCII letters without spaces; a key read from a file needs .strip()")
        name = f"[{host}]" if ":" in host and "://" not in host and not host.startswith("[") else host
        self.address = host if "://" in host else f"ws://{name}:{port}"
        self.timeout_s, self.connect_timeout_s = timeout_s, connect_timeout_s
        self.wait_s, self.backoff_s, self.max_frame_bytes = wait_s, backoff_s, max_frame_bytes
        self.metadata: dict[str, Any] = {}
        self.timing: dict[str, float] = {}
        self._api_key = api_key
        self._connection: ClientConnection | None = None
        self._session: tuple[int, int] | None = None  # seed and next chunk, once reset
        self._count = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()  # close() was called since the last connect()
        self.connect()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return "Client({}, {})".format(self.address, "open" if self._connection is not None else "closed")

    @property
    def knows_observations(self) -> bool:
        """Whether the server is this project's, and takes raw observations and reset."""
        return _is(self.metadata.get("server"), "dit4dit")

    def connect(self) -> None:
        """Connect again after a loss; a session that was reset goes on at its next chunk. Nothing happens while connected.

        Raises:
            ConnectError: not reachable, or not let in, or `close` was called meanwhile.
        """
        with self._lock:
            if self._closed.is_set():  # while a request that had its answer still held the lock
                self._drop()
            if self._connection is not None:
                return
            self._closed.clear()
            end, pause, limit = time.monotonic() + self.wait_s, self.backoff_s, self.connect_timeout_s
            while True:
                try:
                    self._attempt(limit)
                    break
                except _NotYet as error:
                    left = end - time.monotonic()
                    if left <= 0:
                        raise ConnectError(str(error)) from None
                if self._closed.wait(min(pause, left)):
                    break
                pause = min(2 * pause, MAX_BACKOFF_S)
                limit = min(self.connect_timeout_s, max(end - time.monotonic(), LAST_ATTEMPT_S))
            if self._closed.is_set():
                self._drop()
                raise ConnectError(f"{self.address}: close() was called while connecting")

    def infer(self, observation: Any, instruction: str, *, observed_at_ns: int | None = None) -> Chunk:
        """The next actions.

        Args:
            observation: a mapping with `images` (view -> uint8 [H, W, 3], RGB, upright) and `state` (key -> numbers in robot
                units), or an object with these attributes; names as in `metadata`. NumPy arrays, not a GPU's tensors.
            instruction: what to do, in words.
            observed_at_ns: when the observation was made, `time.monotonic_ns()` of this machine; the time of this call where
                None. It is not sent: clocks of two machines have nothing in common.

        Raises:
            TypeError: the observation holds what cannot be sent. ValueError: a stamp of another clock, or of the future.
            ServerError: the observation does not fit, or the server cannot take it now; the message says why.
            ProtocolError, ConnectionLost, RequestTimeout.
        """
        observed_at = _stamp(observed_at_ns)
        self._need_own("infer")
        get = observation.get if isinstance(observation, Mapping) else lambda key: getattr(observation, key, None)
        raw: dict[str, Any] = {}
        for part in ("images", "state"):
            found = get(part)
            if not isinstance(found, Mapping) and found is not None:
                raise TypeError(f"observation[{part!r}]: expected a mapping of names, got a {type(found).__name__}")
            raw[part] = dict(found or {})

        def read(reply: dict[str, Any]) -> Chunk:
            return self._chunk(reply, observed_at)

        return self._ask("infer", "inference_result", read, observation=raw, instruction=instruction)

    def predict_action(self, examples: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
        """The published call.

        Args:
            examples: dicts with `image` (uint8 [H, W, 3], views joined, or a list of them), `lang`, and optionally `state`
                ([1, state_dim], encoded and padded); as `Policy.predict_action` takes them.

        Returns:
            {"normalized_actions": float32 [B, K, A_model]}, from this project's server also "actions" [B, K, A] in robot units.

        Raises:
            As `infer` does.
        """
        given = [examples] if isinstance(examples, Mapping) else list(examples)

        def read(reply: dict[str, Any]) -> dict[str, Any]:
            data = reply.get("data")
            names = ["normalized_actions", *(["actions"] if self.knows_observations else [])]
            arrays = {name: self._actions(reply, name, len(given)) for name in names}
            if self.knows_observations:
                self._advance(reply, len(given))
            return {**data, **arrays} if isinstance(data, dict) else arrays

        return self._ask("predict_action", "inference_result", read, examples=given)

    def ping(self) -> float:
        """Ask whether the server answers; returns the round trip in seconds. It does not wait for others' chunks."""
        return self._ask("ping", "ping", lambda _: self.timing["total"] / 1e3)

    def reset(self, seed: int | None = None, chunk: int = 0) -> int:
        """Begin a session (an episode): its chunk n has the noise (seed, n), from `chunk` on. None asks for a fresh seed.

        Returns:
            The seed.
        """
        self._need_own("reset")

        def read(reply: dict[str, Any]) -> int:
            self._session = self._noise(reply)
            return self._session[0]

        return self._ask("reset", "reset", read, seed=seed, chunk=chunk)

    def close(self) -> None:
        """End the connection; does nothing where there is none. A request of another thread ends with `ConnectionLost`."""
        self._closed.set()
        if self._lock.acquire(blocking=False):
            try:
                connection, self._connection = self._connection, None
                if connection is not None:
                    _close(connection)
            finally:
                self._lock.release()
        else:  # whoever has the lock drops what is left
            connection = self._connection
            if connection is not None:
                _cut(connection)

    def _need_own(self, what: str) -> None:
        if not self.knows_observations:
            raise ProtocolError(
                f"{what}: the server at {self.address} speaks the published dialect only, without raw observations and reset; "
                "use predict_action"
            )

    def _attempt(self, seconds: float) -> None:
        """Connect once, with the server's greeting and the session's next chunk; `_NotYet` where that may pass."""
        end, connection = time.monotonic() + seconds, None
        try:
            connection = self._open(end)
            greeting = connection.recv(timeout=_left(end))
            metadata = None if isinstance(greeting, str) else unpack(greeting)
            if not isinstance(metadata, dict):
                raise ProtocolError(
                    f"its greeting is {_short(greeting if metadata is None else metadata)}, expected a map"
                )
            self.metadata = metadata
            if self._session is not None and self.knows_observations:
                seed, chunk = self._session
                frame, identity = self._packed("reset", {"seed": seed, "chunk": chunk})
                reply = self._read(self._exchange(connection, frame, _left(end)), identity, "reset")
                if self._noise(reply) != self._session:
                    raise ProtocolError("the server began another session than it was asked for")
            self._connection = connection
        except BaseException as error:
            if connection is not None:
                _abandon(connection)
            if not isinstance(error, Exception):
                raise
            raise self._failure(error) from None

    def _open(self, end: float) -> ClientConnection:
        options: dict[str, Any] = {"compression": None, "max_size": self.max_frame_bytes, "close_timeout": CLOSE_S}
        # What older websockets do not know. Straight to the address, whatever proxy the environment names; no pings of our own,
        # which the published server does not answer while it computes (a request's time limit is what counts).
        newer: dict[str, Any] = {"proxy": None, "ping_interval": None, "legacy": True}
        known = inspect.signature(connect).parameters
        options.update((name, value) for name, value in newer.items() if name in known)
        if self._api_key:
            options["additional_headers"] = {"Authorization": "Api-Key " + self._api_key}
        try:
            address = parse_uri(self.address)
            address.host.encode("idna")
            if re.search(r"\s|\0", address.host):
                raise ValueError("a host has no spaces")
        except Exception as error:
            raise ConnectError(
                f"{self.address}: not an address ({_said(error)}); expected a host, or ws://HOST:PORT"
            ) from None
        sock = _reach(address.host, address.port, end)
        try:
            return connect(
                self.address,
                sock=sock,
                open_timeout=_left(end),
                logger=_quiet,
                create_connection=_Connection,
                **options,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            raise

    def _failure(self, error: Exception) -> Exception:
        """What an attempt's error means: `_NotYet` where it may pass, else a `ConnectError`."""
        what = _said(error)
        if isinstance(error, ConnectError):
            return error
        if isinstance(error, ServerError):
            return ConnectError(f"{self.address}: the session cannot go on there: {what}")
        if isinstance(error, InvalidStatus):
            status, body = error.response.status_code, bytes(error.response.body or b"").decode("utf-8", "replace")
            text = f"{self.address}: refused with status {status} ({_said(body[:200] or 'no reason given')})"
            if status == 401:
                text += (
                    "; pass the server's key as api_key=" if not self._api_key else "; the api_key is not the server's"
                )
            return (_NotYet if status in _PASSING_STATUS else ConnectError)(text)
        if isinstance(error, ssl.SSLError):
            passing = isinstance(error, (ssl.SSLEOFError, ssl.SSLSyscallError, ssl.SSLZeroReturnError))
            if not passing:
                return ConnectError(
                    f"{self.address}: no TLS with it ({what}); check its certificate, or use ws:// without TLS"
                )
        elif isinstance(error, ConnectionClosed):
            passing = not _ours(error) and not (error.rcvd is not None and error.rcvd.code == 1008)
            what = f"it closed before its greeting: {what}"
        elif isinstance(error, InvalidMessage):
            passing = isinstance(error.__cause__, EOFError)
            what = f"{what}: {_said(error.__cause__)}"
        else:  # names that are not known, refusals, resets, time limits, and what a reset makes websockets 13 stumble over
            passing = not isinstance(error, (InvalidHandshake, ValueError, ProtocolError))
        if passing:
            return _NotYet(
                f"{self.address}: no policy server there ({what}); start one (for other machines with --host 0.0.0.0 and a key), "
                "or give it longer with wait_s"
            )
        return ConnectError(f"{self.address}: not a policy server ({what}); is the port right?")

    def _ask(self, kind: str, wanted: str, read: Callable[[dict[str, Any]], Any], **fields: Any) -> Any:
        """What `read` makes of the one answer to one request; its times go to `timing`."""
        with self._lock:
            connection = self._connection
            if connection is None:
                raise ConnectionLost(f"not connected to {self.address}; call connect()")
            started = time.perf_counter()
            frame, identity = self._packed(kind, fields)
            try:
                encoded = time.perf_counter()
                answer = self._exchange(connection, frame, self.timeout_s)
                arrived = time.perf_counter()
                reply = self._read(answer, identity, wanted)
                done = time.perf_counter()
                times = {"encode": encoded - started, "decode": done - arrived, "total": done - started}
                self.timing = {name: 1e3 * seconds for name, seconds in times.items()}
                self._add_server_timing(reply, 1e3 * (arrived - encoded))
                return read(reply)
            except ServerError:
                raise
            except BaseException as error:  # an interrupt too: a late answer must not be taken for the next one's
                self._drop()
                if not isinstance(error, Exception) or isinstance(error, ServingError):
                    raise
                raise ProtocolError(f"{self.address}: an answer that cannot be read ({_said(error)})") from error
            finally:
                if self._closed.is_set():
                    self._drop()

    def _packed(self, kind: str, fields: dict[str, Any]) -> tuple[bytes, str]:
        """A request, and its identity."""
        self._count += 1
        identity = str(self._count)
        try:
            frame = pack(dict({"type": kind, "request_id": identity}, **fields))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TypeError(f"{kind}: {_place(fields)}: {error}") from None
        most = self.metadata.get("max_frame_bytes")
        if isinstance(most, int) and len(frame) > most:
            raise ServerError(
                f"the request has {len(frame)} bytes and {self.address} takes {most}; send smaller images, or start the "
                "server with a larger frame"
            )
        return frame, identity

    def _exchange(self, connection: ClientConnection, frame: bytes, seconds: float) -> bytes | str:
        end = time.monotonic() + seconds
        try:
            with _limit(connection, end):
                connection.send(frame)
            return connection.recv(timeout=_left(end))
        # websockets' and the socket's; in rare states of a connection also websockets' assertions
        except Exception as error:
            if self._closed.is_set():
                raise ConnectionLost(f"{self.address}: close() was called during the request") from None
            if isinstance(error, TimeoutError) or time.monotonic() >= end:
                raise RequestTimeout(f"{self.address}: no answer in {seconds:g} s; call connect()") from None
            if isinstance(error, ConnectionClosed) and _ours(error):
                raise ProtocolError(f"{self.address}: an answer that cannot be taken ({_said(error)})") from None
            raise ConnectionLost(f"{self.address}: the connection ended ({_said(error)}); call connect()") from None

    def _read(self, answer: bytes | str, identity: str, wanted: str) -> dict[str, Any]:
        if isinstance(answer, str):  # the published server's traceback, after which it hangs up
            self._drop()
            raise ServerError(_said(answer, MAX_TEXT))
        try:
            reply = unpack(answer)
        except ValueError as error:
            raise ProtocolError(f"{self.address}: an answer that cannot be read ({_said(error)})") from None
        if not isinstance(reply, dict):
            raise self._wrong("the answer", "a map", reply)
        good, given = reply.get("ok") is True, reply.get("request_id")
        # a refusal of what the server could not read has no identity of ours
        if not _is(given, identity) and not (_is(given, "default") and not good):
            raise self._wrong("an answer to another request: request_id", repr(identity), given)
        if not good:
            detail = reply.get("error")
            found = detail.get("message") if isinstance(detail, dict) else detail
            raise ServerError(
                _said(found, MAX_TEXT) if isinstance(found, str) else f"no reason given ({_short(found)})"
            )
        if not _is(reply.get("type"), wanted):
            raise self._wrong("type", repr(wanted), reply.get("type"))
        return reply

    def _wrong(self, where: str, wanted: str, got: Any) -> ProtocolError:
        return ProtocolError(f"{self.address}: {where}: expected {wanted}, got {_short(got)}; the connection is closed")

    def _add_server_timing(self, reply: dict[str, Any], waited_ms: float) -> None:
        server = reply.get("server_timing", {})
        if not isinstance(server, dict):
            raise self._wrong("server_timing", "a map", server)
        for name, ms in server.items():
            if isinstance(ms, bool) or not isinstance(ms, (int, float, np.number)):
                raise self._wrong(f"server_timing[{_short(name)}]", "milliseconds", ms)
        self.timing.update((name, float(server[name + "_ms"])) for name in ("queue", "infer") if name + "_ms" in server)
        if "total_ms" in server:
            self.timing.update(network=waited_ms - float(server["total_ms"]), server=float(server["total_ms"]))

    def _chunk(self, reply: dict[str, Any], observed_at_ns: int) -> Chunk:
        actions, normalized = (self._actions(reply, name, 1)[0] for name in ("actions", "normalized_actions"))
        names, rate = self.metadata.get("action_names"), self.metadata.get("control_hz")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._wrong("the greeting's action_names", "a list of names", names)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise self._wrong("the greeting's control_hz", "a rate above 0", rate)
        if actions.shape[1] != len(names) or len(normalized) != len(actions):
            raise self._wrong("data['actions']", f"float32 [1, {len(normalized)}, {len(names)}]", actions[None])
        seed, chunk = self._advance(reply, 1)
        stamps = (observed_at_ns, time.monotonic_ns())
        return Chunk(actions, tuple(names), rate, normalized, seed, chunk, self.timing, *stamps)

    def _actions(self, reply: dict[str, Any], name: str, count: int) -> np.ndarray:
        """`data[name]`, as an array of the caller's own: float32 [count, K, A] (the published server's: any float dtype)."""
        data = reply.get("data")
        found: Any = data.get(name) if isinstance(data, dict) else data
        good = isinstance(found, np.ndarray) and found.ndim == 3 and len(found) == count and 0 not in found.shape
        if not good or found.dtype.kind != "f" or (self.knows_observations and found.dtype != np.float32):
            raise self._wrong(f"data[{name!r}]", f"float32 [{count}, K, A]", found)
        if not np.isfinite(found).all():
            raise ProtocolError(
                f"{self.address}: data[{name!r}]: some actions are not finite; the connection is closed"
            )
        copied: np.ndarray = found.copy()
        return copied

    def _noise(self, reply: dict[str, Any]) -> tuple[int, int]:
        """Seed and chunk that an answer tells."""
        noise = reply.get("noise")
        found = noise if isinstance(noise, dict) else {}
        for name in ("seed", "chunk"):
            value = found.get(name)
            if type(value) is not int or value < 0:
                raise self._wrong(f"noise[{name!r}]", "an integer of 0 or more", value)
        return found["seed"], found["chunk"]

    def _advance(self, reply: dict[str, Any], chunks: int) -> tuple[int, int]:
        """Seed and chunk of an inference's noise; the session goes on after it."""
        seed, chunk = self._noise(reply)
        if self._session is not None:
            self._session = (self._session[0], chunk + chunks)
        return seed, chunk

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _abandon(connection)


class _Connection(ClientConnection):
    """Whose other side is done, or has done something wrong, need not hang up first: it may never."""

    recv_exc = None  # websockets 13.1 starts the thread that reads this before it sets it
    send_end = math.inf  # when what blocks in sending is cut off

    def watch(self) -> None:
        """Cut off a send whose time is over, while the connection lasts. A socket's own limit starts anew with every byte that a
        slow server takes, and a timer for each request would cost 0.1 ms of it.
        """
        while self.recv_events_thread.is_alive():
            self.recv_events_thread.join(WATCH_S)
            if time.monotonic() > self.send_end:
                _cut(self)

    def send_data(self) -> None:  # called after whatever came
        super().send_data()
        protocol = self.protocol
        goodbye = protocol.close_rcvd is None and protocol.close_sent is not None and protocol.close_sent.code == 1000
        if protocol.handshake_exc is not None or (protocol.close_expected() and not goodbye):
            _cut(self)

    def handshake(self, *args: Any, **options: Any) -> None:
        failed: Exception | None = None
        try:
            super().handshake(*args, **options)
        except Exception as error:
            failed = self.protocol.handshake_exc or error
        if failed is not None:
            raise failed
        threading.Thread(target=self.watch, daemon=True).start()


class _NotYet(Exception):
    """An attempt failed in a way that may pass."""


def _stamp(observed_at_ns: Any) -> int:
    now = time.monotonic_ns()
    if observed_at_ns is None:
        return now
    if isinstance(observed_at_ns, bool) or not isinstance(observed_at_ns, (int, np.integer)):
        raise TypeError(f"observed_at_ns: expected time.monotonic_ns(), got {_short(observed_at_ns)}")
    if not 0 <= observed_at_ns <= now:
        raise ValueError(
            f"observed_at_ns: expected time.monotonic_ns() of when the observation was made, 0 to {now} (the present), got "
            f"{observed_at_ns}; time.time_ns() and other machines' clocks are not this one"
        )
    return int(observed_at_ns)


def _left(end: float) -> float:
    return max(end - time.monotonic(), 1e-3)


def _place(value: Any, depth: int = 4) -> str:
    """Where in a request that is which cannot be packed, as ['images']['front']."""
    if isinstance(value, (dict, list, tuple)) and depth:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                pack(inside)
            except (TypeError, ValueError, OverflowError, RecursionError):
                return f"[{key!r}]" + _place(inside, depth - 1)
    return ""


def _reach(host: str, port: int, end: float) -> socket.socket:
    """A TCP connection by `end`: the lookup has no time limit of its own, and a name's addresses share what is left."""
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            found.append(error)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(_left(end))
    addresses = found[0] if found else TimeoutError(f"looking up {host} took too long")
    if isinstance(addresses, Exception):
        raise addresses
    failed: OSError = ConnectionError(f"{host} has no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(_left(end) / (len(addresses) - index))
            sock.connect(address)
            sock.settimeout(None)
            return sock
        except BaseException as error:
            if sock is not None:
                sock.close()
            if not isinstance(error, OSError):
                raise
            failed = error
    raise failed


def _ours(error: ConnectionClosed) -> bool:
    """Whether this side ended the connection, because of what came."""
    wrong_text = isinstance(error.__cause__, UnicodeError)  # websockets 13 only stumbles over it
    return wrong_text or (error.sent is not None and error.sent.code in _OUR_CODES and not error.rcvd_then_sent)


def _cut(connection: ClientConnection) -> None:
    """End the connection's traffic at once, for every thread; takes no lock."""
    with contextlib.suppress(OSError, ValueError):
        # not the method of an SSLSocket, after which another thread's bytes would follow in the clear
        socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)


@contextlib.contextmanager
def _limit(connection: ClientConnection, end: float) -> Iterator[None]:
    """A server that does not read, or a byte at a time, holds up no request: sending inside ends at `end`, or `WATCH_S` later."""
    connection.send_end = end
    try:
        yield
    finally:
        connection.send_end = math.inf


def _close(connection: ClientConnection) -> None:
    """Say goodbye, but not for long."""
    try:
        with _limit(connection, time.monotonic() + 1.5 * CLOSE_S), contextlib.suppress(Exception):
            connection.close()
    except BaseException:
        _cut(connection)
        raise


def _abandon(connection: ClientConnection) -> None:
    """Close without goodbye: the other side does not answer, or not what it should."""
    _cut(connection)
    _close(connection)
