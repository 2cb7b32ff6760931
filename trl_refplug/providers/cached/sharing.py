"""Several processes that fill one store at once: each scores its part first, and then what others left undone."""

from __future__ import annotations

import time

import xxhash

from trl_refplug.store import LogProbStore


_LOOKING_SHARE = 50
"""The store is looked at again as often as takes one part in this many of the time, ..."""
_LOOKING_SECONDS = 10.0
"""... and at least this often."""


class SharedWork:
    """
    Decides when this process scores which rows of a store that others may fill, too.

    Nothing is claimed and nobody waits, so a process that dies holds nothing up. Every window of rows has a weight of
    its own for every writer. The writer for whom it weighs most scores it in its first turn; the others come to it in
    a later turn, when their own are done, and by then it mostly is there (rendezvous hashing, Thaler and Ravishankar
    1996).

    Args:
        store ([`LogProbStore`]): What is being filled.
    """

    def __init__(self, store: LogProbStore) -> None:
        self._store = store
        self._look_again = 0.0

    def turn(self, key: bytes) -> int:
        """The turn, from 0, in which this process scores the window whose first row has this key."""
        mine = _weight(self._store.writer, key)
        before = sum(_weight(other, key) > mine for other in self._store.other_writers)
        # Every second window of another process is left for later: so this one overtakes it and does not follow it.
        return 2 * before - (before > 0 and mine[-1] % 2)

    def look(self) -> None:
        """See what others have put since. Called before every window; does nothing if that was a moment ago."""
        started = time.monotonic()
        if started >= self._look_again:
            self._store.refresh()
            now = time.monotonic()
            self._look_again = now + min(_LOOKING_SHARE * (now - started), _LOOKING_SECONDS)


def _weight(writer: str, key: bytes) -> bytes:
    return xxhash.xxh3_64_digest(writer.encode() + key)
