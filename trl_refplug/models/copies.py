"""Make a second, frozen model from the policy in memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.modes import stay_in_evaluation_mode


if TYPE_CHECKING:
    from torch import nn


_MOVERS = ("to", "cuda", "xpu", "npu", "mlu", "musa", "sdaa")
"""
Methods that move a model. On a model that is spread over devices, accelerate replaces them by functions that are bound
to that very model.
"""


def snapshot(policy: nn.Module, dtype: str | None = None, device: str | None = None) -> nn.Module:
    """
    Copy `policy` as it is in memory now. The copy is frozen, in evaluation mode, and shares no storage with it.

    Under ZeRO-3 every parameter holds only this rank's shard and cannot be deep-copied. Instead a new model is built
    from the configuration, which DeepSpeed partitions in the same way, and each shard is copied into it.

    Args:
        policy (`nn.Module`): The model to copy.
        dtype (`str`, *optional*): The dtype of the copy; by default that of the policy.
        device (`str`, *optional*): The device of the copy; by default each weight stays where the policy's is.

    Raises:
        ConfigurationError: A policy that is sharded in this way cannot be copied.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(part, FSDPModule) for part in policy.modules()):
        raise ConfigurationError(
            "The policy is sharded by FSDP as it is loaded, and such a model cannot be copied. Name the reference: "
            "ref_provider_kwargs={'model': ...}, with the policy's own path."
        )
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        if dtype is not None:
            raise ConfigurationError(
                f"ref_provider='frozen': option dtype={dtype!r} cannot be used under DeepSpeed ZeRO-3, where the copy "
                "is made shard by shard. Remove it, or name the reference: {'model': ..., 'dtype': ...}."
            )
        module = _zero3_copy(policy)
    else:
        module = copy.deepcopy(policy, {} if device is None else _weights_on(torch.device(device), policy))
        for part in module.modules():
            for name in _MOVERS:
                part.__dict__.pop(name, None)  # the copied function would still move the policy
    if dtype not in (None, "auto"):
        module = module.to(getattr(torch, str(dtype)))
    return freeze(module)


def freeze(module: nn.Module) -> nn.Module:
    """Put `module` in evaluation mode, and switch off and remove its gradients."""
    stay_in_evaluation_mode(module)
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.grad = None
    return module


def _weights_on(device: torch.device, policy: nn.Module) -> dict[int, Any]:
    """
    Copy the weights of `policy` to `device`, as a memo for `copy.deepcopy`, which then uses these copies.

    Without it `deepcopy` would make the copy on the policy's own device, which may not have room for it.
    """
    from torch import nn

    copied: dict[int, Any] = {}
    for tensor in (*policy.parameters(), *policy.buffers()):
        if type(tensor) is nn.Parameter:
            copied[id(tensor)] = nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=False)
        elif type(tensor) is torch.Tensor:
            copied[id(tensor)] = tensor.detach().to(device, copy=True)
    return copied


def _zero3_copy(policy: nn.Module) -> nn.Module:
    if hasattr(policy, "peft_config"):
        raise ConfigurationError(
            "ref_provider='frozen' cannot copy a PEFT policy under DeepSpeed ZeRO-3. Use ref_provider='adapter', "
            "which needs no copy, or name the reference: ref_provider_kwargs={'model': ...}."
        )
    policy_class: Any = type(policy)
    module: nn.Module = policy_class._from_config(copy.deepcopy(policy.config), dtype=policy.dtype)
    copies = dict(module.named_parameters())
    for name, parameter in policy.named_parameters():
        copies[name].ds_tensor.data.copy_(parameter.ds_tensor.data)  # type: ignore[attr-defined]
    buffers = dict(module.named_buffers())
    for name, buffer in policy.named_buffers():
        buffers[name].data.copy_(buffer.data)
    return module
