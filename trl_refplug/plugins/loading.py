"""
Loading the plugins: import each of them, leave out those that are broken, and collect the providers of the others.

pluggy finds and orders hook implementations, but it does not protect plugins from each other: one import error would
end all loading. That is why we have a loading loop of our own. It ends with one [`PluginRecord`] for every plugin,
which says `ok`, `blocked`, `failed` or `incompatible`. A plugin is used as a whole or not at all, and if two plugins
claim the same provider name, the order of loading does not decide who gets it: nobody does.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pluggy

import trl_refplug
from trl_refplug import hookspecs, providers
from trl_refplug.errors import PluginError
from trl_refplug.plugins.checks import (
    class_problems,
    hook_problems,
    incompatibility,
    registration_problem,
    target_problem,
)
from trl_refplug.plugins.failures import load_failure_reason
from trl_refplug.plugins.installed import PluginRecord, canonical, canonical_names, installed_plugins
from trl_refplug.provider import Capabilities, ReferenceProvider


BLOCK = "TRL_REFPLUG_BLOCK"
"""Environment variable with a comma-separated list of plugins or distributions that must not even be imported."""

LOAD = "TRL_REFPLUG_LOAD"
"""
Environment variable with a comma-separated list of the only third-party plugins or distributions to load. If it is set
and empty, none is loaded.
"""

Target: TypeAlias = "type[ReferenceProvider] | str"

Registration: TypeAlias = "tuple[Target, type | None, Capabilities | None]"
"""What a plugin has registered under a name: the target, and the options and capabilities that it gave with it."""


@dataclass(frozen=True)
class RegisteredProvider:
    """
    A provider that a plugin has registered.

    Args:
        name (`str`): Its name.
        target (`type` or `str`): Its class, or where to import it from: `"package.module:Class"`.
        plugin (`PluginRecord`): The plugin it comes from.
        light_options (`type` or `None`), light_capabilities (`Capabilities` or `None`): Its options and capabilities
            if the plugin gave them when it registered the provider. They are known without importing anything.
    """

    name: str
    target: Target
    plugin: PluginRecord
    light_options: type | None = None
    light_capabilities: Capabilities | None = None

    @property
    def options(self) -> type:
        """The options class. If the plugin did not register it, the provider is imported."""
        return self.light_options or self.load().Options

    @property
    def capabilities(self) -> Capabilities:
        """What the provider can do. If the plugin did not register that, the provider is imported."""
        return self.light_capabilities or self.load().capabilities

    def problem(self) -> str:
        """Why it cannot be used, as far as that is known without importing it; an empty string if nothing is."""
        found = target_problem(self.target) if isinstance(self.target, str) else ""
        return f"Provider {self.name!r} ({self.target}) cannot be imported: {found}." if found else ""

    def load(self) -> type[ReferenceProvider]:
        """
        The provider class. It is imported now if the plugin registered only where it is.

        Raises:
            [`PluginError`]: It cannot be imported, or is not a complete provider.
        """
        target: Any = self.target
        origin = f"Provider {self.name!r} ({target}) of the {self.plugin}"
        if isinstance(target, str):
            try:
                target = pkgutil.resolve_name(target)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                reason = load_failure_reason(error, self.plugin.distribution)
                raise PluginError(f"{origin} cannot be imported: {reason}") from error
        if problems := class_problems(target, self.light_options, self.light_capabilities):
            raise PluginError(f"{origin} cannot be used: {' '.join(problems)}")
        return target  # type: ignore[no-any-return]


class LoadedPlugins:
    """
    All installed plugins. The constructor loads them, and leaves out those that are blocked or broken.

    Args:
        environ (`Mapping[str, str]`): The environment variables, for `TRL_REFPLUG_BLOCK` and `TRL_REFPLUG_LOAD`.

    Attributes:
        hooks (`pluggy.PluginManager`): The hook implementations of the plugins that are `ok`.
        records (`list[PluginRecord]`): Every plugin found, the built-in one first.
        providers (`dict[str, RegisteredProvider]`): Every provider that can be selected, by name.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._blocked = environ.get(BLOCK)
        self._allowed = environ.get(LOAD)
        self.hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self.hooks.add_hookspecs(hookspecs)
        self.records: list[PluginRecord] = []
        self.providers: dict[str, RegisteredProvider] = {}

        location = providers.__file__ or ""
        builtin = PluginRecord("builtin", "trl-refplug", trl_refplug.__version__, providers.__name__, location)
        self._add_providers(builtin, self._register_plugin(builtin, providers, {}))
        self._load_installed()

    def _load_installed(self) -> None:
        """
        Load the installed plugins, and use those that work and claim no provider name that another plugin claims.
        """
        loaded: list[tuple[PluginRecord, dict[str, Registration]]] = []
        for record, entry_point in installed_plugins():
            targets: dict[str, Registration] = {}
            loaded.append((self._load(record, entry_point, targets) if entry_point else record, targets))

        claims: defaultdict[str, list[PluginRecord]] = defaultdict(list)
        for record, targets in loaded:
            for name in targets if record.status == "ok" else ():
                claims[name].append(record)

        for record, targets in loaded:
            contested = [name for name in targets if len(claims[name]) > 1 and record.status == "ok"]
            if contested:
                self.hooks.unregister(name=record.key)
                reason = " ".join(self._name_conflict(name, claims[name]) for name in contested)
                record = replace(record, status="failed", reason=reason, providers=tuple(targets))
            if record.status == "ok":
                self._add_providers(record, targets)
            else:
                self.records.append(record)

    def _load(
        self, record: PluginRecord, entry_point: importlib.metadata.EntryPoint, targets: dict[str, Registration]
    ) -> PluginRecord:
        """Try to load a plugin, and return its record. The providers that it registers are added to `targets`."""
        if reason := self._block_reason(record):
            return replace(record, status="blocked", reason=reason)
        try:
            plugin = entry_point.load()
            module = sys.modules.get(entry_point.module)
            record = replace(record, location=getattr(module, "__file__", None) or record.location)
            if reason := incompatibility(plugin):
                return replace(record, status="incompatible", reason=reason)
            self._register_plugin(record, plugin, targets)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and panics of compiled modules are failures like any other
            reason = load_failure_reason(error, record.distribution)
            frames = error.__traceback__
            return replace(
                record,
                status="failed",
                reason=reason,
                exception=error,
                traceback="".join(traceback.format_exception(type(error), error, frames)) if frames else "",
                providers=tuple(targets),
            )
        return record

    def _block_reason(self, record: PluginRecord) -> str:
        """Which environment variable keeps the plugin from being loaded; an empty string if none does."""
        if record.answers_to(canonical_names(self._blocked)):
            return f"Blocked by {BLOCK}={self._blocked}."
        if self._allowed is not None and not record.answers_to(canonical_names(self._allowed)):
            return f"Not among {LOAD}={self._allowed}."
        return ""

    def _register_plugin(
        self, record: PluginRecord, plugin: object, targets: dict[str, Registration]
    ) -> dict[str, Registration]:
        """
        Check a plugin, register its hooks, and collect its providers in `targets`. Raises an error if it is unsound.
        """
        if problems := list(hook_problems(plugin, self.hooks)):
            raise PluginError(" ".join(problems))
        if twin := next((key for key, other in self.hooks.list_name_plugin() if other is plugin), None):
            raise PluginError(f"{record.value} is loaded already, as {twin}; uninstall one of the two.")
        self.hooks.register(plugin, name=record.key)

        def register(
            name: str, target: Target, *, options: type | None = None, capabilities: Capabilities | None = None
        ) -> None:
            light = options, capabilities
            if problem := registration_problem(name, target, *light, builtin=self.providers, own=targets):
                raise PluginError(problem)
            targets[name] = target, *light

        try:
            for implementation in self.hooks.hook.refplug_register_providers.get_hookimpls():
                if implementation.plugin is plugin:
                    call_hook(implementation, register=register)
        except BaseException:
            self.hooks.unregister(plugin)
            raise
        return targets

    def _add_providers(self, record: PluginRecord, targets: Mapping[str, Registration]) -> None:
        """Use a plugin that was loaded: its providers can be selected from now on."""
        record = replace(record, providers=tuple(targets))
        self.records.append(record)
        self.providers |= {
            name: RegisteredProvider(name, target, record, options, capabilities)
            for name, (target, options, capabilities) in targets.items()
        }

    def _name_conflict(self, name: str, claimants: list[PluginRecord]) -> str:
        """The message about a provider name that several plugins claim."""
        several_distributions = len({canonical(record.distribution) for record in claimants}) > 1
        choices = [record.distribution if several_distributions else record.name for record in claimants]
        blocked = f"{self._blocked}," if self._blocked else ""
        return (
            f"The provider name {name!r} is claimed by the {' and the '.join(map(str, claimants))}: it is nobody's. "
            f"Uninstall one, or leave it out: {' or '.join(f'{BLOCK}={blocked}{choice}' for choice in choices)}."
        )


def call_hook(implementation: pluggy.HookImpl, **arguments: object) -> object:
    """Call one hook implementation. It gets only those of `arguments` that it has parameters for."""
    named = [name for name in implementation.kwargnames if name in arguments]
    return implementation.function(
        *(arguments[name] for name in implementation.argnames), **{name: arguments[name] for name in named}
    )
