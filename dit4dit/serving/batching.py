"""Requests of several clients -> passes of the policy, in one thread beside the event loop.

While a pass runs, requests queue; the next pass takes all of them that fit together. A request's noise is its own whatever it
shares a pass with, but matrices of another size add up in another order: the same request in a pass of another size agrees to
rounding (about 1e-6 relative in float32), not to the bit. `most=1` gives each request a pass of its own: always the same bits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from dit4dit.errors import DeviceError, Dit4DitError
from dit4dit.policy.requests import Request
from dit4dit.serving.backend import Backend
from dit4dit.types import ActionChunk

log = logging.getLogger("dit4dit.serving")


class BusyError(Dit4DitError, RuntimeError):
    """The server has no place for another request now."""


@dataclass(frozen=True)
class Answer:
    """The chunks that a message asked for; how long it waited, how long its pass took [s], and how many messages shared it."""

    chunks: list[ActionChunk]
    queue_s: float
    infer_s: float
    batch: int


@dataclass(eq=False)
class _Waiting:
    requests: Sequence[Request]  # of one message
    answer: asyncio.Future[Answer]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Call everything from the event loop. A request whose `submit` is cancelled is not computed any more."""

    def __init__(
        self,
        backend: Backend,
        *,
        most: int,
        window_s: float,
        queued: int,
        clients: Callable[[], int],
        on_dead: Callable[[DeviceError], None],
    ) -> None:
        """most: chunks of one pass. window_s: how long a pass waits for requests of other connected clients.
        queued: requests that may wait. clients: how many are connected. on_dead: the device is lost, for good."""
        self._backend, self._most, self._window_s = backend, most, window_s
        self._limit, self._clients, self._on_dead = queued, clients, on_dead
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dit4dit-inference")
        self._stopped = False
        self._task = asyncio.create_task(self._loop())
        self.running = False

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def submit(self, requests: Sequence[Request]) -> Answer:
        """The answer, when a pass has given it.

        Raises:
            BusyError: too many wait, or the server is stopping. Anything that the policy raises for this request.
        """
        if self._stopped:
            raise BusyError("the server is stopping; connect to another, or again later")
        if len(self._queue) >= self._limit:
            raise BusyError(f"{self._limit} requests wait already; try again later, or start the server with more")
        waiting = _Waiting(requests, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def stop(self) -> None:
        """Refuse what waits, and return when the running pass has answered."""
        self._stopped = True
        while self._queue:
            _fail([self._queue.popleft()], BusyError("the server is stopping; connect to another, or again later"))
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    async def _loop(self) -> None:
        while not self._stopped:
            await self._arrived.wait()
            await self._gather()
            batch = self._take()
            if self._queue:  # what cannot share this pass has arrived all the same, whatever `_gather` cleared
                self._arrived.set()
            elif not self._stopped:
                self._arrived.clear()
            if not batch:
                continue
            self.running = True
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, batch)
            except DeviceError as error:
                _fail(batch, error)
                self._on_dead(error)
                return
            finally:
                self.running = False
            for waiting, answer in zip(batch, found, strict=True):
                if isinstance(answer, Answer):
                    if not waiting.answer.done():
                        waiting.answer.set_result(answer)
                else:
                    _fail([waiting], answer)

    async def _gather(self) -> None:
        """Wait until as many requests are there as can come, or the window is over; alone, a client never waits."""
        end = time.perf_counter() + self._window_s
        while not self._stopped and len(self._queue) < min(self._most, self._clients()):
            left = end - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except asyncio.TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The oldest request and those that can share its pass; the others keep their places."""
        batch: list[_Waiting] = []
        later: deque[_Waiting] = deque()
        room = self._most
        while self._queue:
            waiting = self._queue.popleft()
            if waiting.answer.done():  # its client is gone
                continue
            count, kind = len(waiting.requests), waiting.requests[0].kind
            if not batch or (kind == batch[0].requests[0].kind and count <= room):
                batch.append(waiting)
                room -= count
            else:
                later.append(waiting)
        self._queue = later
        return batch

    def _compute(self, batch: Sequence[_Waiting]) -> list[Answer | Exception]:
        """In the inference thread: an answer or what went wrong, for each request. One that fails fails alone."""
        started = time.perf_counter()
        try:
            found = iter(self._backend.run([request for waiting in batch for request in waiting.requests]))
        except DeviceError:
            raise
        except Exception as error:
            # the server outlives whatever a request has met, a bug too: it is logged with the answer that says so
            if len(batch) == 1:
                return [error]
            return [answer for waiting in batch for answer in self._compute([waiting])]
        took = time.perf_counter() - started
        return [
            Answer(list(islice(found, len(waiting.requests))), started - waiting.since, took, len(batch))
            for waiting in batch
        ]


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
