"""
The queue in front of the model: one thread merges the rows of all clients into forward passes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from trl_refplug.rows import Values
from trl_refplug.serving.engine import WorkUnit


logger = logging.getLogger("trl_refplug")

Score = Callable[[Sequence[WorkUnit]], Iterator[tuple[int, list[Values]]]]
Answers = dict[int, Values]
"""The log-probs of a request's rows, by the index of the row."""

_TURNS_PER_PASS = 4
"""In each turn a client gets at most this fraction of a forward pass, before the next client has its turn."""
_MAX_QUEUE_SECONDS = 60.0
"""The queue is full when it holds this many seconds of work: clients would give up what waits longer and ask again."""
_MAX_RETRY_AFTER = 30
"""The longest `Retry-After`, in seconds, that is sent to a client when the queue is full."""


class QueueFullError(Exception):
    """The queue is full. `retry_after` says in how many seconds the client should try again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; come back in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is shutting down and accepts no new work."""


@dataclass(eq=False)
class _PendingRequest:
    """A request whose answer is not complete: what is there already, and how many units are still missing."""

    answers: Answers = field(default_factory=dict)
    missing: int = 0
    future: Future[Answers] = field(default_factory=Future)


@dataclass(eq=False)
class _QueuedUnit:
    """A unit of work, and the requests that wait for it, each with the indices of the rows that the unit answers."""

    unit: WorkUnit
    waiters: list[tuple[_PendingRequest, list[int]]]

    @property
    def abandoned(self) -> bool:
        return all(request.future.done() for request, _ in self.waiters)


class Batcher:
    """
    Merges the work of all clients into batches for the model.

    Clients take turns, so that a client with a lot of work does not hold up the others. If several requests ask for
    the same unit, it is computed once. Units for which no request waits any more are dropped from the queue.

    Args:
        score (`Callable`): Scores the units of one batch: [`~Engine.score`]. It is only called on one thread.
        device_works (`Callable`): Whether the device can still compute: [`~Engine.device_works`]. It is called after
            a failure. If the answer is no, everything in the queue fails, and no new work is accepted.
        token_budget (`int`): Most tokens in a batch.
        max_queued_tokens (`int`): New work is refused when this many tokens wait or are being computed, or when the
            queue would take more than a minute.

    Attributes:
        device_lost (`bool`): Whether the device has stopped working.
    """

    def __init__(
        self, score: Score, device_works: Callable[[], bool], *, token_budget: int, max_queued_tokens: int
    ) -> None:
        self._score = score
        self._device_works = device_works
        self._token_budget = token_budget
        self._max_queued_tokens = max_queued_tokens
        self._condition = threading.Condition()
        self._queues: OrderedDict[int, deque[_QueuedUnit]] = OrderedDict()  # by client; the next turn is the first's
        self._by_key: dict[bytes, _QueuedUnit] = {}  # all units that wait or are being computed
        self._queued_tokens = 0  # in these units
        self._speed = 0.0  # recent tokens per second
        self._closed = False
        self.device_lost = False
        self._thread = threading.Thread(target=self._run, name="refplug-scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the scoring thread is running."""
        return self._thread.is_alive()

    def submit(self, client: int, units: Sequence[tuple[WorkUnit, list[int]]]) -> Future[Answers]:
        """
        Queue the units of a request, each with the indices of the rows that it answers. Cancelling the future takes
        them out of the queue.

        Raises:
            QueueFullError: The queue is full.
            ClosedError: `close` has been called.
        """
        request = _PendingRequest(missing=len(units))
        if not units:
            request.future.set_result({})
            return request.future
        with self._condition:
            if self._closed:
                raise ClosedError
            longest = self._speed * _MAX_QUEUE_SECONDS if self._speed else math.inf
            if self._queued_tokens >= min(self._max_queued_tokens, longest):
                raise QueueFullError(self._retry_after())
            for unit, indices in units:
                queued = self._by_key.get(unit.key)
                if queued is None:
                    queued = self._by_key[unit.key] = _QueuedUnit(unit, [])
                    self._queues.setdefault(client, deque()).append(queued)
                    self._queued_tokens += unit.tokens
                queued.waiters.append((request, indices))
            self._condition.notify()
        request.future.add_done_callback(self._drop_abandoned)
        return request.future

    def close(self) -> None:
        """Accept no new work, finish what is in the queue, and return when it is done."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        seconds = self._queued_tokens / self._speed / 2 if self._speed else 1  # by then half of the queue is done
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER)

    def _drop_abandoned(self, future: Future[Answers]) -> None:
        if not future.cancelled():
            return
        with self._condition:
            for client, queue in list(self._queues.items()):
                kept: deque[_QueuedUnit] = deque()
                for queued in queue:
                    if queued.abandoned:
                        self._forget(queued)
                    else:
                        kept.append(queued)
                if kept:
                    self._queues[client] = kept
                else:
                    del self._queues[client]

    def _forget(self, queued: _QueuedUnit) -> None:
        del self._by_key[queued.unit.key]
        self._queued_tokens -= queued.unit.tokens

    # The methods below run on the scoring thread.

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queues:
                    if self._closed:
                        return
                    self._condition.wait()
                batch = self._next_batch()
            started = time.perf_counter()
            if not self._compute(batch) and not self._device_works():
                logger.critical("The device does not compute any more. Restart this server.")
                self._give_up()
                return
            speed = sum(queued.unit.tokens for queued in batch) / max(time.perf_counter() - started, 1e-6)
            self._speed = 0.5 * (self._speed or speed) + 0.5 * speed

    def _next_batch(self) -> list[_QueuedUnit]:
        """The units to compute next: units of one temperature within the token budget, or a single other unit."""
        batch: list[_QueuedUnit] = []
        room = self._token_budget
        took = True
        while took and room > 0:
            took = False
            for client in list(self._queues):
                queue, turn = self._queues[client], max(1, self._token_budget // _TURNS_PER_PASS)
                before = len(batch)
                while queue and turn > 0 and room > 0 and _fits(queue[0].unit, batch, room):
                    queued = queue.popleft()
                    batch.append(queued)
                    room = 0 if queued.unit.as_sent else room - queued.unit.tokens
                    turn -= queued.unit.tokens
                if len(batch) > before:
                    took = True
                    self._queues.move_to_end(client)
                if not queue:
                    del self._queues[client]
        return batch

    def _compute(self, batch: Sequence[_QueuedUnit]) -> bool:
        """Compute a batch and deliver the results. Returns whether all units could be computed."""
        pending = dict(enumerate(batch))
        all_computed = True
        try:
            for index, values in self._score([queued.unit for queued in batch]):
                self._deliver(pending.pop(index), values)
        except Exception as error:  # a model can raise anything
            if len(pending) == 1:
                logger.exception("Scoring failed.")
                self._deliver(pending.popitem()[1], error)
                all_computed = False
        # If a batch fails, each unit is tried alone, so that a bad one does not fail the others. This is not done
        # inside `except`, because there the traceback would keep the memory of the failed pass alive.
        for queued in pending.values():
            all_computed = self._compute([queued]) and all_computed
        return all_computed

    def _give_up(self) -> None:
        with self._condition:
            self._closed = self.device_lost = True
            waiting = [queued for queue in self._queues.values() for queued in queue]
            self._queues.clear()
        for queued in waiting:
            self._deliver(queued, ClosedError())

    def _deliver(self, queued: _QueuedUnit, result: list[Values] | Exception) -> None:
        with self._condition:
            self._forget(queued)
            waiters = queued.waiters
        for request, indices in waiters:
            request.missing -= 1
            if isinstance(result, Exception):
                _settle(request.future, error=result)
                continue
            request.answers.update(zip(indices, result, strict=True))
            if not request.missing:
                _settle(request.future, request.answers)


def _fits(unit: WorkUnit, batch: Sequence[_QueuedUnit], room: int) -> bool:
    if not batch:
        return True
    return not unit.as_sent and unit.temperature == batch[0].unit.temperature and unit.tokens <= room


def _settle(future: Future[Answers], answers: Answers | None = None, error: Exception | None = None) -> None:
    """Set the result of a future that another thread may be cancelling at the same moment."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert answers is not None
        future.set_result(answers)
