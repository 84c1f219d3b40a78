"""How a server is reached, and its bounds; checked before a checkpoint is read."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dit4dit.errors import ConfigError, said

PORT = 10093
KEY_VARIABLE = "DIT4DIT_API_KEY"
MIN_KEY = 16

log = logging.getLogger("dit4dit.serving")


@dataclass(frozen=True)
class Settings:
    """Options of a server.

    Attributes:
        host, port: address to listen at; port 0 takes a free one.
        api_key: what clients must send; without one, only loopback addresses are served.
        insecure: serve any address without a key.
        max_batch: chunks in one pass, 1 to MAX_BATCH.
        batch_window_ms: how long a pass waits for other connected clients.
        max_clients, max_queued: connections that have finished their handshake, and requests that wait; more are refused.
            Others are bounded by `connections.py`, whatever these are.
        max_frame_bytes: of one request. A connection holds at most four times as much, when its peer sends ahead: a frame that
            is decoded, its arrays, and two frames that came behind it; all clients together 4 * max_clients * max_frame_bytes,
            8 GiB as set here. A request of two 640 x 480 images has 1.8 MB.
        idle_timeout_s: stop after so long without a message; None never.
        ping_timeout_s: cut off who answers no ping for so long, 1 to 36 000 s; None never. A simulator may block for minutes, and
            its WebSocket with it. The kernel frees the place of a peer whose machine is gone in about as long
            (`DEAD_AFTER_S` for None).
        seed: of every connection's noise until it resets; None gives each a fresh one.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    api_key: str | None = field(default=None, repr=False)
    insecure: bool = False
    max_batch: int = 8
    batch_window_ms: float = 2.0
    max_clients: int = 64
    max_queued: int = 128
    max_frame_bytes: int = 32 * 2**20
    idle_timeout_s: float | None = None
    ping_timeout_s: float | None = 300.0
    seed: int | None = None

    def __post_init__(self) -> None:
        from dit4dit.engine import MAX_BATCH  # the command line reads the defaults, and loads no torch for them

        bounds = {
            "port": (0, 65535),
            "max_batch": (1, MAX_BATCH),
            "batch_window_ms": (0, 1000),
            "max_clients": (1, 10_000),
            "max_queued": (1, 100_000),
            "max_frame_bytes": (1024, 2**31),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, got {value}")
        if self.idle_timeout_s is not None and not 0 < self.idle_timeout_s < 1e9:
            raise ConfigError(f"idle_timeout_s: expected seconds, more than 0, got {self.idle_timeout_s}")
        if self.ping_timeout_s is not None and not 1 <= self.ping_timeout_s <= 36_000:
            raise ConfigError(
                f"ping_timeout_s: expected 1 to 36000 seconds, or None for never, got {self.ping_timeout_s}"
            )
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed: expected an integer in 0..2^64-1, got {self.seed}")
        if self.api_key is not None:
            _check_key("api_key", self.api_key)
        if self.api_key is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r}: others can reach it, and there is no key; give one (--api-key-file FILE or "
                f"{KEY_VARIABLE}), or serve a closed robot network without one by --insecure"
            )

    def listen(self) -> socket.socket:
        """A socket bound to the address, which does not listen yet; ConfigError where it cannot be had."""
        try:
            family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            bound = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(
                f"host {self.host!r}: {error.strerror or error}; give an address of this machine"
            ) from None
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            bound.close()
            raise ConfigError(
                f"{self.host}:{self.port}: cannot listen there ({error.strerror or error}); give another --host or --port"
            ) from None
        return bound


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; ConfigError where the name is not known."""
    if not host:
        return False  # every interface
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error.strerror or error}; give an address of this machine") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def find_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in `file`, else in the environment; never from the command line, which every user of the machine can read.

    A file that other users of the machine can read or write is taken, with a warning.

    Raises:
        ConfigError: the file cannot be read, or the key is too short or has letters that a header cannot carry.
    """
    if file is None:
        given = environment.get(KEY_VARIABLE)
        return None if given is None else _check_key(KEY_VARIABLE, given.strip())
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the key cannot be read ({said(error)})") from None
    if os.name == "posix" and (mode := file.stat().st_mode & 0o777) & 0o077:
        log.warning("%s: other users can reach the key (mode %03o, expected 600); run chmod 600 %s", file, mode, file)
    return _check_key(str(file), text.strip())


def _check_key(where: str, key: str) -> str:
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where}: expected a key of at least {MIN_KEY} ASCII letters without spaces, got {len(key)} letters; make one "
            "with python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key
