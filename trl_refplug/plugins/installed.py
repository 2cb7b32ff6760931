"""Finding the installed plugins: the entry points of the group `trl_refplug`, read without importing any of them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trl_refplug.hookspecs import PROJECT
from trl_refplug.plugins.failures import exception_sentence


GROUP = PROJECT
"""The entry-point group that plugins are listed in."""

Status = Literal["ok", "blocked", "failed", "incompatible"]


@dataclass(frozen=True)
class PluginRecord:
    """
    One plugin that was found, and whether it could be loaded.

    Args:
        name (`str`): The name of its entry point.
        distribution (`str`): The installed distribution it comes from.
        version (`str`): That distribution's version.
        value (`str`): What the entry point names: the module, or `module:instance`.
        location (`str`): The file of the plugin's module; if it was not imported, the directory of its distribution.
        status (`str`): `ok`, `blocked` (by an environment variable), `failed`, or `incompatible` (another
            `API_VERSION`). Only `ok` plugins take part in anything.
        reason (`str`): Why it is not `ok`, in whole sentences.
        exception (`BaseException` or `None`): The exception it failed with.
        traceback (`str`): The traceback of that exception, from the first line of the plugin's own code on; empty if
            none of its code ran.
        providers (`tuple[str, ...]`): The provider names it registered, or had registered before it failed.
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
        """
        A name that is unique even if plugins of two distributions have the same name, so that neither hides the other.
        """
        return f"{self.distribution}:{self.name}"

    def answers_to(self, names: set[str]) -> bool:
        """Whether `names` has the plugin or its distribution. All names in it are canonical, see [`canonical`]."""
        return not names.isdisjoint({canonical(self.name), canonical(self.distribution)})

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"


def canonical(name: str) -> str:
    """A name as PEP 503 normalizes it: in lower case, and with `-` for `_` and `.`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def canonical_names(setting: str | None) -> set[str]:
    """The canonical names in a comma-separated environment variable."""
    return {canonical(word.strip()) for word in (setting or "").split(",") if word.strip()}


def installed_plugins() -> Iterator[tuple[PluginRecord, importlib.metadata.EntryPoint | None]]:
    """
    Every installed plugin, sorted by distribution and name, with its entry point.

    If a distribution is on `sys.path` twice, only the first one counts, as it does for imports. If the metadata of a
    distribution cannot be read, there is a failed record for it, without an entry point.
    """
    found: dict[tuple[str, str, str], tuple[PluginRecord, importlib.metadata.EntryPoint | None]] = {}
    for distribution in importlib.metadata.distributions():
        try:
            if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception:  # the broken metadata may belong to a package that has nothing to do with us
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
            reason = f"Its metadata cannot be read ({path}): {exception_sentence(error)}"
            record = PluginRecord("?", "?", "?", "?", path, status="failed", reason=reason, exception=error)
            found["", path, ""] = record, None
    yield from (found[key] for key in sorted(found))
