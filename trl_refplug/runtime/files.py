"""Writing files so that a reader, or a run after a crash, never meets half of one."""

from __future__ import annotations

import os
import uuid
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
