"""Rows that were put and are not published yet."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trl_refplug.store.format import Manifest, encode_shard, new_name
from trl_refplug.store.journal import Journal


class WaitingRows:
    """
    The rows that one writer is going to publish next: in memory, and in a journal, should the writer be killed.

    Args:
        directory (`Path`): A local directory, for the journal.
        most_rows (`int`), most_bytes (`int`), most_seconds (`float`): How much may wait, and for how long.
    """

    def __init__(self, directory: Path, *, most_rows: int, most_bytes: int, most_seconds: float) -> None:
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.journal = Journal(directory)
        self._most_rows, self._most_bytes, self._most_seconds = most_rows, most_bytes, most_seconds
        self._bytes = 0
        self._since = 0.0
        self._unwritten: list[bytes] = []

    def add(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Add a row, which is not copied."""
        if not self.rows:
            self._since = time.monotonic()
        self.rows[key] = row
        self._bytes += row.nbytes
        self._unwritten.append(key)

    @property
    def full(self) -> bool:
        """Whether as much waits as may."""
        return len(self.rows) >= self._most_rows or self._bytes >= self._most_bytes

    @property
    def overdue(self) -> bool:
        """Whether a row has waited as long as it may."""
        return bool(self.rows) and time.monotonic() - self._since >= self._most_seconds

    def write_journal(self) -> None:
        """Make the rows added since survive this process."""
        if self._unwritten:
            self.journal.append(self._unwritten, [self.rows[key] for key in self._unwritten])
            self._unwritten.clear()

    def encoded(self, provenance: Mapping[str, Any]) -> tuple[Manifest, bytes]:
        """All rows as a shard: its manifest, and its file."""
        data = encode_shard(list(self.rows), list(self.rows.values()))
        now = datetime.now(UTC)
        manifest = Manifest(
            name=new_name(now),
            rows=len(self.rows),
            tokens=self._bytes // np.dtype(np.float32).itemsize,
            size=len(data),
            xxh3_128=xxhash.xxh3_128_hexdigest(data),
            created=now.isoformat(timespec="seconds"),
            provenance=provenance,
        )
        return manifest, data

    def published(self, keys: Iterable[bytes]) -> None:
        """Let go of rows that are published, by whomever."""
        for key in list(keys):
            self._bytes -= self.rows.pop(key).nbytes
        self._unwritten = [key for key in self._unwritten if key in self.rows]
        if not self.rows:
            self.journal.clear()
