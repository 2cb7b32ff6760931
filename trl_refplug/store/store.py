"""`LogProbStore`, which reads and writes a store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import InvalidLogProbsError, RefPlugWarning, StoreError, StoreWriteError
from trl_refplug.store.folder import explain_read_errors, open_existing, open_folder
from trl_refplug.store.format import DamagedFileError, Manifest, installed_versions, shard_file_names
from trl_refplug.store.journal import OtherJournals, abandoned_rows
from trl_refplug.store.keys import as_key_array
from trl_refplug.store.shards import PublishedShards
from trl_refplug.store.write_buffer import WriteBuffer


_NO_VALUES = np.empty(0, np.float32)


class StoreWarning(RefPlugWarning):
    """Part of a store is damaged. Its rows are missing and will be scored again."""


class LogProbStore:
    """
    An append-only map from 128-bit keys to float32 log-probs. Any number of processes can share it without locks.

    Every shard's checksum is verified when the shard is opened. A damaged shard is left out, so that its rows are
    missing and can be scored again. If several shards have a row with the same key, the row that was read first is
    used for as long as the store is open; shards are read in the order of their names. A `LogProbStore` must be used
    from one thread only.

    Rows that are put are collected and published together, as one shard. Until then they are also in a journal on
    disk: if the process is killed, the next one that opens the store for writing publishes them.

    Args:
        location (`str` or `os.PathLike`): A directory, or an fsspec URL such as `s3://bucket/ref-store`.
        mode (`"r"` or `"a"`): `"r"` reads a store. `"a"` also writes: the store is created if needed, and a test file
            proves that it is writable.
        provenance (`Mapping[str, Any]`): With `mode="a"`, JSON values that tell people where the rows come from,
            usually the identity of the reference. Package versions are added.
        publish_rows (`int`): Publish a shard as soon as this many rows have been collected.
        publish_bytes (`int`): Publish a shard as soon as this many bytes of log-probs have been collected.
        publish_seconds (`float`): Publish a shard in the first `put` that finds a row collected this long ago.
        cache_dir (`str` or `os.PathLike`): The directory for copies of remote shards, by default
            `~/.cache/trl-refplug/store`.

    Raises:
        [`StoreError`]: There is no such store to read, or it cannot be read.
        [`StoreVersionError`]: A newer release wrote part of the store.
        [`StoreWriteError`]: With `mode="a"`, the store is not writable.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        provenance: Mapping[str, Any] | None = None,
        publish_rows: int = 16_384,
        publish_bytes: int = 16 << 20,
        publish_seconds: float = 10.0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if mode not in ("r", "a"):
            raise ValueError(f'mode must be "r" or "a", got {mode!r}')
        self.location = os.fspath(location)
        self.mode = mode
        self._folder = (open_existing if mode == "r" else open_folder)(location, cache_dir)
        self._shards = PublishedShards(self._folder)
        self._buffer = WriteBuffer(
            self._folder.directory, max_rows=publish_rows, max_bytes=publish_bytes, max_seconds=publish_seconds
        )
        self._closed = False
        if mode == "a":
            self._provenance = {**(provenance or {}), "versions": installed_versions()}
            # If the provenance is not JSON, this raises now rather than when the first rows have been scored.
            Manifest("", 0, 0, 0, "", "", self._provenance).encode()
            try:
                self._folder.create()
            except OSError as error:
                raise self._cannot_write(error) from error
        self._other_journals = OtherJournals(self._folder.directory, self.writer)
        self.refresh()
        if mode == "a":
            self._recover()

    def __len__(self) -> int:
        """Number of different rows, including those that are not published yet."""
        unpublished = list(self._buffer.rows.keys() | self._other_journals.rows.keys())
        return len(self._shards.index) + len(unpublished) - len(self._published_among(unpublished))

    @property
    def writer(self) -> str:
        """The unique name of this writer."""
        return self._buffer.journal.name

    @property
    def provenances(self) -> list[Mapping[str, Any]]:
        """The provenance of each published shard."""
        return [manifest.provenance for manifest in self._shards.manifests.values()]

    def add_provenance(self, **values: Any) -> None:
        """Add JSON values to the provenance of the rows that are published from now on."""
        self._provenance.update(values)

    @property
    def other_writers(self) -> list[str]:
        """The names of the writers whose journals the last `refresh` has found."""
        return list(self._other_journals.names)

    # Reading

    def contains(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether the store has a row for each of these keys: bool `[keys]`."""
        self._check_open()
        found = self._shards.index.find(as_key_array(keys)).found
        if self._buffer.rows or self._other_journals.rows:
            for i in np.flatnonzero(~found).tolist():
                found[i] = keys[i] in self._buffer.rows or keys[i] in self._other_journals.rows
        return found

    def lookup(self, keys: Sequence[bytes]) -> list[NDArray[np.float32] | None]:
        """
        The rows with these keys. Each is a copy, float32 `[tokens]` in nats, or `None` if the store does not have it.
        A key may occur more than once.
        """
        self._check_open()
        rows = self._shards.rows(as_key_array(keys))
        for unpublished in (self._buffer.rows, self._other_journals.rows):
            if unpublished:
                rows = [unpublished.get(key) if row is None else row for key, row in zip(keys, rows, strict=True)]
        return [None if row is None else row.copy() for row in rows]

    def refresh(self) -> None:
        """
        Read what other writers have published since the last time. Rows that they have put but not published are read
        as well, if their journals can be seen: those of a local store, or of a remote store on the same machine.
        """
        self._check_open()
        self._other_journals.refresh()  # before the shards, so that rows published in between are not missed
        self._refresh_published()

    # Writing

    def ensure_room(self, tokens: int) -> None:
        """
        Check, before rows are scored, that there is room for their log-probs.

        Args:
            tokens (`int`): Number of log-probs that are going to be put.

        Raises:
            [`StoreWriteError`]: The disk has too little room.
        """
        try:
            self._folder.ensure_room(tokens * np.dtype(np.float32).itemsize)
        except OSError as error:
            raise self._cannot_write(error) from error

    def put(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """
        Add rows. A row whose key the store already has is ignored, also if another writer has put it and not published
        it yet.

        When this returns, the rows survive a kill of this process. When the next `flush` returns, they are visible to
        everyone and survive a power cut.

        Args:
            keys (`Sequence[bytes]`): A key for each row.
            rows (`Sequence[NDArray[np.float32]]`): The log-probs of each row's scored tokens, 1-D and finite. They are
                copied.

        Raises:
            [`InvalidLogProbsError`]: A row is not finite, not float32 or not 1-D. No row of this call is added.
            [`StoreWriteError`]: A shard could not be published. This process keeps the rows and can read them, and the
                next `flush` tries again.
        """
        if self.mode != "a":
            raise StoreError(f'the store {self.location!r} is open for reading; open it with mode="a"')
        self._check_open()
        if len(keys) != len(rows):
            raise ValueError(f"every row needs a key: got {len(keys)} keys and {len(rows)} rows")
        for key, row in zip(keys, rows, strict=True):
            if row.dtype != np.float32 or row.ndim != 1:
                raise InvalidLogProbsError(
                    f"row {key.hex()}: log-probs must be float32 [tokens], got {row.dtype} {list(row.shape)}"
                )
        values = np.concatenate([_NO_VALUES, *rows])  # this is the copy that is kept
        if not np.isfinite(values).all():
            bad = next(key for key, row in zip(keys, rows, strict=True) if not np.isfinite(row).all())
            raise InvalidLogProbsError(f"row {bad.hex()}: log-probs must be finite")
        ends = np.cumsum([len(row) for row in rows]).tolist()
        for i in np.flatnonzero(~self.contains(keys)).tolist():
            if keys[i] in self._buffer.rows:  # the same key occurs twice in this call
                continue
            self._buffer.add(keys[i], values[ends[i] - len(rows[i]) : ends[i]])
            if self._buffer.full:
                self._publish()
        if self._buffer.overdue:
            self._publish()
        self._buffer.write_journal()

    def flush(self) -> None:
        """
        Publish all rows that are not published yet, as one shard. Rows that another writer has published in the
        meantime are left out, and rows in the journals of killed writers are published, too. When this returns, the
        rows survive a power cut.

        Raises:
            [`StoreWriteError`]: That failed. This process keeps the rows.
        """
        self._check_open()
        self._publish()
        if self.mode == "a" and self._other_journals.names:  # a writer that had put some of our rows may have died
            self._recover()

    def close(self) -> None:
        """[`flush`], and release all shards. This may be called more than once."""
        if self._closed:
            return
        self.flush()
        self._buffer.journal.close()
        self._closed = True
        self._shards = PublishedShards(self._folder)

    def __enter__(self) -> LogProbStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Internals

    def _publish(self) -> None:
        if self._buffer.rows:
            self._drop_published_by_others()
        if not self._buffer.rows:
            return
        manifest, data = self._buffer.to_shard(self._provenance)
        manifest_file, shard_file = shard_file_names(manifest.name)
        try:
            self._folder.publish(shard_file, data)
            self._folder.publish(manifest_file, manifest.encode())  # from here on the rows are published
        except OSError as error:
            raise self._write_error(error) from error
        for name, reason in self._shards.add([manifest.name]).items():
            self._exclude_damaged_shard(name, reason)
            raise self._write_error(f"a shard reads back otherwise than it was written: {reason}") from reason
        self._buffer.discard(self._buffer.rows)

    def _refresh_published(self) -> None:
        with explain_read_errors(self.location):
            damaged = self._shards.refresh()
        for name, reason in damaged.items():
            self._exclude_damaged_shard(name, reason)
        self._other_journals.discard(self._published_among(list(self._other_journals.rows)))

    def _published_among(self, keys: Sequence[bytes]) -> list[bytes]:
        found = self._shards.index.find(as_key_array(keys)).found
        return [keys[i] for i in np.flatnonzero(found).tolist()]

    def _drop_published_by_others(self) -> None:
        """Drop the rows that another process has scored at the same time and has already published."""
        try:
            self.refresh()
        except StoreError:
            return  # at worst some rows are stored twice; if the store is broken, publishing has the clearer error
        self._buffer.discard(self._published_among(list(self._buffer.rows)))

    def _recover(self) -> None:
        """Publish the rows in the journals of writers that have died."""
        with abandoned_rows(self._folder.directory) as rows:
            if rows:
                self._other_journals.discard(key for key, _ in rows)  # or `put` would ignore them
                self.put([key for key, _ in rows], [row for _, row in rows])
                self._publish()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.location!r} is closed")

    def _cannot_write(self, cause: Exception) -> StoreWriteError:
        return StoreWriteError(f"cannot write to the store {self.location!r}: {cause}. Use another path")

    def _write_error(self, cause: object) -> StoreWriteError:
        return StoreWriteError(
            f"cannot publish {len(self._buffer.rows):,} rows to the store {self.location!r}: {cause}. The "
            f"{sum(manifest.rows for manifest in self._shards.manifests.values()):,} rows published before are kept"
        )

    def _exclude_damaged_shard(self, name: str, error: Exception) -> None:
        done = "ignored"
        # A wrong checksum is permanent. An error of the file system may be temporary, so the files stay.
        if self.mode == "a" and isinstance(error, DamagedFileError) and self._folder.set_aside(shard_file_names(name)):
            done = "set aside"
        warnings.warn(
            f"shard {name} of the store {self.location!r} is damaged and was {done}, its rows are missing: {error}",
            StoreWarning,
            stacklevel=4,
        )
