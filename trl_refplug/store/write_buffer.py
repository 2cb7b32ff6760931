"""The rows that this process has put into a store and not published yet."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trl_refplug.store.format import Manifest, encode_shard, new_shard_name
from trl_refplug.store.journal import Journal


class WriteBuffer:
    """
    The rows that one writer is going to publish as its next shard. They are kept in memory, and also in a journal on
    disk in case the writer is killed.

    Args:
        directory (`Path`): A local directory in which the journal is written.
        max_rows (`int`), max_bytes (`int`): The buffer is full when it holds this many rows, or bytes of log-probs.
        max_seconds (`float`): The buffer is overdue when its oldest row has been in it for this long.
    """

    def __init__(self, directory: Path, *, max_rows: int, max_bytes: int, max_seconds: float) -> None:
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.journal = Journal(directory)
        self._max_rows, self._max_bytes, self._max_seconds = max_rows, max_bytes, max_seconds
        self._bytes = 0
        self._since = 0.0
        self._not_in_journal: list[bytes] = []

    def add(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Add a row without copying it."""
        if not self.rows:
            self._since = time.monotonic()
        self.rows[key] = row
        self._bytes += row.nbytes
        self._not_in_journal.append(key)

    @property
    def full(self) -> bool:
        """Whether the buffer has reached `max_rows` or `max_bytes`."""
        return len(self.rows) >= self._max_rows or self._bytes >= self._max_bytes

    @property
    def overdue(self) -> bool:
        """Whether the oldest row has been in the buffer for `max_seconds`."""
        return bool(self.rows) and time.monotonic() - self._since >= self._max_seconds

    def write_journal(self) -> None:
        """Append the rows that were added since the last call to the journal, so that they survive this process."""
        if self._not_in_journal:
            self.journal.append(self._not_in_journal, [self.rows[key] for key in self._not_in_journal])
            self._not_in_journal.clear()

    def to_shard(self, provenance: Mapping[str, Any]) -> tuple[Manifest, bytes]:
        """Encode all rows as a shard. Returns its manifest and the content of its file."""
        data = encode_shard(list(self.rows), list(self.rows.values()))
        now = datetime.now(UTC)
        manifest = Manifest(
            name=new_shard_name(now),
            rows=len(self.rows),
            tokens=self._bytes // np.dtype(np.float32).itemsize,
            size=len(data),
            xxh3_128=xxhash.xxh3_128_hexdigest(data),
            created=now.isoformat(timespec="seconds"),
            provenance=provenance,
        )
        return manifest, data

    def discard(self, keys: Iterable[bytes]) -> None:
        """Remove rows that have been published, whether by this process or by another one."""
        for key in list(keys):
            self._bytes -= self.rows.pop(key).nbytes
        self._not_in_journal = [key for key in self._not_in_journal if key in self.rows]
        if not self.rows:
            self.journal.clear()
