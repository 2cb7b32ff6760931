"""What is installed: the entry points of the group `trl_refplug`, before anything of them is imported."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trl_refplug.hookspecs import PROJECT
from trl_refplug.plugins.failures import told


GROUP = PROJECT
"""Entry-point group of plugins."""

Status = Literal["ok", "blocked", "failed", "incompatible"]


@dataclass(frozen=True)
class PluginRecord:
    """
    What became of one plugin.

    Args:
        name (`str`): Name of the entry point.
        distribution (`str`): The installed distribution it comes from.
        version (`str`): That distribution's version.
        value (`str`): Value of the entry point: the module, or `module:instance`.
        location (`str`): File of the plugin's module; the directory of its distribution where nothing was imported.
        status (`str`): `ok`, `blocked` (by an environment variable), `failed`, or `incompatible` (another
            `API_VERSION`). Only `ok` plugins take part in anything.
        reason (`str`): Why it is not `ok`, in whole sentences.
        exception (`BaseException` or `None`): What it failed with.
        traceback (`str`): The same as text, from the plugin's own first line on; empty where none of its code ran.
        providers (`tuple[str, ...]`): Provider names it registered, or had registered before it failed.
    """

    name: str
    distribution: str
    version: str
    value: str
    location: str
    status: Status = "ok"
    reason: str = ""
    exception: BaseException | None = None
    traceback: str = ""
    providers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique name: two distributions may both have a plugin `default`, and neither shadows the other."""
        return f"{self.distribution}:{self.name}"

    def answers_to(self, names: set[str]) -> bool:
        """Whether the plugin or its distribution is among `names`, which are canonical."""
        return not names.isdisjoint({canonical(self.name), canonical(self.distribution)})

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"


def canonical(name: str) -> str:
    """A name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def canonical_names(setting: str | None) -> set[str]:
    """The canonical names in a comma-separated environment variable."""
    return {canonical(word.strip()) for word in (setting or "").split(",") if word.strip()}


def installed() -> Iterator[tuple[PluginRecord, importlib.metadata.EntryPoint | None]]:
    """
    Every plugin, sorted by distribution and name. A distribution found twice on `sys.path` counts once, the first, as
    for imports. Where the metadata cannot be read there is a failed record, without entry point.
    """
    found: dict[tuple[str, str, str], tuple[PluginRecord, importlib.metadata.EntryPoint | None]] = {}
    for distribution in importlib.metadata.distributions():
        try:
            if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception:  # someone else's unreadable file
            continue
        location = str(distribution.locate_file(""))
        try:
            name, version = distribution.metadata["Name"], distribution.version
            first = importlib.metadata.distribution(name)
            if (str(first.locate_file("")), first.version) != (location, version):
                continue
            for entry_point in distribution.entry_points.select(group=GROUP):
                record = PluginRecord(entry_point.name, name, version, entry_point.value, location)
                found[canonical(name), entry_point.name, entry_point.value] = record, entry_point
        except Exception as error:
            path = str(getattr(distribution, "_path", location))
            reason = f"Its metadata cannot be read ({path}): {told(error)}"
            record = PluginRecord("?", "?", "?", "?", path, status="failed", reason=reason, exception=error)
            found["", path, ""] = record, None
    yield from (found[key] for key in sorted(found))
