"""The index of a store: it finds the shard and the row of a key. It takes 24 bytes per row, in sorted numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray


Keys: TypeAlias = NDArray[np.uint64]

_ROW_BITS = 32


class RowLocations(NamedTuple):
    """The locations of keys, each array `[keys]`. Where `found` is false, `shards` and `rows` have no meaning."""

    found: NDArray[np.bool_]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]


class SortedIndex:
    """
    Keys, sorted by their first 8 bytes, with the location of each. If a key is added again, its first location stays.
    """

    def __init__(self) -> None:
        self._high: Keys = np.empty(0, np.uint64)
        self._low: Keys = np.empty(0, np.uint64)
        self._locations: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._locations)

    def add(self, shards: Sequence[tuple[int, Keys]]) -> None:
        """
        Add all keys of some shards.

        Args:
            shards (`Sequence[tuple[int, NDArray]]`): The number of each shard and its keys, uint64 `[rows, 2]`.
        """
        if not shards:
            return
        high = np.concatenate([keys[:, 0] for _, keys in shards])
        low = np.concatenate([keys[:, 1] for _, keys in shards])
        locations = np.concatenate([(number << _ROW_BITS) + np.arange(len(keys)) for number, keys in shards])

        order = np.lexsort((low, high))  # stable, so equal keys stay in the order in which they were given
        high, low, locations = high[order], low[order], locations[order]
        del order  # so that sorting a million rows takes less than 64 MB
        first = np.ones(len(high), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if len(self):
            first &= self._find(high, low) < 0
        if not first.all():
            high, low, locations = high[first], low[first], locations[first]
        if not len(self):
            self._high, self._low, self._locations = high, low, locations
            return
        position = np.searchsorted(self._high, high)
        self._high = np.insert(self._high, position, high)
        self._low = np.insert(self._low, position, low)
        self._locations = np.insert(self._locations, position, locations)

    def find(self, keys: Keys) -> RowLocations:
        """The locations of keys, uint64 `[keys, 2]`."""
        position = self._find(keys[:, 0], keys[:, 1])
        locations = self._locations[position] if len(self) else np.zeros(len(keys), np.int64)
        return RowLocations(position >= 0, locations >> _ROW_BITS, locations & ((1 << _ROW_BITS) - 1))

    def _find(self, high: Keys, low: Keys) -> NDArray[np.int64]:
        if not len(self):
            return np.full(len(high), -1, np.int64)
        position = np.minimum(np.searchsorted(self._high, high), len(self) - 1)
        same = self._high[position] == high
        hit = same & (self._low[position] == low)
        answer: NDArray[np.int64] = np.where(hit, position, -1)
        # A key can share its first half with others. Then each round of this loop compares it with the next of them.
        pending = np.flatnonzero(same ^ hit)
        while pending.size:
            position[pending] += 1
            pending = pending[position[pending] < len(self)]
            pending = pending[self._high[position[pending]] == high[pending]]
            found = self._low[position[pending]] == low[pending]
            answer[pending[found]] = position[pending[found]]
            pending = pending[~found]
        return answer
