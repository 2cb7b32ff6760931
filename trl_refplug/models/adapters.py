"""Using a PEFT policy as its own reference, and leaving it exactly as it was."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError, ReferenceMismatchError
from trl_refplug.models.identity import adapter_attributes, adapter_tensor_name
from trl_refplug.models.modes import evaluation_mode


if TYPE_CHECKING:
    from torch import nn

REFERENCE_ADAPTER = "ref"  # the name that TRL gives it


def is_peft(model: Any) -> bool:
    """Whether `model` is a `PeftModel`, wrapped or not. `False` if it is the path of a model."""
    from peft import PeftModel

    return isinstance(peft_model_of(model), PeftModel)


def has_injected_adapter(model: Any) -> bool:
    """Whether transformers has put an adapter into `model` itself, without a `PeftModel` around it."""
    return not is_peft(model) and bool(getattr(model, "_hf_peft_config_loaded", False))


def peft_model_of(policy: Any) -> Any:
    """
    The model inside the wrappers of DDP, DeepSpeed or `torch.compile`. For a PEFT policy, that is the `PeftModel`.
    """
    while True:
        if hasattr(policy, "_orig_mod"):
            policy = policy._orig_mod
        elif hasattr(policy, "module") and isinstance(policy.module, torch.nn.Module):
            policy = policy.module
        else:
            return policy


def base_model_of(model: Any) -> Any:
    """The transformers model: the one inside `model` if that is a `PeftModel`, and otherwise `model` itself."""
    return model.get_base_model() if is_peft(model) else model


def policy_adapter(model: Any) -> str:
    """The name of the adapter that is being trained."""
    active = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise ConfigurationError(
            f"The policy has {len(names)} active adapters ({names}); a reference needs exactly one to start from. "
            "Activate one with `model.set_adapter(name)`."
        )
    return str(names[0])


def adapter_parameters(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter. The name of the adapter is taken out of their names."""
    attributes = adapter_attributes(model)
    found = {}
    for name, parameter in model.named_parameters():
        owned = adapter_tensor_name(name, attributes)
        if owned is not None and owned[0] == adapter:
            found[owned[1]] = parameter
    return found


def add_reference_adapter(model: Any, source: str) -> str:
    """
    Copy the adapter `source` into an adapter `ref`, and return that name. The adapter is added to `model`, unless TRL
    has added it already.
    """
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
    """Add an adapter to `model`. Parameters that were trainable stay so, and parameters that were not stay frozen."""
    with _flags_kept(model):
        model.add_adapter(name, plainly_initialized(config))


def plainly_initialized(config: Any) -> Any:
    """
    The same adapter configuration for a frozen copy, with an initialization that leaves the base model alone.

    PiSSA, OLoRA, CorDA, LoftQ and others take the first weights of an adapter out of the base model, and rewrite the
    base's weights. A copy of an adapter gets its weights from the original, so that must not happen a second time.
    """
    plain = copy.deepcopy(config)
    if not plain.is_prompt_learning:
        plain.inference_mode = True  # the copy is not trained, and AdaLoRA allows one trainable adapter only
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(plain, name):
            setattr(plain, name, True)
    return plain


def freeze_adapter(model: Any, adapter: str) -> None:
    """Freeze an adapter, so that the optimizer leaves it alone."""
    for parameter in adapter_parameters(model, adapter).values():
        parameter.requires_grad_(False)


def save_without(model: Any, adapter: str) -> None:
    """
    Make `model.save_pretrained` leave `adapter` out, unless it is asked for by name, because what the user wants to
    save is the policy. The trainer's checkpoints and `push_to_hub` call that method, too.
    """

    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(type(self).save_pretrained)
        given = signature.bind(self, save_directory, *args, **kwargs)
        if given.arguments.get("selected_adapters") is None:
            given.arguments["selected_adapters"] = [name for name in self.peft_config if name != adapter]
        type(self).save_pretrained(*given.args, **given.kwargs)

    # It is a bound method, so that a deep copy of the model saves itself and not the original.
    model.save_pretrained = MethodType(functools.wraps(type(model).save_pretrained)(save_pretrained), model)


def starts_as_identity(model: Any, adapter: str) -> bool:
    """Whether a LoRA adapter is new and changes nothing yet, because one factor of each of its products is zero."""
    factors: dict[str, list[bool]] = {}
    for name, parameter in adapter_parameters(model, adapter).items():
        module, _, rest = name.partition(".lora_")
        if not rest:
            continue  # modules_to_save are copies of what they replace at first
        if rest.startswith(("A", "B", "embedding_A", "embedding_B")):
            factors.setdefault(module, []).append(bool((parameter == 0).all()))
    return bool(factors) and all(any(zero) for zero in factors.values())


@contextmanager
def reference_active(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """
    Turn the policy into its own reference, as long as the context lasts: `adapter` is active, or all adapters are
    disabled if it is `None`, and all modules are in eval mode.

    Afterwards the active adapters, all `requires_grad` flags and the modes of all modules are what they were. No
    random numbers are drawn, because eval mode switches off dropout, even that of functional attention.
    """
    peft_model = peft_model_of(model)
    with ExitStack() as stack:
        restore_flags = stack.enter_context(_flags_kept(peft_model))
        # Autocast must not reuse casts from under no_grad in the policy's own pass: they would have no gradient.
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(evaluation_mode(model))
        if adapter is None:
            stack.enter_context(peft_model.disable_adapter())
        else:
            stack.enter_context(_active(peft_model, adapter))
        # In its first forward pass FSDP2 learns from the flags what is trained, so that they must be the policy's.
        restore_flags()
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
def _flags_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore every `requires_grad` flag when the context ends, and when what it gives is called."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    try:
        yield restore
    finally:
        restore()


def active_adapter(model: Any) -> str | None:
    """The name of the adapter that `model` computes with; `None` if it has none."""
    return policy_adapter(model) if is_peft(model) else None
