"""
Dividing the work between processes that fill one store: each scores its own part, and then what others have left.
"""

from __future__ import annotations

import time

import xxhash

from trl_refplug.store import LogProbStore


_LOOKING_SHARE = 50
"""Looking at the store again may take one part in this many of the time."""
_LOOKING_SECONDS = 10.0
"""But the store is looked at again after this many seconds in any case."""


class SharedWork:
    """
    Decides when this process scores which rows of a store that others may fill, too.

    No process claims rows or waits for another one, so it does no harm if a process dies. Every window of rows has a
    weight for every process, made by hashing. The process with the largest weight scores the window in its first turn.
    The others come to it in a later turn, when their own windows are done; by then, it is usually in the store. This
    is rendezvous hashing (Thaler and Ravishankar 1996).

    Args:
        store ([`LogProbStore`]): The store that is being filled.
    """

    def __init__(self, store: LogProbStore) -> None:
        self._store = store
        self._look_again = 0.0

    def turn(self, key: bytes) -> int:
        """The turn, from 0, in which this process scores the window whose first row has this key."""
        mine = _weight(self._store.writer, key)
        before = sum(_weight(other, key) > mine for other in self._store.other_writers)
        # Of the windows of another process, every second one is left for a later turn. So this process gets ahead of
        # the other one, and does not score the same windows right behind it.
        return 2 * before - (before > 0 and mine[-1] % 2)

    def look(self) -> None:
        """Look at what others have stored. Called before every window; does nothing if it was done a moment ago."""
        started = time.monotonic()
        if started >= self._look_again:
            self._store.refresh()
            now = time.monotonic()
            self._look_again = now + min(_LOOKING_SHARE * (now - started), _LOOKING_SECONDS)


def _weight(writer: str, key: bytes) -> bytes:
    return xxhash.xxh3_64_digest(writer.encode() + key)
