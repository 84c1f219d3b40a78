"""Client of a DiT4DiT policy server. One self-contained file: copy it to the robot.

It needs Python 3.8 or later, numpy, msgpack >= 1.0 and websockets >= 13.1, and no checkpoint: pictures and state go out as the
robot has them, actions come back in its units.

    with Client("127.0.0.1", api_key=key, wait_s=60) as policy:
        policy.metadata["views"], policy.metadata["state_keys"]     # what an observation must hold
        policy.reset(seed=7)                                        # chunk n of a session is a function of (seed, n)
        chunk = policy.infer({"images": {"primary_image": picture, ...}, "state": {"x": [0.1], ...}}, "open the drawer")
        chunk.actions                                               # float32 [K, A], robot units

`predict_action` speaks the published dialect, to the published server too. What a server or a connection does wrong is a
`ServingError`.
"""

from __future__ import annotations

import contextlib
import inspect
import socket
import struct
import sys
import threading
import time
from typing import Any, Mapping, NamedTuple

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

PORT = 10093
MAX_BACKOFF_S = 5.0


class ServingError(Exception):
    """Base of all errors of this client."""


class ConnectError(ServingError, ConnectionError):
    """The server cannot be reached, or does not let this client in."""


class ConnectionLost(ServingError, ConnectionError):
    """The connection ended; `connect()` makes another, which goes on at the session's next chunk."""


class RequestTimeout(ServingError, TimeoutError):
    """No answer in time. The connection is closed, so that a late answer is not taken for the next one's."""


class ServerError(ServingError, RuntimeError):
    """The server refused the request; the message is its own, and the connection goes on."""


class ProtocolError(ServingError, RuntimeError):
    """What came is not an answer to what was asked, or the server does not know this kind of request."""


class Chunk(NamedTuple):
    """The next K actions.

    Attributes:
        actions: float32 [K, A] in robot units.
        names: A names, one per column.
        rate_hz: how many of them the robot executes per second.
        normalized: float32 [K, A_model], what the model wrote.
        seed, chunk: of the noise that led to them.
        timing: milliseconds, as in `Client.timing`.
    """

    actions: np.ndarray
    names: tuple[str, ...]
    rate_hz: float
    normalized: np.ndarray
    seed: int
    chunk: int
    timing: dict[str, float]


def pack(message: Any) -> bytes:
    """The message as bytes: msgpack, with NumPy arrays and scalars as marked maps (the published codec, openpi's too)."""
    packed: bytes = msgpack.packb(message, default=_marked)
    return packed


def unpack(frame: bytes) -> Any:
    """The message of one frame; its arrays are read-only."""
    return msgpack.unpackb(frame, object_hook=_restored)


def _marked(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} cannot be sent; expected arrays, numbers, text, lists and dicts")
    if value.dtype.kind in "OVc":
        raise TypeError(f"an array of dtype {value.dtype} cannot be sent; no object, void or complex dtypes")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _restored(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        dtype = _plain_dtype(found[b"dtype"])
        return np.ndarray(tuple(found[b"shape"]), dtype, buffer=found[b"data"])
    if b"__npgeneric__" in found:
        return np.array(found[b"data"], _plain_dtype(found[b"dtype"]))[()]
    return found


def _plain_dtype(text: str) -> np.dtype:
    dtype = np.dtype(text)
    if dtype.kind not in "biufSUmM":
        raise ValueError(f"an array of dtype {dtype} is not part of the protocol")
    return dtype


class Client:
    """A connection to a policy server. Requests of several threads wait for each other; make a client each to share passes.

    Attributes:
        metadata: what the server said on connecting; this project's tells views, state_keys, action_names, rate_hz,
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
            timeout_s: of one request. connect_timeout_s: of one attempt to connect.
            wait_s: how long to go on trying while there is no server yet, or it is full; 0 tries once.
            backoff_s: pause after the first attempt; it doubles up to 5 s.
            max_frame_bytes: largest answer that is taken.

        Raises:
            ConnectError: not reachable, or not let in.
        """
        if timeout_s <= 0 or connect_timeout_s <= 0 or wait_s < 0 or backoff_s <= 0:
            raise ValueError("timeout_s, connect_timeout_s and backoff_s must be more than 0, wait_s 0 or more")
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
        self._lock = threading.RLock()
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
        return self.metadata.get("server") == "dit4dit"

    def connect(self) -> None:
        """Connect again after a loss; a session that was reset goes on at its next chunk. Nothing happens while connected."""
        with self._lock:
            if self._connection is not None:
                return
            end, pause = time.monotonic() + self.wait_s, self.backoff_s
            while True:
                try:
                    self._connection, self.metadata = self._attempt()
                    break
                except _NotYet as error:
                    left = end - time.monotonic()
                    if left <= 0:
                        raise ConnectError(str(error)) from None
                time.sleep(min(pause, left))
                pause = min(2 * pause, MAX_BACKOFF_S)
            if self._session is not None and self.knows_observations:
                self.reset(*self._session)

    def infer(self, observation: Any, instruction: str) -> Chunk:
        """The next actions.

        Args:
            observation: a mapping with `images` (view -> uint8 [H, W, 3], RGB, upright) and `state` (key -> numbers in robot
                units), or an object with these attributes; names as in `metadata`.
            instruction: what to do, in words.

        Raises:
            ServerError: the observation does not fit, or the server cannot take it now; the message says why.
            ProtocolError, ConnectionLost, RequestTimeout.
        """
        self._need_own("infer")
        get = observation.get if isinstance(observation, Mapping) else lambda key: getattr(observation, key, None)
        raw: dict[str, Any] = {"images": dict(get("images") or {}), "state": dict(get("state") or {})}
        reply = self._ask("infer", "inference_result", observation=raw, instruction=instruction)
        data, noise = reply["data"], reply["noise"]
        return Chunk(
            actions=data["actions"][0],
            names=tuple(self.metadata["action_names"]),
            rate_hz=self.metadata["rate_hz"],
            normalized=data["normalized_actions"][0],
            seed=noise["seed"],
            chunk=noise["chunk"],
            timing=self.timing,
        )

    def predict_action(self, examples: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
        """The published call.

        Args:
            examples: dicts with `image` (uint8 [H, W, 3], views joined, or a list of them), `lang`, and optionally `state`
                ([1, state_dim], encoded and padded); as `Policy.predict_action` takes them.

        Returns:
            {"normalized_actions": float32 [B, K, A_model]}, from this project's server also "actions" [B, K, A] in robot units.
        """
        given = [examples] if isinstance(examples, Mapping) else list(examples)
        reply = self._ask("predict_action", "inference_result", examples=given)
        return dict(reply["data"])

    def ping(self) -> float:
        """Ask whether the server answers; returns the round trip in seconds. It does not wait for others' chunks."""
        self._ask("ping", "ping")
        return self.timing["total"] / 1e3

    def reset(self, seed: int | None = None, chunk: int = 0) -> int:
        """Begin a session (an episode): its chunk n has the noise (seed, n), from `chunk` on. None asks for a fresh seed.

        Returns:
            The seed.
        """
        self._need_own("reset")
        reply = self._ask("reset", "reset", seed=seed, chunk=chunk)
        self._session = (reply["noise"]["seed"], reply["noise"]["chunk"])
        return self._session[0]

    def close(self) -> None:
        """End the connection; does nothing where there is none."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _need_own(self, what: str) -> None:
        if not self.knows_observations:
            raise ProtocolError(
                f"{what}: the server at {self.address} speaks the published dialect only, without raw observations and reset; "
                "use predict_action"
            )

    def _attempt(self) -> tuple[ClientConnection, dict[str, Any]]:
        options: dict[str, Any] = {"compression": None, "max_size": self.max_frame_bytes, "close_timeout": 2.0}
        # What older websockets do not know. Straight to the address, whatever proxy the environment names; no pings of our own,
        # which the published server does not answer while it computes (a request's time limit is what counts).
        newer: dict[str, Any] = {"proxy": None, "ping_interval": None, "legacy": True}
        known = inspect.signature(connect).parameters
        options.update((name, value) for name, value in newer.items() if name in known)
        if self._api_key:
            options["additional_headers"] = {"Authorization": "Api-Key " + self._api_key}
        try:
            connection = connect(self.address, open_timeout=self.connect_timeout_s, **options)
        except InvalidStatus as error:
            status, body = error.response.status_code, bytes(error.response.body or b"").decode("utf-8", "replace")
            text = f"{self.address}: refused with status {status} ({body.strip()[:200]})"
            raise (_NotYet(text) if status == 503 else ConnectError(text)) from None
        except InvalidURI as error:
            raise ConnectError(f"{self.address}: not an address ({error})") from None
        except (OSError, InvalidHandshake, EOFError) as error:
            raise _NotYet(f"{self.address}: no policy server there ({error or type(error).__name__})") from None
        if sys.platform == "linux":  # a server that stops reading holds up no request for longer than its time limit
            limit = struct.pack("@ll", int(self.timeout_s), int(self.timeout_s % 1 * 1e6))
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            metadata = unpack(_binary(connection.recv(timeout=self.connect_timeout_s)))
        except (TimeoutError, ConnectionClosed) as error:
            connection.close()
            raise _NotYet(f"{self.address}: said nothing on connecting ({error})") from None
        except (ValueError, TypeError, KeyError, msgpack.UnpackException, ServerError) as error:
            connection.close()
            raise ConnectError(f"{self.address}: not a policy server ({error})") from None
        return connection, metadata if isinstance(metadata, dict) else {}

    def _ask(self, kind: str, wanted: str, **fields: Any) -> dict[str, Any]:
        """One request, one answer; its times go to `timing`."""
        with self._lock:
            connection = self._connection
            if connection is None:
                raise ConnectionLost(f"not connected to {self.address}; call connect()")
            self._count += 1
            identity = str(self._count)
            started = time.perf_counter()
            frame = pack(dict({"type": kind, "request_id": identity}, **fields))
            self._check_size(frame)
            encoded = time.perf_counter()
            answer = self._exchange(connection, frame)
            arrived = time.perf_counter()
            reply = self._read(answer, identity, wanted)
            done = time.perf_counter()
            server = {name: float(ms) for name, ms in reply.get("server_timing", {}).items()}
            times = {"encode": encoded - started, "decode": done - arrived, "total": done - started}
            self.timing = {name: 1e3 * seconds for name, seconds in times.items()}
            if "total_ms" in server:
                self.timing["network"] = 1e3 * (arrived - encoded) - server["total_ms"]
                self.timing.update(queue=server["queue_ms"], infer=server["infer_ms"], server=server["total_ms"])
            if self._session is not None and "noise" in reply and wanted == "inference_result":
                chunks = len(reply["data"]["normalized_actions"])
                self._session = (self._session[0], reply["noise"]["chunk"] + chunks)
            return reply

    def _check_size(self, frame: bytes) -> None:
        most = self.metadata.get("max_frame_bytes")
        if isinstance(most, int) and len(frame) > most:
            raise ServerError(
                f"the request has {len(frame)} bytes and {self.address} takes {most}; send smaller pictures, or start the "
                "server with a larger frame"
            )

    def _exchange(self, connection: ClientConnection, frame: bytes) -> bytes | str:
        try:
            connection.send(frame)
            return connection.recv(timeout=self.timeout_s)
        except TimeoutError:
            self._drop()
            raise RequestTimeout(f"{self.address}: no answer in {self.timeout_s:g} s") from None
        except ConnectionClosed as error:
            self._drop()
            raise ConnectionLost(f"{self.address}: the connection ended ({error})") from None

    def _read(self, answer: bytes | str, identity: str, wanted: str) -> dict[str, Any]:
        try:
            reply = unpack(_binary(answer))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            self._drop()
            raise ProtocolError(f"{self.address}: an answer that cannot be read ({error})") from None
        if not isinstance(reply, dict) or reply.get("request_id") not in (identity, "default"):
            self._drop()
            raise ProtocolError(f"{self.address}: an answer to another request; the connection is closed")
        if reply.get("ok") is not True:
            detail = reply.get("error")
            raise ServerError(str(detail.get("message") if isinstance(detail, dict) else detail))
        if reply.get("type") != wanted:
            raise ProtocolError(
                "{}: expected the answer {!r}, got {!r}".format(self.address, wanted, reply.get("type"))
            )
        return reply

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake with who does not answer
            connection.close()


class _NotYet(Exception):
    """An attempt failed in a way that may pass."""


def _binary(answer: bytes | str) -> bytes:
    """Frames are binary; the published server sends its traceback as text."""
    if isinstance(answer, str):
        raise ServerError(answer)
    return answer
