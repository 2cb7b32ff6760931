"""
Where the files of a store are: a directory, or an fsspec URL that is read through a local cache.

Both publish a file whole or not at all, and neither ever changes one that is published.
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
    """What a store needs of the place its files are in."""

    @property
    def directory(self) -> Path:
        """Local directory in which files are read, after `fetch`."""

    def exists(self) -> bool:
        """Whether the place is there at all."""

    def create(self) -> None:
        """Make the place if needed and write to it once. Raises `OSError` if that is not possible."""

    def ensure_room(self, size: int) -> None:
        """Raise `OSError` if it is known that `size` bytes do not fit."""

    def names(self) -> list[str]:
        """Names of all files, as they are now."""

    def fetch(self, names: Sequence[str]) -> None:
        """Make these files, which `names` has shown, present in `directory`."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""

    def set_aside(self, names: Sequence[str]) -> bool:
        """Take damaged files out of the store, so that nobody reads them again. Returns whether that was possible."""

    def drop_copies(self, names: Sequence[str]) -> bool:
        """Forget local copies of these files. Returns whether they can be fetched anew."""


def open_folder(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Folder:
    """The place a path or URL stands for."""
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
def reading(location: object) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StoreError` that says which store could not be read."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot read the store {str(location)!r}: {error}. Check option 'path'") from error


def open_existing(location: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Folder:
    """The place a path or URL stands for, which must be there."""
    folder = open_folder(location, cache_dir)
    with reading(location):
        if not folder.exists():
            raise StoreError(
                f"there is no store at {os.fspath(location)!r}. Check option 'path', or fill a store there with "
                "`trl-refplug precompute`"
            )
    return folder


class LocalFolder:
    """A directory, which may be on a network file system. Files appear in it by rename."""

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

    def names(self) -> list[str]:
        return os.listdir(self.directory)

    def fetch(self, names: Sequence[str]) -> None:
        pass

    def publish(self, name: str, data: bytes) -> None:
        write_atomically(self.directory / name, data, durable=True)

    def set_aside(self, names: Sequence[str]) -> bool:
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # another process was faster, or it never was there
                    os.rename(self.directory / name, self.directory / (name + DAMAGED_SUFFIX))
        except OSError:
            return False
        return True

    def drop_copies(self, names: Sequence[str]) -> bool:
        return False


def _with_os_errors(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """fsspec's file systems raise what they like; here every failure of one is an `OSError`."""

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
    """Objects under an fsspec URL, each written by a single put, with copies of those that were read in a cache."""

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
    def names(self) -> list[str]:
        self._filesystem.invalidate_cache(self._path)
        try:
            paths = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:  # object stores have no empty directories
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
                with contextlib.suppress(FileExistsError):  # on Windows, where another process was faster
                    os.rename(path, self.directory / name)
        finally:
            for path in arriving:
                path.unlink(missing_ok=True)

    @_with_os_errors
    def publish(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"{self._path}/{name}", data)
        self._cache.publish(name, data)

    def set_aside(self, names: Sequence[str]) -> bool:
        return False  # a rename is a copy here, and another client may see the object whole

    def drop_copies(self, names: Sequence[str]) -> bool:
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        return True
