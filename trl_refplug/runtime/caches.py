"""Where things are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """`$XDG_CACHE_HOME/trl-refplug/<name>`, by default `~/.cache/trl-refplug/<name>`. It need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored if relative, says the XDG specification
    return (base if base.is_absolute() else Path.home() / ".cache") / "trl-refplug" / name
