"""Several processes that fill one store at once: each takes its part of the work, and what others left undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain

import xxhash

from trl_refplug.store import LogProbStore


_LOOKING_SHARE = 50
"""Others' rows are looked for as often as takes one part in this many of the time, ..."""
_LOOKING_SECONDS = 10.0
"""... and at least this often."""


class SharedWork:
    """
    Decides which forward pass is next, given the rows that others have put into the store by now.

    Nothing is claimed and nobody waits, so a process that dies holds nothing up. Every pass has a place of its own in
    every writer's order, and the writer that has it in the highest place is the one to score it; the others come to it
    when theirs are done, and by then it mostly is (rendezvous hashing, Thaler and Ravishankar 1996).

    Args:
        store ([`LogProbStore`]): What is being filled.
        key_of (`Callable[[int], bytes]`): The key that a row, by its index, is going to be put under.
        leave_out (`Callable[[int], None]`): Called with the index of a row that was planned and is not going to be
            scored, because others have put it.
    """

    def __init__(self, store: LogProbStore, key_of: Callable[[int], bytes], leave_out: Callable[[int], None]) -> None:
        self._store = store
        self._key_of = key_of
        self._leave_out = leave_out
        self._look_again = 0.0

    def choose(self, passes: Sequence[Sequence[int]]) -> int | None:
        """The number of the next pass to make; `None` if the store has the rows of all of them."""
        self._look()
        places = [self._place(self._key_of(indices[0])) for indices in passes]
        for number in sorted(range(len(passes)), key=places.__getitem__, reverse=True):
            if not self._store.contains([self._key_of(index) for index in passes[number]]).all():
                return number
        for index in chain.from_iterable(passes):
            self._leave_out(index)
        return None

    def _look(self) -> None:
        started = time.monotonic()
        if started >= self._look_again:
            self._store.refresh()
            now = time.monotonic()
            self._look_again = now + min(_LOOKING_SHARE * (now - started), _LOOKING_SECONDS)

    def _place(self, key: bytes) -> tuple[bool, bytes]:
        mine = _weight(self._store.writer, key)
        return all(mine > _weight(other, key) for other in self._store.other_writers), mine


def _weight(writer: str, key: bytes) -> bytes:
    return xxhash.xxh3_64_digest(writer.encode() + key)
