"""One policy for many players: requests are collected and run in passes of a fixed size.

Every pass has exactly `batch` rows, empty ones filled with a copy of the first, so that it is always the same computation, and a
request's result depends neither on who else is in the pass nor on how many players there are: the same bits. Another `batch` is
another computation and may round differently (about 1e-6 in float32). That rows really are independent is checked before the
first pass of each picture size, guided ones (real-time chunking) by themselves: they are passes of their own.

When to start a pass that is not full: with w requests there and a pass taking P seconds, waiting d seconds for one more pays if
(w + 1) / (P + d) > w / P, that is if d < P / w. The next request is expected one usual time between answer and request after the
oldest answer. The wait decides how fast an evaluation is, never what comes out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dit4dit.engine import MAX_BATCH
from dit4dit.errors import ConfigError, OutputError
from dit4dit.policy.requests import Kind, Request
from dit4dit.robots import Embodiment
from dit4dit.types import ActionChunk, Guidance, Noise, Observation

log = logging.getLogger("dit4dit.evaluation")


class Predictor(Protocol):
    """What the evaluation needs of a `Policy`."""

    @property
    def embodiment(self) -> Embodiment: ...

    def request(
        self,
        observation: Observation,
        instruction: str,
        *,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
    ) -> Request: ...

    def run(self, requests: Sequence[Request]) -> list[ActionChunk]: ...

    def warm_up(
        self,
        pictures: Mapping[str, tuple[int, int]] | None = None,
        *,
        batch: int = 1,
        max_guidance: float | None = None,
    ) -> None: ...

    def prepare(self, instruction: str) -> Future[None]: ...


@dataclass(frozen=True)
class Answer:
    """seconds: what the pass took."""

    chunk: ActionChunk
    seconds: float


@dataclass(frozen=True, eq=False)
class Question:
    """One request, and where its answer goes."""

    request: Request
    player: int = field(default_factory=threading.get_ident)
    answer: Future[Answer] = field(default_factory=Future)


def check_batch(batch: int) -> None:
    """ConfigError where a pass cannot have so many rows."""
    if not 1 <= batch <= MAX_BATCH:
        raise ConfigError(f"batch: expected 1 to {MAX_BATCH}, got {batch}")


class BatchedPolicy:
    """Players, each in a thread of its own, `ask`; one thread calls `serve`.

    Attributes:
        passes: passes so far. rows: requests in them.
        independent: whether the rows of a pass are independent of each other to the bit; None before the first pass.
    """

    def __init__(self, policy: Predictor, batch: int) -> None:
        check_batch(batch)
        self._policy, self._batch = policy, batch
        self.passes = self.rows = 0
        self.independent: bool | None = None
        self._changed = threading.Condition()
        self._waiting: list[Question] = []
        self._away: dict[int, float] = {}  # player -> when its last question was answered
        self._usual_away = 0.0
        self._usual_pass = 0.0
        self._warm: set[Kind] = set()
        self._closed: BaseException | None = None

    def ask(self, observation: Observation, instruction: str, noise: Noise, guidance: Guidance | None = None) -> Answer:
        """The chunk; waits for it. Raises what the policy raised, or what `close` was given."""
        question = Question(self._policy.request(observation, instruction, noise=noise, guidance=guidance))
        with self._changed:
            if self._closed is not None:
                raise self._closed
            since = self._away.pop(question.player, None)
            if since is not None:
                self._usual_away = _recent(self._usual_away, time.monotonic() - since)
            self._waiting.append(question)
            self._changed.notify_all()
        return question.answer.result()

    def leave(self) -> None:
        """The calling player will not ask for a while, or not again."""
        with self._changed:
            self._away.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def close(self, reason: BaseException) -> None:
        """Every question, now and later, raises `reason`."""
        with self._changed:
            self._closed = reason
            for question in self._waiting:
                question.answer.set_exception(reason)
            self._waiting.clear()
            self._changed.notify_all()

    def serve(self, until: Callable[[], bool]) -> None:
        """Answer questions until `until()`, which is asked whenever something has changed; call `wake` when it has."""
        while True:
            with self._changed:
                while not self._waiting and not until():
                    self._changed.wait(0.5)
                if until():
                    return
                self._wait_for_more(until)
                kinds = [question.request.kind for question in self._waiting]
                chosen = [q for q, kind in zip(self._waiting, kinds, strict=True) if kind == kinds[0]][: self._batch]
                self._waiting = [q for q in self._waiting if q not in chosen]
            if chosen:
                self._run(chosen)

    def wake(self) -> None:
        """Let `serve` look at `until()` again."""
        with self._changed:
            self._changed.notify_all()

    def _wait_for_more(self, until: Callable[[], bool]) -> None:
        """Until the pass is full or waiting no longer pays. The lock is held."""
        while 0 < len(self._waiting) < self._batch and self._away and not until():
            now, patience = time.monotonic(), self._usual_pass / len(self._waiting)
            expected = max(0.0, min(self._away.values()) + self._usual_away - now)
            if expected > patience or not self._changed.wait(patience):
                return

    def _run(self, questions: list[Question]) -> None:
        """One pass; where the policy refuses its own result, each request alone, so that one player's NaN is not another's."""
        try:
            self._check_rows(questions[0].request)
            answers = self._pass(questions)
        except OutputError as error:
            if len(questions) == 1:
                questions[0].answer.set_exception(error)
                return
            for question in questions:
                self._run([question])
            return
        except BaseException as error:
            for question in questions:
                question.answer.set_exception(error)
            raise
        with self._changed:
            self._away.update(dict.fromkeys((q.player for q in questions), time.monotonic()))
        for question, answer in zip(questions, answers, strict=True):
            question.answer.set_result(answer)

    def _pass(self, questions: list[Question]) -> list[Answer]:
        start = time.monotonic()
        requests = [question.request for question in questions]
        chunks = self._policy.run(requests + requests[:1] * (self._batch - len(requests)))
        seconds = time.monotonic() - start
        self._usual_pass = _recent(self._usual_pass, seconds)
        self.passes += 1
        self.rows += len(questions)
        return [Answer(chunk, seconds) for chunk in chunks[: len(questions)]]

    def _check_rows(self, request: Request) -> None:
        """Before the first pass of this kind: warm up, and see whether each row gives the same bits."""
        if request.kind in self._warm:
            return
        shape, _ = request.kind
        sizes = dict(zip(self._policy.embodiment.views, shape.views, strict=True))
        self._policy.warm_up(sizes, batch=self._batch, max_guidance=shape.max_guidance)
        rows = [chunk.normalized for chunk in self._policy.run([request] * self._batch)]
        same = all(np.array_equal(rows[0], row) for row in rows)
        if not same:
            log.warning(
                "rows of a pass of %d differ for the same request by up to %.1e: results depend on the order of requests in "
                "their last bits; --batch 1 is reproducible",
                self._batch,
                max(float(np.abs(rows[0] - row).max()) for row in rows),
            )
        self.independent = same and self.independent is not False
        self._warm.add(request.kind)


def _recent(mean: float, value: float) -> float:
    """A mean that follows what happens now."""
    return value if mean == 0.0 else 0.8 * mean + 0.2 * value
