"""
Where the files of a store are: in a directory, or under an fsspec URL that is read through a local cache.

In both, a file is published completely or not at all, and a published file is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import xxhash

from trl_refplug.errors import StoreError
from trl_refplug.runtime.caches import cache_directory
from trl_refplug.runtime.files import temporary_path, write_atomically


DAMAGED_SUFFIX = ".damaged"

_PROBE_BYTES = 1 << 16

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Folder(Protocol):
    """The operations that a store needs of the place where its files are."""

    @property
    def directory(self) -> Path:
        """The local directory from which files are read once `fetch` has been called for them."""

    def exists(self) -> bool:
        """Whether the folder exists."""

    def create(self) -> None:
        """Create the folder if needed, and prove by a test file that it is writable. Raises `OSError` if it is not."""

    def ensure_room(self, size: int) -> None:
        """Raise `OSError` if the free space is known and is less than `size` bytes."""

    def list_files(self) -> list[str]:
        """The names of all files that are in the folder now."""

    def fetch(self, names: Sequence[str]) -> None:
        """Make sure that these files, whose names `list_files` has returned, are in `directory`."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file. Other processes see all of it or nothing."""

    def set_aside(self, names: Sequence[str]) -> bool:
        """Rename damaged files, so that nobody reads them again. Returns whether that was possible."""

    def drop_copies(self, names: Sequence[str]) -> bool:
        """Delete the local copies of these files. Returns whether the files can be fetched again."""


def open_folder(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Folder:
    """The folder at a path or URL, which need not exist yet."""
    location = os.fspath(location)
    if "://" not in location:
        return LocalFolder(Path(location))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = url_to_fs(location)
    except (ValueError, ImportError, OSError) as error:
        raise StoreError(
            f"cannot open a store at {location!r}: {error}. Option 'path' is a directory or an fsspec URL such as "
            "'s3://bucket/ref-store'"
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFolder(Path(path))
    root = Path(cache_dir) if cache_dir is not None else cache_directory("store")
    return RemoteFolder(filesystem, path, root / xxhash.xxh3_128_hexdigest(location.rstrip("/").encode()))


@contextlib.contextmanager
def explain_read_errors(location: object) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StoreError` that names the store and the option to check."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot read the store {str(location)!r}: {error}. Check option 'path'") from error


def open_existing(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Folder:
    """The folder at a path or URL. Raises `StoreError` if it does not exist."""
    folder = open_folder(location, cache_dir)
    with explain_read_errors(location):
        if not folder.exists():
            raise StoreError(
                f"there is no store at {os.fspath(location)!r}. Check option 'path', or fill a store there with "
                "`trl-refplug precompute`"
            )
    return folder


class LocalFolder:
    """A directory, which may be on a network file system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()

    def exists(self) -> bool:
        return self.directory.is_dir()

    def create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(self.directory)
        write_atomically(probe, bytes(_PROBE_BYTES), durable=True)
        probe.unlink()

    def ensure_room(self, size: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{free:,} bytes free, {size:,} needed", str(self.directory))

    def list_files(self) -> list[str]:
        return os.listdir(self.directory)

    def fetch(self, names: Sequence[str]) -> None:
        pass

    def publish(self, name: str, data: bytes) -> None:
        write_atomically(self.directory / name, data, durable=True)

    def set_aside(self, names: Sequence[str]) -> bool:
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process did it first, or the file never existed
                    os.rename(self.directory / name, self.directory / (name + DAMAGED_SUFFIX))
        except OSError:
            return False
        return True

    def drop_copies(self, names: Sequence[str]) -> bool:
        return False


def _with_os_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Convert every exception to `OSError`, because file systems of fsspec raise exceptions of any kind."""

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(*args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return wrapped


class RemoteFolder:
    """Objects under an fsspec URL. Each is written by a single put, and those that are read are copied to a cache."""

    def __init__(self, filesystem: Any, path: str, cache: Path) -> None:
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        self._cache = LocalFolder(cache)
        self.directory = self._cache.directory

    @_with_os_errors
    def exists(self) -> bool:
        return bool(self._filesystem.exists(self._path))

    @_with_os_errors
    def create(self) -> None:
        self._cache.create()
        self._filesystem.makedirs(self._path, exist_ok=True)
        probe = f"{self._path}/{temporary_path(self.directory).name}"
        self._filesystem.pipe_file(probe, bytes(_PROBE_BYTES))
        self._filesystem.rm_file(probe)

    def ensure_room(self, size: int) -> None:
        self._cache.ensure_room(size)

    @_with_os_errors
    def list_files(self) -> list[str]:
        self._filesystem.invalidate_cache(self._path)
        try:
            paths = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:  # in an object store an empty directory does not exist
            return []
        return [str(path).rsplit("/", 1)[-1] for path in paths]

    @_with_os_errors
    def fetch(self, names: Sequence[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        wanted = [name for name in names if not (self.directory / name).exists()]
        arriving = [temporary_path(self.directory) for _ in wanted]
        try:
            self._filesystem.get([f"{self._path}/{name}" for name in wanted], [os.fspath(path) for path in arriving])
            for path, name in zip(arriving, wanted, strict=True):
                with contextlib.suppress(FileExistsError):  # on Windows, if another process was faster
                    os.rename(path, self.directory / name)
        finally:
            for path in arriving:
                path.unlink(missing_ok=True)

    @_with_os_errors
    def publish(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"{self._path}/{name}", data)
        self._cache.publish(name, data)

    def set_aside(self, names: Sequence[str]) -> bool:
        return False  # object stores cannot rename, and another client may see an intact object

    def drop_copies(self, names: Sequence[str]) -> bool:
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        return True
