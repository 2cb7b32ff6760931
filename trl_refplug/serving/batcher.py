"""
The queue in front of the model: work of all clients, merged into forward passes by one thread.
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
from trl_refplug.serving.engine import Unit


logger = logging.getLogger("trl_refplug")

Score = Callable[[Sequence[Unit]], Iterator[tuple[int, list[Values]]]]
Answers = dict[int, Values]
"""The values of a request's rows, by index."""

_TURN = 4  # a client gets a quarter of a forward pass before the next one has its turn
_LONGEST_QUEUE = 60.0  # seconds of work: what waits longer would be given up, and asked for again, by its client
_LONGEST_PAUSE = 30  # seconds, announced by `Retry-After`


class QueueFullError(Exception):
    """More is waiting than may wait. `retry_after` is when to come back, in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; come back in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is going down and takes nothing new."""


@dataclass(eq=False)
class _Job:
    """A request: what is still missing of it."""

    answers: Answers = field(default_factory=dict)
    missing: int = 0
    future: Future[Answers] = field(default_factory=Future)


@dataclass(eq=False)
class _Entry:
    """A unit, and everyone who waits for it: jobs, with the rows of theirs that it answers."""

    unit: Unit
    waiting: list[tuple[_Job, list[int]]]

    @property
    def abandoned(self) -> bool:
        return all(job.future.done() for job, _ in self.waiting)


class Batcher:
    """
    Merges work, fairly: clients take turns, whatever each has asked for. Identical units that wait or are being
    computed are computed once. What a client no longer waits for is not begun.

    Args:
        score (`Callable`): Scores units that go together: [`~Engine.score`]. Called on one thread only.
        works (`Callable`): Asked after a failure whether there is any use in going on: [`~Engine.works`]. If not,
            all that waits fails, and nothing more is taken.
        token_budget (`int`): Most tokens scored together.
        queue_tokens (`int`): When this many tokens wait or are being computed, or what takes a minute, no more are
            taken.

    Attributes:
        lost (`bool`): Whether the device computes no more.
    """

    def __init__(self, score: Score, works: Callable[[], bool], *, token_budget: int, queue_tokens: int) -> None:
        self._score = score
        self._works = works
        self._budget = token_budget
        self._bound = queue_tokens
        self._changed = threading.Condition()
        self._queues: OrderedDict[int, deque[_Entry]] = OrderedDict()  # the client whose turn is next comes first
        self._entries: dict[bytes, _Entry] = {}  # waiting or being computed
        self._waiting = 0  # tokens
        self._speed = 0.0  # tokens/s, of late
        self._closed = False
        self.lost = False
        self._thread = threading.Thread(target=self._run, name="refplug-scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether work is being done, or would be."""
        return self._thread.is_alive()

    def submit(self, client: int, units: Sequence[tuple[Unit, list[int]]]) -> Future[Answers]:
        """
        Queue the units of a request, each with the rows that it answers. Cancel the future to take them back.

        Raises:
            QueueFullError: Too much is waiting.
            ClosedError: After `close`.
        """
        job = _Job(missing=len(units))
        if not units:
            job.future.set_result({})
            return job.future
        with self._changed:
            if self._closed:
                raise ClosedError
            if self._waiting >= min(self._bound, self._speed * _LONGEST_QUEUE or self._bound):
                raise QueueFullError(self._retry_after())
            for unit, indices in units:
                entry = self._entries.get(unit.key)
                if entry is None:
                    entry = self._entries[unit.key] = _Entry(unit, [])
                    self._queues.setdefault(client, deque()).append(entry)
                    self._waiting += unit.tokens
                entry.waiting.append((job, indices))
            self._changed.notify()
        job.future.add_done_callback(self._drop_abandoned)
        return job.future

    def close(self) -> None:
        """Take nothing new, finish what was taken, and return when it is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        seconds = self._waiting / self._speed / 2 if self._speed else 1  # by then half of the queue is done
        return min(max(math.ceil(seconds), 1), _LONGEST_PAUSE)

    def _drop_abandoned(self, future: Future[Answers]) -> None:
        if not future.cancelled():
            return
        with self._changed:
            for client, queue in list(self._queues.items()):
                kept: deque[_Entry] = deque()
                for entry in queue:
                    if entry.abandoned:
                        self._forget(entry)
                    else:
                        kept.append(entry)
                if kept:
                    self._queues[client] = kept
                else:
                    del self._queues[client]

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.unit.key]
        self._waiting -= entry.unit.tokens

    # What follows runs on the scoring thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queues:
                    if self._closed:
                        return
                    self._changed.wait()
                batch = self._next()
            started = time.perf_counter()
            if not self._compute(batch) and not self._works():
                logger.critical("The device computes no more. Start this server anew.")
                self._give_up()
                return
            speed = sum(entry.unit.tokens for entry in batch) / max(time.perf_counter() - started, 1e-6)
            self._speed = 0.5 * (self._speed or speed) + 0.5 * speed

    def _next(self) -> list[_Entry]:
        """What to compute next: entries of one temperature within the budget, or one that is whole."""
        batch: list[_Entry] = []
        room = self._budget
        took = True
        while took and room > 0:
            took = False
            for client in list(self._queues):
                queue, turn = self._queues[client], max(1, self._budget // _TURN)
                before = len(batch)
                while queue and turn > 0 and room > 0 and _fits(queue[0].unit, batch, room):
                    entry = queue.popleft()
                    batch.append(entry)
                    room = 0 if entry.unit.whole else room - entry.unit.tokens
                    turn -= entry.unit.tokens
                if len(batch) > before:
                    took = True
                    self._queues.move_to_end(client)
                if not queue:
                    del self._queues[client]
        return batch

    def _compute(self, batch: Sequence[_Entry]) -> bool:
        """Whether all of it could be."""
        pending = dict(enumerate(batch))
        sound = True
        try:
            for index, values in self._score([entry.unit for entry in batch]):
                self._deliver(pending.pop(index), values)
        except Exception as error:  # whatever a model raises
            if len(pending) == 1:
                logger.exception("Scoring failed.")
                self._deliver(pending.popitem()[1], error)
                sound = False
        # One unit must not fail the others. Not inside `except`, where the error keeps the memory of the pass
        for entry in pending.values():
            sound = self._compute([entry]) and sound
        return sound

    def _give_up(self) -> None:
        with self._changed:
            self._closed = self.lost = True
            waiting = [entry for queue in self._queues.values() for entry in queue]
            self._queues.clear()
        for entry in waiting:
            self._deliver(entry, ClosedError())

    def _deliver(self, entry: _Entry, result: list[Values] | Exception) -> None:
        with self._changed:
            self._forget(entry)
            waiting = entry.waiting
        for job, indices in waiting:
            job.missing -= 1
            if isinstance(result, Exception):
                _settle(job.future, error=result)
                continue
            job.answers.update(zip(indices, result, strict=True))
            if not job.missing:
                _settle(job.future, job.answers)


def _fits(unit: Unit, batch: Sequence[_Entry], room: int) -> bool:
    if not batch:
        return True
    return not unit.whole and unit.temperature == batch[0].unit.temperature and unit.tokens <= room


def _settle(future: Future[Answers], answers: Answers | None = None, error: Exception | None = None) -> None:
    """Settle a future that someone else may be cancelling at this moment."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert answers is not None
        future.set_result(answers)
