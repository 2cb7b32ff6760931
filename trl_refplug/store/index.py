"""The index: which shard, and which row in it, holds a key. 24 bytes a row in sorted numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray


Keys: TypeAlias = NDArray[np.uint64]

_ROW_BITS = 32


class Places(NamedTuple):
    """Where keys are. `shards` and `rows` mean nothing where a key was not found. All `[keys]`."""

    found: NDArray[np.bool_]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]


class SortedIndex:
    """
    Keys, sorted by their first half, with the place each was first seen at.

    Of equal keys the first one added wins, for as long as the index lives.
    """

    def __init__(self) -> None:
        self._high: Keys = np.empty(0, np.uint64)
        self._low: Keys = np.empty(0, np.uint64)
        self._places: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, shards: Sequence[tuple[int, Keys]]) -> None:
        """
        Add all keys of some shards.

        Args:
            shards (`Sequence[tuple[int, NDArray]]`): Number and keys, uint64 `[rows, 2]`, of each shard.
        """
        if not shards:
            return
        high = np.concatenate([keys[:, 0] for _, keys in shards])
        low = np.concatenate([keys[:, 1] for _, keys in shards])
        places = np.concatenate([(number << _ROW_BITS) + np.arange(len(keys)) for number, keys in shards])

        order = np.lexsort((low, high))  # stable: equal keys stay in the order they were given in
        high, low, places = high[order], low[order], places[order]
        del order  # a million rows must fit 64 MB while they are being sorted, too
        first = np.ones(len(high), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if len(self):
            first &= self._find(high, low) < 0
        if not first.all():
            high, low, places = high[first], low[first], places[first]
        if not len(self):
            self._high, self._low, self._places = high, low, places
            return
        at = np.searchsorted(self._high, high)
        self._high = np.insert(self._high, at, high)
        self._low = np.insert(self._low, at, low)
        self._places = np.insert(self._places, at, places)

    def find(self, keys: Keys) -> Places:
        """Where keys, uint64 `[keys, 2]`, are."""
        at = self._find(keys[:, 0], keys[:, 1])
        places = self._places[at] if len(self) else np.zeros(len(keys), np.int64)
        return Places(at >= 0, places >> _ROW_BITS, places & ((1 << _ROW_BITS) - 1))

    def _find(self, high: Keys, low: Keys) -> NDArray[np.int64]:
        if not len(self):
            return np.full(len(high), -1, np.int64)
        at = np.minimum(np.searchsorted(self._high, high), len(self) - 1)
        same = self._high[at] == high
        hit = same & (self._low[at] == low)
        answer: NDArray[np.int64] = np.where(hit, at, -1)
        # Only of keys that share their first half with another one: one more round for each of those.
        pending = np.flatnonzero(same ^ hit)
        while pending.size:
            at[pending] += 1
            pending = pending[at[pending] < len(self)]
            pending = pending[self._high[at[pending]] == high[pending]]
            found = self._low[at[pending]] == low[pending]
            answer[pending[found]] = at[pending[found]]
            pending = pending[~found]
        return answer
