"""
The plugin manager: load, isolate, block, list, and resolve a provider name to its class.

pluggy finds and orders hook implementations but isolates nothing (one import error would end all loading), so the
loading loop is ours. Every plugin ends as one [`PluginRecord`]: `ok`, `blocked`, `failed` or `incompatible`. A plugin
is in or out as a whole, and load order never decides between two of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pkgutil
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import pluggy

import trl_refplug
from trl_refplug import hookspecs, providers
from trl_refplug.errors import PluginError, RefPlugError, RefPlugWarning, UnknownProviderError, did_you_mean
from trl_refplug.plugins.checks import class_problems, hook_problems, incompatibility, registration_problem
from trl_refplug.plugins.installed import PluginRecord, canonical, installed, told
from trl_refplug.provider import ReferenceProvider


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.hookspecs import SelectionContext
    from trl_refplug.provider import ReferenceBatch, ReferenceIdentity


BLOCK = "TRL_REFPLUG_BLOCK"
"""Environment variable: comma-separated plugins or distributions that are not even imported."""

LOAD = "TRL_REFPLUG_LOAD"
"""Environment variable: where set, the only third-party plugins or distributions that are loaded (empty: none)."""

OUTCOMES = {"blocked": "is blocked", "failed": "failed to load", "incompatible": "is incompatible"}

LISTED = "`trl-refplug plugins` lists everything installed."

Target: TypeAlias = "type[ReferenceProvider] | str"


@dataclass(frozen=True)
class RegisteredProvider:
    """A provider name, the class or `"package.module:Class"` behind it, and the plugin it comes from."""

    name: str
    target: Target
    plugin: PluginRecord

    def load(self) -> type[ReferenceProvider]:
        """
        The provider class, imported now if its target is lazy.

        Raises:
            [`PluginError`]: It cannot be imported, or is no complete provider.
        """
        target: Any = self.target
        origin = f"Provider {self.name!r} ({target}) of the {self.plugin}"
        if isinstance(target, str):
            try:
                target = pkgutil.resolve_name(target)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise PluginError(f"{origin} cannot be imported: {told(error)}{_extra_hint(self.name)}") from error
        if problems := class_problems(target):
            raise PluginError(f"{origin} cannot be used: {' '.join(problems)}")
        return target  # type: ignore[no-any-return]


class PluginManager:
    """
    All installed plugins, loaded or left out at construction. [`plugin_manager`] is the one of this process.

    Args:
        environ (`Mapping[str, str]`, *optional*, defaults to `os.environ`):
            Where `TRL_REFPLUG_BLOCK` and `TRL_REFPLUG_LOAD` are read.

    Attributes:
        records (`list[PluginRecord]`): Every plugin found, the built-in one first.
        providers (`dict[str, RegisteredProvider]`): Every provider that can be selected, by name.
    """

    records: list[PluginRecord]
    providers: dict[str, RegisteredProvider]

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._blocked = environ.get(BLOCK)
        self._allowed = environ.get(LOAD)
        self._warned: set[str] = set()
        self._hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self._hooks.add_hookspecs(hookspecs)
        self.records = []
        self.providers = {}

        location = providers.__file__ or ""
        builtin = PluginRecord("builtin", "trl-refplug", trl_refplug.__version__, providers.__name__, location)
        self._accept(builtin, self._admit(builtin, providers, {}))
        self._load_installed()
        self._observers = tuple(reversed(self._hooks.hook.refplug_scored.get_hookimpls()))

    # Loading

    def _load_installed(self) -> None:
        """Load what is installed, and take in the plugins that are sound and contradict nobody."""
        loaded: list[tuple[PluginRecord, dict[str, Target]]] = []
        for record, entry_point in installed():
            targets: dict[str, Target] = {}
            loaded.append((self._load(record, entry_point, targets) if entry_point else record, targets))

        claims: defaultdict[str, list[PluginRecord]] = defaultdict(list)
        for record, targets in loaded:
            for name in targets if record.status == "ok" else ():
                claims[name].append(record)

        for record, targets in loaded:
            contested = [name for name in targets if len(claims[name]) > 1 and record.status == "ok"]
            if contested:
                self._hooks.unregister(name=record.key)
                reason = " ".join(self._contest(name, claims[name]) for name in contested)
                record = replace(record, status="failed", reason=reason, providers=tuple(targets))
            if record.status == "ok":
                self._accept(record, targets)
            else:
                self.records.append(record)

    def _load(
        self, record: PluginRecord, entry_point: importlib.metadata.EntryPoint, targets: dict[str, Target]
    ) -> PluginRecord:
        """The record of a plugin after the attempt to load it. What it registers goes into `targets`."""
        if reason := self._kept_out(record):
            return replace(record, status="blocked", reason=reason)
        try:
            plugin = entry_point.load()
            module = sys.modules.get(entry_point.module)
            record = replace(record, location=getattr(module, "__file__", None) or record.location)
            if reason := incompatibility(plugin):
                return replace(record, status="incompatible", reason=reason)
            self._admit(record, plugin, targets)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and panics of compiled modules are failures like any other
            return replace(
                record,
                status="failed",
                reason=str(error) if isinstance(error, RefPlugError) else told(error),
                exception=error,
                traceback="".join(traceback.format_exception(type(error), error, error.__traceback__)),
                providers=tuple(targets),
            )
        return record

    def _kept_out(self, record: PluginRecord) -> str:
        """Which environment variable keeps the plugin out; an empty string if none does."""
        if record.answers_to(_names(self._blocked)):
            return f"Blocked by {BLOCK}={self._blocked}."
        if self._allowed is not None and not record.answers_to(_names(self._allowed)):
            return f"Not among {LOAD}={self._allowed}."
        return ""

    def _admit(self, record: PluginRecord, plugin: object, targets: dict[str, Target]) -> dict[str, Target]:
        """Check the plugin, register its hooks, collect its providers in `targets`. Raises what is wrong with it."""
        if problems := list(hook_problems(plugin, self._hooks)):
            raise PluginError(" ".join(problems))
        if twin := next((key for key, other in self._hooks.list_name_plugin() if other is plugin), None):
            raise PluginError(f"{record.value} is loaded already, as {twin}; uninstall one of the two.")
        self._hooks.register(plugin, name=record.key)

        def register(name: str, target: Target) -> None:
            if problem := registration_problem(name, target, builtin=self.providers, own=targets):
                raise PluginError(problem)
            targets[name] = target

        try:
            for implementation in self._hooks.hook.refplug_register_providers.get_hookimpls():
                if implementation.plugin is plugin:
                    _call(implementation, register=register)
        except BaseException:
            self._hooks.unregister(plugin)
            raise
        return targets

    def _accept(self, record: PluginRecord, targets: Mapping[str, Target]) -> None:
        record = replace(record, providers=tuple(targets))
        self.records.append(record)
        self.providers |= {name: RegisteredProvider(name, target, record) for name, target in targets.items()}

    def _contest(self, name: str, claimants: list[PluginRecord]) -> str:
        """The sentence about a provider name that several plugins claim."""
        several_distributions = len({canonical(record.distribution) for record in claimants}) > 1
        choices = [record.distribution if several_distributions else record.name for record in claimants]
        blocked = f"{self._blocked}," if self._blocked else ""
        return (
            f"The provider name {name!r} is claimed by the {' and the '.join(map(str, claimants))}: it is nobody's. "
            f"Uninstall one, or leave it out: {' or '.join(f'{BLOCK}={blocked}{choice}' for choice in choices)}."
        )

    # Resolving

    def provider_class(self, name: str) -> type[ReferenceProvider]:
        """
        The class behind `ref_provider=name`. Plugins that are broken but not concerned are warned about, once.

        Raises:
            [`UnknownProviderError`]: No plugin that is loaded registers that name.
            [`PluginError`]: The plugin behind that name failed (`__cause__` is its own exception), is incompatible or
                in conflict with another one, or the provider cannot be imported.
        """
        if name not in self.providers:
            self._raise_unavailable(name)
        provider = self.providers[name].load()
        self._warn()
        return provider

    def _raise_unavailable(self, name: str) -> NoReturn:
        left_out = [record for record in self.records if record.status != "ok"]
        concerned = [record for record in left_out if name in record.providers]
        concerned += [record for record in left_out if record.answers_to({canonical(name)})]
        for record in concerned:
            message = f"No provider {name!r}, as the {record} {OUTCOMES[record.status]}. {record.reason} {LISTED}"
            if record.status == "blocked":
                raise UnknownProviderError(message)
            if record.exception is not None and record.exception.__traceback__ is None:
                message += f"\n\n{record.traceback}"
            raise PluginError(message) from record.exception
        raise UnknownProviderError(
            f"No provider {name!r}.{did_you_mean(name, self.providers)} There are {', '.join(self.providers)}."
            + _extra_hint(name)
            + (f" Left out: {'; '.join(f'{record} ({record.status})' for record in left_out)}." if left_out else "")
            + f" {LISTED}"
        )

    def _warn(self) -> None:
        """Report, once each, broken plugins and settings that name nothing. Called when a provider is in use."""
        for record in self.records:
            if record.status in ("failed", "incompatible"):
                self._warn_once(
                    f"The {record} {OUTCOMES[record.status]} and is not used. {record.reason} The provider in use "
                    f"is another one; to silence this, uninstall {record.distribution} or name it in {BLOCK}."
                )
            # The frames of a traceback keep the local variables of all callers alive, so maybe a whole policy. Now
            # that a provider is found and the process goes on, the text of a failure is enough.
            _drop_frames(record.exception)
        known = {canonical(word) for record in self.records for word in (record.name, record.distribution)}
        for variable, setting in ((BLOCK, self._blocked), (LOAD, self._allowed)):
            for word in sorted(_names(setting) - known):
                hint = did_you_mean(word, known)
                self._warn_once(f"{variable} names {word!r}, but no such plugin or distribution is installed.{hint}")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RefPlugWarning, stacklevel=4)

    # Hooks

    def select(self, context: SelectionContext) -> str | None:
        """
        What plugins answer to `ref_provider="auto"`: the name of a provider, or `None` if none of them answers.

        Raises:
            [`PluginError`]: A plugin's answer is an exception or no provider. Asking the next one instead would train
                against another reference than the one meant.
        """
        for implementation in reversed(self._hooks.hook.refplug_select_provider.get_hookimpls()):
            origin = f"Plugin {implementation.plugin_name!r} cannot answer ref_provider='auto'"
            remedy = f"Name a ref_provider, or leave the plugin out with {BLOCK}."
            try:
                answer = _call(implementation, context=context)
            except Exception as error:
                raise PluginError(f"{origin}: {told(error)} {remedy}") from error
            if answer is None:
                continue
            if not isinstance(answer, str) or answer not in self.providers:
                known = ", ".join(self.providers)
                raise PluginError(f"{origin}: found {answer!r}; expected None or one of {known}. {remedy}")
            return answer
        return None

    def scored(self, identity: ReferenceIdentity, batch: ReferenceBatch, log_probs: Tensor, seconds: float) -> None:
        """Tell the observers about an answer of the reference. An exception of theirs is reported once per plugin."""
        for implementation in self._observers:
            # A copy each: nothing may change a provider's numbers from outside
            copy = log_probs.detach().clone()
            try:
                _call(implementation, identity=identity, batch=batch, log_probs=copy, seconds=seconds)
            except Exception as error:
                if implementation.plugin_name not in self._warned:
                    self._warned.add(implementation.plugin_name)
                    warnings.warn(
                        f"Plugin {implementation.plugin_name!r}: refplug_scored raised {told(error)} Training goes "
                        "on, and this is reported once.",
                        RefPlugWarning,
                        stacklevel=2,
                    )


@functools.cache
def plugin_manager() -> PluginManager:
    """The plugin manager of this process. The first call discovers and loads the plugins."""
    return PluginManager()


def _names(setting: str | None) -> set[str]:
    """The canonical names in a comma-separated environment variable."""
    return {canonical(word.strip()) for word in (setting or "").split(",") if word.strip()}


def _call(implementation: pluggy.HookImpl, **arguments: object) -> object:
    """Call one hook implementation with those of `arguments` that it names."""
    named = [name for name in implementation.kwargnames if name in arguments]
    return implementation.function(
        *(arguments[name] for name in implementation.argnames), **{name: arguments[name] for name in named}
    )


def _extra_hint(name: str) -> str:
    extra = providers.EXTRAS.get(name)
    if extra:
        return f" It needs: pip install 'trl-refplug[{extra}]'"
    planned = providers.PLANNED.get(name)
    if planned is None:
        return ""
    needs = f", with the extra {planned!r} (pip install 'trl-refplug[{planned}]')" if planned else ""
    return f" It will come with a later release of trl-refplug{needs}; this one does not have it."


def _drop_frames(error: BaseException | None) -> None:
    """Forget the traceback of an exception, of its cause and of its context."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _drop_frames(error.__cause__)
        error = error.__context__
