"""What a request has brought is free as soon as it is answered, refused or left: nothing waits for a garbage collection."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from serving_stand import StandIn, ask, running
from waiting import eventually

from dit4dit.errors import InputError
from dit4dit.policy.requests import Request
from dit4dit.serving import wire
from dit4dit.types import Noise

LARGE, SMALL = 8 * 2**20, 900_000
"""Bytes of a frame that is decoded beside the event loop, and of one that is decoded in it."""


class Keeping(StandIn):
    """Its requests keep their image, as a policy's do."""

    def check(self, message):
        if not isinstance(message.get("value"), (int, float)):
            raise InputError("value: expected a number")
        return [Request([message["image"]], None, message["value"], None, Noise.fresh(), None, "bilinear", False)]


def refuse(_) -> None:
    raise InputError("as the test says")


def answered(_, connection, image) -> None:
    assert ask(connection, {"value": 1, "image": image})["ok"]


def refused(_, connection, image) -> None:
    assert not ask(connection, {"value": "no", "image": image})["ok"]


def text(_, connection, image) -> None:
    assert not ask(connection, "a" * image.nbytes)["ok"]


def unreadable(_, connection, image) -> None:
    assert not ask(connection, wire.pack({"image": image, "value": "?????"}).replace(b"?????", b"\xff" * 5))["ok"]


def failed(server, connection, image) -> None:
    server.backend.fail = refuse
    assert not ask(connection, {"value": 1, "image": image})["ok"]


def failed_preparation(server, connection, image) -> None:
    server.backend.new, server.backend.fail_prepare = {1}, refuse
    assert not ask(connection, {"value": 1, "image": image})["ok"]


def busy(server, connection, image) -> None:
    server.server._batcher._limit = 0
    assert not ask(connection, {"value": 1, "image": image})["ok"]


def left(server, _, image) -> None:
    """Its client goes while the pass runs."""
    server.backend.gate.clear()
    with server.raw() as other:
        other.recv()
        other.send(wire.pack({"value": 1, "image": image}))
        server.backend.wait_for_pass()
    eventually(lambda: len(server.server._clients) == 1)
    server.backend.gate.set()
    eventually(lambda: not server.server._batcher.running)


@pytest.mark.parametrize("size", [LARGE, SMALL])
@pytest.mark.parametrize("way", [answered, refused, text, unreadable, failed, failed_preparation, busy, left])
def test_nothing_is_kept_of_a_request_that_is_over(way, size) -> None:
    with running(Keeping()) as server, server.raw() as connection:
        connection.recv()
        image = np.zeros((1, size, 1), np.uint8)
        way(server, connection, image)  # what is made once
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(4):
                way(server, connection, image)
            eventually(lambda: tracemalloc.get_traced_memory()[0] < size / 2)
        finally:
            tracemalloc.stop()
            gc.enable()
