"""Writing files so that a reader, or a run after a crash, never meets half of one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


TEMPORARY_PREFIX = ".tmp-"


def temporary_path(directory: Path) -> Path:
    """A path in `directory` that no other process uses. Its name shows that the file was not finished."""
    return directory / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """
    Write a file under a temporary name and rename it, so that `path` has either its old content or all of the new.

    Args:
        path (`Path`): The file, in an existing directory. Replaced if it exists.
        content (`str` or `bytes`): Text is written as UTF-8.
        durable (`bool`): Whether the file has to survive a power cut as soon as this function returns.
    """
    # `tempfile` is not used because its files are readable by their owner only, and stores are shared.
    temporary = temporary_path(path.parent)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable and os.name == "posix":  # the rename itself is only durable once the directory is synchronized
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """
    Yield a path beside `target` with the same suffix. At the end of the context, what was written becomes `target`.

    If the context fails, for example because the disk is full, what was written is removed and `target` is as before.

    Args:
        target (`Path`): A file, or a directory that does not exist or is empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(target.parent).with_suffix(target.suffix)
    try:
        yield aside
        os.replace(aside, target)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise
