"""
A cache of facts about models on disk, such as their digest, so that a model need not be loaded to know them.

The facts of a model are one file in `~/.cache/trl-refplug/models`, found by a fingerprint of the model's files. They
are used only as long as every file of the model has the name, size and times that it had when the facts were saved. A
file of the cache is written whole or not at all, so any number of processes may use the cache at once.
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


_VERSION = 1  # increase it whenever digests or other facts are computed in another way
_PACKAGES = ("torch", "transformers", "trl")  # another version of these may turn the same files into another model
_SETTLED_SECONDS = 2.0
"""A file that was changed less than this long ago may change again without a change of its times."""


def fingerprint_files(model: str, revision: str | None, loading: Mapping[str, Any]) -> str | None:
    """
    A text that changes whenever the files of a model, or the way they are loaded, change.

    Args:
        model (`str`): A directory, or a hub id whose files are in the hub's cache.
        revision (`str`, *optional*): Revision of a hub id.
        loading (`Mapping[str, Any]`): Everything else that decides what is loaded.

    Returns:
        `str` or `None`: `None` where the files do not settle which model is loaded: they are not on this machine, they
        were changed a moment ago, they are those of an adapter (whose base model is elsewhere), or `loading` has
        values that are not JSON.
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
    except OSError:  # whoever loads the model will be told what is wrong
        return None
    return None if config is None else Path(config).parent


def load_facts(known_by: str | None) -> dict[str, Any] | None:
    """The facts that were saved under a fingerprint; `None` if there are none, or no fingerprint."""
    if known_by is None:
        return None
    try:
        entry = json.loads(_entry(known_by).read_bytes())
        found: dict[str, Any] | None = entry["facts"] if entry["known_by"] == known_by else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found


def save_facts(known_by: str | None, facts: Mapping[str, Any]) -> None:
    """Save JSON values under a fingerprint. If that fails, nothing is raised: the facts can be determined again."""
    if known_by is None:
        return
    path = _entry(known_by)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"known_by": known_by, "facts": dict(facts)}))


def delete_facts(known_by: str | None) -> None:
    """Delete the facts that were saved under a fingerprint, because they turned out to be wrong."""
    if known_by is not None:
        with suppress(OSError):
            _entry(known_by).unlink()


def _entry(known_by: str) -> Path:
    return cache_directory("models") / f"{xxhash.xxh3_128_hexdigest(known_by.encode())}.json"
