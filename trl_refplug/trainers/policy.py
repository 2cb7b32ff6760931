"""What has to be known of the policy, or done to it, while TRL builds its trainer: its adapters, and its log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_refplug.models.adapters import REFERENCE_ADAPTER, is_peft, plainly_initialized
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.scoring import exact_log_probs


def output_dtype(accelerator: Any) -> torch.dtype:
    """The dtype of the policy's log-probs: FSDP2's mixed precision casts all outputs of a model, even float32 ones."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    dtype: torch.dtype | None = getattr(getattr(plugin, "mixed_precision_policy", None), "output_dtype", None)
    return dtype or torch.float32


def output_device(model: Any) -> torch.device | None:
    """
    The device that the policy's log-probs are on, if the policy is spread over several devices; `None` if they are on
    the device of its inputs.
    """
    inner = causal_lm(model)
    spread = len(set(getattr(inner, "hf_device_map", {}).values())) > 1
    device: torch.device = inner.get_output_embeddings().weight.device
    return device if spread and device.type != "meta" else None


def adapter_names(model: Any) -> frozenset[str]:
    """The names of the adapters of a PEFT policy; empty for any other policy, and for the path of one."""
    return frozenset(model.peft_config) if is_peft(model) else frozenset()


@contextmanager
def default_adapter_known(model: Any) -> Iterator[None]:
    """
    Show TRL an adapter called `default`, as long as the context lasts. TRL makes its reference adapter from the
    configuration of that one. It gets the configuration of the policy's own adapter, whatever its name, but with an
    initialization that does not change the base model.
    """
    if not is_peft(model):
        yield
        return
    own = model.peft_config.get("default")
    active = model.active_adapter
    model.peft_config["default"] = plainly_initialized(
        own or model.peft_config[active if isinstance(active, str) else active[0]]
    )
    try:
        yield
    finally:
        if own is None:
            del model.peft_config["default"]
        else:
            model.peft_config["default"] = own


def remove_unused_reference_adapter(model: Any, before: frozenset[str], providers: list[ReferenceProvider]) -> None:
    """Delete the adapter `ref` that TRL adds to a policy that comes with an adapter, unless it is the reference."""
    used = any(provider.reference_adapter == REFERENCE_ADAPTER for provider in providers)
    if is_peft(model) and REFERENCE_ADAPTER in model.peft_config and REFERENCE_ADAPTER not in before and not used:
        model.delete_adapter(REFERENCE_ADAPTER)


def policy_log_probs(model: nn.Module, batch: ReferenceBatch) -> Tensor:
    """The policy's own log-probs, without dropout: float32 `[batch, seq - 1]`. Every module's mode stays as it was."""
    try:
        with evaluation_mode(model):
            return exact_log_probs(model, batch)
    finally:
        torch.clear_autocast_cache()  # casts made without gradient must not serve the training pass
