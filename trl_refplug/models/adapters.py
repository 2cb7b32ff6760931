"""Using a PEFT policy as its own reference, and leaving it exactly as it was."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError, ReferenceMismatchError
from trl_refplug.models.identity import adapter_attributes, adapter_tensor_name
from trl_refplug.models.modes import evaluation_mode


if TYPE_CHECKING:
    from torch import nn

REFERENCE_ADAPTER = "ref"  # TRL's own name for it


def is_peft(model: Any) -> bool:
    """Whether `model` is a `PeftModel`, wrapped or not; the path of a model is none."""
    from peft import PeftModel

    return isinstance(peft_model_of(model), PeftModel)


def has_injected_adapter(model: Any) -> bool:
    """Whether transformers has put an adapter into `model` itself, without a `PeftModel` around it."""
    return not is_peft(model) and bool(getattr(model, "_hf_peft_config_loaded", False))


def peft_model_of(policy: Any) -> Any:
    """The model inside DDP, DeepSpeed or `torch.compile` wrappers: of a PEFT policy, the `PeftModel`."""
    while True:
        if hasattr(policy, "_orig_mod"):
            policy = policy._orig_mod
        elif hasattr(policy, "module") and isinstance(policy.module, torch.nn.Module):
            policy = policy.module
        else:
            return policy


def base_model_of(model: Any) -> Any:
    """The transformers model inside a `PeftModel`."""
    return model.get_base_model() if is_peft(model) else model


def policy_adapter(model: Any) -> str:
    """Name of the adapter being trained."""
    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ConfigurationError(
            f"The policy has {len(names)} active adapters ({names}); a reference needs exactly one to start from. "
            "Activate one with `model.set_adapter(name)`."
        )
    return str(names[0])


def adapter_parameters(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their name without the adapter's."""
    attributes = adapter_attributes(model)
    found = {}
    for name, parameter in model.named_parameters():
        owned = adapter_tensor_name(name, attributes)
        if owned is not None and owned[0] == adapter:
            found[owned[1]] = parameter
    return found


def add_reference_adapter(model: Any, source: str) -> str:
    """Give `model` an adapter that is a copy of `source`, or fill the one TRL has added, and return its name."""
    if REFERENCE_ADAPTER not in model.peft_config:
        add_adapter(model, REFERENCE_ADAPTER, model.peft_config[source])
    copies = adapter_parameters(model, REFERENCE_ADAPTER)
    originals = adapter_parameters(model, source)
    if copies.keys() != originals.keys():
        odd = sorted(copies.keys() ^ originals.keys())
        raise ConfigurationError(
            f"Cannot copy adapter {source!r}: PEFT made {len(copies)} tensors for the copy where the original has "
            f"{len(originals)} (first difference: {odd[0]}). Use ref_provider='frozen'."
        )
    with torch.no_grad():
        for name, parameter in originals.items():
            copies[name].data = parameter.data.to(copies[name].device).clone()
    return REFERENCE_ADAPTER


def add_adapter(model: Any, name: str, config: Any) -> None:
    """Give `model` another adapter and leave what it had as trainable as it was."""
    with _flags_kept(model):
        model.add_adapter(name, plainly_initialized(config))


def plainly_initialized(config: Any) -> Any:
    """
    The same adapter configuration for a frozen copy, with an initialization that leaves the base model alone.

    PiSSA, OLoRA, CorDA, LoftQ and others take their first weights out of the base's and rewrite those. For a copy of
    an adapter, which gets its weights from the original, that would change the base under both.
    """
    plain = copy.deepcopy(config)
    if not plain.is_prompt_learning:
        plain.inference_mode = True  # the copy is not trained, and AdaLoRA allows one trainable adapter only
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(plain, name):
            setattr(plain, name, True)
    return plain


def freeze_adapter(model: Any, adapter: str) -> None:
    """Keep the reference adapter out of the optimiser."""
    for parameter in adapter_parameters(model, adapter).values():
        parameter.requires_grad_(False)


def save_without(model: Any, adapter: str) -> None:
    """
    Have `model.save_pretrained`, which the trainer's checkpoints and `push_to_hub` use too, leave `adapter` out unless
    it is asked for by name: what the user saves is the policy.
    """

    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(type(self).save_pretrained)
        given = signature.bind(self, save_directory, *args, **kwargs)
        if given.arguments.get("selected_adapters") is None:
            given.arguments["selected_adapters"] = [name for name in self.peft_config if name != adapter]
        type(self).save_pretrained(*given.args, **given.kwargs)

    # A bound method, so that a deep copy of the model saves itself and not the original.
    model.save_pretrained = MethodType(functools.wraps(type(model).save_pretrained)(save_pretrained), model)


def starts_as_identity(model: Any, adapter: str) -> bool:
    """Whether a new LoRA adapter changes nothing yet: one factor of every product is zero."""
    factors: dict[str, list[bool]] = {}
    for name, parameter in adapter_parameters(model, adapter).items():
        module, _, rest = name.partition(".lora_")
        if not rest:
            continue  # modules_to_save start as copies of what they replace
        if rest.startswith(("A", "B", "embedding_A", "embedding_B")):
            factors.setdefault(module, []).append(bool((parameter == 0).all()))
    return bool(factors) and all(any(zero) for zero in factors.values())


@contextmanager
def reference_active(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """
    The policy as its own reference: adapters disabled (`None`) or `adapter` active, in eval mode.

    On exit the active adapters, every `requires_grad` flag and every module's mode are what they were. No random
    number is drawn inside: eval mode switches off dropout, functional attention dropout included.
    """
    peft_model = peft_model_of(model)
    with ExitStack() as stack:
        stack.enter_context(_flags_kept(peft_model))
        # Casts made under no_grad must not be reused by the policy's own pass: they carry no gradient.
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(evaluation_mode(model))
        if adapter is None:
            stack.enter_context(peft_model.disable_adapter())
        else:
            stack.enter_context(_active(peft_model, adapter))
        yield


@contextmanager
def _active(peft_model: Any, adapter: str) -> Iterator[None]:
    previous = peft_model.active_adapter
    tuner_previous = list(peft_model.active_adapters)
    if adapter not in peft_model.peft_config:
        raise ReferenceMismatchError(
            f"The adapter {adapter!r} of the policy, which is the reference, is not there any more: it was deleted or "
            f"renamed after the trainer was built. The policy has {', '.join(map(repr, peft_model.peft_config))}. "
            "Leave it where it is, or use ref_provider='frozen', a copy of its own."
        )
    disabled = peft_model._adapters_disabled
    if disabled:
        peft_model.base_model.enable_adapter_layers()
    peft_model.set_adapter(adapter)
    try:
        yield
    finally:
        peft_model.set_adapter(previous)
        if not peft_model.peft_config[previous].is_prompt_learning:
            peft_model.base_model.set_adapter(tuner_previous)
        if disabled:
            peft_model.base_model.disable_adapter_layers()


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def active_adapter(model: Any) -> str | None:
    """Name of the adapter that is part of what `model` computes; `None` for a model without one."""
    return policy_adapter(model) if is_peft(model) else None
