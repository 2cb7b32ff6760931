"""
What was found out about models on disk, remembered by their files: to know a digest without loading what it is of.

An entry is a file of its own in `~/.cache/trl-refplug/models`, written whole or not at all, so any number of processes
may remember at once. It counts only as long as every file of the model has the name, size and times it had then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from trl_refplug.runtime.caches import cache_directory
from trl_refplug.runtime.files import write_atomically


_VERSION = 1  # of what is remembered: another way to digest needs another number
_PACKAGES = ("torch", "transformers", "trl")  # which turn the files into a model
_SETTLED_SECONDS = 2.0
"""A file changed this recently may change once more without its times showing it."""


def fingerprint(model: str, revision: str | None, loading: Mapping[str, Any]) -> str | None:
    """
    Text that stands for the files of a model and for how they are loaded.

    Args:
        model (`str`): A directory, or a hub id whose files are in the hub's cache.
        revision (`str`, *optional*): Of a hub id.
        loading (`Mapping[str, Any]`): All else that decides what is loaded.

    Returns:
        `str` or `None`: `None` where files alone do not say which model it is: they are not here, have just been
        changed, are those of an adapter (whose base model is elsewhere), or come with options that are not JSON.
    """
    directory = _directory(model, revision)
    if directory is None or (directory / "adapter_config.json").exists():
        return None
    newest = 0
    files = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_file():
            found = entry.stat()
            newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
            files.append([entry.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
    if not files or newest > time.time_ns() - _SETTLED_SECONDS * 1e9:
        return None
    facts = {
        "version": _VERSION,
        "packages": {package: metadata.version(package) for package in _PACKAGES},
        "directory": str(directory.resolve()),
        "files": files,
        "loading": dict(loading),
    }
    try:
        return json.dumps(facts, sort_keys=True)
    except TypeError:
        return None


def _directory(model: str, revision: str | None) -> Path | None:
    if os.path.isdir(model):
        return Path(model)
    from transformers.utils import cached_file

    try:
        config = cached_file(model, "config.json", revision=revision)
    except OSError:  # whoever loads it says what is wrong
        return None
    return None if config is None else Path(config).parent


def recall(known_by: str | None) -> dict[str, Any] | None:
    """What was remembered under a fingerprint."""
    if known_by is None:
        return None
    try:
        entry = json.loads(_entry(known_by).read_bytes())
        found: dict[str, Any] | None = entry["facts"] if entry["known_by"] == known_by else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found


def remember(known_by: str | None, facts: Mapping[str, Any]) -> None:
    """Keep JSON values under a fingerprint. To fail to is no error: they can be found out again."""
    if known_by is None:
        return
    path = _entry(known_by)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"known_by": known_by, "facts": dict(facts)}))


def forget(known_by: str | None) -> None:
    """Take back what was remembered."""
    if known_by is not None:
        with suppress(OSError):
            _entry(known_by).unlink()


def _entry(known_by: str) -> Path:
    return cache_directory("models") / f"{xxhash.xxh3_128_hexdigest(known_by.encode())}.json"
