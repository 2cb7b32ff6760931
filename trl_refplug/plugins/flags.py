"""Checks of the reference flags that need no trainer and import no torch, so that a mistake is answered at once."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError
from trl_refplug.options import parse_options
from trl_refplug.plugins.manager import plugin_manager
from trl_refplug.runtime.names import check_name


def check_reference_flags(flags: ReferenceArguments, *, policy_is_peft: bool, peft_flag: str = "--use_peft") -> None:
    """
    Check the name of the provider, its options, and what the options name.

    Args:
        flags ([`ReferenceArguments`]): The reference flags.
        policy_is_peft (`bool`): Whether the policy is, or will be, a PEFT model.
        peft_flag (`str`): The flag of the command that makes it one.

    Raises:
        RefPlugError: The provider is unknown or broken, its options do not fit it, or it does not fit the policy.
    """
    if flags.ref_provider == "auto":
        return  # TRL's flags decide, which are known when TRL is imported
    _check_provider(flags.ref_provider, flags.ref_provider_kwargs, None if policy_is_peft else peft_flag)


def _check_provider(name: str, values: Any, missing_flag: str | None) -> None:
    """Check a provider and those it is made of. `missing_flag` would make the policy a PEFT model, if it is none."""
    registered = plugin_manager().registered(name)
    light = registered.light_capabilities
    if light is not None and light.needs_peft and missing_flag is not None:
        others = [
            other
            for other, provider in plugin_manager().providers.items()
            if provider.light_capabilities is not None and not provider.light_capabilities.needs_peft
        ]
        raise ConfigurationError(
            f"Reference provider {name!r} needs a PEFT policy. Add {missing_flag}, or use another provider: "
            f"{', '.join(others)}."
        )
    if registered.light_options is None:
        return  # the provider would have to be imported
    options: Any = parse_options(name, registered.light_options, values)
    for field in fields(registered.light_options):
        value = getattr(options, field.name)
        if value is None:
            continue
        if field.metadata.get("names") == "model":
            check_name(f"ref_provider={name!r}, option {field.name!r}:", value)
        elif field.metadata.get("names") == "provider":
            _check_provider(value, getattr(options, field.metadata["options"]), missing_flag)
