"""
Journals: files that hold the rows which a writer has put and not yet published, in case it is killed.

Each writer has its own journal. It appends every row that is put, and empties the journal when it publishes. Other
writers read the journal to find rows that they need not score. A writer that opens the store after the owner of a
journal has died publishes the rows in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from trl_refplug.errors import RefPlugWarning
from trl_refplug.runtime.files import temporary_path
from trl_refplug.store.keys import KEY_BYTES


try:
    import fcntl
except ImportError:  # on Windows the age of a journal tells whether it is abandoned
    fcntl = None  # type: ignore[assignment]

JOURNAL_SUFFIX = ".journal"

_HEADER = b"trl-refplug journal 1\n"
_COUNT = struct.Struct("<I")
_CHECKSUM_BYTES = 8
_ABANDONED_SECONDS = 600.0
"""If files cannot be locked, a journal counts as abandoned when nobody has written to it for this long."""
_SETTLED_SECONDS = 2.0
"""
A journal that was modified less than this long ago is read again even if its size and modification time are the same:
the resolution of the time may be too coarse to show that it was emptied and written once more.
"""


class Journal:
    """
    The journal of this writer. The first `append` creates the file. An error of the file system only causes a warning,
    because the rows are still in memory and will be published from there.

    Args:
        directory (`Path`): A local directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:16]}{JOURNAL_SUFFIX}"
        self._file: int | None = None
        self._usable = True
        self._warned = False

    @property
    def name(self) -> str:
        """The name of the file. No other writer has the same."""
        return self._path.name

    def append(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """Append rows. Afterwards they survive a kill of this process, but not a power cut."""
        if not self._usable:
            return
        try:
            if self._file is None:
                self._file = self._create()
            data = b"".join(map(_encode_record, keys, rows))
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._usable = False
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the journal {self._path} cannot be written ({error}): if this process is killed, the rows that "
                    "it has not published have to be scored again",
                    RefPlugWarning,
                    stacklevel=4,
                )

    def _create(self) -> int:
        # The file is locked before it gets its name. Otherwise another process could take it for an abandoned journal.
        temporary = temporary_path(self._path.parent)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            _try_lock(file)
            os.write(file, _HEADER)
            os.rename(temporary, self._path)
        except BaseException:
            os.close(file)
            temporary.unlink(missing_ok=True)
            raise
        return file

    def clear(self) -> None:
        """Empty the journal, because all its rows have been published."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, len(_HEADER))
                self._usable = True

    def close(self) -> None:
        """Delete the file. This may be called more than once."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._usable = False


class OtherJournals:
    """
    The rows in the journals of other writers, as of the last `refresh`. Each row was checked against its checksum.

    Args:
        directory (`Path`): A local directory.
        own (`str`): The name of this writer's own journal, which is left out.
    """

    def __init__(self, directory: Path, own: str) -> None:
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.names: list[str] = []
        self._directory = directory
        self._own = own
        self._seen: dict[str, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Add the rows that are in the journals now. Rows that were read before and are gone from them stay."""
        with contextlib.suppress(OSError):
            names = (path.name for path in self._directory.glob(f"*{JOURNAL_SUFFIX}"))
            self.names = sorted(name for name in names if name != self._own)
        for name in self.names:
            with contextlib.suppress(OSError):  # the writer has just deleted it
                found = os.stat(self._directory / name)
                if (state := (found.st_size, found.st_mtime_ns)) != self._seen.get(name):
                    if time.time() - found.st_mtime > _SETTLED_SECONDS:
                        self._seen[name] = state
                    data = (self._directory / name).read_bytes()
                    self.rows.update(_decode_records(data) if data.startswith(_HEADER) else ())

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forget the rows with these keys."""
        for key in keys:
            self.rows.pop(key, None)


@contextlib.contextmanager
def abandoned_rows(directory: Path) -> Iterator[list[tuple[bytes, NDArray[np.float32]]]]:
    """
    The rows in all journals whose writer has died. If the block ends without an exception, the journals are deleted.
    """
    claimed: list[Path] = []
    rows: list[tuple[bytes, NDArray[np.float32]]] = []
    with contextlib.ExitStack() as claimed_files:
        for path in sorted(directory.glob(f"*{JOURNAL_SUFFIX}")):
            with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # another process may delete the file
                file = os.open(path, os.O_RDWR)
                opened.callback(os.close, file)
                data = path.read_bytes() if _is_abandoned(file) else None
                if data is not None and _HEADER.startswith(data[: len(_HEADER)]):  # else another version's, or in use
                    rows += _decode_records(data)
                    claimed.append(path)
                    claimed_files.enter_context(opened.pop_all())
        yield rows
        for path in claimed:
            with contextlib.suppress(OSError):
                path.unlink()


def _try_lock(file: int) -> bool | None:
    """Try to lock a file until it is closed. Returns whether that worked, or `None` if files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_abandoned(file: int) -> bool:
    locked = _try_lock(file)
    if locked is None:
        return time.time() - os.fstat(file).st_mtime > _ABANDONED_SECONDS
    return locked


def _encode_record(key: bytes, row: NDArray[np.float32]) -> bytes:
    body = _COUNT.pack(len(row)) + key + row.astype("<f4").tobytes()
    return body + xxhash.xxh3_64_digest(body)


def _decode_records(data: bytes) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
    """The records of a journal, up to the first that is incomplete or damaged."""
    start = len(_HEADER)
    while start + _COUNT.size <= len(data):
        (count,) = _COUNT.unpack_from(data, start)
        values = start + _COUNT.size + KEY_BYTES
        end = values + 4 * count
        if xxhash.xxh3_64_digest(data[start:end]) != data[end : end + _CHECKSUM_BYTES]:
            return
        yield data[start + _COUNT.size : values], np.frombuffer(data[values:end], "<f4").astype(np.float32)
        start = end + _CHECKSUM_BYTES
