"""Making a second, frozen model: from the policy in memory, or from a name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.modes import stay_in_evaluation_mode


if TYPE_CHECKING:
    from torch import nn

    from trl_refplug.providers.frozen import FrozenOptions


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


def load_model(options: FrozenOptions, policy: nn.Module, args: Any) -> nn.Module:
    """The model that `options` name, loaded as TRL loads a reference; in the policy's dtype unless one is named."""
    return load_named(str(options.model), loading(options, policy, args))


def loading(options: FrozenOptions, policy: nn.Module, args: Any) -> dict[str, Any]:
    """How the model that `options` name is loaded: keyword arguments of `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    kwargs = dict(getattr(args, "model_init_kwargs", None) or {})
    kwargs.pop("revision", None)  # the policy's revision says nothing about another model
    config: Any = policy.config
    kwargs.update(
        dtype=options.dtype or policy.dtype,
        attn_implementation=kwargs.get("attn_implementation") or config._attn_implementation,
        trust_remote_code=kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False)),
    )
    if options.revision is not None:
        kwargs["revision"] = options.revision
    if options.quantization_config is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**options.quantization_config)
    if options.device is not None:
        kwargs["device_map"] = {"": options.device}
    elif args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def load_named(model: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A frozen model, from a name and the keyword arguments of [`loading`]."""
    from trl.trainer.utils import create_model_from_path

    return freeze(create_model_from_path(model, **kwargs))


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
