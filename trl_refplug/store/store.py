"""Reading and writing a store: the one class that training uses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trl_refplug.errors import InvalidLogProbsError, RefPlugWarning, StoreError, StoreWriteError
from trl_refplug.store.catalogue import Catalogue
from trl_refplug.store.folder import open_existing, open_folder, reading
from trl_refplug.store.format import DamagedFileError, Manifest, files_of, installed_versions
from trl_refplug.store.journal import OtherJournals, abandoned
from trl_refplug.store.keys import as_key_array
from trl_refplug.store.waiting import WaitingRows


_NO_VALUES = np.empty(0, np.float32)


class StoreWarning(RefPlugWarning):
    """Part of a store cannot be used: its rows are missing and will be scored again."""


class LogProbStore:
    """
    An append-only map from 128-bit keys to float32 log-probs, shared by any number of processes without locks.

    What is found was checked: every shard's checksum is verified when it is opened, and a shard that fails is left
    out, so that its rows are missing again. Of several published rows with one key the first one wins, in the order
    of the shards' names and then of [`refresh`], and stays for as long as the store is open. Use it from one thread.

    Args:
        location (`str` or `os.PathLike`): A directory, or an fsspec URL such as `s3://bucket/ref-store`.
        mode (`"r"` or `"a"`): `"a"` may `put`, creates the place if needed and writes to it once to prove that it can.
        provenance (`Mapping[str, Any]`): For `mode="a"`: where rows come from, as JSON values, for people; usually the
            reference's identity. Package versions are added.
        publish_rows (`int`): Publish a shard as soon as this many rows are waiting, ...
        publish_bytes (`int`): ... or this many bytes of log-probs, ...
        publish_seconds (`float`): ... or, looked at in every `put`, the oldest has waited this long. What waits is in
            a journal, too: of a killed process, the next one that opens the store for writing publishes it.
        cache_dir (`str` or `os.PathLike`): Where copies of remote shards are kept, by default
            `~/.cache/trl-refplug/store`.

    Raises:
        [`StoreError`]: There is no such store to read, or it cannot be read.
        [`StoreVersionError`]: A newer release wrote part of it.
        [`StoreWriteError`]: `mode="a"`, and nothing can be written there.
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
        self._published = Catalogue(self._folder)
        self._waiting = WaitingRows(
            self._folder.directory, most_rows=publish_rows, most_bytes=publish_bytes, most_seconds=publish_seconds
        )
        self._closed = False
        if mode == "a":
            self._provenance = {**(provenance or {}), "versions": installed_versions()}
            Manifest("", 0, 0, 0, "", "", self._provenance).encode()  # not JSON? Say so now and not after scoring.
            try:
                self._folder.create()
            except OSError as error:
                raise self._refused(error) from error
        self._others = OtherJournals(self._folder.directory, self.writer)
        self.refresh()
        if mode == "a":
            self._recover()

    def __len__(self) -> int:
        """Number of different rows, waiting ones included."""
        unpublished = list(self._waiting.rows.keys() | self._others.rows.keys())
        return len(self._published.index) + len(unpublished) - len(self._those_published(unpublished))

    @property
    def writer(self) -> str:
        """A name that no other writer has."""
        return self._waiting.journal.name

    @property
    def provenances(self) -> list[Mapping[str, Any]]:
        """What the writers of all published shards have said of themselves."""
        return [manifest.provenance for manifest in self._published.manifests.values()]

    def add_provenance(self, **values: Any) -> None:
        """Say more of where the rows come from that are published from now on. JSON values."""
        self._provenance.update(values)

    @property
    def other_writers(self) -> list[str]:
        """Names of those that had put rows at the last `refresh`, as far as they are seen from here."""
        return list(self._others.names)

    # Reading

    def contains(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Which of these keys the store has: bool `[keys]`."""
        self._check_open()
        found = self._published.index.find(as_key_array(keys)).found
        if self._waiting.rows or self._others.rows:
            for i in np.flatnonzero(~found).tolist():
                found[i] = keys[i] in self._waiting.rows or keys[i] in self._others.rows
        return found

    def lookup(self, keys: Sequence[bytes]) -> list[NDArray[np.float32] | None]:
        """
        The rows with these keys: of each a copy, float32 `[tokens]` in nats, or `None` where the store does not have
        it. A key may be asked for more than once.
        """
        self._check_open()
        rows = self._published.rows(as_key_array(keys))
        for unpublished in (self._waiting.rows, self._others.rows):
            if unpublished:
                rows = [unpublished.get(key) if row is None else row for key, row in zip(keys, rows, strict=True)]
        return [None if row is None else row.copy() for row in rows]

    def refresh(self) -> None:
        """
        Take in what others have published since, and what they have put where this process sees it: in the same
        directory or, of a remote store, on the same machine.
        """
        self._check_open()
        self._others.look()  # first: what is published in between is seen twice rather than not at all
        self._refresh_published()

    # Writing

    def ensure_room(self, tokens: int) -> None:
        """
        Refuse early, before they are scored, log-probs that are known not to fit.

        Args:
            tokens (`int`): Number of log-probs that are going to be put.

        Raises:
            [`StoreWriteError`]: The disk has less room than that.
        """
        try:
            self._folder.ensure_room(tokens * np.dtype(np.float32).itemsize)
        except OSError as error:
            raise self._refused(error) from error

    def put(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """
        Add rows. Those the store has already are left as they are.

        Args:
            keys (`Sequence[bytes]`): A key for each row.
            rows (`Sequence[NDArray[np.float32]]`): Log-probs of the scored tokens of each row, 1-D, finite. Copied.

        Raises:
            [`InvalidLogProbsError`]: A row is not finite, not float32 or not 1-D. Nothing of this call is added.
            [`StoreWriteError`]: A shard could not be published. The rows still wait, for this process to read and for
                the next `flush`.

        When it returns, the rows survive this process; after the next `flush` they survive the machine, too, and
        others see them. Rows that another writer has put already are that writer's to publish.
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
        values = np.concatenate([_NO_VALUES, *rows])  # the copy that is kept
        if not np.isfinite(values).all():
            bad = next(key for key, row in zip(keys, rows, strict=True) if not np.isfinite(row).all())
            raise InvalidLogProbsError(f"row {bad.hex()}: log-probs must be finite")
        ends = np.cumsum([len(row) for row in rows]).tolist()
        for i in np.flatnonzero(~self.contains(keys)).tolist():
            if keys[i] in self._waiting.rows:  # the same row twice in one call
                continue
            self._waiting.add(keys[i], values[ends[i] - len(rows[i]) : ends[i]])
            if self._waiting.full:
                self._publish()
        if self._waiting.overdue:
            self._publish()
        self._waiting.write_journal()

    def flush(self) -> None:
        """
        Publish the rows that wait, as one shard, less those that others have published in the meantime. When it
        returns they survive this machine. Rows of writers that were killed are published, too.

        Raises:
            [`StoreWriteError`]: That failed. The rows still wait.
        """
        self._check_open()
        self._publish()
        if self.mode == "a" and self._others.names:  # what was left to a writer that is gone by now
            self._recover()

    def close(self) -> None:
        """[`flush`], and let go of all shards. May be called more than once."""
        if self._closed:
            return
        self.flush()
        self._waiting.journal.close()
        self._closed = True
        self._published = Catalogue(self._folder)

    def __enter__(self) -> LogProbStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Behind both

    def _publish(self) -> None:
        if self._waiting.rows:
            self._leave_to_others()
        if not self._waiting.rows:
            return
        manifest, data = self._waiting.encoded(self._provenance)
        manifest_file, shard_file = files_of(manifest.name)
        try:
            self._folder.publish(shard_file, data)
            self._folder.publish(manifest_file, manifest.encode())  # from here on the rows count
        except OSError as error:
            raise self._write_error(error) from error
        for name, reason in self._published.add([manifest.name]).items():
            self._leave_out(name, reason)
            raise self._write_error(f"a shard reads back otherwise than it was written: {reason}") from reason
        self._waiting.published(self._waiting.rows)

    def _refresh_published(self) -> None:
        with reading(self.location):
            damaged = self._published.refresh()
        for name, reason in damaged.items():
            self._leave_out(name, reason)
        self._others.forget(self._those_published(list(self._others.rows)))

    def _those_published(self, keys: Sequence[bytes]) -> list[bytes]:
        found = self._published.index.find(as_key_array(keys)).found
        return [keys[i] for i in np.flatnonzero(found).tolist()]

    def _leave_to_others(self) -> None:
        """Drop what waits and is published: of processes that score the same rows at once, the first one counts."""
        try:
            self.refresh()
        except StoreError:
            return  # it costs only a row that is there twice, and publishing says more clearly what is wrong
        self._waiting.published(self._those_published(list(self._waiting.rows)))

    def _recover(self) -> None:
        """Publish what writers that are gone had put and not published."""
        with abandoned(self._folder.directory) as rows:
            if rows:
                self._others.forget(key for key, _ in rows)  # or `put` would leave them to a writer that is gone
                self.put([key for key, _ in rows], [row for _, row in rows])
                self._publish()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.location!r} is closed")

    def _refused(self, cause: Exception) -> StoreWriteError:
        return StoreWriteError(f"cannot write to the store {self.location!r}: {cause}. Use another path")

    def _write_error(self, cause: object) -> StoreWriteError:
        return StoreWriteError(
            f"cannot publish {len(self._waiting.rows):,} rows to the store {self.location!r}: {cause}. The "
            f"{sum(manifest.rows for manifest in self._published.manifests.values()):,} rows published before are kept"
        )

    def _leave_out(self, name: str, error: Exception) -> None:
        done = "ignored"
        # An error of the file system may pass; a wrong checksum does not.
        if self.mode == "a" and isinstance(error, DamagedFileError) and self._folder.set_aside(files_of(name)):
            done = "set aside"
        warnings.warn(
            f"shard {name} of the store {self.location!r} is damaged and was {done}, its rows are missing: {error}",
            StoreWarning,
            stacklevel=4,
        )
