"""
Rows that were put and are not published yet, on disk: what a killed process leaves behind for the next one.

A journal belongs to one writer, which appends to it and empties it whenever it publishes. Other writers read it to
know what they need not score; one that opens the store when the first is gone publishes what is in it.
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
except ImportError:  # Windows: journals are told abandoned by their age
    fcntl = None  # type: ignore[assignment]

JOURNAL_SUFFIX = ".journal"

_HEADER = b"trl-refplug journal 1\n"
_COUNT = struct.Struct("<I")
_CHECKSUM_BYTES = 8
_ABANDONED_SECONDS = 600.0
"""Where files cannot be locked, how long a journal that nobody writes to counts as in use."""
_SETTLED_SECONDS = 2.0
"""A journal written this recently may be emptied and written once more without its size and time showing it."""


class Journal:
    """
    The journal of one writer. Created by the first `append`; of an error of the file system it only warns, as its rows
    still wait in memory and are published as ever.

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
        """Its file's, which tells its writer from all others."""
        return self._path.name

    def append(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """Add rows. When it returns they survive this process, though not the machine."""
        if not self._usable:
            return
        try:
            if self._file is None:
                self._file = self._create()
            data = b"".join(map(_record, keys, rows))
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._usable = False
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the journal {self._path} cannot be written ({error}): should this process be killed, the rows "
                    "that it has not published are scored again",
                    RefPlugWarning,
                    stacklevel=4,
                )

    def _create(self) -> int:
        # It is locked before it is a journal, or another process could take it for one that was left behind.
        temporary = temporary_path(self._path.parent)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            _lock(file)
            os.write(file, _HEADER)
            os.rename(temporary, self._path)
        except BaseException:
            os.close(file)
            temporary.unlink(missing_ok=True)
            raise
        return file

    def clear(self) -> None:
        """Forget all rows: they are published."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, len(_HEADER))
                self._usable = True

    def close(self) -> None:
        """Delete the journal. May be called more than once."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._usable = False


class OtherJournals:
    """
    What the journals of other writers had when they were last looked at. Only a hint at what is going to be published,
    but each row was checked, so it may be used.

    Args:
        directory (`Path`): A local directory.
        own (`str`): Name of the journal that is left out.
    """

    def __init__(self, directory: Path, own: str) -> None:
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.names: list[str] = []
        self._directory = directory
        self._own = own
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        """Add the rows that are there now. Those that are not in a journal any more stay."""
        with contextlib.suppress(OSError):
            names = (path.name for path in self._directory.glob(f"*{JOURNAL_SUFFIX}"))
            self.names = sorted(name for name in names if name != self._own)
        for name in self.names:
            with contextlib.suppress(OSError):  # its writer has just closed it
                found = os.stat(self._directory / name)
                if (state := (found.st_size, found.st_mtime_ns)) != self._seen.get(name):
                    if time.time() - found.st_mtime > _SETTLED_SECONDS:
                        self._seen[name] = state
                    data = (self._directory / name).read_bytes()
                    self.rows.update(_read(data) if data.startswith(_HEADER) else ())

    def forget(self, keys: Iterable[bytes]) -> None:
        """Let go of rows."""
        for key in keys:
            self.rows.pop(key, None)


@contextlib.contextmanager
def abandoned(directory: Path) -> Iterator[list[tuple[bytes, NDArray[np.float32]]]]:
    """
    The rows in all journals whose writer is gone. The journals are deleted when the block ends without an exception.
    """
    taken: list[tuple[Path, int]] = []
    rows: list[tuple[bytes, NDArray[np.float32]]] = []
    try:
        for path in sorted(directory.glob(f"*{JOURNAL_SUFFIX}")):
            with contextlib.suppress(OSError):  # another process was faster
                file = os.open(path, os.O_RDWR)
                try:
                    mine = _is_abandoned(file)
                    data = path.read_bytes() if mine else b""
                    mine = mine and _HEADER.startswith(data[: len(_HEADER)])  # another version's stays where it is
                    rows += _read(data) if mine else ()
                except BaseException:
                    os.close(file)
                    raise
                if mine:
                    taken.append((path, file))
                else:
                    os.close(file)
        yield rows
        for path, _ in taken:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        for _, file in taken:
            os.close(file)


def _lock(file: int) -> bool | None:
    """Whether the file is now this process's own, for as long as it lives; `None` where files cannot be locked."""
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
    locked = _lock(file)
    if locked is None:
        return time.time() - os.fstat(file).st_mtime > _ABANDONED_SECONDS
    return locked


def _record(key: bytes, row: NDArray[np.float32]) -> bytes:
    body = _COUNT.pack(len(row)) + key + row.astype("<f4").tobytes()
    return body + xxhash.xxh3_64_digest(body)


def _read(data: bytes) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
    """All whole records; the first that is torn ends the journal."""
    at = len(_HEADER)
    while at + _COUNT.size <= len(data):
        (count,) = _COUNT.unpack_from(data, at)
        values = at + _COUNT.size + KEY_BYTES
        end = values + 4 * count
        if xxhash.xxh3_64_digest(data[at:end]) != data[end : end + _CHECKSUM_BYTES]:
            return
        yield data[at + _COUNT.size : values], np.frombuffer(data[values:end], "<f4").astype(np.float32)
        at = end + _CHECKSUM_BYTES
