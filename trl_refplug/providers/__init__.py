"""The built-in providers, registered through the same hook as everyone else's."""

from __future__ import annotations

from trl_refplug.hookspecs import Register, hookimpl


API_VERSION = 1


@hookimpl
def refplug_register_providers(register: Register) -> None:
    register("frozen", "trl_refplug.providers.frozen:FrozenProvider")
    register("adapter", "trl_refplug.providers.adapter:AdapterProvider")
    register("cached", "trl_refplug.providers.cached.provider:CachedProvider")
    register("ema", "trl_refplug.providers.ema.provider:EmaProvider")
    register("remote", "trl_refplug.providers.remote.provider:RemoteProvider")
