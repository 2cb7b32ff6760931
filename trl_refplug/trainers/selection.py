"""From flags to a provider: what `auto` means, which combinations contradict each other, and how one is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError
from trl_refplug.options import parse_options
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ReferenceProvider


# What TRL's own flags mean, in the order in which they are looked at.
_FLAG_MEANINGS = {"precompute_ref_log_probs": "cached", "sync_ref_model": "ema"}
# Flags of TRL that are options of a provider, where `ref_provider_kwargs` do not give them.
_FLAG_OPTIONS = {"ema": {"alpha": "ref_model_mixup_alpha", "sync_steps": "ref_model_sync_steps"}}
_TAKE_A_MODEL = ("frozen", "cached", "ema")


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


def select_name(selection: Selection) -> str:
    """
    The name of the provider to use: the one that is named, or what TRL's flags, a plugin or the policy say.

    Raises:
        ConfigurationError: The flags contradict each other.
    """
    flags = ReferenceArguments.of(selection.args)
    meant = {flag: name for flag, name in _FLAG_MEANINGS.items() if getattr(selection.args, flag, False)}
    if flags.ref_provider != "auto":
        for flag, name in meant.items():
            if flags.ref_provider != name:
                raise ConfigurationError(
                    f"`{flag}=True` asks for the {name!r} reference and ref_provider={flags.ref_provider!r} for "
                    f"another. Remove one of the two."
                )
        return flags.ref_provider
    if meant:
        return next(iter(meant.values()))
    if selection.has_ref_model:
        return "frozen"
    chosen = plugin_manager().select(selection)
    if chosen is not None:
        return chosen
    return "adapter" if selection.policy_is_peft else "frozen"


def make_provider(
    name: str, options: Mapping[str, Any] | str | None, *, args: Any = None, ref_model: nn.Module | None = None
) -> ReferenceProvider:
    """
    An instance of the provider registered as `name`, its options validated.

    Args:
        name (`str`): Name of the provider.
        options: Its options, as the user wrote them.
        args: Training arguments whose flags are options too; `None` for a provider made by another one.
        ref_model (`nn.Module`, *optional*): The model that was passed to the trainer as its reference.

    Raises:
        ConfigurationError: The options are wrong, or the provider does not take a model.
    """
    provider_class: Any = plugin_manager().provider_class(name)
    if args is not None and name in _FLAG_OPTIONS and not isinstance(options, str):
        flags = {option: getattr(args, flag) for option, flag in _FLAG_OPTIONS[name].items() if hasattr(args, flag)}
        options = {**flags, **(options or {})}
    parsed = parse_options(name, provider_class.Options, options)
    provider: ReferenceProvider
    if ref_model is None:
        provider = provider_class(parsed)
    elif name in _TAKE_A_MODEL:
        provider = provider_class(parsed, model=ref_model)
    else:
        raise ConfigurationError(
            f"A reference model was passed (`ref_model=`) and ref_provider={name!r} does not use one. Remove one of "
            "the two, or use ref_provider='frozen'."
        )
    return provider


def check_reference(args: ReferenceArguments, *, policy_is_peft: bool, online: bool) -> None:
    """
    Refuse an unknown provider and options that do not fit it, before anything slow begins.

    Raises:
        RefPlugError: What the trainer would raise later, after loading a model and data.
    """
    name = select_name(Selection(args=args, policy_is_peft=policy_is_peft, has_ref_model=False, online=online))
    make_provider(name, args.ref_provider_kwargs).close()


def check_capabilities(provider: ReferenceProvider, name: str, *, temperature: float) -> None:
    """
    Refuse what the provider says it cannot do.

    Raises:
        ConfigurationError: GRPO or RLOO at another temperature than 1 with a provider that ignores it; a provider that
            moves and wants to be asked ahead.
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
