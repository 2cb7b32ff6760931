"""The plugin manager: it resolves a provider name to its class, and calls the hooks of the plugins that are loaded."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from trl_refplug import providers
from trl_refplug.errors import PluginError, RefPlugWarning, UnknownProviderError, did_you_mean
from trl_refplug.plugins.failures import clear_tracebacks, exception_sentence
from trl_refplug.plugins.installed import PluginRecord, canonical, canonical_names
from trl_refplug.plugins.loading import BLOCK, LOAD, LoadedPlugins, RegisteredProvider, call_hook
from trl_refplug.provider import ReferenceProvider


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.hookspecs import SelectionContext
    from trl_refplug.provider import ReferenceBatch, ReferenceIdentity


OUTCOMES = {"blocked": "is blocked", "failed": "failed to load", "incompatible": "is incompatible"}

LISTED = "`trl-refplug plugins` lists everything installed."


class PluginManager:
    """
    All installed plugins. The constructor loads them, and leaves out those that are blocked or broken. Call
    [`plugin_manager`] to get the one of this process.

    Args:
        environ (`Mapping[str, str]`, *optional*, defaults to `os.environ`):
            The environment variables, for `TRL_REFPLUG_BLOCK` and `TRL_REFPLUG_LOAD`.

    Attributes:
        records (`list[PluginRecord]`): Every plugin found, the built-in one first.
        providers (`dict[str, RegisteredProvider]`): Every provider that can be selected, by name.
    """

    records: list[PluginRecord]
    providers: dict[str, RegisteredProvider]

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        loaded = LoadedPlugins(environ)
        self.records, self.providers, self._hooks = loaded.records, loaded.providers, loaded.hooks.hook
        self._settings = {variable: environ.get(variable) for variable in (BLOCK, LOAD)}
        self._warned: set[str] = set()
        self._observers = tuple(reversed(self._hooks.refplug_scored.get_hookimpls()))

    def provider_class(self, name: str) -> type[ReferenceProvider]:
        """
        The class that `ref_provider=name` selects. If plugins that have nothing to do with it are broken, they are
        warned about, each once.

        Raises:
            [`UnknownProviderError`]: No plugin that is loaded registers that name.
            [`PluginError`]: The plugin that registers that name failed to load (`__cause__` is its own exception), is
                incompatible or in conflict with another plugin, or the provider cannot be imported.
        """
        provider = self.registered(name).load()
        self._warn()
        return provider

    def registered(self, name: str) -> RegisteredProvider:
        """
        What was registered as `name`; nothing is imported.

        Raises:
            [`UnknownProviderError`], [`PluginError`]: As [`provider_class`].
        """
        if name not in self.providers:
            self._raise_unavailable(name)
        return self.providers[name]

    def able(self, capability: str) -> list[str]:
        """The names of the providers that declare a capability. A provider that cannot be imported is left out."""
        names = []
        for name, provider in self.providers.items():
            with suppress(PluginError):
                if getattr(provider.capabilities, capability):
                    names.append(name)
        return names

    def _raise_unavailable(self, name: str) -> NoReturn:
        left_out = [record for record in self.records if record.status != "ok"]
        concerned = [record for record in left_out if name in record.providers]
        concerned += [record for record in left_out if record.answers_to({canonical(name)})]
        for record in concerned:
            message = f"No provider {name!r}, as the {record} {OUTCOMES[record.status]}. {record.reason} {LISTED}"
            if record.status == "blocked":
                raise UnknownProviderError(message)
            if record.traceback and record.exception is not None and record.exception.__traceback__ is None:
                message += f"\n\n{record.traceback}"
            raise PluginError(message) from record.exception
        raise UnknownProviderError(
            f"No provider {name!r}.{did_you_mean(name, self.providers)} There are {', '.join(self.providers)}."
            + (f" Left out: {'; '.join(f'{record} ({record.status})' for record in left_out)}." if left_out else "")
            + f" {LISTED}"
        )

    def _warn(self) -> None:
        """
        Warn about broken plugins, and about environment variables that name plugins which are not installed, each
        once. Called when a provider is going to be used.
        """
        for record in self.records:
            if record.status in ("failed", "incompatible"):
                self._warn_once(
                    f"The {record} {OUTCOMES[record.status]} and is not used. {record.reason} The provider in use "
                    f"is another one; to silence this, name {record.distribution} in {BLOCK}."
                )
            # The frames of a traceback keep the local variables of all callers in memory, maybe a whole policy. Now
            # that a provider was found and the process goes on, the text of the failure is enough.
            clear_tracebacks(record.exception)
        for problem in self.setting_problems():
            self._warn_once(problem)

    def setting_problems(self) -> list[str]:
        """What is wrong with `TRL_REFPLUG_BLOCK` and `TRL_REFPLUG_LOAD`: names of plugins that are not installed."""
        known = {canonical(word) for record in self.records for word in (record.name, record.distribution)}
        return [
            f"{variable} names {word!r}, but no such plugin or distribution is installed.{did_you_mean(word, known)}"
            for variable, setting in self._settings.items()
            for word in sorted(canonical_names(setting) - known)
        ]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RefPlugWarning, stacklevel=4)

    # Hooks

    def select(self, context: SelectionContext) -> str:
        """
        The name of the provider that `ref_provider="auto"` stands for.

        If TRL's own flags or a reference model decide that, only the built-in plugin is asked. Otherwise all plugins
        are asked, the built-in one last; it always has an answer.

        Raises:
            [`PluginError`]: A plugin raised an exception, or its answer is not the name of a provider. The next plugin
                is not asked instead, because the run would then train against another reference than the one meant.
        """
        decided = context.wants_stored or context.wants_moving or context.has_ref_model
        for implementation in reversed(self._hooks.refplug_select_provider.get_hookimpls()):
            if decided and implementation.plugin is not providers:
                continue
            origin = f"Plugin {implementation.plugin_name!r} cannot answer ref_provider='auto'"
            remedy = f"Name a ref_provider, or leave the plugin out with {BLOCK}."
            try:
                answer = call_hook(implementation, context=context)
            except Exception as error:
                raise PluginError(f"{origin}: {exception_sentence(error)} {remedy}") from error
            if answer is None:
                continue
            if not isinstance(answer, str) or answer not in self.providers:
                known = ", ".join(self.providers)
                raise PluginError(f"{origin}: found {answer!r}; expected None or one of {known}. {remedy}")
            return answer
        raise AssertionError("the built-in plugin always answers")

    def scored(self, identity: ReferenceIdentity, batch: ReferenceBatch, log_probs: Tensor, seconds: float) -> None:
        """
        Call the `refplug_scored` hooks with an answer of the reference. If one raises, that is reported once per
        plugin.
        """
        for implementation in self._observers:
            # Every hook gets a copy of its own, so that none of them can change the numbers that training uses.
            copy = log_probs.detach().clone()
            try:
                call_hook(implementation, identity=identity, batch=batch, log_probs=copy, seconds=seconds)
            except Exception as error:
                if implementation.plugin_name not in self._warned:
                    self._warned.add(implementation.plugin_name)
                    warnings.warn(
                        f"Plugin {implementation.plugin_name!r}: refplug_scored raised {exception_sentence(error)} "
                        "Training goes on, and this is reported once.",
                        RefPlugWarning,
                        stacklevel=2,
                    )


@functools.cache
def plugin_manager() -> PluginManager:
    """The plugin manager of this process. The first call finds and loads the plugins."""
    return PluginManager()
