"""Writing a file or a directory aside, so that a failure leaves nothing half-written where it was to be."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """
    Yield a path beside `target` with the same suffix. At the end of the context, what was written becomes `target`.

    If the context fails, for example because the disk is full, what was written is removed and `target` is as before.

    Args:
        target (`Path`): A file, or a directory that does not exist or is empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".unfinished-{uuid.uuid4().hex}{target.suffix}")
    try:
        yield aside
        os.replace(aside, target)
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise
