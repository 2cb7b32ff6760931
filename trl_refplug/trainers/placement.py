"""
Placing a reference that TRL does not place itself, because it is beside a PEFT policy, on a device of its own, or part
of another provider.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from trl_refplug.errors import ConfigurationError


def place(module: Any, trainer: Any, *, temperature: float, device: str | None) -> nn.Module:
    """
    Do to `module` what TRL does to its own reference: switch off dropout, fuse the LM head with the temperature, shard
    it, and move it to its device.

    Args:
        module (`nn.Module`): A transformers model or a `PeftModel`, as it was loaded.
        trainer: The trainer, after TRL has constructed it.
        temperature (`float`): What logits are divided by.
        device (`str` or `None`): The device for it; `None` for the one on which the trainer puts models.
    """
    args = trainer.args
    if device is not None:
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ConfigurationError(
                f"A reference on its own device ({device!r}) cannot be combined with DeepSpeed or FSDP, which place "
                "it themselves. Remove the option 'device'."
            )
        module = _moved(module, torch.empty(0, device=device).device)
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    if args.disable_dropout:
        disable_dropout_in_model(module)
    cast_lm_head = getattr(args, "cast_lm_head_to_fp32", False)
    if cast_lm_head:
        _cast_lm_head(base)
    add_fused_lm_head(base, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head)
    if device is not None:
        placed = trainer.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
    elif trainer.is_deepspeed_enabled:
        placed = prepare_deepspeed(module, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        placed = prepare_fsdp(module, trainer.accelerator)
    else:
        placed = trainer.accelerator.prepare_model(module, evaluation_mode=True)
    placed.eval()  # not chained: a DeepSpeed engine's eval() returns None
    result: nn.Module = placed
    return result


def _moved(module: Any, device: torch.device) -> nn.Module:
    """Move all of `module` to one device. If it was spread over several, all traces of that are removed."""
    for part in module.modules():
        if "_hf_hook" in part.__dict__:  # not `hasattr`, which PEFT's wrappers answer for the module they wrap
            remove_hook_from_module(part)
        # If it named another device, accelerate would refuse a quantized model.
        part.__dict__.pop("hf_device_map", None)
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module = module.to(device)
    return module  # type: ignore[no-any-return]


def _cast_lm_head(model: Any) -> None:
    """Do what GRPO does to its own reference for `cast_lm_head_to_fp32`. A tied embedding keeps its output dtype."""
    dtype = model.lm_head.weight.dtype
    model.lm_head = model.lm_head.float()
    if model.config.tie_word_embeddings and dtype != torch.float32:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))
