"""The directory in which files are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """`$XDG_CACHE_HOME/trl-refplug/<name>`, by default `~/.cache/trl-refplug/<name>`. It may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification says to ignore relative paths
    return (base if base.is_absolute() else Path.home() / ".cache") / "trl-refplug" / name
