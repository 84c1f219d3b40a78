"""Who may hold a connection: strangers for a few seconds and a few at a time, clients while they are there.

A socket costs a stranger nothing, so what has not finished its handshake is bounded apart from the clients, and the oldest makes
room for the newest: who has the key needs milliseconds. There is no bound per address: users share loopback.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ProtocolError

HANDSHAKE_S = 5.0
"""From a connection's first byte to the end of its handshake, or of the answer that refuses it."""
MAX_HANDSHAKES = 128
"""Connections that have not come so far; when there are more, the oldest is dropped."""
ACCEPTED_AT_ONCE = 1
"""Connections taken in one turn of the event loop. A handshake takes about six turns: in that time fewer must come than may be
there, or a flood would drop those who are about to get in; and it must not slow down the turns of those who are."""
BACKLOG = 1024
"""Connections that wait in the kernel, for which nothing has been spent yet."""
CLOSING_S = 2.0
"""What a peer has to answer that a connection closes, before it is cut off."""
MAX_FRAMES = 256
"""WebSocket frames in one read (at most 256 KiB) of a connection, or while its peer does not read what it is sent. A request is
one frame; thousands of empty ones would hold up the event loop, and pings that are answered into the void fill the memory."""


class Handshakes:
    """The connections before the end of their handshake, oldest first."""

    def __init__(self) -> None:
        self._open: dict[ServerConnection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, connection: ServerConnection) -> None:
        self._open[connection] = None
        if len(self._open) > MAX_HANDSHAKES:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()

    def end(self, connection: ServerConnection) -> None:
        """It is a client now, or gone."""
        self._open.pop(connection, None)

    def drop(self) -> None:
        """Cut all of them off."""
        for connection in self._open:
            connection.transport.abort()

    def connection_type(self) -> type[ServerConnection]:
        """What `websockets.serve` makes of a socket: one that is among these from its first byte."""
        handshakes = self

        class Connection(ServerConnection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                self._frames, self._take = 0, self.protocol.recv_frame
                self.protocol.recv_frame = self._count
                handshakes.begin(self)

            def connection_lost(self, exc: Exception | None) -> None:
                handshakes.end(self)
                super().connection_lost(exc)

            def data_received(self, data: bytes) -> None:
                if not self.paused:  # the peer reads
                    self._frames = 0
                super().data_received(data)

            def _count(self, frame: Any) -> None:
                self._frames += 1
                if self._frames > MAX_FRAMES:
                    self.loop.call_later(CLOSING_S, self.transport.abort)
                    raise ProtocolError(f"more than {MAX_FRAMES} frames at once; send a message in one")
                taken = replace(frame)
                frame.data = b""  # the parser keeps its frame until the next one comes, which may be never
                self._take(taken)

        return Connection


def notice_death(connection: ServerConnection, seconds: float) -> None:
    """Let the kernel end a connection whose peer's machine does not answer for about so long, as far as it can. A process that
    is only paused is not dead: its kernel answers."""
    peer = connection.transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval = max(1, int(seconds / 2)), max(1, int(seconds / 10))
    options = {
        "TCP_KEEPIDLE": idle,
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": 5,
        "TCP_USER_TIMEOUT": int(seconds * 1e3),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
