"""The built-in providers, registered through the same hook as everyone else's."""

from __future__ import annotations

from trl_refplug.hookspecs import Register, SelectionContext, hookimpl
from trl_refplug.providers import options


API_VERSION = 1


@hookimpl
def refplug_register_providers(register: Register) -> None:
    package = "trl_refplug.providers"
    register(
        "frozen",
        f"{package}.frozen:FrozenProvider",
        options=options.FrozenOptions,
        capabilities=options.FROZEN_CAPABILITIES,
    )
    register(
        "adapter",
        f"{package}.adapter:AdapterProvider",
        options=options.AdapterOptions,
        capabilities=options.ADAPTER_CAPABILITIES,
    )
    register(
        "cached",
        f"{package}.cached.provider:CachedProvider",
        options=options.CachedOptions,
        capabilities=options.CACHED_CAPABILITIES,
    )
    register(
        "ema",
        f"{package}.ema.provider:EmaProvider",
        options=options.EmaOptions,
        capabilities=options.EMA_CAPABILITIES,
    )
    register(
        "remote",
        f"{package}.remote.provider:RemoteProvider",
        options=options.RemoteOptions,
        capabilities=options.REMOTE_CAPABILITIES,
    )


@hookimpl
def refplug_select_provider(context: SelectionContext) -> str:
    """What `auto` means: what TRL's own flags ask for, else what TRL itself does."""
    if context.wants_stored:
        return "cached"
    if context.wants_moving:
        return "ema"
    if context.has_ref_model:
        return "frozen"
    return "adapter" if context.policy_is_peft else "frozen"
