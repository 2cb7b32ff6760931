"""Finding out which provider the flags mean, refusing flags that contradict each other, and making the provider."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError
from trl_refplug.options import parse_options
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ReferenceProvider


# Flags of TRL that ask for a reference with a certain capability, and that capability.
_FLAG_CAPABILITIES = {"precompute_ref_log_probs": "stored", "sync_ref_model": "moving"}


@dataclass(frozen=True)
class Selection:
    """
    What `refplug_select_provider` may look at to answer `auto`.

    Args:
        args: The trainer's arguments.
        policy_is_peft (`bool`): Whether the policy is, or will be, a PEFT model.
        has_ref_model (`bool`): Whether a reference model was passed to the trainer.
        online (`bool`): Whether the trainer generates its completions (GRPO, RLOO).
    """

    args: Any
    policy_is_peft: bool
    has_ref_model: bool
    online: bool

    @property
    def wants_stored(self) -> bool:
        """Whether TRL's `precompute_ref_log_probs` is set."""
        return bool(getattr(self.args, "precompute_ref_log_probs", False))

    @property
    def wants_moving(self) -> bool:
        """Whether TRL's `sync_ref_model` is set."""
        return bool(getattr(self.args, "sync_ref_model", False))


def select_name(selection: Selection) -> str:
    """
    The name of the provider to use: the one that `ref_provider` names, or for `auto` the one that TRL's flags, a
    plugin or the policy decide on.

    Raises:
        ConfigurationError: The flags contradict each other.
    """
    named = ReferenceArguments.of(selection.args).ref_provider
    if named == "auto":
        return plugin_manager().select(selection)
    for flag, capability in _FLAG_CAPABILITIES.items():
        if getattr(selection.args, flag, False):
            able = plugin_manager().able(capability)
            if not getattr(plugin_manager().registered(named).capabilities, capability):
                raise ConfigurationError(
                    f"`{flag}=True` asks for the {' or '.join(map(repr, able))} reference and ref_provider={named!r} "
                    "for another. Remove one of the two."
                )
    return named


def make_provider(
    name: str, options: Mapping[str, Any] | str | None, *, args: Any = None, ref_model: nn.Module | None = None
) -> ReferenceProvider:
    """
    Make an instance of the provider that is registered as `name`, after validating its options.

    Args:
        name (`str`): The name of the provider.
        options: Its options, as the user wrote them.
        args: The training arguments. Some flags of TRL set options of the provider. `None` for a provider that another
            provider is made of.
        ref_model (`nn.Module`, *optional*): The model that was passed to the trainer as its reference.

    Raises:
        ConfigurationError: The options are wrong, or the provider does not take a model.
    """
    registered = plugin_manager().registered(name)
    if args is not None and not isinstance(options, str):
        options = {**_flags_that_are_options(registered.options, args), **(options or {})}
    parsed: Any = parse_options(name, registered.options, options)
    provider_class: Any = plugin_manager().provider_class(name)
    provider: ReferenceProvider
    if ref_model is None:
        provider = provider_class(parsed)
    elif provider_class.capabilities.accepts_model:
        provider = provider_class(parsed, model=ref_model)
    else:
        raise ConfigurationError(
            f"A reference model was passed (`ref_model=`) and ref_provider={name!r} does not use one. Remove one of "
            f"the two, or use a provider that takes one: {', '.join(plugin_manager().able('accepts_model'))}."
        )
    return provider


def _flags_that_are_options(options_class: type, args: Any) -> dict[str, Any]:
    """The options that flags of TRL set (`trl_flag` in their metadata), with the values that `args` has for them."""
    flags = {option.name: option.metadata.get("trl_flag") for option in dataclasses.fields(options_class)}
    return {name: getattr(args, flag) for name, flag in flags.items() if flag is not None and hasattr(args, flag)}


def check_reference(args: ReferenceArguments, *, policy_is_peft: bool, online: bool) -> None:
    """
    Refuse an unknown provider, or options that do not fit it, before anything slow begins.

    Raises:
        RefPlugError: The error that the trainer would raise later, after a model and data were loaded.
    """
    name = select_name(Selection(args=args, policy_is_peft=policy_is_peft, has_ref_model=False, online=online))
    make_provider(name, args.ref_provider_kwargs).close()


def check_capabilities(provider: ReferenceProvider, name: str, *, temperature: float) -> None:
    """
    Refuse what the provider says it cannot do.

    Raises:
        ConfigurationError: The temperature of GRPO or RLOO is not 1, and the provider ignores it; or the provider both
            moves and wants to be asked ahead of time.
    """
    if provider.capabilities.moving and provider.capabilities.overlap:
        raise ConfigurationError(
            f"Reference provider {name!r} declares both `moving` and `overlap`: an answer asked ahead of its step "
            "would be that of the reference before it moved. Its author must declare one of the two."
        )
    if temperature != 1.0 and not provider.capabilities.temperature:
        raise ConfigurationError(
            f"`temperature={temperature}` divides the policy's logits, and reference provider {name!r} cannot divide "
            "the reference's, so the KL term would be wrong. Use `temperature=1.0`, or another provider "
            "(`trl-refplug plugins` lists what each can do)."
        )
