"""
The built-in providers. They are registered through the same hook as those of other packages.

- `options`: the options and capabilities of all of them, without importing torch
- `frozen`: a frozen copy of the policy, or another model, in the trainer's process
- `named_model`: the model that an option of `frozen` names: how it is loaded, and what is remembered of it
- `adapter`: the PEFT policy itself, with its adapters disabled or with a frozen adapter active
- `cached`: log-probs that another provider has scored and that are kept in a store
- `ema`: a moving average of the policy
- `remote`: a reference that a server has
- `scorers`: makes the scorer of a model as the trainer's flags say
"""

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
    """Decide what `auto` means: what TRL's own flags ask for, and otherwise what TRL itself would do."""
    if context.wants_stored:
        return "cached"
    if context.wants_moving:
        return "ema"
    if context.has_ref_model:
        return "frozen"
    return "adapter" if context.policy_is_peft else "frozen"
