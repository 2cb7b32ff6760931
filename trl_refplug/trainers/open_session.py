"""Checking a trainer's arguments, and opening the session of its reference, before anything is loaded."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError
from trl_refplug.models.adapters import has_injected_adapter, is_peft
from trl_refplug.models.weights import shared_weights
from trl_refplug.provider import ReferenceProvider
from trl_refplug.trainers.selection import Selection, make_provider, select_name
from trl_refplug.trainers.session import ReferenceSession
from trl_refplug.trainers.trl_patch import PatchPoint, check_flags


logger = logging.getLogger("trl_refplug")

_instances_in_use: WeakValueDictionary[int, ReferenceProvider] = WeakValueDictionary()
"""The provider instances that were passed to a trainer as `reference=`, by `id`."""


def open_session(
    patch_point: PatchPoint,
    *,
    model: Any,
    args: Any,
    peft_config: Any,
    reference: ReferenceProvider | None,
    ref_model: Any,
    processing_class: Any,
    train_dataset: Any,
) -> ReferenceSession | None:
    """
    Select a provider as the trainer's arguments say, before anything is loaded. Returns `None` if the trainer uses no
    reference, so that TRL is left alone.

    Raises:
        ConfigurationError: Flags or arguments contradict each other, or options are wrong.
    """
    flags = ReferenceArguments.of(args)
    explicit = reference is not None or flags.ref_provider != "auto" or (ref_model is not None and patch_point.online)
    check_flags(patch_point, args)
    if not patch_point.needs_reference(args) and not flags.ref_monitor_steps:
        if explicit:
            logger.warning(
                "`beta=0.0` needs no reference, so %s is not used and nothing is built. Set `beta` to a non-zero "
                "value to use it, or `ref_monitor_steps` to log the distance from it.",
                _asked_for(flags, reference, ref_model),
            )
        return None
    _check_models(model, ref_model, peft_config)
    # TRL cannot put its fused LM head into a PEFT model, so we place such a reference ourselves, later.
    for_trl = None if patch_point.online or is_peft(ref_model) else ref_model
    if reference is not None:
        if flags.ref_provider != "auto" or ref_model is not None:
            raise ConfigurationError(
                "`reference=` is a provider already made, so `ref_provider` and `ref_model` must not name another. "
                "Keep one of the three."
            )
        if not isinstance(reference, ReferenceProvider):
            raise ConfigurationError(
                f"`reference=` takes a ReferenceProvider instance, got {type(reference).__name__}. A model goes into "
                "`ref_model=`, a provider's name into `ref_provider`."
            )
        if _instances_in_use.get(id(reference)) is reference:
            raise ConfigurationError(
                f"`reference=` is a {type(reference).__name__} that another trainer was given before. It belongs to "
                "that trainer's policy, and is closed with it. Make a new one for every trainer."
            )
        session = ReferenceSession(
            patch_point,
            reference,
            type(reference).__name__,
            args,
            peft_config,
            for_trl,
            processing_class,
            train_dataset,
        )
        _instances_in_use[id(reference)] = reference
        return session
    selection = Selection(
        args=args,
        policy_is_peft=peft_config is not None or is_peft(model),
        has_ref_model=ref_model is not None,
        online=patch_point.online,
    )
    name = select_name(selection)
    provider = make_provider(name, flags.ref_provider_kwargs, args=args, ref_model=ref_model)
    return ReferenceSession(patch_point, provider, name, args, peft_config, for_trl, processing_class, train_dataset)


def _check_models(model: Any, ref_model: Any, peft_config: Any) -> None:
    if isinstance(model, nn.Module) and peft_config is not None and has_injected_adapter(model):
        raise ConfigurationError(
            "The policy has an adapter that transformers put on it (`from_pretrained` of an adapter, `load_adapter`, "
            "`add_adapter`), and `peft_config=` asks TRL for another, which would overwrite it. Merge the first one "
            "into the model (`PeftModel.from_pretrained(base, adapter).merge_and_unload()`), or load it with "
            "`PeftModel.from_pretrained(base, adapter, is_trainable=True)` and leave `peft_config` out to train it on."
        )
    if ref_model is None:
        return
    if ref_model is model:
        raise ConfigurationError(
            "`model` and `ref_model` are the same object, which is about to be trained. Leave `ref_model` out: a "
            "copy of the policy is the reference then."
        )
    if isinstance(model, nn.Module) and isinstance(ref_model, nn.Module):
        shared = shared_weights(model, ref_model)
        if shared:
            raise ConfigurationError(
                f"`model` and `ref_model` share {len(shared)} of their weights ({shared[0]}, ...), so training or "
                "wrapping one changes the other. Pass a copy (`copy.deepcopy(model)`), or leave `ref_model` out: a "
                "copy of the policy as it is passed in, or for PEFT its base, is the reference then."
            )


def _asked_for(flags: ReferenceArguments, reference: ReferenceProvider | None, ref_model: Any) -> str:
    """How the user asked for a reference, for a message."""
    if reference is not None:
        return f"reference={type(reference).__name__}(...)"
    return "`ref_model`" if ref_model is not None else f"ref_provider={flags.ref_provider!r}"
