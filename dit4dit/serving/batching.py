"""Requests of several clients -> passes of the policy, in one thread beside the event loop.

While a pass runs, requests queue; the next pass takes one chunk of each message in turn, and again until it is full, so that a
message of 64 chunks holds up nobody for longer than a pass. A connection has one message here at a time: messages in turn are
clients in turn. What an instruction needs is prepared before its message enters the queue.

A request's noise is its own whatever it shares a pass with, but matrices of another size add up in another order: the same
request in a pass of another size agrees to rounding (about 1e-6 relative in float32), not to the bit. `most=1` gives each chunk a
pass of its own: always the same bits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from dit4dit.errors import DeviceError, Dit4DitError
from dit4dit.policy.requests import Request
from dit4dit.serving.backend import Backend
from dit4dit.types import ActionChunk

Made = TypeVar("Made")


class BusyError(Dit4DitError, RuntimeError):
    """The server has no place for another request now."""


@dataclass(frozen=True)
class Answer:
    """The chunks that a message asked for; how long it waited, how long its passes took [s], and how many messages shared one of
    them at most."""

    chunks: list[ActionChunk]
    queue_s: float
    infer_s: float
    batch: int


@dataclass(eq=False)
class _Message:
    requests: Sequence[Request]
    part: asyncio.Future[None] = field(init=False)  # done when the requests before `ready` have run, or one has failed
    ready: int = 0  # requests that may run: what their instructions need is there
    coming: asyncio.Future[None] | None = None  # what the next one's instruction needs, begun
    chunks: list[ActionChunk] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    infer_s: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class _Ran:
    """What a pass has given one message."""

    chunks: list[ActionChunk]
    took: float
    ended: float
    batch: int


_Pass = dict[_Message, list[Request]]


class Batcher:
    """Call everything from the event loop. A message whose `submit` is cancelled is not computed any more.

    Attributes:
        running: whether a pass runs.
        at_work: passes and preparations in their threads, also those that `stop` has left behind.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        most: int,
        window_s: float,
        queued: int,
        clients: Callable[[], int],
        on_dead: Callable[[Exception], None],
    ) -> None:
        """most: chunks of one pass. window_s: how long a pass waits for requests of other connected clients.
        queued: messages that may wait. clients: how many are connected. on_dead: no pass will run
        any more: the device is lost, or something here is broken."""
        self._backend, self._most, self._window_s = backend, most, window_s
        self._limit, self._clients, self._on_dead = queued, clients, on_dead
        self._queue: dict[_Message, None] = {}  # whose turn is next comes first
        self._preparing: set[_Message] = set()
        self._running: _Pass = {}
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dit4dit-inference")
        self.running = False
        self.at_work: set[Future[Any]] = set()
        self._stopped = False
        self._task = asyncio.create_task(self._loop())
        self._task.add_done_callback(self._ended)

    @property
    def queued(self) -> int:
        """Messages that wait: for a pass, or for what their instruction needs."""
        return len(self._queue) + len(self._preparing)

    async def submit(self, requests: Sequence[Request]) -> Answer:
        """The answer, when passes have given all of it.

        Raises:
            BusyError: too many wait, or the server is stopping. Anything that the policy raises for one of these requests.
        """
        if self._stopped:
            raise _stopping()
        if self.queued >= self._limit:
            raise BusyError(f"{self._limit} requests wait already; try again later, or start the server with more")
        message = _Message(requests)
        try:
            while len(message.chunks) < len(requests):
                message.part = asyncio.get_running_loop().create_future()
                await self._prepare(message)
                if self._stopped:
                    raise _stopping()
                self._queue[message] = None
                self._arrived.set()
                await message.part
        finally:
            self._queue.pop(message, None)
            if message.coming is not None:
                message.coming.cancel()
        queue_s = message.ended - message.since - message.infer_s
        return Answer(message.chunks, queue_s, message.infer_s, message.batch)

    async def stop(self, seconds: float) -> None:
        """Refuse what waits, and return when the running pass has answered; after so many seconds refuse that too, and leave its
        thread to itself."""
        self._stopped = True
        _fail([*self._queue, *self._preparing], _stopping())
        self._queue.clear()
        self._arrived.set()
        await asyncio.wait({self._task}, timeout=seconds)
        _fail(self._running, _stopping())
        self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _prepare(self, message: _Message) -> None:
        """Make what the next pass of this message needs of its instructions. A message has one at work at a time, so that one
        with many new ones is in turn with the others; and no more than a pass's before they run, so that they are kept so long.
        """
        enough = len(message.chunks) + self._most
        while message.ready < len(message.requests):
            if message.coming is None:
                coming = self._backend.prepare(message.requests[message.ready])
                message.coming = None if coming is None else self._watched(coming)
            if message.coming is not None:
                if message.ready >= enough:
                    return
                self._preparing.add(message)
                try:
                    await asyncio.wait({message.coming, message.part}, return_when=asyncio.FIRST_COMPLETED)
                    (message.part if message.part.done() else message.coming).result()
                except DeviceError as error:
                    self._on_dead(error)
                    raise
                finally:
                    self._preparing.discard(message)
                message.coming = None
            message.ready += 1

    async def _loop(self) -> None:
        while not self._stopped:
            if not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            self._running = self._take()
            if not self._running:
                continue
            self.running = True
            try:
                self._give(await self._watched(self._thread.submit(self._compute, self._running)))
            except DeviceError as error:
                _fail(self._running, error)
                self._on_dead(error)
                return
            finally:
                self.running = False
            self._running = {}

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):  # a bug in a turn: nobody would be answered again
            self._stopped = True
            _fail([*self._queue, *self._preparing, *self._running], error)
            self._on_dead(error)

    def _give(self, found: Sequence[_Ran | Exception]) -> None:
        """Give its messages what the running pass has made: in a call of its own, which keeps none when it is over."""
        for message, ran in zip(self._running, found, strict=True):
            if message.part.done():  # its client is gone
                continue
            if isinstance(ran, Exception):
                message.part.set_exception(ran)
                continue
            message.chunks += ran.chunks
            message.infer_s += ran.took
            message.ended, message.batch = ran.ended, max(message.batch, ran.batch)
            if len(message.chunks) == message.ready:
                message.part.set_result(None)

    def _watched(self, coming: Future[Made]) -> asyncio.Future[Made]:
        self.at_work.add(coming)
        coming.add_done_callback(self.at_work.discard)
        return asyncio.wrap_future(coming)

    async def _gather(self) -> None:
        """Wait until a pass is full, or as many messages are there as can come, or the window is over. A client that is alone
        never waits, and a message that has begun not again."""
        end = time.perf_counter() + self._window_s
        while not self._stopped and len(self._queue) < min(self._most, self._clients() - len(self._preparing)):
            left = end - time.perf_counter()
            full = sum(message.ready - len(message.chunks) for message in self._queue) >= self._most
            if left <= 0 or full or any(message.chunks for message in self._queue):
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except asyncio.TimeoutError:
                return

    def _take(self) -> _Pass:
        """The next pass: requests of the kind of the first message's. A message that has more goes behind those that wait."""
        for message in [message for message in self._queue if message.part.done()]:
            del self._queue[message]
        taken: _Pass = {message: [] for message in self._queue}
        kind, room = None, self._most
        while room:
            before = room
            for message, requests in taken.items():
                at = len(message.chunks) + len(requests)
                if room and at < message.ready and kind in (None, message.requests[at].kind):
                    kind = message.requests[at].kind
                    requests.append(message.requests[at])
                    room -= 1
            if room == before:
                break
        taken = {message: requests for message, requests in taken.items() if requests}
        for message, requests in taken.items():
            del self._queue[message]
            if len(message.chunks) + len(requests) < message.ready:
                self._queue[message] = None
        return taken

    def _compute(self, taken: _Pass) -> list[_Ran | Exception]:
        """In the inference thread: what each message gets, or what went wrong. One that fails fails alone."""
        started = time.perf_counter()
        try:
            found = iter(self._backend.run([request for requests in taken.values() for request in requests]))
        except DeviceError:
            raise
        except Exception as error:
            # the server outlives whatever a request has met, a bug too: it is logged with the answer that says so
            if len(taken) == 1:
                return [error]
            return [ran for message, requests in taken.items() for ran in self._compute({message: requests})]
        ended = time.perf_counter()
        return [
            _Ran(list(islice(found, len(requests))), ended - started, ended, len(taken)) for requests in taken.values()
        ]


def _stopping() -> BusyError:
    return BusyError("the server is stopping; connect to another, or again later")


def _fail(messages: Sequence[_Message] | _Pass, error: Exception) -> None:
    for message in messages:
        if not message.part.done():
            message.part.set_exception(error)
