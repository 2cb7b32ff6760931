"""Making a second, frozen model from the policy in memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.modes import stay_in_evaluation_mode


if TYPE_CHECKING:
    from torch import nn


_MOVERS = ("to", "cuda", "xpu", "npu", "mlu", "musa", "sdaa")
"""Methods that accelerate replaces, on a model spread over devices, by functions which move that very model."""


def snapshot(policy: nn.Module, dtype: str | None = None, device: str | None = None) -> nn.Module:
    """
    A frozen copy of `policy` as it is in memory, in eval mode, sharing no storage with it.

    Args:
        dtype (`str`, *optional*): Of the copy; that of the policy by default.
        device (`str`, *optional*): Where its weights are made; by default each where the policy's is.

    Under ZeRO-3 the parameters hold only this rank's shard and cannot be deep-copied: a model is built anew from the
    configuration, partitioned the same way, and each shard is copied.
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
        module = copy.deepcopy(policy, {} if device is None else _copies(policy, torch.device(device)))
        for part in module.modules():
            for name in _MOVERS:
                part.__dict__.pop(name, None)  # copied, it would still move the policy
    if dtype not in (None, "auto"):
        module = module.to(getattr(torch, str(dtype)))
    return freeze(module)


def freeze(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode and out of reach of autograd."""
    stay_in_evaluation_mode(module)
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.grad = None
    return module


def _copies(policy: nn.Module, device: torch.device) -> dict[int, Any]:
    """What `copy.deepcopy` is to take for the weights: made on `device`, as the policy's own may have no room."""
    from torch import nn

    made: dict[int, Any] = {}
    for tensor in (*policy.parameters(), *policy.buffers()):
        if type(tensor) is nn.Parameter:
            made[id(tensor)] = nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=False)
        elif type(tensor) is torch.Tensor:
            made[id(tensor)] = tensor.detach().to(device, copy=True)
    return made


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
